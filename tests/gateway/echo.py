"""A Triton with the rest of its protocol, and a model of any tensors."""

from typing import Any

from tritonclient.grpc import model_config_pb2, service_pb2

from tests.gateway.fake_triton import Context, FakeTriton

EXTENSIONS = ("classification", "model_repository", "statistics", "system_shared_memory", "trace", "logging")


class EchoTriton(FakeTriton):
    """
    :class:`FakeTriton` with the rest of Triton's protocol, and a model ``echo`` whose outputs are its inputs.

    Attributes:
        methods: Methods other than ModelInfer, in order of arrival.
        reason: Why a model does not load, in the repository's index.
        gathers: Whether ``echo`` makes batches of requests.
    """

    def __init__(self) -> None:
        super().__init__({"mnist": [1], "echo": [1]})
        self.methods: list[str] = []
        self.reason = ""
        self.gathers = True
        self.extensions = EXTENSIONS

    async def ModelInfer(self, request: Any, context: Context) -> Any:
        """Return the inputs as outputs."""
        if request.model_name != "echo":
            return await super().ModelInfer(request, context)
        await self._let_in(request, context)
        response = service_pb2.ModelInferResponse(
            model_name="echo", model_version="1", id=request.id, raw_output_contents=request.raw_input_contents
        )
        for tensor in request.inputs:
            response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        return response

    async def arrivals(self, count: int) -> None:
        """Wait until so many ModelInfer have arrived."""
        while len(self.requests) < count:
            self.arrived.clear()
            await self.arrived.wait()

    async def ModelConfig(self, request: Any, context: Context) -> Any:
        """Describe a model; ``echo`` takes any tensors."""
        self.methods.append("ModelConfig")
        if request.name != "echo":
            return await super().ModelConfig(request, context)
        config = model_config_pb2.ModelConfig(name="echo", max_batch_size=self.max_batch_size)
        if self.gathers:
            config.dynamic_batching.SetInParent()
        return service_pb2.ModelConfigResponse(config=config)

    async def ModelMetadata(self, request: Any, context: Context) -> Any:
        """Name the model's tensors."""
        await self._check(request.name, request.version, context)
        tensor = service_pb2.ModelMetadataResponse.TensorMetadata
        return service_pb2.ModelMetadataResponse(
            name=request.name, versions=["1"], inputs=[tensor(name="image", datatype="UINT8", shape=[-1, 1, 28, 28])]
        )

    async def ModelStatistics(self, request: Any, context: Context) -> Any:
        """Count inferences."""
        await self._check(request.name, request.version, context)
        statistics = service_pb2.ModelStatistics(name=request.name, version="1", inference_count=len(self.requests))
        return service_pb2.ModelStatisticsResponse(model_stats=[statistics])

    async def ModelReady(self, request: Any, context: Context) -> Any:
        """Say whether there is such a model."""
        return service_pb2.ModelReadyResponse(ready=request.name in self.models)

    async def RepositoryIndex(self, request: Any, context: Context) -> Any:
        """List ready versions, and one that does not load if there is a reason."""
        index = await super().RepositoryIndex(request, context)
        if self.reason and not request.ready:
            index.models.add(name="broken", version="1", state="UNAVAILABLE", reason=self.reason)
        return index

    async def _check(self, name: str, version: str, context: Context) -> None:
        await super()._check(name, version or "1", context)

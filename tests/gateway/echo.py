"""A Triton with a model of any tensors, and the passthrough in front of it, without the rest of a gateway."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import Message
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

from gateway.admission import Admission
from gateway.errors import UpstreamUnavailableError
from gateway.passthrough import Context, PassthroughServicer
from rpc.interceptor import Guard
from tests.gateway.fake_triton import FakeTriton

MAX_ANSWER_BYTES = 1 << 20
"""Largest answer of Triton that the passthrough here takes."""
EXTENSIONS = ("classification", "model_repository", "statistics", "system_shared_memory", "trace", "logging")


class EchoTriton(FakeTriton):
    """
    :class:`FakeTriton` with the rest of Triton's protocol, and a model ``echo`` whose outputs are its inputs.

    Attributes:
        asked: Methods other than ModelInfer, in order of arrival.
        reason: Why a model does not load, in the repository's index.
    """

    def __init__(self) -> None:
        super().__init__({"mnist": [1], "echo": [1]})
        self.asked: list[str] = []
        self.reason = ""

    async def ModelInfer(self, request: Any, context: Context) -> Any:
        """Return the inputs as outputs."""
        if request.model_name != "echo":
            return await super().ModelInfer(request, context)
        self.requests.append(request)
        self.arrived.set()
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        await self._check(request.model_name, request.model_version, context)
        if self.failure is not None:
            await context.abort(*self.failure)
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
        self.asked.append("ModelConfig")
        if request.name != "echo":
            return await super().ModelConfig(request, context)
        return service_pb2.ModelConfigResponse(
            config=model_config_pb2.ModelConfig(name="echo", max_batch_size=self.max_batch_size)
        )

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

    async def ServerMetadata(self, request: Any, context: Context) -> Any:
        """Name the server and what it can do."""
        return service_pb2.ServerMetadataResponse(name="triton", version="2.51.0", extensions=EXTENSIONS)

    async def RepositoryIndex(self, request: Any, context: Context) -> Any:
        """List ready versions, and one that does not load if there is a reason."""
        index = await super().RepositoryIndex(request, context)
        if self.reason and not request.ready:
            index.models.add(name="broken", version="1", state="UNAVAILABLE", reason=self.reason)
        return index

    async def _check(self, name: str, version: str, context: Context) -> None:
        await super()._check(name, version or "1", context)


class ChannelUpstream:
    """Triton's own RPCs on a channel."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(channel)

    def begin(self, method: str, request: Message) -> asyncio.Task[Any]:
        """Start an RPC without a deadline."""

        async def run() -> Any:
            return await getattr(self._stub, method)(request)

        return asyncio.create_task(run())

    async def control(self, method: str, request: Message) -> Any:
        """Return the answer, within seconds."""
        return await getattr(self._stub, method)(request, timeout=30)


class Readiness:
    """
    What the gateway knows of its models.

    Attributes:
        models: Of those that it proves, whether they are ready.
        routed: Versions that requests without one go to, the first until the next :meth:`refresh`.
        num_failures: Of inferences that Triton failed.
    """

    def __init__(self) -> None:
        self.models = {"mnist": True}
        self.routed: dict[str, list[int]] = {}
        self.num_failures = 0

    def of(self, name: str, version: int) -> bool | None:
        """Return whether a model is ready, None for one that is not proven."""
        return self.models.get(name)

    def require(self, name: str, version: int) -> None:
        """Refuse a model that is not ready."""
        if self.models.get(name) is False:
            raise UpstreamUnavailableError(f"{name} does not answer now; try again")

    async def refresh(self) -> None:
        """Learn that the versions routed to have gone."""
        for versions in self.routed.values():
            versions.pop(0)

    def route(self, name: str) -> int:
        """Return the version for requests without one."""
        return next(iter(self.routed.get(name, ())), 0)

    def fail(self) -> None:
        """Count a failure."""
        self.num_failures += 1


@dataclass(frozen=True)
class Passing:
    """The passthrough where it listens, ``host:port``, and what knows whether it is idle."""

    address: str
    guard: Guard


@asynccontextmanager
async def passing_through(
    triton_address: str, admission: Admission, readiness: Readiness, *, timeout_seconds: float = 60
) -> AsyncIterator[Passing]:
    """Serve the passthrough in front of a Triton."""
    guard = Guard()
    server = grpc.aio.server(interceptors=(guard,), options=[("grpc.so_reuseport", 0)])
    limit = ("grpc.max_receive_message_length", MAX_ANSWER_BYTES)
    async with grpc.aio.insecure_channel(triton_address, options=[limit]) as channel:
        servicer = PassthroughServicer(
            upstream=ChannelUpstream(channel),
            admission=admission,
            identity=lambda context: context.peer().rpartition(":")[0],
            require=readiness.require,
            route=readiness.route,
            refresh=readiness.refresh,
            is_ready=lambda: all(readiness.models.values()),
            is_model_ready=readiness.of,
            upstream_timeout_seconds=timeout_seconds,
            on_upstream_error=readiness.fail,
            on_answer=lambda name, version: None,
        )
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            yield Passing(f"127.0.0.1:{port}", guard)
        finally:
            await server.stop(None)

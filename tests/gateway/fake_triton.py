"""A small Triton that answers what it is told to."""

import asyncio
from collections.abc import Callable, Collection, MutableSequence, Sequence
from types import TracebackType
from typing import Any, Self

import grpc
import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]
Answer = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


def label_of(image: NDArray[np.uint8]) -> int:
    """Return what :class:`FakeTriton` takes an image for: the sum of its pixels modulo 10."""
    return int(image.sum()) % 10


def normalised(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the first 500 pixels of each image at unit length, each raised by one so that none is all zeros."""
    rows = images.reshape(len(images), -1)[:, :500].astype(np.float32) + 1
    unit: NDArray[np.float32] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def confident(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return 0.91 for :func:`label_of` each image and 0.01 for every other class."""
    rows = np.full((len(images), 10), 0.01, np.float32)
    rows[np.arange(len(images)), [label_of(image) for image in images]] = 0.91
    return rows


class FakeTriton(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]  # the base is untyped
    """
    ``inference.GRPCInferenceService`` as far as the gateway uses it, with Triton's own error texts.

    Everything may be changed between two calls.

    Attributes:
        models: Ready versions by model name.
        max_batch_size: Of every model; more images in one request are refused.
        answer: Images, uint8 (N, 28, 28), to probabilities, float32.
        embed: Images, uint8 (N, 28, 28), to embeddings, float32; ``None``: no model has that output.
        failure: Status and text that every ModelInfer ends with, where not ``None``.
        rewrite: Last change to a ModelInferResponse before it is sent.
        version: What it says to be.
        extensions: What it says it can do.
        gate: ModelInfer waits for it; set it to let answers out. Open at first.
        received: The images of every ModelInfer that arrived, in order of arrival.
        requests: Those requests.
        num_cancelled: ModelInfer calls that ended by the client's cancelling or deadline.
        index: RepositoryIndex waits for it. Open at first.
        asked: Set whenever a RepositoryIndex arrives.
        held: Models whose ModelInfer waits for the gate, where not ``None``, while others' do not.
        undescribed: Models whose ModelConfig fails.
        arrived: Set whenever a ModelInfer arrives, also one of the gateway's probe.
    """

    def __init__(
        self,
        models: dict[str, list[int]] | None = None,
        *,
        max_batch_size: int = 64,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        self.models = {"mnist": [1]} if models is None else models
        self.max_batch_size = max_batch_size
        self.dims = [1, 28, 28]
        self.answer: Answer = confident
        self.embed: Answer | None = normalised
        self.failure: tuple[grpc.StatusCode, str] | None = None
        self.rewrite: Callable[[Any], None] = lambda response: None
        self.version = "2.51.0"
        self.extensions: Sequence[str] = ()
        self.gate = asyncio.Event()
        self.gate.set()
        self.received: MutableSequence[NDArray[np.uint8]] = []
        self.requests: MutableSequence[Any] = []
        self.num_cancelled = 0
        self.index = asyncio.Event()
        self.index.set()
        self.asked = asyncio.Event()
        self.held: Collection[str] | None = None
        self.undescribed: Collection[str] = ()
        self.arrived = asyncio.Event()
        self._server: grpc.aio.Server | None = None
        self._host, self._port = host, port

    @property
    def address(self) -> str:
        """``host:port``; the same after a :meth:`stop` and :meth:`start`."""
        return f"{self._host}:{self._port}"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.gate.set()
        await self.stop()

    async def start(self) -> None:
        """Listen, at the same port as before if there was one."""
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, server)
        self._port = server.add_insecure_port(self.address)
        await server.start()
        self._server = server

    async def stop(self) -> None:
        """Stop at once, as a crash does; calls in flight fail."""
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    async def arrival_of(self, image: NDArray[np.uint8]) -> None:
        """Wait until a ModelInfer with this image, uint8 (28, 28), has arrived."""
        while not any((one == image).all() for images in self.received for one in images):
            self.arrived.clear()
            await self.arrived.wait()

    async def ServerMetadata(self, request: Any, context: Context) -> Any:
        """Say who it is."""
        return service_pb2.ServerMetadataResponse(name="triton", version=self.version, extensions=self.extensions)

    async def RepositoryIndex(self, request: Any, context: Context) -> Any:
        """List ready versions."""
        self.asked.set()
        await self.index.wait()
        index = service_pb2.RepositoryIndexResponse
        return index(
            models=[
                index.ModelIndex(name=name, version=str(version), state="READY")
                for name, versions in self.models.items()
                for version in versions
            ]
        )

    async def ModelConfig(self, request: Any, context: Context) -> Any:
        """Describe a model as config.pbtxt does."""
        await self._check(request.name, request.version, context)
        if request.name in self.undescribed:
            await context.abort(grpc.StatusCode.INTERNAL, "failed to describe it")
        return service_pb2.ModelConfigResponse(
            config=model_config_pb2.ModelConfig(
                name=request.name,
                max_batch_size=self.max_batch_size,
                input=[
                    model_config_pb2.ModelInput(name="image", data_type=model_config_pb2.TYPE_UINT8, dims=self.dims)
                ],
                output=[
                    model_config_pb2.ModelOutput(name=name, data_type=model_config_pb2.TYPE_FP32, dims=[width])
                    for name, width in (("probabilities__0", 10), ("embedding__1", 500))[: 2 if self.embed else 1]
                ],
            )
        )

    async def ModelInfer(self, request: Any, context: Context) -> Any:
        """Answer as the script says."""
        images = np.frombuffer(request.raw_input_contents[0], np.uint8).reshape(-1, 28, 28)
        self.received.append(images)
        await self._let_in(request, context)
        if len(images) > self.max_batch_size:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"inference request batch-size must be <= {self.max_batch_size} for '{request.model_name}'",
            )
        outputs: dict[str, Answer | None] = {"probabilities__0": self.answer, "embedding__1": self.embed}
        names = [output.name for output in request.outputs] or list(outputs)  # who names none gets all
        asked = {name: answer for name in names if (answer := outputs[name])}
        rows = [answer(images) for answer in asked.values()]
        response = service_pb2.ModelInferResponse(
            model_name=request.model_name,
            model_version=request.model_version,
            outputs=[
                service_pb2.ModelInferResponse.InferOutputTensor(name=name, datatype="FP32", shape=part.shape)
                for name, part in zip(asked, rows, strict=True)
            ],
            raw_output_contents=[part.tobytes() for part in rows],
        )
        self.rewrite(response)
        return response

    async def _let_in(self, request: Any, context: Context) -> None:
        """Note a ModelInfer, hold it at the gate, and end it where the script has it fail."""
        self.requests.append(request)
        self.arrived.set()
        try:
            if self.held is None or request.model_name in self.held:
                await self.gate.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        await self._check(request.model_name, request.model_version, context)
        if self.failure is not None:
            await context.abort(*self.failure)

    async def _check(self, name: str, version: str, context: Context) -> None:
        if name not in self.models:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{name}' is not found")
        if not version.isascii() or not version.isdecimal() or len(version) > 18:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"failed to get model version from specified version string '{version}' (details: stol), version "
                "should be an integral value > 0",
            )
        if int(version) not in self.models[name]:
            await context.abort(
                grpc.StatusCode.UNAVAILABLE,
                f"Request for unknown model: '{name}' version {version} is not at ready state",
            )

"""
Triton behind one channel: what it has ready, and images in, probabilities or embeddings out.

Triton may crash when a ModelInfer is cancelled or its deadline passes (server#7368, server#8034), until 2.59. So none
gets a deadline here, and none is cancelled before the server has said that it is new enough.
"""

import asyncio
import re
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import structlog
from google.protobuf.message import Message
from numpy.typing import NDArray
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

from gateway.errors import (
    GatewayError,
    OverloadedError,
    UnknownModelError,
    UnknownVersionError,
    UnreachedError,
    UpstreamContractError,
    UpstreamFailedError,
    UpstreamTimeoutError,
    UpstreamUnavailableError,
)

log = structlog.get_logger(__name__)

Rows = NDArray[np.float32]
Metadata = tuple[tuple[str, str], ...]

# Names follow libtorch's rule: inputs by forward's argument, outputs by __index.
_INPUT, _INPUT_DIMS = "image", [1, 28, 28]
_MODEL_INFER = "/inference.GRPCInferenceService/ModelInfer"
_RAW_INPUT_KEY = bytes([service_pb2.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER << 3 | 2])
_TOLERANCE = 1e-3
_RELEASE = re.compile(r"(\d+)\.(\d+)")
# As callers write it; others are Triton's to refuse.
_VERSION = re.compile(r"[1-9][0-9]{0,17}")
# Release 25.06, which has the last of the fixes: server#8220, after server#7840 and server#8078.
_BEARS_CANCELLING = (2, 59)
# How gRPC begins to say that it has no connection; of one that broke, which a call may have passed, it says else.
_NO_CONNECTION = ("failed to connect to all addresses", "errors resolving")


@dataclass(frozen=True, slots=True)
class Output:
    """One of the model's answers: a row of float32 for each image, and what holds for every row."""

    name: str
    """Name of Triton's tensor."""
    promise: str
    """What :attr:`holds` tells, in words."""
    holds: Callable[[Rows], NDArray[np.bool_]]
    """Rows, shape (N, width), to whether it holds for each, shape (N,). NaN fails it: it fails every comparison."""


PROBABILITIES = Output(
    "probabilities__0",
    "probabilities that sum to 1",
    lambda rows: (np.abs(rows.sum(axis=1) - 1) <= _TOLERANCE) & (rows.min(axis=1) >= 0),
)
EMBEDDING = Output(
    "embedding__1",
    "vectors of unit length",
    lambda rows: np.abs(np.linalg.norm(rows, axis=1) - 1) <= _TOLERANCE,
)

_CHANNEL_OPTIONS = (
    # A cut link is noticed within 3 s; Triton takes three pings without data as abuse, and the probe brings data twice
    # a second for as long as Triton lives, if only of what it has loaded.
    ("grpc.keepalive_time_ms", 2_000),
    ("grpc.keepalive_timeout_ms", 1_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # Triton is near: after a restart it is found again within half a second.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.use_local_subchannel_pool", 1),
    # Answers of any model that passes through, as large as Triton makes them.
    ("grpc.max_receive_message_length", 1 << 30),
    # http_proxy is for the world outside.
    ("grpc.enable_http_proxy", 0),
)


@dataclass(frozen=True, slots=True)
class ReadyVersion:
    """A version that Triton has ready and that keeps the gateway's contract."""

    name: str
    version: int
    num_classes: int
    max_batch_size: int
    """Most images in one request, at least 1."""
    embedding_width: int = 0
    """Numbers in an embedding; 0 where the model gives none."""
    num_instances: int = 1
    """How many batches it runs at once."""


class Triton:
    """
    One channel to Triton; build it in the event loop that uses it.

    Args:
        address: ``host:port`` of its gRPC endpoint.
        control_timeout_seconds: Deadline of every RPC but ModelInfer.
        outgoing: Gives the metadata to send with each ModelInfer, as ``traceparent``.

    Attributes:
        address: The same.
        may_cancel: Whether it bears that an inference is cancelled; as of the last look.
        index: Models and versions that it has ready, of whatever kind; as of the last look.
    """

    def __init__(
        self, address: str, *, control_timeout_seconds: float, outgoing: Callable[[], Metadata] | None = None
    ) -> None:
        self.address = address
        self.may_cancel = False
        self.index: Set[tuple[str, int]] = frozenset()
        self._outgoing = outgoing
        self._control_timeout_seconds = control_timeout_seconds
        self._channel = grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._model_infer: Any = self._channel.unary_unary(
            _MODEL_INFER, response_deserializer=service_pb2.ModelInferResponse.FromString
        )
        # As large as admission lets it grow: a call that was left keeps its place there.
        self._running: set[asyncio.Task[Any]] = set()
        self._unfit: set[tuple[str, int]] = set()
        self._described: dict[tuple[str, int], ReadyVersion] = {}

    async def ready_versions(self) -> Sequence[ReadyVersion]:
        """
        Return every ready version that keeps the gateway's contract; others are logged once and left out.

        One that Triton does not describe is what it was before, or left out: it takes no other with it.

        Raises:
            GatewayError: Triton did not say which there are.
        """
        index, self.may_cancel = await asyncio.gather(
            self._control("RepositoryIndex", service_pb2.RepositoryIndexRequest(ready=True)), self._bears_cancelling()
        )
        named = [(model.name, int(model.version)) for model in index.models if model.version.isdecimal()]
        described = await asyncio.gather(*(self._describe(name, version) for name, version in named))
        unfit = {key for key, found in zip(named, described, strict=True) if isinstance(found, UpstreamContractError)}
        for key, found in zip(named, described, strict=True):
            if key in unfit - self._unfit:
                log.warning("model not served", model=key[0], version=key[1], reason=str(found))
        self._unfit, self.index = unfit, frozenset(named)
        self._described = {(found.name, found.version): found for found in described if isinstance(found, ReadyVersion)}
        return list(self._described.values())

    def asking(self, name: str, version: int, output: Output, *, width: int) -> "Asking":
        """
        Return what sends images to a version of a model.

        Args:
            name: Model.
            version: At least 1.
            output: Which of its answers; the others are neither computed nor sent.
            width: Length of each row of the answer.
        """
        return Asking(self, name, version, output, width)

    async def infer(self, request: bytes, name: str, version: int) -> Any:
        """
        Return Triton's answer to a serialised ModelInferRequest. To be cancelled only where ``may_cancel`` says so.

        Raises:
            GatewayError: There is none.
        """
        try:
            return await self._model_infer(request, metadata=self._outgoing() if self._outgoing else None)
        except grpc.aio.AioRpcError as error:
            raise self._translate(error, name, version) from error

    def begin(self, method: str, request: Message) -> asyncio.Task[Any]:
        """
        Start an RPC that nobody cancels, whoever waits for it: use ``asyncio.shield`` or ``asyncio.wait``.

        Returns:
            Task of Triton's answer. It raises ``grpc.aio.AioRpcError``, in Triton's words.
        """
        call = asyncio.create_task(_awaited(getattr(self._stub, method)(request)))
        self._running.add(call)
        call.add_done_callback(self._forget)
        return call

    async def control(self, method: str, request: Message) -> Any:
        """
        Return the answer to anything but an inference, in good time.

        Raises:
            grpc.aio.AioRpcError: There is none; in Triton's words.
        """
        return await getattr(self._stub, method)(request, timeout=self._control_timeout_seconds)

    async def close(self, timeout_seconds: float) -> None:
        """Let the running inferences end, which callers may have left long ago, then close the channel."""
        if self._running:
            await asyncio.wait(self._running, timeout=timeout_seconds)
        await self._channel.close()

    async def _bears_cancelling(self) -> bool:
        try:
            metadata = await self.control("ServerMetadata", service_pb2.ServerMetadataRequest())
        except grpc.aio.AioRpcError:
            return False
        numbers = _RELEASE.match(metadata.version)
        return numbers is not None and (int(numbers[1]), int(numbers[2])) >= _BEARS_CANCELLING

    async def _describe(self, name: str, version: int) -> ReadyVersion | GatewayError:
        request = service_pb2.ModelConfigRequest(name=name, version=str(version))
        try:
            response = await self._control("ModelConfig", request, name, version)
            return _ready_version(name, version, response.config)
        except (UnknownModelError, UpstreamContractError) as error:
            # Gone between the two questions, or not a model for this gateway.
            return error
        except GatewayError as error:
            return self._described.get((name, version), error)

    async def _control(self, method: str, request: Message, name: str = "", version: int = 0) -> Any:
        try:
            return await self.control(method, request)
        except grpc.aio.AioRpcError as error:
            raise self._translate(error, name, version) from error

    def _translate(self, error: grpc.aio.AioRpcError, name: str, version: int) -> GatewayError:
        """The one map of what Triton and the channel say; their words go to the log and not to the caller."""
        code, details = error.code(), error.details() or ""
        if code is grpc.StatusCode.NOT_FOUND or "not at ready state" in details:
            return UnknownVersionError(f"model_version: {name} has no version {version} ready")
        log.warning("upstream failed", address=self.address, model=name, code=code.name, details=details)
        match code:
            case grpc.StatusCode.UNAVAILABLE if "maximum queue size" in details:
                return OverloadedError("overloaded: the model's queue is full", retry_after_seconds=0.1)
            case grpc.StatusCode.RESOURCE_EXHAUSTED:
                return OverloadedError("overloaded: Triton refused more", retry_after_seconds=0.1)
            case grpc.StatusCode.UNAVAILABLE:
                kind = UnreachedError if has_not_left(error) else UpstreamUnavailableError
                return kind("the inference server cannot be reached; try again")
            case grpc.StatusCode.DEADLINE_EXCEEDED:
                return UpstreamTimeoutError("the inference server does not answer")
            case grpc.StatusCode.INVALID_ARGUMENT:
                return UpstreamContractError("the model does not take what this gateway sends")
        return UpstreamFailedError("the inference server failed to run the model")

    def _forget(self, call: asyncio.Task[Any]) -> None:
        self._running.discard(call)
        # Marks the error as seen: whoever waited may have left.
        if not call.cancelled():
            call.exception()


class Asking:
    """
    Sends images to one output of one version of a model; cancelled only where :attr:`Triton.may_cancel` says so.

    Requests are bytes: what is the same in all of a size is serialised once, and pixels are copied once.
    """

    def __init__(self, triton: Triton, name: str, version: int, output: Output, width: int) -> None:
        self._triton = triton
        self._name = name
        self._version = version
        self._output = output
        self._width = width
        # As many as there are sizes of a batch.
        self._heads: dict[int, bytes] = {}

    async def __call__(self, pixels: bytes, num_images: int) -> Rows:
        """
        Return the answers to so many images whose pixels, uint8, 28x28 each, lie behind each other.

        Returns:
            float32, shape (N, width); whether each is what the output promises is not looked at.

        Raises:
            GatewayError: What that means is told in gateway/errors.py.
        """
        head = self._heads.get(num_images)
        if head is None:
            head = self._heads[num_images] = self._head(num_images)
        # raw_input_contents, the last field: its key, its length, its bytes.
        request = b"".join((head, _varint(len(pixels)), pixels))
        response = await self._triton.infer(request, self._name, self._version)
        return _rows(response, self._output, num_images, self._width)

    def _head(self, num_images: int) -> bytes:
        message = service_pb2.ModelInferRequest(
            model_name=self._name,
            model_version=str(self._version),
            inputs=[
                service_pb2.ModelInferRequest.InferInputTensor(
                    name=_INPUT, datatype="UINT8", shape=(num_images, *_INPUT_DIMS)
                )
            ],
            # Named, or Triton computes and sends every output.
            outputs=[service_pb2.ModelInferRequest.InferRequestedOutputTensor(name=self._output.name)],
        )
        return bytes(message.SerializeToString()) + _RAW_INPUT_KEY


def _varint(value: int) -> bytes:
    """Return a length as protobuf writes it."""
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)


def has_not_left(error: grpc.aio.AioRpcError) -> bool:
    """Tell whether a call that ended with this reached no Triton for sure, so that another may have it."""
    return error.code() is grpc.StatusCode.UNAVAILABLE and (error.details() or "").startswith(_NO_CONNECTION)


async def _awaited(call: Any) -> Any:
    return await call


def _ready_version(name: str, version: int, config: Any) -> ReadyVersion:
    inputs = [(one.name, one.data_type, list(one.dims)) for one in config.input]
    if inputs != [(_INPUT, model_config_pb2.TYPE_UINT8, _INPUT_DIMS)]:
        raise UpstreamContractError(f"its input has to be {_INPUT}, uint8, {_INPUT_DIMS}")
    num_classes = _width(config, PROBABILITIES)
    if num_classes is None:
        raise UpstreamContractError(f"it needs an output {PROBABILITIES.name}, float32, one number for each class")
    if num_classes < 1 or config.max_batch_size < 1:
        raise UpstreamContractError("it needs at least one class and max_batch_size of at least 1")
    return ReadyVersion(
        name,
        version,
        num_classes,
        config.max_batch_size,
        embedding_width=max(_width(config, EMBEDDING) or 0, 0),
        num_instances=num_instances(config),
    )


def version_number(version: str) -> int:
    """Return a version, as Triton's protocol has it, as a number; 0 for none, and for what is none."""
    return int(version) if _VERSION.fullmatch(version) else 0


def num_instances(config: Any) -> int:
    """Return how many requests, or batches that it gathers itself, Triton runs at once of a model; at least 1."""
    count: int = sum(max(group.count, 1) * max(len(group.gpus), 1) for group in config.instance_group)
    return max(count, 1)


def _width(config: Any, wanted: Output) -> int | None:
    """Return the length of that output's rows, None where the model has no such output of float32 rows."""
    output = next((one for one in config.output if one.name == wanted.name), None)
    if output is None or output.data_type != model_config_pb2.TYPE_FP32 or len(output.dims) != 1:
        return None
    return int(output.dims[0])


def _rows(response: Any, wanted: Output, num_images: int, width: int) -> Rows:
    def broken(expected: str, found: str) -> UpstreamContractError:
        log.error("upstream broke the contract", expected=expected, found=found)
        return UpstreamContractError(f"the model did not answer with {wanted.promise}")

    if len(response.outputs) != 1 or len(response.raw_output_contents) != 1:
        raise broken("one output", f"{len(response.outputs)}")
    output, raw = response.outputs[0], response.raw_output_contents[0]
    if output.name != wanted.name or output.datatype != "FP32":
        raise broken(f"{wanted.name} FP32", f"{output.name} {output.datatype}")
    if list(output.shape) != [num_images, width] or len(raw) != 4 * num_images * width:
        raise broken(f"shape {[num_images, width]}", f"{list(output.shape)}, {len(raw)} bytes")
    return np.frombuffer(raw, "<f4").reshape(num_images, width)

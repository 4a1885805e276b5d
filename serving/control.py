"""What Sluice asks of a running Triton over gRPC, apart from the gateway's own traffic."""

import asyncio
import math
import re
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import grpc
import numpy as np
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

from serving.errors import ControlError

Array = np.ndarray[Any, Any]
T = TypeVar("T")

_INPUT, _DIMS = "image", (1, 28, 28)
_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # A server that is starting is found within this, not after grpc's first whole second.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    # A dead server's failed channel would otherwise greet its successor.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
)
_RETRY_SECONDS = (0.02, 0.5)
_STACK = re.compile(r"\s+At:\n")


@dataclass(frozen=True)
class Counts:
    """Triton's own counters of a model since it was loaded, summed over versions; warm-up counts too."""

    inferences: int
    """Images that were answered."""
    executions: int
    """Batches that they were run in."""


@dataclass(frozen=True)
class VersionState:
    """What Triton says of one version; a model that never loaded has version 0."""

    model: str
    version: int
    ready: bool
    reason: str
    """Why it is not ready, in Triton's words; empty where there is nothing to say."""


class TritonControl:
    """
    One connection to a Triton, open inside ``async with``.

    An inference in flight is never cancelled: cancellation crashes this version of Triton (server#7368, #8034). A
    caller that is cancelled goes at once; leaving the ``async with`` waits for what is in flight.

    Args:
        address: ``host:port`` of its gRPC protocol.
        answer_seconds: How long any answer may take before :class:`ControlError`.
    """

    def __init__(self, address: str, *, answer_seconds: float = 120.0) -> None:
        self._address = address
        self._answer_seconds = answer_seconds
        self._in_flight: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> Self:
        self._channel = grpc.aio.insecure_channel(self._address, options=_CHANNEL_OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._in_flight:
            await asyncio.wait(self._in_flight, timeout=self._answer_seconds)
        await self._channel.close()

    async def wait_live(self, timeout_seconds: float) -> None:
        """
        Wait until Triton answers, which it does only once every model it was started with is loaded or has failed.

        Raises:
            ControlError: It did not within ``timeout_seconds``.
        """
        await self._wait_for("ServerLive", service_pb2.ServerLiveRequest(), "live", timeout_seconds)

    async def wait_ready(self, timeout_seconds: float) -> None:
        """
        Wait until Triton and all its models say ready.

        Raises:
            ControlError: They did not within ``timeout_seconds``.
        """
        await self._wait_for("ServerReady", service_pb2.ServerReadyRequest(), "ready", timeout_seconds)

    async def _wait_for(self, method: str, request: Any, claim: str, timeout_seconds: float) -> None:
        pause, longest = _RETRY_SECONDS
        try:
            async with asyncio.timeout(timeout_seconds):
                # The channel waits for the connection by itself; what Triton then says can only be asked again.
                while not await self._claims(method, request, claim):
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, longest)
        except TimeoutError as error:
            raise ControlError(f"Triton at {self._address} is not {claim} after {timeout_seconds:g} s") from error

    async def _claims(self, method: str, request: Any, claim: str) -> bool:
        try:
            answer = await getattr(self._stub, method)(request, wait_for_ready=True)
        except grpc.aio.AioRpcError:
            return False  # it went away in between, or is not so far yet
        return bool(getattr(answer, claim))

    async def load(self, model: str, *, config: str | None = None) -> None:
        """
        Load ``model``, or what is new in its folder, and wait until it is loaded and warmed up.

        Args:
            model: Name in the model repository.
            config: A whole configuration as JSON that holds until the next load; none takes the model's own.

        Raises:
            ControlError: Triton could not; the versions that ran before go on running.
        """
        request = service_pb2.RepositoryModelLoadRequest(model_name=model)
        if config is not None:
            request.parameters["config"].string_param = config
        await self._call("RepositoryModelLoad", request)

    async def unload(self, model: str) -> None:
        """
        Unload all versions of ``model``; they refuse requests on return, and are gone a moment later.

        Raises:
            ControlError: Triton could not.
        """
        await self._call("RepositoryModelUnload", service_pb2.RepositoryModelUnloadRequest(model_name=model))

    async def states(self) -> list[VersionState]:
        """
        Return what Triton says of every version it knows.

        Raises:
            ControlError: It did not answer.
        """
        index = await self._call("RepositoryIndex", service_pb2.RepositoryIndexRequest())
        return [
            VersionState(entry.name, int(entry.version or 0), entry.state == "READY", _plain(entry.reason))
            for entry in index.models
        ]

    async def versions(self, model: str) -> list[int]:
        """
        Return the versions of ``model`` that are ready, ascending; empty where Triton has none, or does not know it.

        Raises:
            ControlError: Triton did not answer.
        """
        return sorted(state.version for state in await self.states() if state.model == model and state.ready)

    async def statistics(self, model: str, version: int | None = None) -> Counts:
        """
        Return Triton's counters of ``model``; a batch is counted a moment after its answers were sent.

        Raises:
            ControlError: It is not loaded.
        """
        request = service_pb2.ModelStatisticsRequest(name=model, version=str(version or ""))
        versions = (await self._call("ModelStatistics", request)).model_stats
        return Counts(
            inferences=sum(version.inference_count for version in versions),
            executions=sum(version.execution_count for version in versions),
        )

    async def infer(self, model: str, images: Array, version: int | None = None) -> tuple[Array, Array]:
        """
        Classify ``images``.

        Args:
            model: Name in the model repository.
            images: uint8 [N, 1, 28, 28], N from 1 to the model's ``max_batch_size``.
            version: Which one; the newest ready one if None.

        Returns:
            Probabilities float32 [N, K] and embeddings float32 [N, D]; both read-only.

        Raises:
            ControlError: Triton refused or failed.
            ValueError: ``images`` are not of that type or number of dimensions.
        """
        if images.dtype != np.uint8 or images.ndim != 4:
            raise ValueError(f"images have to be uint8 [N, 1, 28, 28], not {images.dtype} {list(images.shape)}")
        request = service_pb2.ModelInferRequest(model_name=model, model_version=str(version or ""))
        request.inputs.add(name=_INPUT, datatype="UINT8", shape=images.shape)
        request.outputs.add(name="probabilities__0")
        request.outputs.add(name="embedding__1")
        request.raw_input_contents.append(images.tobytes())
        answer = await self._call("ModelInfer", request)
        # By name: Triton promises no order.
        arrays = {
            output.name: np.frombuffer(content, np.float32).reshape(tuple(output.shape))
            for output, content in zip(answer.outputs, answer.raw_output_contents, strict=True)
        }
        return arrays["probabilities__0"], arrays["embedding__1"]

    async def takes_images(self, model: str, version: int) -> bool:
        """
        Tell whether a version takes what :meth:`infer` sends, and nothing beside it.

        Raises:
            ControlError: It is not loaded.
        """
        request = service_pb2.ModelConfigRequest(name=model, version=str(version))
        config = (await self._call("ModelConfig", request)).config
        inputs = [(one.name, one.data_type, list(one.dims)) for one in config.input]
        return inputs == [(_INPUT, model_config_pb2.TYPE_UINT8, list(_DIMS))] and config.max_batch_size > 0

    def begin_blank(self, model: str, version: int) -> asyncio.Task[None]:
        """
        Start to infer one blank image, however long that takes; do not cancel it.

        Returns:
            Task that ends with the answer. It raises :class:`ControlError` where there is none, or one with numbers
            that are none.
        """
        return self._begin(self._blank(model, version))

    async def _blank(self, model: str, version: int) -> None:
        request = service_pb2.ModelInferRequest(model_name=model, model_version=str(version))
        request.inputs.add(name=_INPUT, datatype="UINT8", shape=(1, *_DIMS))
        request.raw_input_contents.append(bytes(math.prod(_DIMS)))
        answer = await self._answer("ModelInfer", request)
        for output, content in zip(answer.outputs, answer.raw_output_contents, strict=False):
            if output.datatype == "FP32" and not np.isfinite(np.frombuffer(content[: len(content) & ~3], "<f4")).all():
                raise ControlError(f"{model} version {version} answers a blank image with NaN or infinity")

    def _begin(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        call = asyncio.create_task(coroutine)
        self._in_flight.add(call)
        call.add_done_callback(self._landed)
        return call

    async def _call(self, method: str, request: Any) -> Any:
        call = self._begin(self._answer(method, request))
        try:
            async with asyncio.timeout(self._answer_seconds):
                return await asyncio.shield(call)
        except TimeoutError as error:
            message = f"Triton at {self._address} did not answer {method} within {self._answer_seconds:g} s"
            raise ControlError(message) from error

    async def _answer(self, method: str, request: Any) -> Any:
        try:
            return await getattr(self._stub, method)(request)
        except grpc.aio.AioRpcError as error:
            name = getattr(request, "model_name", "") or getattr(request, "name", "")
            about = f" of model '{name}'" if name else ""
            detail = _plain(error.details() or error.code().name)
            raise ControlError(f"Triton at {self._address}: {method}{about}: {detail}") from error

    def _landed(self, call: asyncio.Task[Any]) -> None:
        self._in_flight.discard(call)
        # The caller may be gone; an error that nobody fetches would be printed by asyncio.
        if not call.cancelled():
            call.exception()


def _plain(text: str) -> str:
    """Triton's message without the place in our backend that raised it, and without the names of its classes."""
    message = _STACK.split(text)[0].removeprefix("[request id: <id_unknown>] ")
    return message.replace("Internal: TritonModelException: ", "").strip()

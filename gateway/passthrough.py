"""
Triton's own protocol, passed through: any model that Triton has and any tensors, under the gateway's limits.

Requests and answers pass as they are. Refused is what would let a caller change or read the server itself: loading
models, shared memory, settings of its traces and log.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

import grpc
import structlog
from google.protobuf.message import Message
from tritonclient.grpc import service_pb2, service_pb2_grpc

from gateway.admission import Admission, Slot
from gateway.errors import GatewayError, OverloadedError, UpstreamUnavailableError
from gateway.triton import num_instances, version_number
from gateway.turns import Turns
from rpc.retry import retry_metadata

log = structlog.get_logger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]

DESCRIPTOR = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
SERVICE = DESCRIPTOR.full_name
"""Name of the service in reflection."""

# Inferences of one stream that are at Triton, or answered and not yet written.
_READ_AHEAD = 8
# How old a model's max_batch_size may be before Triton is asked again, beside the requests that use it.
_FRESH_SECONDS = 30.0
# Requests at Triton for each instance of a model, so that it always has a next one; of a model whose requests Triton
# gathers, as many full batches as the gateway has of its own. The rest wait here, where they take turns: Triton's own
# queue has none, and what the gateway asks for itself would come last in it.
_PER_INSTANCE = 4
_BATCHES_PER_INSTANCE = 2
_RETRY_SECONDS = 0.1
# As in the servicer: a version that the caller did not choose went away, and the next best answers.
_REPLACEMENTS = 2

# Of what Triton says it can do, what is refused here.
_NOT_OFFERED = frozenset(
    ("model_repository(unload_dependents)", "system_shared_memory", "cuda_shared_memory", "trace", "logging")
)
_MODELS = (
    "models are not loaded or unloaded through the gateway; use `sluice publish` and `sluice rollback`, or ask Triton "
    "itself"
)
_SHARED_MEMORY = "the server's shared memory is not open to callers; send tensors in the request (raw_input_contents)"
_SETTINGS = "Triton's trace and log settings are not changed through the gateway; set them where Triton is started"

_INTERNAL = re.compile(
    r"""\n | Traceback | 0x[0-9a-f]{6}
    | \b\w+\.(?:cc|cpp|cu|h|hpp|py|pyc|so)\b            # source files
    | \w://\w | \b\d{1,3}(?:\.\d{1,3}){3}\b           # addresses
    | (?<![\w/]) ~?\.{0,2}/\w | \b[A-Za-z]:\\          # paths; a slash within a word is a tensor's: dense/BiasAdd
    """,
    re.VERBOSE,
)
# A status is a header, of which peers take 8 KiB; a byte that is not ASCII takes three there.
_MAX_WORDS_BYTES = 2000

# Where Triton's words about a request cannot be shown.
_NEUTRAL = {
    grpc.StatusCode.INVALID_ARGUMENT: "the model does not take this request",
    grpc.StatusCode.NOT_FOUND: "no such model or version is ready",
    grpc.StatusCode.UNIMPLEMENTED: "the model does not do this",
}
_FAILURES = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.INTERNAL)


class Upstream(Protocol):
    """Triton, by the names of its RPCs; errors come as it gave them."""

    async def infer(self, request: Message) -> Any:
        """
        Return the answer to a ModelInfer, which nobody cancels and which has no deadline.

        Raises:
            grpc.aio.AioRpcError: There is none.
        """
        ...

    async def control(self, method: str, request: Message) -> Any:
        """
        Return the answer to anything but an inference, in good time.

        Raises:
            grpc.aio.AioRpcError: There is none.
        """
        ...

    def num_having(self, model: str) -> int:
        """Return how many Tritons have a model ready, at least 1."""
        ...


class _Refusal(GatewayError):
    """What a caller is told: a status, words, and when another try has a chance."""

    def __init__(self, code: grpc.StatusCode, words: str, *, retry_after_seconds: float | None = None) -> None:
        super().__init__(words)
        self.code = code
        self.retry_after_seconds = retry_after_seconds

    @property
    def is_failure(self) -> bool:
        """Whether Triton, or the way to it, is the cause."""
        return self.code in _FAILURES


@dataclass(eq=False, slots=True)
class _Inference:
    """One that waits for its turn, or runs at Triton."""

    request: Any
    is_routed: bool
    """Whether its version was chosen here."""
    until: float
    """When its caller has waited long enough, by the event loop's clock."""
    is_sent: bool = False
    call: asyncio.Task[Any] = field(init=False)

    def leave(self) -> None:
        """Wait for it no more: what has not left for Triton does not leave."""
        if not self.is_sent:
            self.call.cancel()


def _refusing(words: str) -> Callable[[Any, Any, Context], Awaitable[NoReturn]]:
    async def refused(self: Any, request: Any, context: Context) -> NoReturn:
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, words)

    return refused


class PassthroughServicer(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]  # the base is untyped
    """
    ``inference.GRPCInferenceService`` on one event loop.

    Of each model only so many inferences are at Triton at once; beyond, callers take turns. One that its caller left,
    or that took too long, runs on at Triton and keeps its place in admission; what has not left for it is dropped.
    Triton's words reach the caller where they are about the request; of its failures they go to the log alone.
    Inferences of a stream are unary ones at Triton, so models with several answers to a request are not served.

    Args:
        upstream: Triton.
        admission: How much at once. A request counts as many images as its batch has items.
        identity: Who calls, for fair shares.
        require: Raises UpstreamUnavailableError where a version, 0 being the default one, is known not to answer.
        route: Returns the version for a request that names none, 0 to leave that to Triton.
        refresh: Learns anew which versions there are, or raises GatewayError.
        is_ready: Whether the gateway is.
        is_model_ready: Whether a model is ready that the gateway itself proves to be so or not, version 0 being its
            default one; None for every other, of which Triton is asked.
        upstream_timeout_seconds: Longest wait for an inference, whatever the caller's deadline.
        on_upstream_error: Called when Triton failed at an inference, so that readiness is looked at again.
        on_answer: Told the model and the version of each answer.
    """

    def __init__(
        self,
        *,
        upstream: Upstream,
        admission: Admission,
        identity: Callable[[Context], str],
        require: Callable[[str, int], None],
        route: Callable[[str], int],
        refresh: Callable[[], Awaitable[None]],
        is_ready: Callable[[], bool],
        is_model_ready: Callable[[str, int], bool | None],
        upstream_timeout_seconds: float,
        on_upstream_error: Callable[[], None],
        on_answer: Callable[[str, int], None],
    ) -> None:
        self._upstream = upstream
        self._admission = admission
        self._identity = identity
        self._require = require
        self._route = route
        self._refresh = refresh
        self._is_ready = is_ready
        self._is_model_ready = is_model_ready
        self._upstream_timeout_seconds = upstream_timeout_seconds
        self._on_upstream_error = on_upstream_error
        self._on_answer = on_answer
        self._models = _Models(upstream)

    async def ModelInfer(self, request: Any, context: Context) -> Any:
        """Infer once."""
        try:
            return await self._answer(await self._begin(request, context), context)
        except _Refusal as error:
            await _abort(context, error)

    async def ModelStreamInfer(self, request_iterator: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        """Answer each request in order, while those after it are on their way; one that fails ends no other."""
        room = asyncio.Semaphore(_READ_AHEAD)
        # Bounded by that room.
        begun: asyncio.Queue[tuple[str, _Inference | _Refusal] | None] = asyncio.Queue()

        async def read() -> None:
            try:
                await room.acquire()
                async for request in request_iterator:
                    begun.put_nowait((request.id, await self._begin_or_refuse(request, context)))
                    await room.acquire()
            finally:
                begun.put_nowait(None)

        # Begun here one by one, so that they reach Triton in order.
        reader = asyncio.create_task(read())
        try:
            while (one := await begun.get()) is not None:
                yield await self._stream_answer(*one, context)
                room.release()
            # What the requests ended with, if not by themselves.
            await reader
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            while not begun.empty():
                if (left := begun.get_nowait()) is not None and isinstance(left[1], _Inference):
                    left[1].leave()

    async def ServerLive(self, request: Any, context: Context) -> Any:
        """Say that the gateway lives."""
        return service_pb2.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Context) -> Any:
        """Say whether the gateway is ready, which is proven by inference."""
        return service_pb2.ServerReadyResponse(ready=self._is_ready())

    async def ModelReady(self, request: Any, context: Context) -> Any:
        """Say whether a model is ready: as proven where the gateway does that, else as Triton says."""
        is_ready = None
        version = version_number(request.version)
        if version or not request.version:
            is_ready = self._is_model_ready(request.name, version)
        if is_ready is None:
            try:
                is_ready = (await _asked(self._upstream, "ModelReady", request)).ready
            except _Refusal as error:
                if not error.is_failure:
                    await _abort(context, error)
                is_ready = False
        return service_pb2.ModelReadyResponse(ready=is_ready)

    async def ServerMetadata(self, request: Any, context: Context) -> Any:
        """Pass on what Triton says of itself, less the extensions that are refused here."""
        answer = await self._control("ServerMetadata", request, context)
        offered = [name for name in answer.extensions if name not in _NOT_OFFERED]
        return service_pb2.ServerMetadataResponse(name=answer.name, version=answer.version, extensions=offered)

    async def ModelMetadata(self, request: Any, context: Context) -> Any:
        """Pass on a model's inputs and outputs."""
        return await self._control("ModelMetadata", request, context)

    async def ModelConfig(self, request: Any, context: Context) -> Any:
        """Pass on a model's configuration."""
        return await self._control("ModelConfig", request, context)

    async def ModelStatistics(self, request: Any, context: Context) -> Any:
        """Pass on Triton's counts of inferences, the gateway's own probes among them."""
        return await self._control("ModelStatistics", request, context)

    async def RepositoryIndex(self, request: Any, context: Context) -> Any:
        """Pass on which models there are, and why one is not ready as far as that may be told."""
        index = await self._control("RepositoryIndex", request, context)
        for model in index.models:
            if model.reason:
                model.reason = _shown(model.reason) or "it does not load; Triton's log says why"
        return index

    RepositoryModelLoad = RepositoryModelUnload = _refusing(_MODELS)
    SystemSharedMemoryStatus = CudaSharedMemoryStatus = _refusing(_SHARED_MEMORY)
    SystemSharedMemoryRegister = CudaSharedMemoryRegister = _refusing(_SHARED_MEMORY)
    SystemSharedMemoryUnregister = CudaSharedMemoryUnregister = _refusing(_SHARED_MEMORY)
    TraceSetting = LogSettings = _refusing(_SETTINGS)

    async def _control(self, method: str, request: Any, context: Context) -> Any:
        try:
            return await _asked(self._upstream, method, request)
        except _Refusal as error:
            await _abort(context, error)

    async def _begin(self, request: Any, context: Context) -> _Inference:
        """
        Send a request to Triton in its turn, if it may go there.

        Raises:
            _Refusal: It may not; nothing was begun.
        """
        _refuse_shared_memory(request)
        remaining, caller = context.time_remaining(), self._identity(context)
        is_routed = not request.model_version and self._choose_version(request)
        try:
            self._require(request.model_name, version_number(request.model_version))
            model, num_items = await self._fitting(request)
            num_places = num_items if model.gathers else 1
            slot = self._admission.enter(
                num_items,
                num_bytes=request.ByteSize(),
                identity=caller,
                remaining_seconds=remaining,
                expected_seconds=model.turns.expected_seconds(caller, num_places),
            )
        except OverloadedError as error:
            raise _overloaded(str(error), error.retry_after_seconds) from error
        except UpstreamUnavailableError as error:
            raise _Refusal(grpc.StatusCode.UNAVAILABLE, str(error)) from error
        seconds = (
            self._upstream_timeout_seconds if remaining is None else min(self._upstream_timeout_seconds, remaining)
        )
        loop = asyncio.get_running_loop()
        inference = _Inference(request, is_routed, loop.time() + seconds)
        inference.call = loop.create_task(self._infer(inference, model.turns, caller, num_places))
        inference.call.add_done_callback(lambda ended: _give_back(slot, ended))
        return inference

    async def _infer(self, inference: _Inference, turns: Turns, caller: str, num_places: int) -> Any:
        """Return Triton's answer; not to be cancelled any more once the request is sent."""
        await turns.take(caller, num_places)
        loop = asyncio.get_running_loop()
        inference.is_sent, sent_at, seconds = True, loop.time(), None
        try:
            if sent_at > inference.until:
                raise _late()
            answer = await self._upstream.infer(inference.request)
            seconds = loop.time() - sent_at
            return answer
        finally:
            turns.give_back(num_places, seconds=seconds)

    def _choose_version(self, request: Any) -> bool:
        """Fill in the version, where there is a choice."""
        request.model_version = str(self._route(request.model_name) or "")
        return bool(request.model_version)

    async def _begin_or_refuse(self, request: Any, context: Context) -> _Inference | _Refusal:
        try:
            return await self._begin(request, context)
        except _Refusal as error:
            return error

    async def _answer(self, inference: _Inference, context: Context) -> Any:
        """Return Triton's answer, of another version where that which was chosen here has gone."""
        for _ in range(_REPLACEMENTS):
            try:
                return await self._its_answer(inference)
            except _Refusal as error:
                if not inference.is_routed or error.code is not grpc.StatusCode.NOT_FOUND:
                    raise
            # What is known already may do, where Triton does not say.
            with suppress(GatewayError):
                await self._refresh()
            inference.request.model_version = ""
            inference = await self._begin(inference.request, context)
        return await self._its_answer(inference)

    async def _its_answer(self, inference: _Inference) -> Any:
        """Wait for Triton's answer; whether this is cancelled or runs out of time, what was sent runs on."""
        call = inference.call
        try:
            if not call.done():
                await asyncio.wait((call,), timeout=max(inference.until - asyncio.get_running_loop().time(), 0))
        finally:
            if not call.done():
                inference.leave()
        if not call.done():
            raise _late()
        if call.cancelled():
            raise _Refusal(grpc.StatusCode.UNAVAILABLE, "the gateway is stopping; try again")
        try:
            answer = call.result()
        except grpc.aio.AioRpcError as error:
            told = _translated(error, "ModelInfer", inference.request.model_name)
            if told.is_failure:
                self._on_upstream_error()
            raise told from error
        self._on_answer(answer.model_name, version_number(answer.model_version))
        return answer

    async def _stream_answer(self, request_id: str, begun: _Inference | _Refusal, context: Context) -> Any:
        answer = service_pb2.ModelStreamInferResponse()
        try:
            if isinstance(begun, _Refusal):
                raise begun
            answer.infer_response.CopyFrom(await self._answer(begun, context))
            # As Triton says in streams.
            answer.infer_response.parameters["triton_final_response"].bool_param = True
        except _Refusal as error:
            answer.error_message = str(error)
            answer.infer_response.id = request_id
        return answer

    async def _fitting(self, request: Any) -> "tuple[_Model, int]":
        """
        Return the model, and how many items the request's batch has; 1 where the model takes no batches.

        Raises:
            _Refusal: There is no such model, or it takes no batch of that size.
        """
        name, shape = request.model_name, request.inputs[0].shape if request.inputs else ()
        num_items = max(shape[0], 1) if shape else 1
        model = await self._models.named(name)
        if 0 < model.max_batch_size < num_items:
            # What is remembered admits, and does not refuse.
            model = await self._models.named(name, is_asked_now=True)
        most = model.max_batch_size
        if not most:
            return model, 1
        if num_items > most:
            raise _Refusal(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"[request id: {request.id[:64] or '<id_unknown>'}] inference request batch-size must be <= {most} "
                f"for '{name}'",
            )
        if num_items > self._admission.max_images:
            raise _Refusal(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"inputs[0].shape: a batch of {num_items}; the gateway takes at most {self._admission.max_images}",
            )
        return model, num_items


@dataclass(eq=False, slots=True)
class _Model:
    """What was learnt of a model."""

    max_batch_size: int
    """Items in one request; 0 where it takes no batches."""
    gathers: bool
    """Whether Triton makes batches of requests, so that a place is one item and not one request."""
    turns: Turns
    asked_at: float


class _Models:
    """What passing on to each model takes to know, asked of Triton when first needed."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        # Of models that Triton had: no more of them than it can load.
        self._known: dict[str, _Model] = {}
        self._asking: dict[str, asyncio.Task[_Model]] = {}

    async def named(self, name: str, *, is_asked_now: bool = False) -> _Model:
        """
        Return what is known of a model. Calls at the same time share one question.

        Raises:
            _Refusal: Triton has no such model, or does not say.
        """
        known = self._known.get(name)
        if known is None or is_asked_now:
            return await asyncio.shield(self._ask(name))
        if asyncio.get_running_loop().time() - known.asked_at > _FRESH_SECONDS:
            self._ask(name)
        return known

    def _ask(self, name: str) -> asyncio.Task[_Model]:
        asking = self._asking.get(name)
        if asking is None:
            asking = self._asking[name] = asyncio.create_task(self._learn(name))
            asking.add_done_callback(lambda ended: self._forget(name, ended))
        return asking

    async def _learn(self, name: str) -> _Model:
        try:
            answer = await _asked(self._upstream, "ModelConfig", service_pb2.ModelConfigRequest(name=name))
        except _Refusal as error:
            if not error.is_failure:
                self._known.pop(name, None)
            raise
        config = answer.config
        size, gathers = config.max_batch_size, config.WhichOneof("scheduling_choice") is not None
        most = max(_BATCHES_PER_INSTANCE * size, _PER_INSTANCE) if gathers else _PER_INSTANCE
        most *= num_instances(config) * self._upstream.num_having(name)
        known = self._known.get(name)
        # Who waits goes on waiting.
        turns = known.turns if known is not None else Turns(most)
        turns.limit = most
        model = self._known[name] = _Model(size, gathers, turns, asyncio.get_running_loop().time())
        return model

    def _forget(self, name: str, asking: asyncio.Task[_Model]) -> None:
        del self._asking[name]
        # Marks the error as seen: whoever waited may have left.
        if not asking.cancelled():
            asking.exception()


def _refuse_shared_memory(request: Any) -> None:
    for name, tensors in (("inputs", request.inputs), ("outputs", request.outputs)):
        for index, tensor in enumerate(tensors):
            if any(key.startswith("shared_memory") for key in tensor.parameters):
                raise _Refusal(
                    grpc.StatusCode.INVALID_ARGUMENT, f"{name}[{index}].parameters: shared_memory: {_SHARED_MEMORY}"
                )


def _give_back(slot: Slot, ended: asyncio.Task[Any]) -> None:
    slot.release()
    # Marks the error as seen: whoever waited may have left.
    if not ended.cancelled():
        ended.exception()


def _late() -> _Refusal:
    return _Refusal(grpc.StatusCode.DEADLINE_EXCEEDED, "no answer from the model in time")


async def _asked(upstream: Upstream, method: str, request: Any) -> Any:
    """
    Return Triton's answer to anything but an inference.

    Raises:
        _Refusal: What the caller may know of its error.
    """
    try:
        return await upstream.control(method, request)
    except grpc.aio.AioRpcError as error:
        raise _translated(error, method, getattr(request, "name", "")) from error


def _translated(error: grpc.aio.AioRpcError, method: str, model: str) -> _Refusal:
    """The one map of what Triton and the channel say."""
    code, words = error.code(), error.details() or ""
    if code in _NEUTRAL:
        return _Refusal(code, _shown(words) or _NEUTRAL[code])
    log.warning("upstream failed", method=method, model=_cut(model), code=code.name, details=_cut(words))
    match code:
        case grpc.StatusCode.UNAVAILABLE if "not at ready state" in words:
            return _Refusal(grpc.StatusCode.NOT_FOUND, _shown(words) or _NEUTRAL[grpc.StatusCode.NOT_FOUND])
        # Of both queue policies Triton says UNAVAILABLE, which callers take for a server that died.
        case grpc.StatusCode.UNAVAILABLE if "maximum queue size" in words:
            return _overloaded("overloaded: the model's queue is full")
        case grpc.StatusCode.UNAVAILABLE if "Request timeout expired" in words:
            return _overloaded("overloaded: the request's time in the model's queue is over")
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.CANCELLED:
            return _Refusal(grpc.StatusCode.UNAVAILABLE, "the inference server cannot be reached; try again")
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return _Refusal(code, "the inference server does not answer")
        # Triton repeats what it does not know, and its status is a header.
        case grpc.StatusCode.RESOURCE_EXHAUSTED if "metadata size" in words:
            return _Refusal(
                grpc.StatusCode.INVALID_ARGUMENT, "refused, in words too long to pass on: shorten id and names"
            )
        case grpc.StatusCode.RESOURCE_EXHAUSTED if "larger than max" in words:
            return _Refusal(code, "the answer is larger than the gateway passes on; ask for less at once")
    return _Refusal(grpc.StatusCode.INTERNAL, "the inference server failed to run the model")


def _shown(words: str) -> str | None:
    """Return Triton's words as far as a status holds them; None where they may tell of its insides."""
    return None if _INTERNAL.search(words) else _cut(words)


def _cut(words: str) -> str:
    return words.encode()[:_MAX_WORDS_BYTES].decode(errors="ignore")


def _overloaded(words: str, retry_after_seconds: float = _RETRY_SECONDS) -> _Refusal:
    return _Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, words, retry_after_seconds=retry_after_seconds)


async def _abort(context: Context, error: _Refusal) -> NoReturn:
    if error.retry_after_seconds is None:
        await context.abort(error.code, str(error))
    metadata = retry_metadata(error.code, str(error), error.retry_after_seconds)
    await context.abort(error.code, str(error), metadata)

"""Around every RPC: requests that parse, one log line, and no internals on the wire."""

from __future__ import annotations  # grpc's classes are generic in their stubs alone

import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc
import structlog
from google.protobuf.message import DecodeError

log = structlog.get_logger(__name__)

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]
    Handler = grpc.RpcMethodHandler[Any, Any]
    Parse = Callable[[bytes], Any]

# Orchestrators poll health several times a second; their calls would drown the others in the log.
_QUIET = ("/grpc.health.v1.Health/",)


class Guard(grpc.aio.ServerInterceptor):
    """
    Stand between grpc.aio and the handlers; one interceptor, because each costs every message its share.

    - Bytes that are not the method's request message are INVALID_ARGUMENT. grpc.aio would answer UNKNOWN with the
      parser's words, so handlers are registered for bytes, and parsing happens in here.
    - An unexpected exception is INTERNAL with an id, its record in the log. grpc.aio would send its text.
    - Each call is one line in the log, health checks aside.

    A cancelled handler re-raises: swallowing ``CancelledError`` leaks in grpc.aio (grpc#43360).
    """

    def __init__(self) -> None:
        # As many as there are methods.
        self._guarded: dict[str, Handler] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Wrap the handler of one method, once."""
        method = handler_call_details.method
        guarded = self._guarded.get(method)
        if guarded is None:
            handler = await continuation(handler_call_details)
            # No handler: unknown method, answered UNIMPLEMENTED by grpc itself.
            if handler is None:
                return None
            guarded = self._guarded[method] = _guard(method, handler)
        return guarded


def _guard(method: str, handler: Handler) -> Handler:
    parse = handler.request_deserializer or bytes
    open_request: Any
    respond: Any
    if handler.request_streaming:
        open_request = _each_parsed
        respond = handler.stream_stream if handler.response_streaming else handler.stream_unary
    else:
        open_request = _parsed
        respond = handler.unary_stream if handler.response_streaming else handler.unary_unary

    async def unary(data: Any, context: Context) -> Any:
        call = _Call(method, context)
        try:
            request = open_request(parse, method, data, context)
            return await respond(request if handler.request_streaming else await request, context)
        except grpc.aio.AbortError:
            raise
        except Exception:
            await call.fail()
        finally:
            call.log()

    async def stream(data: Any, context: Context) -> AsyncIterator[Any]:
        call, responses = _Call(method, context), None
        try:
            request = open_request(parse, method, data, context)
            responses = respond(request if handler.request_streaming else await request, context)
            async for response in responses:
                yield response
        except GeneratorExit:
            # How a cancellation, or the server's stop, reaches a generator that waits at its yield.
            call.is_cut = True
            raise
        except grpc.aio.AbortError:
            raise
        except Exception:
            await call.fail()
        finally:
            if responses is not None:
                await responses.aclose()
            call.log()

    wrap: Any = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[bool(handler.request_streaming), bool(handler.response_streaming)]
    guarded: Handler = wrap(stream if handler.response_streaming else unary, None, handler.response_serializer)
    return guarded


async def _parsed(parse: Parse, method: str, data: bytes, context: Context) -> Any:
    try:
        return parse(data)
    except DecodeError:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"request: not a valid message for {method}")


async def _each_parsed(parse: Parse, method: str, stream: AsyncIterator[bytes], context: Context) -> AsyncIterator[Any]:
    async for data in stream:
        yield await _parsed(parse, method, data, context)


class _Call:
    """One call on its way: what the log says of it."""

    def __init__(self, method: str, context: Context) -> None:
        self.is_cut = False
        self._method = method
        self._context = context
        self._started = time.perf_counter()
        # Asked for now: a cancelled stream is closed after its call is freed, and asking then crashes (grpc 1.85).
        self._peer = context.peer()

    async def fail(self) -> None:
        incident = uuid.uuid4().hex[:12]
        log.exception("rpc failed", method=self._method, incident=incident)
        await self._context.abort(grpc.StatusCode.INTERNAL, f"internal error, logged as {incident}")

    def log(self) -> None:
        if self._method.startswith(_QUIET):
            return
        # grpc.aio keeps OK as None or 0 until the status is sent, and an abort as the code it was given.
        code: grpc.StatusCode | int | None = self._context.code()
        code = code or grpc.StatusCode.OK
        if self.is_cut or self._context.cancelled():
            code = grpc.StatusCode.CANCELLED
        name = code.name if isinstance(code, grpc.StatusCode) else str(code)
        seconds = round(time.perf_counter() - self._started, 6)
        log.info("rpc", method=self._method, code=name, seconds=seconds, peer=self._peer)

"""Around every RPC: one log line, and no internals on the wire."""

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

# Orchestrators poll health several times a second; their calls would drown the others in the log.
_QUIET = ("/grpc.health.v1.Health/",)


class Guard(grpc.aio.ServerInterceptor):
    """
    Write one log line an RPC, and turn an unexpected exception into INTERNAL with an id.

    grpc.aio sends the text of an exception to the caller; here the caller gets an id, and the log the record.
    Bytes that are no message of the method's request type are INVALID_ARGUMENT, for methods with one request.
    A cancelled handler re-raises: swallowing ``CancelledError`` leaks in grpc.aio (grpc#43360).
    """

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wrap the handler of one call."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        # No handler: unknown method, answered UNIMPLEMENTED by grpc itself.
        if handler is None or method.startswith(_QUIET):
            return handler
        if handler.response_streaming:
            respond = handler.stream_stream if handler.request_streaming else handler.unary_stream
            wrap = (
                grpc.stream_stream_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_stream_rpc_method_handler
            )
            return wrap(_guard_stream(method, respond), _parser(handler), handler.response_serializer)
        respond = handler.stream_unary if handler.request_streaming else handler.unary_unary
        wrap = (
            grpc.stream_unary_rpc_method_handler if handler.request_streaming else grpc.unary_unary_rpc_method_handler
        )
        return wrap(_guard_unary(method, respond), _parser(handler), handler.response_serializer)


class _Malformed:
    """Stands in for a request that does not parse; grpc.aio would answer UNKNOWN with the parser's text."""


def _parser(handler: grpc.RpcMethodHandler[Any, Any]) -> Any:
    parse = handler.request_deserializer
    if handler.request_streaming or parse is None:
        return parse

    def parse_or_mark(raw: bytes) -> Any:
        try:
            return parse(raw)
        except DecodeError:
            return _Malformed()

    return parse_or_mark


async def _refuse_malformed(method: str, request: Any, context: Context) -> None:
    if isinstance(request, _Malformed):
        await context.abort(
            grpc.StatusCode.INVALID_ARGUMENT, f"the bytes sent are no request of {method}: see its .proto"
        )


def _guard_unary(method: str, respond: Any) -> Any:
    async def guarded(request: Any, context: Context) -> Any:
        started = time.perf_counter()
        try:
            await _refuse_malformed(method, request, context)
            return await respond(request, context)
        except grpc.aio.AbortError:
            raise
        except Exception:
            await _abort_neutrally(method, context)
        finally:
            _log_call(method, context, started)

    return guarded


def _guard_stream(method: str, respond: Any) -> Any:
    async def guarded(request: Any, context: Context) -> AsyncIterator[Any]:
        started = time.perf_counter()
        responses = None
        try:
            await _refuse_malformed(method, request, context)
            responses = respond(request, context)
            async for response in responses:
                yield response
        except grpc.aio.AbortError:
            raise
        except Exception:
            await _abort_neutrally(method, context)
        finally:
            if responses is not None:
                await responses.aclose()
            _log_call(method, context, started)

    return guarded


async def _abort_neutrally(method: str, context: Context) -> None:
    incident = uuid.uuid4().hex[:12]
    log.exception("rpc failed", method=method, incident=incident)
    await context.abort(grpc.StatusCode.INTERNAL, f"internal error, logged as {incident}")


def _log_call(method: str, context: Context, started: float) -> None:
    # grpc.aio keeps OK as None or 0 until the status is sent, and an abort as the code it was given.
    code: grpc.StatusCode | int | None = context.code()
    code = code or grpc.StatusCode.OK
    if context.cancelled():
        code = grpc.StatusCode.CANCELLED
    name = code.name if isinstance(code, grpc.StatusCode) else str(code)
    log.info("rpc", method=method, code=name, seconds=round(time.perf_counter() - started, 6), peer=context.peer())

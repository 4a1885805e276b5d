"""A relay between reader and streamer that spoils what passes, as networks, disks and replicas do."""

import asyncio
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any, Self

import grpc

SERVICE = "sluice.streamer.v1.SampleService"

Spoil = Callable[[int, int, bytes], bytes | None]
"""From number of the call, number of the message in it, and message: what goes on; None breaks the stream."""


class Relay:
    """
    Serves SampleService by asking another streamer, message by message, as bytes.

    Attributes:
        address: Where it listens.
        upstream: Whom it asks; may be changed between calls.
        num_calls: Streams opened so far.
        code: Status of a broken stream; OK ends it as if it were done.
        stalls_first: The first stream stops after its first message, and stays open.
    """

    def __init__(
        self,
        upstream: str,
        spoil: Spoil,
        *,
        code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE,
        stalls_first: bool = False,
    ) -> None:
        self.upstream = upstream
        self.num_calls = 0
        self.code = code
        self._spoil = spoil
        self._stalls_first = stalls_first
        self._server = grpc.aio.server()
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "ListDatasets": grpc.unary_unary_rpc_method_handler(self._list),
            "PullBatches": grpc.stream_stream_rpc_method_handler(self._stream),
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    async def __aenter__(self) -> Self:
        await self._server.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._server.stop(0)

    async def _list(self, request: bytes, context: Any) -> bytes:
        async with grpc.aio.insecure_channel(self.upstream) as channel:
            method: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/{SERVICE}/ListDatasets")
            return await method(request)

    async def _stream(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        self.num_calls += 1
        async with grpc.aio.insecure_channel(self.upstream) as channel:
            method: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(f"/{SERVICE}/PullBatches")
            call = method(requests)
            try:
                number = 0
                async for message in call:
                    spoilt = self._spoil(self.num_calls, number, message)
                    if spoilt is None:
                        break
                    number += 1
                    yield spoilt
                    if self._stalls_first and self.num_calls == 1:
                        await asyncio.Event().wait()
                else:
                    return
            except grpc.aio.AioRpcError as error:
                await context.abort(error.code(), error.details())
            finally:
                call.cancel()
        if self.code is not grpc.StatusCode.OK:
            await context.abort(self.code, "the relay broke it")

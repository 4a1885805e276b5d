"""A target's calls on several channels, with nothing between them and the server: no stubs, no retries, no proxy."""

import asyncio
from types import TracebackType
from typing import Any, Self

import grpc

from loadtest.errors import CallError, StartError
from loadtest.tally import Verdict
from loadtest.targets import Target
from rpc.access import key_metadata
from rpc.address import is_loopback
from rpc.tls import ClientTls, open_channel

# One connection's flow control and lock would be shared by all callers.
_CHANNELS = 4
_FIRST_CALL_SECONDS = 10.0
_ABSENT = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


class Caller:
    """
    Sends a target's calls; open inside ``async with``.

    Args:
        address: ``host:port``.
        target: What to ask.
        timeout_seconds: Deadline of each call, where the target's calls may have one.
        tls: As of :class:`gateway.client.ImageClient`, and so is ``api_key``.
        api_key: As said.
    """

    def __init__(
        self,
        address: str,
        target: Target,
        *,
        timeout_seconds: float,
        tls: ClientTls | None = None,
        api_key: str | None = None,
    ) -> None:
        self._address = address
        self._target = target
        self._timeout_seconds = timeout_seconds if target.may_cancel else None

        self._tls = tls
        self._metadata = key_metadata(api_key, address, tls)

    async def __aenter__(self) -> Self:
        options = _options(self._address)
        self._channels = [open_channel(self._address, self._tls, options) for _ in range(_CHANNELS)]
        # Bytes in, bytes out.
        self._methods: list[Any] = [channel.unary_unary(self._target.method) for channel in self._channels]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await asyncio.gather(*(channel.close() for channel in self._channels))

    async def start(self) -> str:
        """
        Connect every channel with one call that is not counted; return the name and version of the answering model.

        Raises:
            StartError: A call failed; the message says what to do.
        """
        try:
            async with asyncio.timeout(_FIRST_CALL_SECONDS):
                # One after the other: a server with little room is not to refuse before the test begins.
                answers = [await self._send(number) for number in range(_CHANNELS)]
        except grpc.aio.AioRpcError as error:
            raise self._start_error(error.code(), error.details() or "") from error
        except TimeoutError as error:
            details = f"no answer within {_FIRST_CALL_SECONDS:g} s"
            raise self._start_error(grpc.StatusCode.DEADLINE_EXCEEDED, details) from error
        try:
            self._target.judge(0, answers[0])
            return self._target.model_of(answers[0])
        except CallError as error:
            raise StartError(f"{self._address} answers {self._target.method}, but wrongly: {error.details}") from error

    async def ask(self, number: int) -> Verdict:
        """
        Send one call and judge its answer; cancelling it cancels the call.

        Raises:
            CallError: It failed.
        """
        try:
            answer = await self._send(number, self._timeout_seconds)
        except grpc.aio.AioRpcError as error:
            raise CallError(error.code().name, error.details() or "") from error
        return self._target.judge(number, answer)

    async def _send(self, number: int, timeout_seconds: float | None = None) -> bytes:
        method = self._methods[number % _CHANNELS]
        call = method(self._target.request(number), timeout=timeout_seconds, metadata=self._metadata)
        try:
            answer: bytes = await call
            return answer
        finally:
            # An abandoned call is never cancelled by grpc.aio itself (grpc#43462).
            call.cancel()

    def _start_error(self, code: grpc.StatusCode, details: str) -> StartError:
        if code in _ABSENT:
            return StartError(
                f"{self._address} does not answer {self._target.method}: {details}; is it running (`sluice up`), "
                "does it have a model, and is that its address?"
            )
        return StartError(f"{self._address} refuses {self._target.method} ({code.name}): {details}")


def _options(address: str) -> list[tuple[str, int]]:
    return [
        # A connection for each channel.
        ("grpc.use_local_subchannel_pool", 1),
        # What fails is counted, not tried again; this also turns off the retries grpc makes unasked.
        ("grpc.enable_retries", 0),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", -1),
        # A server that comes back during the test is found again at once.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 500),
        # Without it, http_proxy in the environment takes even the calls to this machine.
        ("grpc.enable_http_proxy", int(not is_loopback(address))),
    ]

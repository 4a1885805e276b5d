"""HTTP/2 and messages by hand: a peer that says what no client would."""

import asyncio
import struct
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import grpc
from hpack import Decoder, Encoder
from hyperframe.frame import (
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
)

from protos.gateway.v1 import image_service_pb2 as pb
from tests.digits import seven
from tests.faults.gateway.process import PATIENCE_SECONDS

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SERVICE = "/sluice.gateway.v1.ImageService"
CLASSIFY = f"{SERVICE}/Classify"
VALID = pb.ClassifyRequest(
    image=pb.Image(raw=pb.RawImage(height=28, width=28, pixels=seven().tobytes()))
).SerializeToString()
"""A request to classify, as it goes over the wire."""
FRAME_BYTES = 16 * 1024
"""The largest frame that nobody has to allow (RFC 9113, section 4.2)."""

_HEADER_BYTES = 9
_GRPC: Mapping[str, str] = {
    ":method": "POST",
    ":scheme": "http",
    ":path": CLASSIFY,
    ":authority": "gateway",
    "content-type": "application/grpc",
    "te": "trailers",
}
# RFC 9113, section 6.5.2.
INITIAL_WINDOW_SIZE = SettingsFrame.INITIAL_WINDOW_SIZE


@dataclass(slots=True)
class Answer:
    """How a stream ended, as far as the peer was told."""

    headers: dict[str, str] = field(default_factory=dict)
    data: bytes = b""
    reset: int | None = None
    """The error code of RST_STREAM."""

    @property
    def status(self) -> grpc.StatusCode | None:
        """``None`` without one."""
        given = self.headers.get("grpc-status")
        return next((code for code in grpc.StatusCode if str(code.value[0]) == given), None)

    def __str__(self) -> str:
        return f"reset {self.reset}" if self.status is None else self.status.name


def packed(changes: Mapping[str, str | bytes | None] | None = None) -> bytes:
    """Return the header block of a gRPC call; a ``None`` takes a header out."""
    headers: dict[str, str | bytes | None] = {**_GRPC, **(changes or {})}
    # Never indexed: the block means the same whatever the connection has seen before.
    return Encoder().encode([(name, value, True) for name, value in headers.items() if value is not None])


def call(stream_id: int, block: bytes, *, flags: Sequence[str] = ("END_HEADERS",)) -> HeadersFrame:
    """Open a stream."""
    frame = HeadersFrame(stream_id, block)
    frame.flags |= set(flags)
    return frame


def message(stream_id: int, body: bytes, *, is_last: bool = True, is_compressed: bool = False) -> DataFrame:
    """One gRPC message; at most :data:`FRAME_BYTES`."""
    frame = DataFrame(stream_id, struct.pack(">BI", is_compressed, len(body)) + body)
    if is_last:
        frame.flags.add("END_STREAM")
    return frame


async def raw_call(channel: grpc.aio.Channel, method: str, data: bytes, **options: Any) -> tuple[grpc.StatusCode, str]:
    """Send bytes as the request of a method, and return the status and its text."""
    asked: Any = channel.unary_unary(f"{SERVICE}/{method}")
    try:
        await asked(data, timeout=PATIENCE_SECONDS, **options)
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    return grpc.StatusCode.OK, ""


class Peer:
    """
    One connection; acknowledges settings and pings while it reads, and does nothing else unasked.

    Attributes:
        goodbye: The GOAWAY that came, once it did.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.goodbye: GoAwayFrame | None = None
        self._reader = reader
        self._writer = writer
        self._decoder = Decoder()
        self._headers: dict[str, str] = {}

    async def send(self, *parts: Frame | bytes) -> None:
        """Send frames, or bytes as they are."""
        self._writer.write(b"".join(part if isinstance(part, bytes) else part.serialize() for part in parts))
        async with asyncio.timeout(PATIENCE_SECONDS):
            await self._writer.drain()

    async def frames(self) -> AsyncIterator[Frame]:
        """Read frame by frame until the other end closes."""
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                header = await self._reader.readexactly(_HEADER_BYTES)
                frame, length = Frame.parse_frame_header(memoryview(header))
                frame.parse_body(memoryview(await self._reader.readexactly(length)))
                if isinstance(frame, HeadersFrame):
                    # Of every stream, wanted or not: the compression has one state for all of them.
                    self._headers = {str(name): str(value) for name, value in self._decoder.decode(frame.data)}
                await self._acknowledge(frame)
                yield frame

    async def answers(self, *stream_ids: int) -> dict[int, Answer]:
        """Wait until these streams have ended, or the connection."""
        answers = {stream_id: Answer() for stream_id in stream_ids}
        waited_for = set(stream_ids)
        async with asyncio.timeout(PATIENCE_SECONDS):
            async for frame in self.frames():
                waited_for -= self._take(frame, answers)
                if not waited_for:
                    break
        return answers

    async def answer(self, stream_id: int) -> Answer:
        """Wait until one stream has ended, or the connection."""
        return (await self.answers(stream_id))[stream_id]

    async def echo(self) -> bool:
        """Wait until everything sent so far was read at the other end; whether the connection is still there."""
        ping = PingFrame(0, b"are here")
        with suppress(ConnectionError):
            await self.send(ping)
        async with asyncio.timeout(PATIENCE_SECONDS):
            async for frame in self.frames():
                if isinstance(frame, PingFrame) and frame.opaque_data == ping.opaque_data:
                    return True
        return False

    async def ended(self, stream_ids: Collection[int], seconds: float) -> set[int]:
        """Wait at most so long for streams to end, and return those that did; the last to be read of a connection."""
        ended: set[int] = set()
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                async for frame in self.frames():
                    ended |= self._take(frame, {}) & set(stream_ids)
                    if len(ended) == len(stream_ids):
                        break
                else:
                    return set(stream_ids)
        return ended

    async def closed(self) -> None:
        """Wait until the other end has closed the connection."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            async for _ in self.frames():
                pass

    def _take(self, frame: Frame, answers: dict[int, Answer]) -> set[int]:
        """Note what a frame says, and return the stream that ended with it."""
        if isinstance(frame, HeadersFrame):
            if frame.stream_id in answers:
                answers[frame.stream_id].headers.update(self._headers)
        elif isinstance(frame, DataFrame) and frame.stream_id in answers:
            answers[frame.stream_id].data += frame.data
        elif isinstance(frame, RstStreamFrame) and frame.stream_id in answers:
            answers[frame.stream_id].reset = frame.error_code
            return {frame.stream_id}
        return {frame.stream_id} if "END_STREAM" in frame.flags else set()

    async def _acknowledge(self, frame: Frame) -> None:
        if isinstance(frame, GoAwayFrame):
            self.goodbye = frame
        if isinstance(frame, SettingsFrame | PingFrame) and "ACK" not in frame.flags:
            answer = SettingsFrame(0) if isinstance(frame, SettingsFrame) else PingFrame(0, frame.opaque_data)
            answer.flags.add("ACK")
            with suppress(ConnectionError):
                await self.send(answer)


@asynccontextmanager
async def socket_to(
    address: str, *, source: str | None = None
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Give a connection that nothing was said on; it is reset in the end. Comes from ``source``, if that is given."""
    host, _, port = address.rpartition(":")
    local = None if source is None else (source, 0)
    reader, writer = await asyncio.open_connection(host, int(port), local_addr=local)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


@asynccontextmanager
async def peer_of(
    address: str, settings: Mapping[int, int] | None = None, *, source: str | None = None
) -> AsyncIterator[Peer]:
    """Give a connection whose preface and settings were sent; ``source`` as of :func:`socket_to`."""
    async with socket_to(address, source=source) as (reader, writer):
        peer = Peer(reader, writer)
        await peer.send(PREFACE, SettingsFrame(0, dict(settings or {})))
        yield peer

"""Somebody who asks about images, and looks at what arrives at Triton."""

import time
from dataclasses import dataclass
from typing import Any

import grpc

from imaging.decoding import Pixels
from protos.gateway.v1 import image_service_pb2 as pb
from tests.faults.gateway.process import PATIENCE_SECONDS, Gateway, Meter
from tests.faults.report import Row
from tests.gateway.fake_triton import FakeTriton

INVALID_ARGUMENT = grpc.StatusCode.INVALID_ARGUMENT

_ACCEPTED = "accepted are PNG, JPEG, BMP, GIF, WebP, TIFF, PGM"
# On a machine ten times slower than most, which is busy.
_MOST_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Asked:
    """What became of one image."""

    code: grpc.StatusCode | None
    """``None``: it was answered."""
    text: str
    pixels: Pixels | None
    """What arrived at Triton, uint8 (28, 28)."""
    response: pb.ClassifyResponse | None

    def __str__(self) -> str:
        return "answered" if self.code is None else self.code.name


class Asker:
    """
    Sends images to the gateway and looks at what arrives at Triton.

    Attributes:
        slowest_seconds: The longest that any image took.
    """

    def __init__(self, stub: Any, triton: FakeTriton, gateway: Gateway) -> None:
        self.stub = stub
        self.slowest_seconds = 0.0
        self._triton = triton
        self._meter = Meter(gateway)

    async def image(self, data: bytes, **options: Any) -> Asked:
        """Ask about an image file."""
        return await self.message(pb.ClassifyRequest(image=pb.Image(encoded=data), **options))

    async def message(self, request: pb.ClassifyRequest) -> Asked:
        self._triton.received.clear()
        started = time.monotonic()
        try:
            response = await self.stub.Classify(request, timeout=PATIENCE_SECONDS)
        except grpc.aio.AioRpcError as error:
            return Asked(error.code(), error.details() or "", None, None)
        finally:
            self.slowest_seconds = max(self.slowest_seconds, time.monotonic() - started)
        (received,) = self._triton.received
        return Asked(None, "", received[0], response)

    async def refused(self, *images: bytes, text: str = _ACCEPTED) -> None:
        """Fail unless each of these is refused with INVALID_ARGUMENT and a text fit to be shown."""
        for data in images:
            asked = await self.image(data)
            assert (asked.code, asked.text[:15]) == (INVALID_ARGUMENT, "image.encoded: "), data[:40]
            assert text in asked.text
            assert not any(word in asked.text for word in ("Traceback", ".py", "0x7", "<_io", "PIL")), asked.text

    async def answered_or_refused(self, data: bytes) -> str:
        """Fail unless an image is either answered or refused with INVALID_ARGUMENT, and return which."""
        asked = await self.image(data)
        assert asked.code in (None, INVALID_ARGUMENT)
        return str(asked)

    @property
    def peak_bytes(self) -> int:
        """Memory of the gateway at its height, beyond what it was at first."""
        return self._meter.cost().peak_bytes

    def note(self, row: Row) -> None:
        """Add what it took, and fail where a single image took so long that something is wrong."""
        row.add("slowest", f"{self.slowest_seconds * 1000:.0f} ms")
        row.add("cost of all", self._meter.cost())
        assert self.slowest_seconds < _MOST_SECONDS

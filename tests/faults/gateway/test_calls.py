"""Calls that take places and give nothing: unasked, untaken, slow, too many. Section P of docs/faults.md."""

import asyncio
import itertools
import statistics
import time
from collections.abc import Awaitable
from contextlib import suppress
from typing import TypeVar

import grpc
import numpy as np
import pytest
from hyperframe.frame import DataFrame, SettingsFrame
from PIL import Image

from protos.gateway.v1 import image_service_pb2 as pb
from tests.digits import encoded
from tests.faults.gateway.conftest import GatewayOf, Measured
from tests.faults.gateway.live import injected
from tests.faults.gateway.process import MEBI, Gateway
from tests.faults.gateway.wire import call, message, packed, peer_of, raw_call
from tests.gateway.fake_triton import FakeTriton

pytestmark = pytest.mark.asyncio(loop_scope="module")

T = TypeVar("T")


@pytest.mark.slow
async def test_calls_without_a_request_are_ended(gateway_of: GatewayOf, triton: FakeTriton, measured: Measured) -> None:
    """P14: calls whose request never comes."""
    row = measured(
        "P14",
        fault="3 connections with 1,000 calls each that bring no request",
        promised="they keep nobody out: others 95 % answered over 30 s",
    )
    occupied = gateway_of(triton.address)
    await occupied.start()
    async with injected(occupied) as fault:
        ended = await occupy(occupied.address, b"", seconds=30)
    row.add("ended", f"{ended} of 3000")
    fault.note(row)
    fault.assert_unharmed(0.95)


@pytest.mark.slow
async def test_answers_that_nobody_takes_keep_out_no_other_caller(
    gateway_of: GatewayOf, triton: FakeTriton, measured: Measured
) -> None:
    """P15: peers that ask and never open their window."""
    row = measured(
        "P15",
        fault="3 connections with 1,000 calls each whose answers are never taken (a window of 0 bytes)",
        promised="at most 96 MiB; they fill their caller's own share: others 90 % answered over 60 s",
    )
    small = pb.ClassifyRequest(image=pb.Image(encoded=encoded(Image.new("L", (28, 28)), optimize=True)))
    occupied = gateway_of(triton.address)
    await occupied.start()
    async with injected(occupied) as fault:
        ended = await occupy(occupied.address, small.SerializeToString(), seconds=60)
    row.add("dropped", f"{ended} of 3000")
    fault.note(row)
    assert fault.cost.peak_bytes <= 96 * MEBI
    fault.assert_unharmed(0.9)


async def occupy(address: str, request: bytes, *, seconds: float) -> int:
    """
    Open 1,000 calls on each of 3 connections, and return how many have ended after so long, or were refused.

    Args:
        address: Where.
        request: What each asks; no bytes: no request at all.
        seconds: How long.
    """
    block, numbers = packed(), range(1, 2000, 2)

    async def one() -> int:
        # Another caller than those who are looked at: what one of them may hold is bounded by caller.
        async with peer_of(address, {SettingsFrame.INITIAL_WINDOW_SIZE: 0}, source="127.0.0.2") as peer:
            for start in range(0, len(numbers), 100):
                for number in numbers[start : start + 100]:
                    await peer.send(call(number, block), *([message(number, request)] if request else ()))
                if request:
                    # The other end has to have read this much before it allows more.
                    await peer.echo()
            # All of that time, whether they have ended or not: it is the others who are looked at.
            ended, _ = await asyncio.gather(peer.ended(numbers, seconds), asyncio.sleep(seconds))
            return len(ended)

    return sum(await asyncio.gather(*(one() for _ in range(3))))


@pytest.mark.slow
async def test_slow_senders_are_ended(gateway: Gateway, triton: FakeTriton, measured: Measured) -> None:
    """P16: images that come byte by byte."""
    row = measured(
        "P16",
        fault="20 requests that come at 1 byte a second",
        promised="ended within 30 s, nothing of them reaches Triton, others 99 % answered",
    )
    slow_image = np.full((28, 28), 77, np.uint8)
    data = pb.ClassifyRequest(image=pb.Image(raw=pb.RawImage(height=28, width=28, pixels=slow_image.tobytes())))
    numbers = range(1, 41, 2)
    async with injected(gateway) as fault, peer_of(gateway.address) as peer:
        await peer.send(*(call(number, packed()) for number in numbers))
        ending = asyncio.create_task(peer.ended(numbers, 30))
        for byte in message(1, data.SerializeToString()).data[:30]:
            with suppress(ConnectionError):
                await peer.send(*(DataFrame(number, bytes((byte,))) for number in numbers))
            await asyncio.wait((ending,), timeout=1)
        ended = await ending

    row.add("ended", f"{len(ended)} of {len(numbers)}")
    fault.note(row)
    assert not any((image == slow_image).all() for images in triton.received for image in images)
    assert len(ended) == len(numbers)
    fault.assert_unharmed(0.99)


async def test_cap_on_images_holds_in_waves(gateway_of: GatewayOf, triton: FakeTriton, measured: Measured) -> None:
    """P18: ten times as many calls at once as are worked on, three times."""
    cap, waves = 8, 3
    row = measured(
        "P18",
        fault=f"{waves} waves of {10 * cap} calls where {cap} are worked on at once",
        promised="never more at Triton in any wave, all others RESOURCE_EXHAUSTED at once",
    )
    # So that the probe, which waits at Triton's gate as well, does not call it dead.
    options = {"max-in-flight": cap, "max-batch-images": cap, "probe-timeout-seconds": 60}
    small = gateway_of(triton.address, *(part for name, value in options.items() for part in (f"--{name}", str(value))))
    # Each of its own: equal ones are asked of Triton once.
    images = [np.full((28, 28), number + 1, np.uint8).tobytes() for number in range(10 * cap)]
    requests = [
        pb.ClassifyRequest(
            image=pb.Image(raw=pb.RawImage(height=28, width=28, pixels=image), polarity=pb.POLARITY_LIGHT_ON_DARK)
        ).SerializeToString()
        for image in images
    ]
    most, seconds = 0, list[float]()
    try:
        await small.start()
        async with grpc.aio.insecure_channel(small.address) as channel:
            for _ in range(waves):
                triton.gate.clear()
                before = len(triton.received)
                calls = [asyncio.create_task(timed(raw_call(channel, "Classify", data))) for data in requests]
                refused = [await each for each in itertools.islice(asyncio.as_completed(calls), 9 * cap)]
                # Those of the probe are all zeros.
                most = max(most, sum(len(each) for each in triton.received[before:] if each.any()))
                triton.gate.set()
                ended = await asyncio.gather(*calls)
                assert [status for (status, _), _ in refused] == [grpc.StatusCode.RESOURCE_EXHAUSTED] * 9 * cap
                assert sum(status is grpc.StatusCode.OK for (status, _), _ in ended) == cap
                seconds += [taken for _, taken in refused]
    finally:
        triton.gate.set()
    row.add("at Triton", f"{most} images at most")
    row.add("refused after", f"{statistics.median(seconds) * 1000:.0f} ms at the median of {len(seconds)}")
    assert most <= cap


async def timed(call: Awaitable[T]) -> tuple[T, float]:
    """Wait for a result, and return it with the seconds that it took."""
    started = time.monotonic()
    return await call, time.monotonic() - started

"""Frames without end: resets, pings, headers. Section P of docs/faults.md."""

import asyncio
import struct
import time

import pytest
from hyperframe.frame import ContinuationFrame, PingFrame, RstStreamFrame

from tests.faults.gateway.conftest import Measured
from tests.faults.gateway.live import injected
from tests.faults.gateway.process import MEBI, Gateway
from tests.faults.gateway.wire import FRAME_BYTES, call, packed, peer_of

pytestmark = pytest.mark.asyncio(loop_scope="module")

_CANCEL = 8
_ENHANCE_YOUR_CALM = 11


async def test_rapid_reset_costs_little(gateway: Gateway, measured: Measured) -> None:
    """P5: streams opened and reset at once, CVE-2023-44487."""
    row = measured(
        "P5",
        fault="20,000 streams opened and reset at once",
        promised="at most 2 s of CPU and 32 MiB, others 99.9 % answered",
    )
    block = packed()
    flood = b"".join(
        call(number, block).serialize() + RstStreamFrame(number, _CANCEL).serialize() for number in range(1, 40_000, 2)
    )
    async with injected(gateway) as fault, peer_of(gateway.address) as peer:
        await peer.send(flood)
        await peer.echo()

    fault.note(row)
    assert fault.cost.cpu_seconds <= 20  # on a machine ten times slower
    assert fault.cost.peak_bytes <= 32 * MEBI
    fault.assert_unharmed(0.999)


async def test_ping_flood_is_sent_away(gateway: Gateway, measured: Measured) -> None:
    """P6: pings without end."""
    row = measured("P6", fault="200 pings at once", promised="GOAWAY ENHANCE_YOUR_CALM, others answered")
    async with injected(gateway) as fault, peer_of(gateway.address) as peer:
        await peer.send(*(PingFrame(0, struct.pack(">Q", number)) for number in range(200)))
        started = time.monotonic()
        await peer.closed()
        seconds = time.monotonic() - started

    assert peer.goodbye is not None
    row.add("sent away", f"after {seconds * 1000:.0f} ms")
    fault.note(row)
    assert peer.goodbye.error_code == _ENHANCE_YOUR_CALM
    fault.assert_unharmed(0.99)


async def test_continuation_flood_holds_little_memory(gateway: Gateway, measured: Measured) -> None:
    """P8: headers that never end."""
    num_peers, each = 8, 64 * MEBI
    row = measured(
        "P8",
        fault=f"{num_peers} connections, each with {each // MEBI} MiB of CONTINUATION frames",
        promised="at most 32 MiB of memory for each connection, others 99 % answered",
    )
    parts = ContinuationFrame(1, large_header()).serialize() * 16

    async def flood() -> int:
        sent = 0
        async with peer_of(gateway.address) as peer:
            try:
                await peer.send(call(1, packed(), flags=()))
                while sent < each:
                    await peer.send(parts)
                    sent += len(parts)
                await peer.echo()
            except ConnectionError:
                pass
        return sent

    async with injected(gateway) as fault:
        sent = await asyncio.gather(*(flood() for _ in range(num_peers)))

    row.add("taken before the connection was cut", f"{max(sent) / MEBI:.0f} MiB at most")
    fault.note(row)
    assert fault.cost.peak_bytes <= num_peers * 32 * MEBI
    fault.assert_unharmed(0.99)


def large_header() -> bytes:
    """Return one header that fills a frame almost, packed as it is: never indexed (RFC 7541, section 6.2.3)."""
    length = FRAME_BYTES - 64
    low, high = (length - 127) % 128 + 128, (length - 127) // 128
    return b"\x10\x07x-flood\x7f" + bytes((low, high)) + b"v" * length

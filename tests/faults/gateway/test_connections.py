"""Connections that bring nothing, or too much else; too many of them. Section P of docs/faults.md."""

import asyncio
import random
import ssl
import time
from contextlib import AsyncExitStack, suppress

import pytest

from tests.faults.gateway.conftest import GatewayOf, Measured
from tests.faults.gateway.live import injected
from tests.faults.gateway.process import MEBI, PATIENCE_SECONDS, Gateway
from tests.faults.gateway.wire import PREFACE, peer_of, socket_to
from tests.gateway.fake_triton import FakeTriton

pytestmark = pytest.mark.asyncio(loop_scope="module")


def client_hello() -> bytes:
    context, sent = ssl.create_default_context(), ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), sent, server_hostname="gateway").do_handshake()
    return sent.read()


async def closing(address: str, said: bytes) -> float:
    """Connect, say something, and return how long it took the other end to close the connection, in seconds."""
    started = time.monotonic()
    async with asyncio.timeout(PATIENCE_SECONDS), socket_to(address) as (reader, writer):
        writer.write(said)
        with suppress(ConnectionError):
            await reader.read(-1)
        return time.monotonic() - started


async def test_other_protocols_are_closed_at_once(gateway: Gateway, measured: Measured) -> None:
    """P1: random bytes, HTTP/1.1 and TLS at the port of plaintext HTTP/2."""
    row = measured(
        "P1",
        fault="1,000 connections that bring random bytes, HTTP/1.1 or a TLS hello",
        promised="all closed, no call begun, at most 1 log line a second, others answered",
    )
    rng = random.Random(1)
    said = [b"GET / HTTP/1.1\r\nHost: gateway\r\n\r\n", client_hello()]
    said += [b"\x01" + rng.randbytes(rng.randrange(1, 400)) for _ in range(8)]
    num_lines, started = len(gateway.lines()), time.monotonic()
    async with injected(gateway) as fault:
        took = [
            seconds
            for _ in range(20)
            for seconds in await asyncio.gather(*(closing(gateway.address, each) for each in said * 5))
        ]
    seconds = time.monotonic() - started

    lines = gateway.lines()[num_lines:]
    row.add("closed", f"{len(took)}, the slowest after {max(took) * 1000:.0f} ms")
    fault.note(row)
    assert len(took) == 1000
    assert all(line["code"] == "OK" for line in lines if line["event"] == "rpc")
    assert sum(line["event"] != "rpc" for line in lines) <= seconds + 1
    fault.assert_unharmed(0.99)


@pytest.mark.slow
async def test_silence_is_closed_at_the_handshake_timeout(gateway: Gateway, measured: Measured) -> None:
    """P2: connections that say nothing, or half of the preface."""
    row = measured(
        "P2",
        fault="500 connections that stay silent, or stop in the middle of the preface",
        promised="closed at the handshake timeout, 5 s",
    )
    async with injected(gateway) as fault:
        before = gateway.num_fds
        silent = [closing(gateway.address, PREFACE[:12] if number % 2 else b"") for number in range(500)]
        took = await asyncio.gather(*silent)

    row.add("closed", f"{len(took)}, after {min(took):.1f} to {max(took):.1f} s")
    fault.note(row)
    assert min(took) > 4
    assert await gateway.drop_to(before) <= before
    fault.assert_unharmed(0.99)


async def test_connections_beyond_the_cap_are_closed(
    gateway_of: GatewayOf, triton: FakeTriton, measured: Measured
) -> None:
    """P3: more connections than are allowed."""
    row = measured(
        "P3",
        fault="100 connections more than max_connections allows",
        promised="those are closed, the others answered, no file left open",
    )
    cap = 50
    small = gateway_of(triton.address, "--max-connections", str(cap))
    await small.start()
    before = small.num_fds
    async with injected(small) as fault, AsyncExitStack() as stack:
        peers = [await stack.enter_async_context(peer_of(small.address)) for _ in range(cap + 100)]
        kept = sum(await asyncio.gather(*(peer.echo() for peer in peers)))
    row.add("kept", f"{kept} of {len(peers)}, with a cap of {cap}")
    fault.note(row)
    assert 0 < kept < cap
    assert await small.drop_to(before) <= before
    fault.assert_unharmed(1)


@pytest.mark.slow
async def test_idle_connections_cost_little_and_are_closed(
    gateway_of: GatewayOf, triton: FakeTriton, measured: Measured
) -> None:
    """P4: connections without a call."""
    row = measured(
        "P4",
        fault="5,000 idle connections",
        promised="at most 20 KiB each, closed after connection_idle_seconds; as many again take half as much at most",
    )
    crowded = gateway_of(triton.address, "--max-connections", "6000", "--connection-idle-seconds", "5")
    await crowded.start()
    rss, fds = crowded.rss_bytes, crowded.num_fds
    heights = []
    async with injected(crowded) as fault:
        for _ in range(2):
            async with AsyncExitStack() as stack:
                peers = [await stack.enter_async_context(peer_of(crowded.address)) for _ in range(5000)]
                heights.append(crowded.rss_bytes - rss)
                await asyncio.gather(*(peer.closed() for peer in peers))
    row.add("memory of each", f"{heights[0] / 5000 / 1024:.1f} KiB")
    row.add("of as many again", f"{(heights[1] - heights[0]) / MEBI:+.1f} MiB")
    fault.note(row)
    assert heights[0] <= 5000 * 20 * 1024
    assert heights[1] - heights[0] <= heights[0] / 2
    assert await crowded.drop_to(fds) <= fds
    fault.assert_unharmed(0.99)

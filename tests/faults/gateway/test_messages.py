"""Messages that are too large, packed, malformed, deep or wide. Section P of docs/faults.md."""

import asyncio
import random
import struct
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio
from hyperframe.frame import DataFrame

from gateway.settings import GatewaySettings
from tests.faults.gateway.conftest import Measured
from tests.faults.gateway.live import Fault, injected
from tests.faults.gateway.process import MEBI, Gateway
from tests.faults.gateway.wire import VALID, call, packed, peer_of, raw_call

pytestmark = pytest.mark.asyncio(loop_scope="module")

OK, INVALID_ARGUMENT = grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT
NOT_FOUND, RESOURCE_EXHAUSTED = grpc.StatusCode.NOT_FOUND, grpc.StatusCode.RESOURCE_EXHAUSTED
_METHODS = ("Classify", "ClassifyBatch", "Embed", "Compare", "ListModels")


class Sender:
    """Sends bytes as requests, of any size."""

    def __init__(self, gateway: Gateway, channel: grpc.aio.Channel) -> None:
        self._gateway = gateway
        self._channel = channel

    async def send(self, data: bytes, method: str = "Classify", **options: Any) -> tuple[grpc.StatusCode, str]:
        """Return the status that these bytes get, and its text."""
        return await raw_call(self._channel, method, data, **options)

    async def inject(self, data: bytes, method: str = "Classify", **options: Any) -> tuple[grpc.StatusCode, str, Fault]:
        """Send as the one fault while others call, and return as well what it did."""
        async with injected(self._gateway) as fault:
            status, text = await self.send(data, method, **options)
        return status, text, fault


@pytest_asyncio.fixture(loop_scope="module")
async def sender(gateway: Gateway) -> AsyncIterator[Sender]:
    options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(gateway.address, options=options) as channel:
        yield Sender(gateway, channel)


async def test_oversize_messages_are_refused_unread(gateway: Gateway, sender: Sender, measured: Measured) -> None:
    """P10: a message above the limit, and one that only says so."""
    limit = GatewaySettings().max_message_bytes
    row = measured(
        "P10",
        fault="a message of one byte more than allowed; 2 GiB announced and never sent",
        promised="RESOURCE_EXHAUSTED, at most the limit of memory, nothing for what is only announced",
    )
    async with injected(gateway) as announced, peer_of(gateway.address) as peer:
        await peer.send(call(1, packed()), DataFrame(1, struct.pack(">BI", 0, 2**31)))
        answer = await peer.answer(1)
    status, text, fault = await sender.inject(bytes(limit + 1))

    row.add("announced", f"{announced.cost.peak_bytes / MEBI:+.1f} MiB")
    fault.note(row)
    assert answer.status == status == RESOURCE_EXHAUSTED
    assert str(limit) in text
    assert announced.cost.peak_bytes <= 8 * MEBI
    assert fault.cost.peak_bytes <= limit + 8 * MEBI
    fault.assert_unharmed(0.99)


async def test_compressed_bomb_is_not_unpacked(sender: Sender, measured: Measured) -> None:
    """P11: a small message that unpacks to a large one."""
    row = measured(
        "P11",
        fault="256 MiB of zeros, packed by gzip to 256 KiB",
        promised="RESOURCE_EXHAUSTED, at most the limit of memory",
    )
    limit = GatewaySettings().max_message_bytes
    status, text, fault = await sender.inject(bytes(256 * MEBI), compression=grpc.Compression.Gzip)

    fault.note(row)
    assert (status, text) == (RESOURCE_EXHAUSTED, "Decompressed message larger than max")
    assert fault.cost.peak_bytes <= limit + 16 * MEBI


async def test_malformed_messages_are_refused_without_internals(
    gateway: Gateway, sender: Sender, measured: Measured
) -> None:
    """P12: bytes that are no message, or another one."""
    row = measured(
        "P12",
        fault="random, cut and flipped messages to each method",
        promised="INVALID_ARGUMENT or NOT_FOUND where not valid by chance, no internals in the text",
    )
    codes: Counter[grpc.StatusCode] = Counter()
    texts: set[str] = set()
    rng = random.Random(12)
    async with injected(gateway) as fault:
        for method in _METHODS:
            datas = [rng.randbytes(rng.randrange(1, 60)) for _ in range(40)] + [b"\xff\xff\xff", b"\x0a\x7f"]
            datas += [VALID[: rng.randrange(1, len(VALID))] for _ in range(20)]
            datas += [flipped(VALID, rng) for _ in range(20)]
            for status, text in await asyncio.gather(*(sender.send(data, method) for data in datas)):
                codes[status] += 1
                texts.add(text)

    row.add("statuses", ", ".join(f"{codes[code]} {code.name}" for code in grpc.StatusCode if code in codes))
    fault.note(row)
    assert codes.keys() <= {OK, INVALID_ARGUMENT, NOT_FOUND}
    assert codes[INVALID_ARGUMENT] > 100
    assert not [text for text in texts if any(word in text for word in ("Error", "google", "0x7", "File ", ".py"))]
    fault.assert_unharmed(0.99)


def flipped(data: bytes, rng: random.Random) -> bytes:
    # Not among the pixels, which may be anything.
    place = rng.randrange(12)
    return data[:place] + bytes((data[place] ^ 1 << rng.randrange(8),)) + data[place + 1 :]


async def test_deep_and_wide_messages_cost_little(gateway: Gateway, sender: Sender, measured: Measured) -> None:
    """P13: a million levels, a million unknown fields."""
    row = measured(
        "P13",
        fault="messages with 500,000 levels and with 1,000,000 unknown fields",
        promised="INVALID_ARGUMENT within 0.1 s of CPU",
    )
    # Groups of field 1 within each other; varints of field 31.
    deep, wide = b"\x0b" * 500_000 + b"\x0c" * 500_000, b"\xf8\x01\x01" * 1_000_000
    async with injected(gateway) as fault:
        started = gateway.cpu_seconds
        refusals = [await sender.send(data) for data in (deep, wide)]
        spent = gateway.cpu_seconds - started

    row.add("CPU", f"{spent:.2f} s for both, the others' calls included")
    fault.note(row)
    assert [status for status, _ in refusals] == [INVALID_ARGUMENT] * 2
    assert spent <= 2  # on a machine ten times slower
    fault.assert_unharmed(0.99)


@pytest.mark.slow
async def test_huge_batches_are_refused_before_they_are_parsed(sender: Sender, measured: Measured) -> None:
    """P13b: millions of empty images in one batch."""
    row = measured(
        "P13b",
        fault="a batch of 16 million empty images in a message of 32 MiB",
        promised="INVALID_ARGUMENT, at most 128 MiB, others 99 % answered",
    )
    many = b"\x0a\x00" * (GatewaySettings().max_message_bytes // 2)
    status, text, fault = await sender.inject(many, "ClassifyBatch")

    fault.note(row)
    assert status == INVALID_ARGUMENT
    assert text.startswith("images: ")
    assert fault.cost.peak_bytes <= 128 * MEBI
    fault.assert_unharmed(0.99)

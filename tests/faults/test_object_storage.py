"""Epochs from a real S3 server, through a real streamer: cold, warm, in an outage, with little room, and damaged."""

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sluice import pack
from streamer.client import SampleClient
from streamer.errors import ReaderError
from tests.faults.conftest import Waits
from tests.faults.processes import Streamer
from tests.faults.reading import NUM_SAMPLES, PLAN, Reader, assert_exactly_once, write_samples
from tests.streamer.slow import SlowLink
from tests.streamer.sources.test_cache import size_of
from tests.streamer.storage import S3Server

# Of each block, in records: both sizes make 300 blocks and more.
_SIDES = [4, pytest.param(28, marks=pytest.mark.slow)]
_BLOCK_SAMPLES = 195

Start = Callable[..., Awaitable[Streamer]]


@pytest.fixture(scope="module")
def packed(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], str]:
    """Return where 60,000 images of so many pixels a side lie, packed when first asked for."""
    places: dict[int, str] = {}

    def place_of(side: int) -> str:
        if side not in places:
            folder, place = tmp_path_factory.mktemp("idx"), f"s3://digits/{side}"
            write_samples(folder, side=side)
            options = pack.PackOptions(
                source=str(folder),
                out=place,
                cache=folder,
                block_bytes=_BLOCK_SAMPLES * record_bytes(side),
                shard_bytes=100 * _BLOCK_SAMPLES * record_bytes(side),
            )
            with pytest.MonkeyPatch.context() as patch:
                for name, value in s3_server.environment.items():
                    patch.setenv(name, value)
                asyncio.run(pack.run(options, report=lambda line: None))
            places[side] = place
        return places[side]

    return place_of


@pytest.fixture
async def link(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[SlowLink]:
    """The way to the server; the environment leads there."""
    async with SlowLink(s3.endpoint) as link:
        for name, value in {**s3.environment, "AWS_ENDPOINT_URL": link.endpoint}.items():
            monkeypatch.setenv(name, value)
        yield link


@pytest.fixture
async def start(link: SlowLink, tmp_path: Path) -> AsyncIterator[Start]:
    """Start streamers that share a cache and hold nothing in memory; they are ended with the test."""
    started: list[Streamer] = []

    async def one(place: str, *options: str) -> Streamer:
        log = tmp_path / f"streamer-{len(started)}.log"
        fixed = ("--cache", str(tmp_path), "--memory-bytes", "0", "--storage-deadline-seconds", "600")
        started.append(Streamer(f"digits={place}", log, options=(*fixed, *options)))
        await started[-1].start()
        return started[-1]

    yield one
    for each in started:
        each.close()


def record_bytes(side: int) -> int:
    return side * side + 1 + 4


def cache_bytes(side: int, share: float) -> int:
    """Room for a share of the data set."""
    return int(share * NUM_SAMPLES * record_bytes(side))


@contextmanager
def largest_size(folder: Path) -> Iterator[Callable[[], int]]:
    """Watch the size of a folder, unfinished files and all, and tell the largest so far."""
    largest, is_over = 0, threading.Event()

    def watch() -> None:
        nonlocal largest
        while not is_over.wait(0.002):
            if folder.is_dir():
                largest = max(largest, size_of(folder))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield lambda: largest
    finally:
        is_over.set()
        watcher.join()


@pytest.mark.parametrize("side", _SIDES)
async def test_epoch_read_cold_and_warm(
    packed: Callable[[int], str], start: Start, link: SlowLink, tmp_path: Path, side: int
) -> None:
    """Cold, each block is asked for once; warm, nothing but the index."""
    place = await asyncio.to_thread(packed, side)
    streamer = await start(place)
    cold = Reader([streamer.address], tmp_path / "cold.ledger")
    await cold.read()
    num_blocks = len(os.listdir(tmp_path / "blocks")) - 1
    # One more for the index.
    assert (link.num_gets, num_blocks >= 300) == (num_blocks + 1, True)
    assert_exactly_once(cold)

    link.num_gets = 0
    streamer.kill()
    await streamer.start()
    warm = Reader([streamer.address], tmp_path / "warm.ledger")
    await warm.read(replace(PLAN, epoch=1))
    assert link.num_gets == 1
    assert_exactly_once(warm)


@pytest.mark.parametrize(
    ("side", "outage_seconds"),
    [(4, 1.0), *(pytest.param(side, 5.0, marks=pytest.mark.slow) for side in (4, 28))],
)
async def test_server_killed_in_an_epoch_and_back_seconds_later(
    s3: S3Server,
    packed: Callable[[int], str],
    start: Start,
    waits: Waits,
    tmp_path: Path,
    side: int,
    outage_seconds: float,
) -> None:
    """With room for half of the data set, so that something is fetched for every batch."""
    place = await asyncio.to_thread(packed, side)
    limit = cache_bytes(side, 0.5)
    streamer = await start(place, "--cache-bytes", str(limit), "--read-ahead-bytes", str(4 * 1024**2))
    reader = Reader([streamer.address], tmp_path / "reader.ledger")
    with largest_size(tmp_path / "blocks") as largest:
        async for _ in reader.batches():
            if reader.num_received == 60:
                s3.kill()
                killed_at = time.monotonic()
                coming_back = asyncio.create_task(back_after(s3, outage_seconds))
        await coming_back

    assert reader.longest_wait(killed_at) > outage_seconds / 2
    assert_exactly_once(reader)
    assert 0.5 * limit < largest() <= limit
    waits.note(f"S3 server killed, and started {outage_seconds:g} s later", reader.longest_wait(killed_at))


async def back_after(s3: S3Server, seconds: float) -> None:
    await asyncio.sleep(seconds)
    await asyncio.to_thread(s3.start, wait=False)


@pytest.mark.slow
@pytest.mark.parametrize("side", [4, 28])
async def test_two_streamers_share_a_cache_and_its_limit(
    packed: Callable[[int], str], start: Start, tmp_path: Path, side: int
) -> None:
    place = await asyncio.to_thread(packed, side)
    limit = cache_bytes(side, 0.25)
    streamers = [await start(place, "--cache-bytes", str(limit)) for _ in range(2)]
    readers = [Reader([each.address], tmp_path / f"{number}.ledger") for number, each in enumerate(streamers)]
    with largest_size(tmp_path / "blocks") as largest:
        await asyncio.gather(*(each.read(replace(PLAN, seed=number)) for number, each in enumerate(readers)))

    assert 0.5 * limit < largest() <= limit
    for each in readers:
        assert_exactly_once(each)


def cut_short(content: bytes) -> bytes:
    return content[: len(content) // 2]


def garbage(content: bytes) -> bytes:
    return np.random.default_rng(1).bytes(len(content))


@pytest.mark.parametrize(
    ("spoil", "options"),
    [
        pytest.param(garbage, (), id="garbage, with a cache"),
        pytest.param(cut_short, ("--cache-bytes", "0"), id="cut short, no cache", marks=pytest.mark.slow),
    ],
)
async def test_spoilt_object_is_named_to_the_reader(
    s3: S3Server,
    packed: Callable[[int], str],
    start: Start,
    spoil: Callable[[bytes], bytes],
    options: Sequence[str],
) -> None:
    """Every batch before it came; the one that needs it is DATA_LOSS, with the object's name and the bytes in it."""
    place = await asyncio.to_thread(packed, 4)
    streamer = await start(place, *options)
    index = s3.get(f"{place}/index.json").decode()
    name = next(line.split('"')[3] for line in index.splitlines() if '"file": "train-00002' in line)
    whole = s3.get(f"{place}/{name}")
    s3.put(f"{place}/{name}", spoil(whole))
    try:
        async with SampleClient(streamer.address) as client, aclosing(client.batches(PLAN)) as batches:
            with pytest.raises(ReaderError, match=rf"DATA_LOSS.*: {name}, bytes \d+-\d+: expected"):
                async for _ in batches:
                    pass
    finally:
        s3.put(f"{place}/{name}", whole)

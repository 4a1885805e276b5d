"""One bit turned over, anywhere between a disk and a reader: noticed, and never delivered."""

import asyncio
import random
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import aclosing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protos.streamer.v1 import sample_service_pb2 as pb
from streamer.client import Batch, Plan, Remainder, Retry, SampleClient
from streamer.errors import (
    DataChangedError,
    DataError,
    RefusedError,
    SampleCorruptError,
    UnreachableError,
)
from streamer.reading import replica
from streamer.server import StreamerServer
from streamer.settings import StreamerSettings
from streamer.sources import datasets, idx, memory
from streamer.sources.objects import ObjectStore
from streamer.sources.packing import StoreTarget
from streamer.sources.places import Reading, open_dataset
from streamer.sources.split import Dataset, MemorySplit
from streamer.sources.tally import Tally
from tests.faults.flipping import Messages, replacing
from tests.streamer.packed import flip as flipped
from tests.streamer.packed import random_split, write_packed
from tests.streamer.relay import Relay
from tests.streamer.storage import S3Server
from tests.tcp import TcpProxy, Way, flip

ROOT = Path(__file__).parents[2]
TRANSFORM = "augment-v1(rotate=10,shift=2)"
# So few samples that what is not pixels is flipped as often, and so little credit that it is granted many times.
PLAN = Plan(dataset="mnist", seed=5, epoch=3, batch_size=8, world_size=3, rank=1, transform=TRANSFORM)
NUM_BATCHES = 3
WINDOW_BYTES, RANGE_BYTES = 300, 300
SETTINGS = StreamerSettings(port=0, metrics_port=0, transform_workers=0, idle_seconds=5)
QUICK = Retry(
    first_delay_seconds=0.001, max_delay_seconds=0.01, stall_seconds=0.5, first_batch_seconds=60, next_batch_seconds=60
)
UNARY_SECONDS = 1.0
# A refusal in mid-stream waits half a second for what the reader has under way.
PATIENT = replace(QUICK, stall_seconds=5)


def split(name: str, seed: int) -> MemorySplit:
    rng = np.random.default_rng(seed)
    return MemorySplit(name, rng.integers(0, 256, (60, 4, 4), dtype=np.uint8), (np.arange(60) % 10).astype("u1"), 10)


# One bit makes one name another's.
DATA = [
    Dataset("mnist", (), {"train": split("train", 0), "traio": split("traio", 1)}),
    Dataset("mnisu", (), {"train": split("train", 2)}),
]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A question that arrives as a longer one waits for the rest of it: 10 s each time."""
    monkeypatch.setattr(replica, "_UNARY_SECONDS", UNARY_SECONDS)


def streamer() -> StreamerServer:
    return StreamerServer(SETTINGS, DATA)


@pytest.fixture
async def server() -> AsyncIterator[StreamerServer]:
    async with streamer() as server:
        yield server


async def read(addresses: str | Sequence[str], plan: Plan = PLAN, *, retry: Retry = QUICK) -> list[Batch]:
    async with SampleClient(addresses, retry=retry, window_bytes=WINDOW_BYTES, range_bytes=RANGE_BYTES) as client:
        return [batch async for batch in client.batches(plan)]


def content(batches: Sequence[Batch]) -> list[tuple[Any, ...]]:
    """Return all that a trainer sees."""
    return [
        (
            each.position,
            each.next_position,
            each.end_of_epoch,
            each.indices.tolist(),
            each.labels.tolist(),
            each.images.shape,
            each.images.dtype,
            each.images.tobytes(),
        )
        for each in batches
    ]


Place = tuple[Way, int, int]
"""Which way, which byte of all that go there, and which bit of it."""


async def in_turns(trial: Callable[[Way, int, int], Awaitable[None]], places: Sequence[Place]) -> None:
    """Try all of them, some at a time: those that wait for a stalled call cost nothing."""
    turn = asyncio.Semaphore(8)

    async def one(place: Place) -> None:
        async with turn:
            await trial(*place)

    await asyncio.gather(*(one(place) for place in places))


FLIPS_OF_A_PROCESS = 60
QUICK_AND_SLOW = [pytest.param(60, id="quick"), pytest.param(4000, id="many", marks=[pytest.mark.slow])]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("num_flips", QUICK_AND_SLOW)
async def test_bit_flipped_in_a_message_changes_nothing_of_the_epoch(server: StreamerServer, num_flips: int) -> None:
    """Any bit of any request and any answer, gRPC's five bytes in front of each included."""
    messages = Messages()
    async with TcpProxy(server.address, messages) as proxy:
        truth = content(await read(proxy.address))
    assert len(truth) == NUM_BATCHES
    chance = random.Random(num_flips)

    async def trial(way: Way, byte: int, bit: int) -> None:
        async with TcpProxy(server.address, Messages(way, byte, bit)) as proxy:
            assert content(await read(proxy.address)) == truth, f"bit {bit} of byte {byte} {way.value}"

    places = [
        (way, chance.randrange(messages.seen[way]), chance.randrange(8))
        for way in chance.choices(list(Way), k=num_flips)
    ]
    await in_turns(trial, places)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "seed",
    [10, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(4000 // FLIPS_OF_A_PROCESS) if seed != 10)],
)
def test_bit_flipped_anywhere_in_a_connection_is_never_delivered(seed: int) -> None:
    """
    In processes of their own, as some damaged headers crash gRPC itself (seen with grpcio 1.85).

    A wrong path does so now and then, an error code of GOAWAY that it does not know each time. Who is dead delivers
    nothing: the others go on.
    """
    tried: set[int] = set()
    for _ in range(3):
        program = f"import asyncio; from {__name__} import read_damaged; asyncio.run(read_damaged({seed}, {tried}))"
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
        tried |= {int(number) for number in re.findall(r"^flip (\d+)$", done.stdout, re.MULTILINE)}
        if -done.returncode not in (signal.SIGSEGV, signal.SIGABRT):
            break

    # Three crashes in sixty are not now and then.
    assert done.returncode == 0, done.stderr


async def read_damaged(seed: int, tried: Collection[int]) -> None:
    """
    Any bit of HTTP/2: one reader has this replica alone and may fail, another has a second replica and may not.

    Prints the number of each flip when it begins; those tried before are left out. A server of its own for each:
    grpc.aio stops taking calls when the path of one is no UTF-8.
    """
    replica._UNARY_SECONDS = UNARY_SECONDS
    async with streamer() as well, TcpProxy(well.address) as proxy:
        truth = content(await read(proxy.address))
        size = dict(proxy.passed)
        chance, num_flips = random.Random(seed), FLIPS_OF_A_PROCESS
        failures: list[str] = []

        async def trial(way: Way, byte: int, bit: int) -> None:
            print("flip", numbers[way, byte, bit], flush=True)
            async with streamer() as server, TcpProxy(server.address, flip(way, byte, bit)) as proxy:
                try:
                    assert content(await read(proxy.address)) == truth
                except (UnreachableError, RefusedError, SampleCorruptError) as error:
                    failures.append(str(error))
            async with streamer() as server, TcpProxy(server.address, flip(way, byte, bit)) as proxy:
                assert content(await read([proxy.address, well.address])) == truth

        places = [
            # No highest bit to the server: a path with one is no UTF-8, and with that grpc.aio takes no more calls. A
            # process ends then, as its own tests show; several such servers in this one make gRPC crash.
            (way, chance.randrange(size[way]), chance.randrange(7 if way is Way.THERE else 8))
            for way in chance.choices(list(Way), k=num_flips)
        ]
        numbers = {place: number for number, place in enumerate(places)}
        await in_turns(trial, [place for place in places if numbers[place] not in tried])

    # Those that end the server: as many as the path's share of all bytes.
    assert len(failures) <= max(5, num_flips // 30), failures


# What a checksum does not cover


def changed(**fields: Any) -> Callable[[pb.Batch], None]:
    def change(batch: pb.Batch) -> None:
        for name, value in fields.items():
            if isinstance(value, list):
                getattr(batch, name)[:] = value
            else:
                setattr(batch, name, value)

    return change


@pytest.mark.parametrize("number", range(NUM_BATCHES))
@pytest.mark.parametrize(
    "lie",
    [
        changed(end_of_epoch=True),
        changed(end_of_epoch=False),
        changed(draining=True),
        changed(image_shape=[4, 5]),
        changed(image_shape=[4]),
        changed(data_type=pb.DATA_TYPE_FLOAT16),
        changed(data_type=9),
        changed(num_samples=7),
        changed(num_samples=0, images=b"", labels=b"", indices=[], end_of_epoch=True),
        changed(position=0),
        changed(next_position=60),
    ],
    ids=["ends", "goes on", "drains", "wider", "flat", "other type", "no type", "fewer", "closing", "place", "next"],
)
async def test_answer_that_lies_once_costs_another_call_at_most(
    server: StreamerServer, lie: Callable[[pb.Batch], None], number: int
) -> None:
    truth = content(await read(server.address))

    def spoil(call: int, at: int, raw: bytes) -> bytes:
        batch = pb.Batch.FromString(raw)
        if (call, at) == (1, number):
            lie(batch)
        return batch.SerializeToString()

    async with Relay(server.address, spoil) as relay:
        assert content(await read(relay.address)) == truth
        assert relay.num_calls <= 2


def message_of(plan: Plan) -> bytes:
    """Both name the fields alike, and number the remainders alike."""
    return pb.Plan(**{**asdict(plan), "remainder": plan.remainder.value}).SerializeToString()


PINNED = replace(PLAN, fingerprint=DATA[0].splits["train"].fingerprint)


@pytest.mark.parametrize(
    "other",
    [
        {"dataset": "mnisu"},
        {"split": "traio"},
        {"seed": 4},
        {"epoch": 2},
        {"world_size": 2},
        {"rank": 2},
        {"batch_size": 9},
        {"remainder": Remainder.DROP},
        {"transform": TRANSFORM.replace("10", "11")},
        {"transform": TRANSFORM.replace("rotate", "rotatf")},
        {"fingerprint": flipped(PINNED.fingerprint, 77)},
    ],
    ids=str,
)
async def test_request_that_arrives_as_another_one_is_sent_again(server: StreamerServer, other: dict[str, Any]) -> None:
    truth = content(await read(server.address, PINNED))

    change = replacing(Way.THERE, message_of(PINNED), message_of(replace(PINNED, **other)))
    async with TcpProxy(server.address, change) as proxy:
        assert content(await read(proxy.address, PINNED)) == truth
        assert proxy.num_connections == 2


@pytest.mark.parametrize("num_samples", [59, 52, 61])
@pytest.mark.parametrize("num_replicas", [1, 2])
async def test_split_that_is_told_with_another_length_is_asked_for_again(
    server: StreamerServer, num_replicas: int, num_samples: int
) -> None:
    truth = content(await read(server.address))
    right = pb.Split(name="train", num_samples=60).SerializeToString()
    wrong = pb.Split(name="train", num_samples=num_samples).SerializeToString()

    async with TcpProxy(server.address, replacing(Way.BACK, right, wrong)) as proxy:
        assert content(await read([proxy.address] * num_replicas)) == truth


async def test_transform_that_is_not_the_readers_is_data_loss_at_every_attempt(server: StreamerServer) -> None:
    def every(way: Way, before: int, data: bytes) -> bytes:
        return data.replace(b"rotate=10", b"rotate=11") if way is Way.THERE else data

    async with TcpProxy(server.address, every) as proxy:
        with pytest.raises(RefusedError, match=r"request: CRC-32C is .* damaged on its way") as caught:
            await read(proxy.address)
    assert caught.value.status == "DATA_LOSS"


async def test_bit_flipped_in_every_answer_names_the_batch(server: StreamerServer) -> None:
    def spoil(call: int, at: int, raw: bytes) -> bytes:
        batch = pb.Batch.FromString(raw)
        batch.labels = flipped(batch.labels, 3) if call > 1 or at == 2 else batch.labels
        return batch.SerializeToString()

    async with Relay(server.address, spoil) as relay:
        with pytest.raises(SampleCorruptError, match="batch at position 48: CRC-32C") as caught:
            await read(relay.address)
    assert caught.value.position == 48


# On disk


def write_idx(folder: Path) -> None:
    rng = np.random.default_rng(6)
    for prefix, count in (("train", 20), ("t10k", 10)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8) // 64
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(idx.pack(idx.format_images(images)))
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(idx.pack(idx.format_labels(labels)))


async def load(folder: Path) -> Dataset:
    return await memory.load(await datasets.find("mnist", data=folder, cache=folder / "cache", report=print))


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"])
async def test_bit_flipped_in_a_packed_idx_file_is_named_or_none_of_its_samples(tmp_path: Path, name: str) -> None:
    write_idx(tmp_path)
    path, whole = tmp_path / name, (tmp_path / name).read_bytes()
    fingerprint = (await load(tmp_path)).splits["train"].fingerprint
    named: list[str] = []
    # Every bit of the header, where gzip notes time and system, and of the end, where its sums are; and many between.
    bits = {
        *range(8 * 10),
        *range(8 * len(whole) - 64, 8 * len(whole)),
        *random.Random(1).sample(range(8 * len(whole)), 120),
    }
    for bit in sorted(bits):
        path.write_bytes(flipped(whole, bit))
        try:
            found = await load(tmp_path)
        except DataError as error:
            named.append(error.file.name)
        else:
            assert found.splits["train"].fingerprint == fingerprint
    assert set(named) == {name}
    assert len(bits) - len(named) < 80, "time and system, and not much more"


async def test_files_that_change_under_a_streamer_in_memory_change_nothing(tmp_path: Path) -> None:
    write_idx(tmp_path)
    plan = Plan(dataset="mnist", batch_size=8)
    async with StreamerServer(SETTINGS, [await load(tmp_path)]) as server:
        truth = content(await read(server.address, plan))
        for path in sorted(tmp_path.glob("*.gz")):  # noqa: ASYNC240 - nobody waits meanwhile
            path.write_bytes(flipped(path.read_bytes(), 300))
        assert content(await read(server.address, plan)) == truth


async def test_streamer_that_restarts_with_a_changed_pixel_is_refused_by_the_run(tmp_path: Path) -> None:
    """A file without any sum of its own: what the run began with tells."""
    write_idx(tmp_path)
    first = await load(tmp_path)
    packed = tmp_path / "train-images-idx3-ubyte.gz"
    packed.with_suffix("").write_bytes(flipped(idx.unpack(packed.read_bytes(), file=packed.name), 8 * 5000))
    packed.unlink()

    async with StreamerServer(SETTINGS, [await load(tmp_path)]) as server:
        plan = Plan(dataset="mnist", batch_size=8, fingerprint=first.splits["train"].fingerprint)
        with pytest.raises(DataChangedError, match="this replica serves"):
            await read(server.address, plan)


PACKED_PLAN = Plan(dataset="random", seed=2, batch_size=16)


async def open_packed(place: Path | str, cache: Path) -> Dataset:
    reading = Reading(cache=cache, cache_bytes=1 << 20, memory_bytes=0, deadline_seconds=20)
    return await open_dataset("random", str(place), reading, report=print)


async def read_until_refused(address: str) -> tuple[list[Batch], RefusedError | None]:
    delivered: list[Batch] = []
    try:
        async with SampleClient(address, retry=PATIENT) as client, aclosing(client.batches(PACKED_PLAN)) as batches:
            async for batch in batches:
                delivered.append(batch)
    except RefusedError as error:
        return delivered, error
    return delivered, None


@pytest.mark.parametrize("seed", [*range(5), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(5, 20))])
async def test_bit_flipped_in_a_shard_is_data_loss_that_names_it_and_another_replica_helps(
    tmp_path: Path, seed: int
) -> None:
    for name in ("damaged", "whole"):
        await write_packed(tmp_path / name, random_split(size=200))
    damaged, whole = [await open_packed(tmp_path / name, tmp_path / "cache") for name in ("damaged", "whole")]
    async with StreamerServer(SETTINGS, [damaged]) as bad, StreamerServer(SETTINGS, [whole]) as good:
        truth = content(await read(good.address, PACKED_PLAN))
        chance = random.Random(seed)
        shard = chance.choice(sorted((tmp_path / "damaged").glob("*.records")))
        shard.write_bytes(flipped(shard.read_bytes(), chance.randrange(8 * shard.stat().st_size)))
        delivered, error = await read_until_refused(bad.address)
        if error is None:
            # A bit that is none of a sample.
            assert len(delivered) == len(truth)
        else:
            assert (error.status, shard.name in str(error)) == ("DATA_LOSS", True)
        assert content(delivered) == truth[: len(delivered)]
        assert content(await read([bad.address, good.address], PACKED_PLAN, retry=PATIENT)) == truth
    for each in (damaged, whole):
        await each.close()


async def test_bits_flipped_in_the_block_cache_are_fetched_anew(s3: S3Server, tmp_path: Path) -> None:
    """Each block of an epoch is damaged between two epochs; after that, in the object storage itself."""
    url = "s3://samples/random"
    store = ObjectStore(url, deadline_seconds=20, tally=Tally())
    index = await write_packed(StoreTarget(store), random_split(size=200))
    dataset = await open_packed(url, tmp_path / "cache")
    async with StreamerServer(SETTINGS, [dataset]) as server:
        truth = content(await read(server.address, PACKED_PLAN, retry=PATIENT))
        blocks = [path for path in (tmp_path / "cache" / "blocks").iterdir() if path.name != ".usage"]
        for number, path in enumerate(blocks):
            path.write_bytes(flipped(path.read_bytes(), number))
        assert len(blocks) > 10
        assert content(await read(server.address, PACKED_PLAN, retry=PATIENT)) == truth

        shard = index.splits["train"].shards[1].file
        s3.put(f"{url}/{shard}", flipped(s3.get(f"{url}/{shard}"), 5000))
        for path in blocks:
            path.unlink(missing_ok=True)
        delivered, error = await read_until_refused(server.address)
        assert error is not None
        assert (error.status, shard in str(error)) == ("DATA_LOSS", True)
        assert content(delivered) == truth[: len(delivered)]
    await dataset.close()

"""Slices of splits, from a real server to a reader and its ledger."""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from protos import mnist_pb2, mnist_pb2_grpc
from streamer import servicer
from streamer.client import Batch, BatchReader, Plan, SampleClient
from streamer.errors import DataChangedError, RefusedError
from streamer.ledger import Ledger
from streamer.loading import StreamedDataset
from streamer.proof import verify
from streamer.server import StreamerServer
from streamer.settings import StreamerSettings
from streamer.slicing import Slice, find
from streamer.sources import split as sources
from streamer.sources.readahead import Allowance
from streamer.sources.shards import FolderRecords, ShardedSplit
from streamer.sources.split import Dataset, MemoryDataset, MemorySplit, Split
from streamer.sources.tally import Tally
from tests.streamer.packed import random_split, write_packed

TRAINING = Plan(dataset="mnist", split="train[:90%]", seed=7, batch_size=64)
VALIDATION = Plan(dataset="mnist", split="train[90%:]", batch_size=64)


async def read(client: SampleClient, plan: Plan) -> list[Batch]:
    return [batch async for batch in client.batches(plan)]


async def base_indices(client: SampleClient, plan: Plan, batches: list[Batch]) -> NDArray[np.int64]:
    indices = np.concatenate([batch.indices for batch in batches])
    return (await client.split(plan)).base_indices(indices)


# What comes


async def test_two_slices_are_the_split_exactly_once_and_each_sample_the_files_own(
    client: SampleClient, dataset: MemoryDataset
) -> None:
    train, seen = dataset.splits["train"], []
    for plan, size in ((TRAINING, 900), (VALIDATION, 100)):
        batches = await read(client, plan)
        assert sorted(index for batch in batches for index in batch.indices) == list(range(size))
        rows = await base_indices(client, plan, batches)
        assert np.array_equal(np.concatenate([batch.images for batch in batches]), train.images[rows])
        assert np.array_equal(np.concatenate([batch.labels for batch in batches]), train.labels[rows])
        seen.append(rows)

    assert np.array_equal(np.sort(np.concatenate(seen)), np.arange(1000))


async def test_epochs_of_a_slice_differ_in_order_alone(client: SampleClient) -> None:
    first, second = [
        await base_indices(client, plan, await read(client, plan)) for plan in (TRAINING, replace(TRAINING, epoch=1))
    ]

    assert set(first) == set(second)
    assert not np.array_equal(first, second)


async def test_slice_of_everything_is_the_split_itself(client: SampleClient) -> None:
    """Byte for byte, so that a run may go on with the other name."""
    whole = await read(client, replace(TRAINING, split="train"))
    sliced = await read(client, replace(TRAINING, split="train[0%:100%]"))

    assert [batch.indices.tolist() for batch in sliced] == [batch.indices.tolist() for batch in whole]
    assert await client.split(replace(TRAINING, split="train[:]")) == await client.split(
        replace(TRAINING, split="train")
    )


async def test_transforms_of_a_slice_are_the_same_at_every_attempt(client: SampleClient) -> None:
    plan = replace(TRAINING, transform="shift(pixels=3)")
    once, again = [np.concatenate([batch.images for batch in await read(client, plan)]) for _ in range(2)]

    assert np.array_equal(once, again)


async def test_seed_rpc_takes_a_slice(channel: grpc.aio.Channel, dataset: MemoryDataset) -> None:
    call = mnist_pb2_grpc.MnistServiceStub(channel).GetTrainingSamples(mnist_pb2.DataRequest(split="train[90%:]"))
    samples = [sample async for sample in call]

    train = dataset.splits["train"]
    _, part = find("train[90%:]", {"train": train})
    assert part is not None
    rows = part.base_indices(np.arange(100))
    assert [sample.index for sample in samples] == list(range(100))
    assert b"".join(sample.image for sample in samples) == train.images[rows].tobytes()


# Where the samples lie


@pytest.fixture(params=["memory", "memory without a table", "shards", "shards read ahead"])
async def random(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Split]:
    """The samples of ``random_split``, wherever they may lie."""
    memory, place = random_split(), request.param
    if place == "memory without a table":
        monkeypatch.setattr(sources, "_MAX_ROWS", 100)
    if place.startswith("memory"):
        yield memory
        return
    packed = (await write_packed(tmp_path / "packed", memory)).splits["train"]
    with ThreadPoolExecutor(2) as threads:
        records = FolderRecords(tmp_path / "packed", packed, threads=threads, tally=Tally())
        yield ShardedSplit(packed, records, Allowance(1_000_000) if "ahead" in place else None)


async def test_slice_is_the_same_wherever_its_samples_lie(random: Split) -> None:
    memory = random_split()
    plan = Plan(dataset="random", split="train[:-250]", seed=3, batch_size=100)
    async with serving(random) as server, SampleClient(server.address) as client:
        batches = await read(client, plan)
        rows = await base_indices(client, plan, batches)

    assert len(set(rows)) == 750
    assert np.array_equal(np.concatenate([batch.images for batch in batches]), memory.images[rows])
    assert np.array_equal(np.concatenate([batch.labels for batch in batches]), memory.labels[rows])


def serving(split: Split) -> StreamerServer:
    return StreamerServer(StreamerSettings(port=0, metrics_port=0), [Dataset("random", (), {"train": split})])


async def test_two_replicas_serve_one_slice(server: StreamerServer, dataset: MemoryDataset) -> None:
    async with StreamerServer(StreamerSettings(port=0, metrics_port=0), [dataset]) as other:
        async with SampleClient([server.address, other.address], range_bytes=50_000) as client:
            together = await read(client, TRAINING)
        async with SampleClient(other.address) as client:
            alone = await read(client, TRAINING)

    assert [batch.indices.tolist() for batch in together] == [batch.indices.tolist() for batch in alone]


async def test_streamer_keeps_a_bounded_number_of_slices(
    server: StreamerServer, client: SampleClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servicer, "_MAX_SLICES", 2)
    made: list[int] = []
    cut = MemorySplit.sliced

    def sliced(split: MemorySplit, part: Slice) -> MemorySplit:
        made.append(part.stop)
        return cut(split, part)

    monkeypatch.setattr(MemorySplit, "sliced", sliced)
    for stop in (10, 20, 10, 30, 10, 20):
        await read(client, replace(TRAINING, split=f"train[:{stop}]"))

    assert made == [10, 20, 30, 20], "10 was always among the two used last"


# What does not


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ("train[:101%]", r"plan\.split: 'train\[:101%\]': 101% lies outside; -100% to 100% are allowed"),
        ("train[5:5]", r"plan\.split: 'train\[5:5\]' is empty"),
        ("train[5]", r"plan\.split: 'train\[5\]' is no slice; allowed are train\[:90%\]"),
        ("dev[:90%]", r"plan\.split: 'dev\[:90%\]' is no split; allowed are train and test"),
    ],
)
async def test_bad_slice_is_refused_by_name_on_both_sides(
    client: SampleClient, channel: grpc.aio.Channel, split: str, words: str
) -> None:
    with pytest.raises(RefusedError, match=words) as refused:
        await read(client, replace(TRAINING, split=split))
    call = mnist_pb2_grpc.MnistServiceStub(channel).GetTrainingSamples(mnist_pb2.DataRequest(split=split))
    with pytest.raises(grpc.aio.AioRpcError, match=words.removeprefix(r"plan\.")) as told:
        await call.read()

    assert refused.value.status == told.value.code().name == "INVALID_ARGUMENT"


async def test_slice_of_other_data_is_refused(client: SampleClient, dataset: MemoryDataset) -> None:
    """The fingerprint of the whole does not stand for that of a part."""
    whole = dataset.splits["train"].fingerprint
    with pytest.raises(DataChangedError, match="this replica serves"):
        await read(client, replace(TRAINING, fingerprint=whole))

    part = (await client.split(TRAINING)).fingerprint
    assert await read(client, replace(TRAINING, fingerprint=part))


# Proof


async def test_ledger_proves_a_slice_and_finds_what_is_missing(client: SampleClient, tmp_path: Path) -> None:
    info = await client.split(TRAINING)
    path, plan = tmp_path / "reader.ledger", replace(TRAINING, fingerprint=info.fingerprint)
    with Ledger(path) as ledger:
        delivery = ledger.begin(plan, num_samples=info.num_samples)
        for batch in await read(client, plan):
            delivery.record(batch)
            before = verify([path])
            delivery.commit(batch.next_position)

    assert before.lost == 900 % 64, "the last batch was not committed then"
    assert verify([path]).is_clean
    assert verify([path]).committed == 900


async def test_training_job_reads_a_slice_and_goes_on_with_it(server: StreamerServer, tmp_path: Path) -> None:
    path = tmp_path / "rank.ledger"

    def life(state: dict[str, Any] | None, *, num_batches: int) -> dict[str, Any]:
        with StreamedDataset(server.address, TRAINING, ledger=path, window_bytes=1) as dataset:
            if state is not None:
                dataset.load_state(state)
            for batch, _ in zip(dataset, range(num_batches), strict=False):
                dataset.commit(batch)
            return dataset.state()

    state = await asyncio.to_thread(life, None, num_batches=5)
    assert (state["position"], state["plan"]["split"]) == (5 * 64, "train[:90%]")
    await asyncio.to_thread(life, state, num_batches=1000)

    verdict = verify([path])
    assert verdict.is_clean
    assert verdict.committed == 900


async def test_plain_reader_reads_a_slice(server: StreamerServer) -> None:
    def work() -> int:
        return sum(len(batch.labels) for batch in BatchReader(server.address, VALIDATION, window_bytes=1))

    assert await asyncio.to_thread(work) == 100

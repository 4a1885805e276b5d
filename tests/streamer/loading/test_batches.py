"""What a training loop gets from a streamer, which share of it, and where it goes on."""

import contextlib
import json
import pickle
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from streamer.client import Batch, BatchReader, Remainder
from streamer.errors import ReaderError, StreamerError
from streamer.loading import StreamedDataset, StreamedLoader, TensorBatch
from streamer.proof import verify
from streamer.reading.cursor import StateError
from tests.streamer.loading.conftest import NOWHERE, NUM_SAMPLES, PLAN, facts, indices, loader, tensors

pytestmark = pytest.mark.timeout(300)


# What comes


def test_plain_loop_gives_the_epoch_as_tensors(streamer: str) -> None:
    batches = list(StreamedDataset(streamer, PLAN))

    assert sorted(indices(batches)) == list(range(NUM_SAMPLES))
    assert {(batch.images.dtype, batch.labels.dtype) for batch in batches} == {(torch.uint8, torch.int64)}
    assert batches[0].images.shape == (3, 28, 28)
    # Each of the images is filled with 25 times its label.
    assert all(torch.equal(batch.images[:, 0, 0], (batch.labels * 25).to(torch.uint8)) for batch in batches)
    assert [batch.end_of_epoch for batch in batches] == [False] * 13 + [True]


@pytest.mark.parametrize("remainder", Remainder)
@pytest.mark.parametrize(("world_size", "rank", "start"), [(1, 0, 0), (2, 1, 0), (3, 2, 5), (4, 3, 36)])
def test_workers_give_the_very_batches_in_the_very_order(
    streamer: str, world_size: int, rank: int, start: int, remainder: Remainder
) -> None:
    plan = replace(PLAN, world_size=world_size, rank=rank, remainder=remainder)
    dataset = StreamedDataset(streamer, plan)
    state = {**dataset.state(), "position": start}
    dataset.load_state(state)
    alone = [facts(batch) for batch in dataset]
    dataset.load_state(state)

    assert [facts(batch) for batch in loader(dataset, 2, multiprocessing_context="fork")] == alone


def test_spawned_workers_give_the_same(streamer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[3])
    dataset = StreamedDataset(streamer, PLAN)
    alone = [facts(batch) for batch in dataset]

    assert [facts(batch) for batch in StreamedLoader(dataset, num_workers=1, multiprocessing_context="spawn")] == alone


@pytest.mark.parametrize("num_workers", [0, 2])
def test_transformed_pixels_come_as_they_are(streamer: str, num_workers: int) -> None:
    plan = replace(PLAN, transform="crop(height=20,width=10,at=centre)|normalise(mean=0,std=1)")
    batches = list(StreamedLoader(StreamedDataset(streamer, plan), num_workers=num_workers))

    assert {(batch.images.dtype, batch.images.shape[1:]) for batch in batches} == {(torch.float32, (20, 10))}
    torch.testing.assert_close(batches[0].images[:, 0, 0], batches[0].labels.float() * 25 / 255)


def test_tensors_lie_where_the_message_came(streamer: str) -> None:
    with BatchReader(streamer, PLAN) as reader:
        told = next(iter(reader))
        batch = tensors(told)

        assert not told.images.flags.writeable
        assert batch.images.data_ptr() == told.images.ctypes.data
    batch.images.add_(1)


def test_batch_goes_to_a_device(streamer: str) -> None:
    (batch, *_) = StreamedDataset(streamer, PLAN)
    moved = batch.to("meta")

    assert (moved.images.device.type, moved.labels.device.type) == ("meta", "meta")
    assert (moved.position, moved.images.shape) == (batch.position, batch.images.shape)
    assert moved.timings == batch.timings


def test_batch_that_went_to_a_device_leaves_nothing_here() -> None:
    images = np.zeros((1, 28, 28), np.uint8)
    labels = np.zeros(1, np.int64)
    batch = tensors(Batch(images, labels, labels, position=0, next_position=1, end_of_epoch=True))
    left = weakref.ref(images)
    moved = batch.to("meta")
    del batch, images

    assert left() is None
    assert moved.images.shape == (1, 28, 28)


def test_timings_are_those_of_the_arrival(streamer: str) -> None:
    (sent, *_) = StreamedDataset(streamer, PLAN)
    batch: TensorBatch = pickle.loads(pickle.dumps(sent))
    told = batch.timings
    time.sleep(0.01)

    assert batch.timings == told
    assert told.decode_seconds > sent.timings.decode_seconds > 0


def test_pinning_pins_the_tensors_and_keeps_the_rest(streamer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Page-locked memory takes a GPU's driver.
    pinned: list[torch.Tensor] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    (batch, *_) = StreamedDataset(streamer, PLAN)
    # As a DataLoader does it, which leaves alone what it does not know.
    done = torch.utils.data._utils.pin_memory.pin_memory(batch)  # type: ignore[no-untyped-call]  # torch leaves it untyped

    assert isinstance(done, TensorBatch)
    assert [id(done.images), id(done.labels)] == [id(tensor) for tensor in pinned]
    assert (facts(done), done.origin, done.timings) == (facts(batch), batch.origin, batch.timings)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory takes a GPU")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_loader_pins_what_comes(streamer: str, num_workers: int) -> None:
    dataset = StreamedDataset(streamer, PLAN)
    alone = [facts(batch) for batch in dataset]
    batches = list(StreamedLoader(dataset, num_workers=num_workers, pin_memory=True))

    assert all(batch.images.is_pinned() and batch.labels.is_pinned() for batch in batches)
    assert [facts(batch) for batch in batches] == alone


def test_batch_too_large_to_be_copied_is_shared(streamer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (batch, *_) = StreamedDataset(streamer, PLAN)
    monkeypatch.setattr("streamer.loading._SMALL_BYTES", 100)
    kinds = [type(value) for value in batch.__reduce__()[1][:2]]

    assert kinds == [torch.Tensor, np.ndarray]
    assert facts(pickle.loads(pickle.dumps(batch))) == facts(batch)


# Whose share


def test_rank_is_torchruns(streamer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    seen = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        seen.append(indices(list(StreamedDataset(streamer, PLAN))))

    assert sorted(seen[0] + seen[1]) == list(range(NUM_SAMPLES))
    assert len(seen[0]) == len(seen[1])


def test_rank_of_torch_distributed_reaches_spawned_workers(streamer: str, tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        dataset = StreamedDataset(streamer, replace(PLAN, rank=1, world_size=2))
        sent: StreamedDataset = pickle.loads(pickle.dumps(dataset))
        assert dataset.state()["plan"]["world_size"] == 1
    finally:
        torch.distributed.destroy_process_group()

    assert sent.state()["plan"]["world_size"] == 1
    assert dataset.state()["plan"]["world_size"] == 2


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"RANK": "0"}, "WORLD_SIZE in the environment: missing"),
        ({"WORLD_SIZE": "2"}, "RANK in the environment: missing"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK in the environment: 'x'; a whole number from 0 on"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK in the environment: '-1'; a whole number from 0 on"),
        ({"RANK": "1_0", "WORLD_SIZE": "20"}, "RANK in the environment: '1_0'; a whole number from 0 on"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE in the environment: '0'; a whole number from 1 on"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK in the environment: 2; 0 to 1 are allowed"),
    ],
)
def test_environment_that_makes_no_sense_is_named(
    monkeypatch: pytest.MonkeyPatch, told: dict[str, str], words: str
) -> None:
    for name, value in told.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(ReaderError, match=words):
        list(StreamedDataset(NOWHERE, PLAN))


def test_reader_that_is_not_distributed_has_the_plans_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")

    assert StreamedDataset(NOWHERE, PLAN).state()["plan"]["world_size"] == 8
    assert StreamedDataset(NOWHERE, PLAN, distributed=False).state()["plan"]["world_size"] == 1


# Where it begins


def test_each_epoch_has_its_own_order(streamer: str) -> None:
    dataset = StreamedDataset(streamer, PLAN)
    orders = []
    for epoch in range(2):
        dataset.set_epoch(epoch)
        orders.append(indices(list(dataset)))

    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_goes_on_from_its_state_with_another_batch_size(streamer: str, num_workers: int) -> None:
    dataset = StreamedDataset(streamer, PLAN)
    seen = []
    for batch in StreamedLoader(dataset, num_workers=num_workers):
        seen.append(batch)
        dataset.commit(batch)
        if len(seen) == 5:
            break
    saved = json.loads(json.dumps(dataset.state()))

    resumed = StreamedDataset(streamer, replace(PLAN, batch_size=4))
    resumed.load_state(saved)
    rest = list(StreamedLoader(resumed, num_workers=num_workers))
    assert sorted(indices(seen + rest)) == list(range(NUM_SAMPLES))
    assert rest[0].position == saved["position"] == 15


def test_batches_received_and_not_committed_come_again(streamer: str) -> None:
    dataset = StreamedDataset(streamer, PLAN)
    first, second, *_ = list(dataset)
    dataset.commit(first)

    assert facts(next(iter(dataset))) == facts(second)


def test_loop_over_all_epochs_skips_what_was_trained_on(streamer: str) -> None:
    saved = StreamedDataset(streamer, PLAN)
    for batch in saved:
        saved.commit(batch)
    dataset = StreamedDataset(streamer, PLAN)
    dataset.load_state(saved.state())
    read = {}
    for epoch in range(3):
        dataset.set_epoch(epoch)
        read[epoch] = 0
        for batch in dataset:
            read[epoch] += 1
            dataset.commit(batch)
        # Never goes back, not even where there was nothing to read.
        assert dataset.state()["epoch"] == max(1, epoch + 1)

    assert read == {0: 0, 1: 14, 2: 14}


def test_state_after_the_last_batch_is_the_next_epoch(streamer: str) -> None:
    dataset = StreamedDataset(streamer, PLAN)
    *_, last = list(dataset)
    dataset.commit(last, step=14)
    state = dataset.state()

    assert (state["epoch"], state["position"], state["step"]) == (1, 0, 14)
    assert {batch.origin.plan.epoch for batch in dataset} == {1}


# 40 samples: a global batch of 39, and one sample that is rank 0's.
UNEVEN = replace(PLAN, world_size=39, rank=38, batch_size=1)


def place(dataset: StreamedDataset) -> tuple[int, int]:
    return dataset.state()["epoch"], dataset.state()["position"]


def test_rank_without_a_share_of_the_last_batch_leaves_it_to_the_others(streamer: str) -> None:
    first, last = StreamedDataset(streamer, replace(UNEVEN, rank=0)), StreamedDataset(streamer, UNEVEN)
    (only,) = last
    last.commit(only)
    batches = iter(first)
    first.commit(next(batches))
    after_one = place(first), place(last)
    first.commit(next(batches))

    assert only.end_of_epoch
    assert after_one == ((0, 39), (0, 39))
    assert (place(first), place(last)) == ((1, 0), (0, 39))


@pytest.mark.parametrize("is_told", [False, True])
def test_rank_without_a_share_goes_on_with_the_next_epoch(streamer: str, is_told: bool) -> None:
    dataset, seen = StreamedDataset(streamer, UNEVEN), []
    for epoch in range(3):
        if is_told:
            dataset.set_epoch(epoch)
        for batch in dataset:
            seen.append((epoch, batch.origin.plan.epoch, place(dataset)))
            dataset.commit(batch)

    assert seen == [(0, 0, (0, 0)), (1, 1, (0, 39)), (2, 2, (1, 39))]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_pass_that_has_nothing_for_a_rank_takes_its_turn(streamer: str, tmp_path: Path, num_workers: int) -> None:
    """Rank 0 trains on the epoch's last sample meanwhile, by a count of steps that both share."""
    paths = []
    for rank in (0, 38):
        paths.append(tmp_path / f"rank-{rank}")
        with StreamedDataset(streamer, replace(UNEVEN, rank=rank), ledger=paths[-1]) as dataset:
            dataset.load_state({**dataset.state(), "position": 39, "step": 1})
            sizes = []
            for step in (2, 3):
                batches = list(StreamedLoader(dataset, num_workers=num_workers))
                sizes.append(len(batches))
                for batch in batches[:1]:
                    dataset.commit(batch, step=step)
            assert sizes == ([1, 2] if rank == 0 else [0, 1])
            assert place(dataset) == (1, 39)

    assert verify(paths).unexpected == 0


def test_epoch_whose_remainder_is_dropped_is_over_before_it(streamer: str) -> None:
    dataset = StreamedDataset(streamer, replace(UNEVEN, remainder=Remainder.DROP))
    (only,) = dataset
    dataset.commit(only)

    assert (only.next_position, place(dataset)) == (39, (1, 0))


@pytest.mark.parametrize("step", [np.int64(14), torch.tensor(14)])
def test_count_of_numpy_or_torch_is_fit_for_json(streamer: str, step: Any) -> None:
    dataset = StreamedDataset(streamer, PLAN, step=step)
    states = [dataset.state()]
    first, *_ = dataset
    dataset.commit(first, step=step)
    states.append(dataset.state())
    with dataset.committing(first, step=step):
        states.append(dataset.state())

    assert [json.loads(json.dumps(state))["step"] for state in states] == [14] * 3


def test_state_of_another_seed_is_refused_by_name() -> None:
    saved = StreamedDataset(NOWHERE, PLAN).state()

    with pytest.raises(StateError, match=r"plan\.seed"):
        StreamedDataset(NOWHERE, replace(PLAN, seed=8)).load_state(saved)


def test_state_pins_the_data(streamer: str) -> None:
    dataset = StreamedDataset(streamer, PLAN)
    dataset.load_state({**dataset.state(), "fingerprint": "ab" * 32})

    with pytest.raises(StreamerError, match="fingerprint"):
        list(dataset)


def test_epoch_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="epoch: -1; 0 to"):
        StreamedDataset(NOWHERE, PLAN).set_epoch(-1)


# Proof and insight


@pytest.mark.parametrize("num_workers", [0, 2])
def test_ledger_of_a_run_that_was_stopped_and_resumed_is_clean(streamer: str, tmp_path: Path, num_workers: int) -> None:
    path, saved, step = tmp_path / "rank-0.ledger", None, 0
    for limit in (5, 20, 1000):
        with StreamedDataset(streamer, PLAN, ledger=path, step=0) as dataset:
            if saved is not None:
                dataset.load_state(saved)
                step = saved["step"]
            for epoch in range(2):
                dataset.set_epoch(epoch)
                for batch in StreamedLoader(dataset, num_workers=num_workers):
                    step += 1
                    if step % 4 == 0 or batch.end_of_epoch:
                        with dataset.committing(batch, step=step):
                            saved = dataset.state()
                    if step >= limit:
                        break
                if step >= limit:
                    break
    verdict = verify([path])

    assert (verdict.is_clean, verdict.committed, verdict.epochs) == (True, 2 * NUM_SAMPLES, 2)
    assert verdict.recovered > 0


def test_plain_loader_with_workers_keeps_a_ledger_of_commits(streamer: str, tmp_path: Path) -> None:
    with StreamedDataset(streamer, PLAN, ledger=tmp_path / "ledger", step=0) as dataset:
        for step, batch in enumerate(loader(dataset, 2), 1):
            dataset.commit(batch, step=step)

    assert verify([tmp_path / "ledger"]).is_clean


def test_checkpoint_that_fails_moves_nothing(streamer: str) -> None:
    dataset = StreamedDataset(streamer, PLAN)
    first, *_ = dataset
    with contextlib.suppress(OSError), dataset.committing(first):
        assert dataset.state()["position"] == 3
        raise OSError("disk full")

    assert dataset.state()["position"] == 0


def test_batch_of_other_data_is_not_committed(streamer: str) -> None:
    (other, *_) = StreamedDataset(streamer, replace(PLAN, split="test"))

    with pytest.raises(ReaderError, match="a batch of mnist test"):
        StreamedDataset(streamer, PLAN).commit(other)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_report_tells_what_was_waited_for(streamer: str, num_workers: int) -> None:
    dataset = StreamedDataset(streamer, PLAN)
    started = time.perf_counter()
    for _ in StreamedLoader(dataset, num_workers=num_workers):
        time.sleep(0.01)
    elapsed = time.perf_counter() - started
    report = dataset.report()

    assert 14 * 0.01 < report.total_seconds < elapsed
    assert "of the time was spent waiting for data" in str(report)


def test_plain_loader_with_workers_has_nothing_to_report(streamer: str) -> None:
    dataset = StreamedDataset(streamer, PLAN)
    for batch in loader(dataset, 1):
        dataset.commit(batch)

    with pytest.raises(ReaderError, match="StreamedLoader"):
        dataset.report()

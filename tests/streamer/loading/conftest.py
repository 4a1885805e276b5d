"""A streamer to train from, and the end of each test: no thread and no process may be left."""

import contextlib
import gc
import multiprocessing
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from streamer.client import Batch, Plan
from streamer.errors import ReaderError
from streamer.loading import StreamedDataset, TensorBatch, _tensors
from streamer.reading.division import Division
from streamer.reading.recording import Origin
from tests.streamers import streaming

NUM_SAMPLES = 40
PLAN = Plan(dataset="mnist", seed=7, batch_size=3)
NOWHERE = "127.0.0.1:1"


@pytest.fixture(scope="session")
def streamer(tiny_mnist: Path) -> Iterator[str]:
    with streaming(f"mnist={tiny_mnist}") as address:
        yield address


@pytest.fixture(autouse=True, scope="module")
def quick_collections() -> Iterator[None]:
    """What is there already, torch and all, is not looked through again after each test and before each fork."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No thread and no process outlives a test."""
    yield
    gc.collect()  # a DataLoader ends its workers when it is collected
    assert [thread.name for thread in threading.enumerate() if thread.name == "sluice-batch-reader"] == []
    assert multiprocessing.active_children() == []


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


Facts = tuple[int, int, bool, bytes, bytes, bytes]


def facts(batch: TensorBatch) -> Facts:
    images, labels = batch.images.numpy().tobytes(), batch.labels.numpy().tobytes()
    return batch.position, batch.next_position, batch.end_of_epoch, batch.indices.tobytes(), labels, images


def indices(batches: list[TensorBatch]) -> list[int]:
    return [int(index) for batch in batches for index in batch.indices]


def tensors(batch: Batch) -> TensorBatch:
    division = Division(PLAN, NUM_SAMPLES, 0)
    (leg,) = division.legs(0, 1)
    return _tensors(batch, leg, division, Origin(plan=PLAN, num_samples=NUM_SAMPLES, start_position=0))


def loader(dataset: StreamedDataset, num_workers: int, **options: Any) -> DataLoader[TensorBatch]:
    return DataLoader(dataset, batch_size=None, num_workers=num_workers, **options)


@contextlib.contextmanager
def refused(words: str) -> Iterator[None]:
    """As pytest.raises; a DataLoader that only its error's traceback holds takes 5 s to end workers once collected."""
    with pytest.raises(ReaderError, match=words) as caught:
        yield
    traceback.clear_frames(caught.tb)

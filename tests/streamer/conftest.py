"""A streamer with a small synthetic data set, and a client of it."""

from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from streamer.client import SampleClient
from streamer.server import StreamerServer
from streamer.settings import StreamerSettings
from streamer.sources import datasets, idx, memory
from streamer.sources.split import Dataset, MemoryDataset, MemorySplit

SIZES = {"train": 1000, "t10k": 100}


@pytest.fixture
def mnist_folder(tmp_path: Path) -> Path:
    """Four IDX files of random pixels: 1,000 samples to train on, 100 to test."""
    folder = tmp_path / "mnist"
    folder.mkdir()
    rng = np.random.default_rng(2)
    for prefix, size in SIZES.items():
        images = rng.integers(0, 256, (size, 28, 28), dtype=np.uint8)
        labels = rng.integers(0, 10, size, dtype=np.uint8)
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(idx.pack(idx.format_images(images)))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx.format_labels(labels))
    return folder


@pytest.fixture
async def dataset(mnist_folder: Path, tmp_path: Path) -> MemoryDataset:
    """The folder's samples in memory."""
    files = await datasets.find("mnist", data=mnist_folder, cache=tmp_path / "cache", report=print)
    return await memory.load(files)


@pytest.fixture
async def server(dataset: Dataset) -> AsyncIterator[StreamerServer]:
    """A streamer on a free port."""
    async with StreamerServer(StreamerSettings(port=0, metrics_port=0), [dataset]) as server:
        yield server


@pytest.fixture
async def client(server: StreamerServer) -> AsyncIterator[SampleClient]:
    """A client of it."""
    async with SampleClient(server.address) as client:
        yield client


@pytest.fixture
async def channel(server: StreamerServer) -> AsyncIterator[grpc.aio.Channel]:
    """A bare channel to it, for requests that our own client would not send."""
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield channel


@pytest.fixture
async def large() -> AsyncIterator[StreamerServer]:
    """A streamer of 60,000 samples, several times what HTTP/2 takes on its way to a reader that does not read."""
    images = np.random.default_rng(1).integers(0, 256, (60_000, 28, 28), dtype=np.uint8)
    split = MemorySplit("train", images, np.zeros(60_000, np.uint8), num_classes=10)
    async with StreamerServer(
        StreamerSettings(port=0, metrics_port=0), [Dataset("mnist", (), {"train": split})]
    ) as server:
        yield server


@pytest.fixture
def dead_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on machines whose only way out is a proxy; this one takes no connection."""
    for name in ("grpc_proxy", "https_proxy", "no_grpc_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")

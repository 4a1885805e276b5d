"""The whole line as its user starts it: `sluice up` without a model, then `sluice train` into it."""

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gateway.client import ImageClient
from rpc.settings import cache_folder
from serving.installation import install
from streamer.client import Plan, SampleClient
from streamer.sources import small
from streamer.sources.declarations import declaration_of
from tests.line.processes import Line, Split, free_ports, read_until, start_up


@pytest.fixture(scope="session")
def triton_installed() -> None:
    """Install Triton once, where its progress is seen."""
    asyncio.run(install(cache_folder(), print))


@pytest.fixture(scope="session")
def small_mnist() -> Path:
    """The 5,000 real images, also on a machine that has or could fetch all 70,000."""
    known = declaration_of("mnist")
    folder = cache_folder() / "datasets" / "mnist-small"
    assert known.small is not None
    if not folder.is_dir():
        asyncio.run(small.make(folder, known, known.small))
    return folder


@pytest.fixture(scope="session")
def running_line(tmp_path_factory: pytest.TempPathFactory, triton_installed: None, small_mnist: Path) -> Iterator[Line]:
    """`sluice up` on free ports in an empty folder; ends with Ctrl-C."""
    folder, ports = tmp_path_factory.mktemp("line"), free_ports()
    with start_up(folder, ports, "--data", str(small_mnist)) as process:
        try:
            yield Line(process, ports, folder, read_until(process, "Ctrl-C stops"))
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                process.communicate(timeout=60)


@pytest.fixture(scope="session")
def line(running_line: Line) -> Line:
    """The line with a model that was trained through it."""
    running_line.train()

    async def serving() -> None:
        async with ImageClient(running_line.address("gateway")) as client:
            await client.wait_ready(timeout_seconds=60)

    asyncio.run(serving())
    return running_line


@pytest.fixture(scope="session")
def digits(running_line: Line) -> Split:
    """The held-out images, read from the streamer."""

    async def read() -> Split:
        async with SampleClient(running_line.address("streamer")) as client:
            plan = Plan(dataset="mnist", split="test", batch_size=500)
            batches = [batch async for batch in client.batches(plan)]
        return Split(
            images=np.concatenate([batch.images for batch in batches]),
            labels=np.concatenate([batch.labels for batch in batches]),
        )

    return asyncio.run(read())

"""A gateway in a process of its own, in front of a Triton in this one."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from tests.faults.gateway.process import Gateway
from tests.faults.report import Row, note
from tests.gateway.fake_triton import FakeTriton


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def triton() -> AsyncIterator[FakeTriton]:
    """Of all tests of a file, which leave it as they found it."""
    async with FakeTriton() as server:
        yield server


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(triton: FakeTriton, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    """Of all tests of a file: serving, with the default settings."""
    folder = tmp_path_factory.mktemp("gateway")
    process = Gateway(triton.address, folder / "gateway.log", "--model-repository", str(folder))
    try:
        await process.start()
        yield process
    finally:
        process.close()


@pytest.fixture
def start_gateway(triton: FakeTriton, tmp_path: Path) -> Callable[..., Gateway]:
    """Make one more gateway, with the options given; to be started and closed by the test."""

    def make(*options: str) -> Gateway:
        return Gateway(triton.address, tmp_path / "gateway.log", "--model-repository", str(tmp_path), *options)

    return make


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[..., Row]:
    """
    Say which row of docs/faults.md a test is.

    ``row = measured("P5", fault="...", promised="...")`` before anything that may skip or fail; figures are added as
    they are found, ``row.add("CPU", "0.04 s")``. Asked again, it is the same row.
    """
    rows: dict[str, Row] = {}

    def row(name: str, *, fault: str, promised: str) -> Row:
        if name not in rows:
            rows[name] = note(request.node, name, fault, promised)
        return rows[name]

    return row

"""Three streamers of 60,000 samples, and a table of how long readers waited after each fault."""

import signal
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.processes import Streamer
from tests.faults.reading import write_samples

_WAITS = pytest.StashKey[dict[str, list[float]]]()


class Waits:
    """Notes how long a reader waited; the table is printed when all tests are done."""

    def __init__(self, noted: dict[str, list[float]]) -> None:
        self._noted = noted

    def note(self, fault: str, seconds: float) -> None:
        self._noted.setdefault(fault, []).append(seconds)


@pytest.fixture
def waits(pytestconfig: pytest.Config) -> Waits:
    """Where to note the time to the next batch after a fault."""
    return Waits(pytestconfig.stash.setdefault(_WAITS, {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    noted = config.stash.get(_WAITS, {})
    if not noted:
        return
    terminalreporter.section("time to the next batch after a fault, in seconds")
    width = max(map(len, noted))
    terminalreporter.write_line(f"{'':{width}}  faults  median     max")
    for fault, seconds in noted.items():
        median, longest = statistics.median(seconds), max(seconds)
        terminalreporter.write_line(f"{fault:{width}}  {len(seconds):6}  {median:6.2f}  {longest:6.2f}")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """IDX files of 60,000 images of 28x28, as a streamer's ``--datasets`` takes them."""
    folder = tmp_path_factory.mktemp("digits")
    write_samples(folder)
    return f"digits={folder}"


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """As many images of 4x4."""
    folder = tmp_path_factory.mktemp("small")
    write_samples(folder, side=4)
    return f"digits={folder}"


@pytest.fixture(scope="session")
def fleet(data: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Streamer]]:
    """Three replicas, started once."""
    logs = tmp_path_factory.mktemp("logs")
    streamers = [Streamer(data, logs / f"{number}.log") for number in range(3)]
    try:
        for each in streamers:
            each.launch()
        for each in streamers:
            each.wait_ready()
        yield streamers
    finally:
        for each in streamers:
            each.close()


@pytest.fixture
def replicas(fleet: list[Streamer]) -> list[Streamer]:
    """The three, all of them well."""
    dead = [each for each in fleet if not each.is_alive]
    for each in dead:
        each.launch()
    for each in dead:
        each.wait_ready()
    for each in fleet:
        each.send(signal.SIGCONT)
    return fleet


@pytest.fixture
def replica(replicas: list[Streamer]) -> Streamer:
    """One of them."""
    return replicas[0]


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    """Of a reader."""
    return tmp_path / "reader.ledger"

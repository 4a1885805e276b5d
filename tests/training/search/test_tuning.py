"""Searches on a real Ray; their trials only pretend, but die as real ones do."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from training.search.logbook import Logbook, Search, parse

pytest.importorskip("ray", reason="a search needs Ray: pip install 'sluice[tune]'")

TOY = Path(__file__).with_name("toy_search.py")
ROOT = TOY.parents[3]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def search(**budget: int) -> Search:
    content: dict[str, Any] = {
        "name": "toy",
        "budget": {"epochs": 4, **budget},
        "space": {"optim.lr": {"low": 1e-4, "high": 1e-2, "log": True}},
        "resources": {"cpus": 1, "concurrency": 2},
    }
    return parse(content, source="test")


@contextmanager
def started(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(TOY), str(folder), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()


def told(process: subprocess.Popen[str]) -> Iterator[str]:
    assert process.stdout is not None
    return (line.strip() for line in process.stdout)


@pytest.mark.parametrize("torn", [None, "experiment_state-*.json", "searcher-state-*.pkl"])
def test_killed_search_goes_on_without_doing_a_finished_trial_again(tmp_path: Path, torn: str | None) -> None:
    logbook = Logbook.create(tmp_path / "toy", search(trials=8))
    with started(logbook.folder) as process:
        lines = told(process)
        first = {next(lines), next(lines), next(lines)}
        os.kill(process.pid, signal.SIGKILL)
    before = {str(trial.number): trial for trial in logbook.trials() if trial.is_over}
    epochs = {trial.id: _epochs(logbook, trial.id) for trial in before.values()}
    if torn is not None:  # Ray was killed while it wrote
        (file,) = (logbook.folder / "ray").glob(torn)
        file.write_bytes(file.read_bytes()[:-20])
    with started(logbook.folder) as process:
        assert list(told(process))[-1] == "whole"
    after = {str(trial.number): trial for trial in logbook.trials()}

    assert first <= set(before)
    assert len(after) == 8
    assert all(trial.is_over and trial.scores for trial in after.values())
    assert {number: after[number] for number in before} == before
    assert {name: _epochs(logbook, name) for name in epochs} == epochs


def test_killed_worker_costs_what_its_trial_did_since_its_last_checkpoint(tmp_path: Path) -> None:
    logbook = Logbook.create(tmp_path / "toy", search(trials=1, min_epochs=4))
    with started(logbook.folder, "killed") as process:
        assert list(told(process))[-1] == "whole"
    (trial,) = logbook.trials()

    assert (trial.state, trial.failures, trial.error) == ("finished", 1, "its process was killed")
    assert _epochs(logbook, trial.id) == ["1", "2", "3", "4"]


def test_trial_that_fails_twice_is_reported_and_tried_again_on_resume(tmp_path: Path) -> None:
    logbook = Logbook.create(tmp_path / "toy", search(trials=1))
    with started(logbook.folder, "broken") as process:
        assert list(told(process))[-1] == "whole"
    (broken,) = logbook.trials()
    with started(logbook.folder) as process:
        list(told(process))
    (mended,) = logbook.trials()

    assert (broken.state, broken.failures, broken.error) == ("failed", 2, "ValueError: the data is broken")
    assert (mended.id, mended.state, mended.epoch) == (broken.id, "finished", 4)


def test_interrupted_search_stops_and_goes_on(tmp_path: Path) -> None:
    logbook = Logbook.create(tmp_path / "toy", search(trials=6))
    with started(logbook.folder) as process:
        lines = told(process)
        next(lines)
        os.kill(process.pid, signal.SIGINT)
        assert list(lines)[-1] == "stopped"
    with started(logbook.folder) as process:
        assert list(told(process))[-1] == "whole"

    assert [trial.is_over for trial in logbook.trials()] == [True] * 6


def _epochs(logbook: Logbook, name: str) -> list[str]:
    return (logbook.folder / "trials" / name / "epochs").read_text().splitlines()

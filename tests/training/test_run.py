"""A whole run against a real streamer with a tiny data set."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from streamer.client import SplitInfo
from streamer.errors import UnreachableError
from streamer.proof import verify
from training import checkpoint, run
from training.config import BudgetConfig, DataConfig, TrainConfig
from training.errors import TrainingError
from training.evaluate import Evaluation
from training.loop import Step


class Silent:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def started(self, config: TrainConfig, split: SplitInfo, device: torch.device) -> None: ...

    def stepped(self, step: Step, num_samples: int) -> None:
        self.steps.append(step)

    def evaluated(self, evaluation: Evaluation) -> None: ...


@pytest.fixture(scope="module")
def streamer(tiny_mnist: Path) -> Iterator[str]:
    """A streamer in a process of its own: grpc.aio wants one event loop in each."""
    arguments = ["streamer", "--port", "0", "--metrics-port", "0", "--data", str(tiny_mnist)]
    command = [sys.executable, "-m", "sluice", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        words = next(line for line in process.stderr if line.startswith("listening on ")).split()
        yield words[2].rstrip(";")
        process.terminate()
        process.communicate(timeout=30)


def config(streamer: str, dataset: str = "mnist") -> TrainConfig:
    return TrainConfig(
        data=DataConfig(streamer=streamer, dataset=dataset, batch_size=16),
        budget=BudgetConfig(seconds=None, max_epochs=2),
    )


def test_run_leaves_a_checkpoint_and_a_published_version(tmp_path: Path, streamer: str) -> None:
    observer = Silent()
    result = run.train(config(streamer), repository=tmp_path / "models", runs=tmp_path / "runs", observer=observer)
    kept = checkpoint.load(result.folder / "checkpoint")

    assert (tmp_path / "models" / "mnist" / "1" / "model.pt").is_file()
    assert result.card.dataset.num_train == 40
    assert result.card.metrics["test_accuracy"] == result.evaluation.accuracy
    assert (kept.state.step, kept.state.epoch, kept.state.position) == (6, 1, 40)
    assert [step.samples for step in observer.steps] == [16, 32, 40, 56, 72, 80]
    assert (kept.state.data["epoch"], kept.state.data["position"], kept.state.data["step"]) == (2, 0, 6)
    assert 0 < result.stalls.waited_share < 1


def test_runs_ledger_proves_every_epoch(tmp_path: Path, streamer: str) -> None:
    ledger = tmp_path / "run.ledger"
    run.train(config(streamer), repository=tmp_path, runs=tmp_path, observer=Silent(), ledger=ledger)
    verdict = verify([ledger])

    assert (verdict.is_clean, verdict.committed, verdict.epochs) == (True, 80, 2)


def test_run_is_one_process_whatever_surrounds_it(
    tmp_path: Path, streamer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    alone = config(streamer)
    result = run.train(alone, repository=tmp_path / "models", runs=tmp_path / "runs", observer=Silent())

    assert (result.last.samples, result.evaluation.num_samples) == (80, 20)


def test_data_set_the_streamer_does_not_have_is_named(tmp_path: Path, streamer: str) -> None:
    with pytest.raises(TrainingError, match=r"'cifar'.*it has mnist"):
        run.train(config(streamer, "cifar"), repository=tmp_path, runs=tmp_path, observer=Silent())


def test_streamer_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_CONNECT_SECONDS", 0.2)
    with pytest.raises(UnreachableError, match=r"127.0.0.1:1"):
        run.train(config("127.0.0.1:1"), repository=tmp_path, runs=tmp_path, observer=Silent())

"""A whole run against a real streamer with a tiny data set."""

from pathlib import Path

import pytest
import torch

from streamer.client import SplitInfo
from streamer.errors import UnreachableError
from streamer.proof import verify
from tests.streamers import streaming
from training import checkpoint, reading, run
from training.config import BudgetConfig, DataConfig, TrainConfig
from training.errors import ConfigError, TrainingError
from training.evaluation.evaluate import Evaluation
from training.loop import Step
from training.overrides import overridden


class Silent:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def started(self, config: TrainConfig, split: SplitInfo, device: torch.device, folder: Path) -> None: ...

    def stepped(self, step: Step, num_samples: int) -> None:
        self.steps.append(step)

    def validated(self, step: Step, evaluation: Evaluation) -> None: ...

    def evaluated(self, evaluation: Evaluation, split: SplitInfo) -> None:
        self.judged = split.name


def config(streamer: str, dataset: str = "mnist") -> TrainConfig:
    return TrainConfig(
        data=DataConfig(streamer=streamer, dataset=dataset, batch_size=16, train_split="train", validation_split=""),
        budget=BudgetConfig(seconds=None, max_epochs=2),
    )


def test_run_leaves_a_checkpoint_and_a_published_version(tmp_path: Path, streamer: str) -> None:
    observer = Silent()
    result = run.train(config(streamer), repository=tmp_path / "models", runs=tmp_path / "runs", observer=observer)
    kept = checkpoint.load(result.folder)

    assert [path.parent.name for path in result.folder.glob("checkpoints/best-*/*.safetensors")] == ["best-00000006"]
    assert (tmp_path / "models" / "mnist" / "1" / "model.pt").is_file()
    assert result.card.dataset.num_train == 40
    assert result.card.metrics["accuracy"] == result.evaluation.accuracy
    # Images of one grey: the border would turn them, and centring would leave nothing of them.
    assert (result.card.polarity, result.card.framing) == ("light_on_dark", "stretch")
    assert (kept.state.step, kept.state.epoch) == (6, 2)
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
    monkeypatch.setattr(reading, "_CONNECT_SECONDS", 0.2)
    repository, runs = tmp_path / "models", tmp_path / "runs"
    with pytest.raises(UnreachableError, match=r"127.0.0.1:1"):
        run.train(config("127.0.0.1:1"), repository=repository, runs=runs, observer=Silent())

    assert not list(tmp_path.iterdir())


def test_data_without_a_test_split_is_measured_on_validation_and_says_so(tmp_path: Path, tiny_mnist: Path) -> None:
    for file in tiny_mnist.glob("train-*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    told = list[str]()
    with streaming(f"bare={tmp_path}") as streamer:
        bare = overridden(config(streamer, "bare"), {"budget.max_epochs": 1})
        with pytest.raises(TrainingError, match=r"no test split, and data\.validation_split is empty"):
            run.train(bare, repository=tmp_path / "models", runs=tmp_path / "runs", observer=Silent())
        assert not (tmp_path / "runs").exists()
        bare = overridden(bare, {"data.validation_split": "train[90%:]"})
        observer = Silent()
        result = run.train(
            bare, repository=tmp_path / "models", runs=tmp_path / "runs", observer=observer, report=told.append
        )

    assert told == [
        "bare has no test split: the network is measured on train[90%:], which also chooses its epoch and its "
        "temperature; expect less of new images"
    ]
    assert (observer.judged, result.evaluation.num_samples) == ("train[90%:]", 4)
    assert "There is no test split" in (result.folder / "report.html").read_text()


def test_validation_split_chooses_and_is_no_part_of_the_training(tmp_path: Path, streamer: str) -> None:
    sliced = overridden(config(streamer), {"data.train_split": "train[:80%]", "data.validation_split": "train[80%:]"})
    learnt = run.learn(sliced, tmp_path / "run", observer=Silent())
    validation = learnt.data.validation

    assert validation is not None
    assert (learnt.data.train.num_samples, validation.num_samples, learnt.last.samples) == (32, 8, 64)
    assert learnt.validation_accuracy == checkpoint.load(tmp_path / "run").state.best_accuracy
    kept = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"config.json", "environment.json", "metrics.jsonl", "checkpoints", "tensorboard"} <= kept


@pytest.mark.parametrize("augmentation", ["crop(height=20,width=20)", "normalise()"])
def test_augmentation_that_the_network_cannot_take_is_named(tmp_path: Path, streamer: str, augmentation: str) -> None:
    changed = overridden(config(streamer), {"augmentation": augmentation})
    with pytest.raises(ConfigError, match=r"augmentation = .*; the network takes uint8 of"):
        run.learn(changed, tmp_path, observer=Silent())


def test_run_that_ended_before_it_was_published_trains_no_further(tmp_path: Path, streamer: str) -> None:
    first = run.learn(config(streamer), tmp_path, observer=Silent())
    observer, told = Silent(), list[str]()
    again = run.learn(config(streamer), tmp_path, observer=observer, report=told.append)

    assert (observer.steps, again.last) == ([], first.last)
    assert told == [f"going on with {tmp_path} after step 6"]
    assert torch.equal(again.network.output.bias, first.network.output.bias)

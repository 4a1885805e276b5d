"""``sluice evaluate`` of a run and of a published version, against a real streamer with tiny MNIST."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from rpc.settings import SettingsError
from sluice import evaluate
from sluice.commands import app
from sluice.evaluate import EvaluateOptions, find
from tests.streamers import streaming
from training import checkpoint
from training.config import DataConfig, TrainConfig
from training.errors import CheckpointError, TrainingError
from training.evaluation import record
from training.model import Network
from training.release.publish import DatasetCard, publish


@pytest.fixture(scope="module")
def streamer(tiny_mnist: Path) -> Iterator[str]:
    with streaming(f"mnist={tiny_mnist},fashion-mnist={tiny_mnist}") as address:
        yield address


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    return Network()


@pytest.fixture
def run_folder(network: Network, tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "20260101-000000-mnist-seed0"
    data = DataConfig(train_split="train[:75%]", validation_split="train[75%:]")
    state = checkpoint.State(config=TrainConfig(data=data), num_classes=10, step=1, epoch=1, fingerprint="00")
    checkpoint.keep(folder / "checkpoints", {"weights": network.state_dict()}, state, is_best=True)
    return folder


def test_newest_run_is_evaluated_and_reported(run_folder: Path, streamer: str) -> None:
    (run_folder.parent / "20250101-000000-mnist-seed0" / "checkpoints").mkdir(parents=True)
    result = CliRunner().invoke(app, ["evaluate", "--streamer", streamer])
    kept = record.read(run_folder / "evaluation.json")

    assert result.exit_code == 0, result.output
    assert "20 images" in result.output
    assert f"fitted on {kept.fitted_on}" in result.output
    assert (kept.num_samples, kept.fitted_on, kept.kind) == (20, "train[75%:]", "checkpoint")
    assert kept.served.temperature != 1
    assert kept.raw is not None
    assert kept.raw.nll > 0
    assert (run_folder / "report.html").is_file()


@pytest.mark.timeout(300)  # the network, through TorchScript, 112 times
def test_published_version_is_evaluated_as_it_is_served(network: Network, tmp_path: Path, streamer: str) -> None:
    dataset = DatasetCard(name="mnist", num_train=40, fingerprint="00")
    publish(network, tmp_path / "models", name="mnist", class_names=list("abcdefghij"), metrics={}, dataset=dataset)
    options = EvaluateOptions(
        target=Path("models/mnist/1"), streamer=streamer, corruptions=True, samples=1, ood="fashion-mnist", report=False
    )
    outcome = evaluate.run(options, say=print)
    kept = outcome.record

    assert outcome.folder == Path("runs/mnist-version-1")
    assert (kept.class_names[0], kept.kind, kept.served.temperature, kept.raw) == ("a", "version", 1, None)
    assert (len(kept.corruptions), kept.corrupted_samples) == (110, 1)
    assert {(row.score, row.other, row.num_other) for row in kept.outliers} == {
        ("probability", "fashion-mnist", 20), ("neighbours", "fashion-mnist", 20),
    }  # fmt: skip
    assert "worst class" in outcome.as_text()


def test_stand_ins_are_named_where_the_other_data_is_not_at_hand(
    streamer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLUICE_CACHE", str(tmp_path / "cache"))
    images = evaluate._served(streamer).reader("mnist").sample("test", 5)
    others, notes = evaluate._others(["mnist"], evaluate._Served(streamer, {}), images)

    assert list(others) == ["noise", "inverted"]
    assert "mnist is neither served by the streamer nor on this machine" in notes[0]


def test_json_is_what_the_file_holds(run_folder: Path, streamer: str) -> None:
    arguments = ["evaluate", str(run_folder), "--streamer", streamer, "--json", "--no-report", "--split", "train[:75%]"]
    result = CliRunner().invoke(app, arguments)

    assert json.loads(result.stdout) == json.loads((run_folder / "evaluation.json").read_text())
    assert not (run_folder / "report.html").exists()


def test_split_that_chooses_must_not_judge(run_folder: Path) -> None:
    with pytest.raises(SettingsError, match=r"--validation train\[75%:\]: what --split judges"):
        evaluate.run(EvaluateOptions(target=run_folder, split="train[75%:]"), say=print)


def test_unknown_data_is_named_with_what_there_is(run_folder: Path, streamer: str) -> None:
    with pytest.raises(TrainingError, match=r"dataset 'cifar'.* it has fashion-mnist, mnist"):
        evaluate.run(EvaluateOptions(target=run_folder, streamer=streamer, dataset="cifar"), say=print)
    with pytest.raises(SettingsError, match=r"--ood cats: .* allowed are fashion-mnist, inverted, mnist, noise"):
        evaluate.run(EvaluateOptions(target=run_folder, streamer=streamer, ood="cats"), say=print)


def test_folder_without_anything_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="runs: no run here"):
        find(None)
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        find(tmp_path)

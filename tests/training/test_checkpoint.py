from pathlib import Path

import pytest
import torch

from training import checkpoint
from training.checkpoint import State
from training.config import TrainConfig
from training.errors import CheckpointError
from training.model import Network

STATE = State(config=TrainConfig(seed=3), num_classes=10, step=5, epoch=0, position=640, fingerprint="ab")


def test_loaded_checkpoint_equals_the_saved_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Network()
    checkpoint.save(tmp_path / "checkpoint", network, STATE)
    loaded = checkpoint.load(tmp_path / "checkpoint")

    assert loaded.state == STATE
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(loaded.network.state_dict()[name], tensor, atol=0, rtol=0)


def test_failed_save_keeps_the_checkpoint_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path / "checkpoint", Network(), STATE)

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(tmp_path / "checkpoint", Network(), STATE)

    assert checkpoint.load(tmp_path / "checkpoint").state == STATE
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("file", ["weights.safetensors", "state.json"])
def test_half_written_file_is_named(tmp_path: Path, file: str) -> None:
    checkpoint.save(tmp_path / "checkpoint", Network(), STATE)
    path = tmp_path / "checkpoint" / file
    path.write_bytes(path.read_bytes()[:20])

    with pytest.raises(CheckpointError, match="not readable"):
        checkpoint.load(tmp_path / "checkpoint")


def test_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        checkpoint.load(tmp_path / "nowhere")


def test_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "checkpoint", Network(7), STATE)

    with pytest.raises(CheckpointError, match="another network"):
        checkpoint.load(tmp_path / "checkpoint")

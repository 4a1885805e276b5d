import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from training import checkpoint
from training.checkpoint import Parts, State
from training.config import TrainConfig
from training.errors import CheckpointError
from training.model import Network

ROOT = Path(__file__).parents[2]
SMALL: Parts = {"weights": {"a": torch.arange(6.0)}}


def state(step: int = 5) -> State:
    return State(config=TrainConfig(seed=3), num_classes=10, step=step, epoch=0, fingerprint="ab")


def parts_of(network: Network) -> Parts:
    return {"weights": network.state_dict()}


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_loaded_checkpoint_equals_the_saved_one(tmp_path: Path) -> None:
    network = Network(dropout=0.5)
    checkpoint.save(tmp_path / "here", parts_of(network), state())
    loaded = checkpoint.load(tmp_path / "here")

    assert loaded.state == state()
    for name, tensor in network.state_dict().items():
        assert torch.equal(loaded.network.state_dict()[name], tensor)


def test_average_is_what_was_learnt(tmp_path: Path) -> None:
    average = Network()
    checkpoint.save(tmp_path / "here", {"weights": {}, "average": average.state_dict()}, state())

    assert torch.equal(checkpoint.load(tmp_path / "here").network.output.bias, average.output.bias)


def test_failed_save_keeps_the_checkpoint_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path / "here", SMALL, state())

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(tmp_path / "here", SMALL, state())

    assert checkpoint.read(tmp_path / "here").state == state()
    assert [entry.name for entry in tmp_path.iterdir()] == ["here"]


@pytest.mark.parametrize("file", ["weights.safetensors", "state.json"])
def test_one_flipped_bit_is_named(tmp_path: Path, file: str) -> None:
    checkpoint.save(tmp_path / "here", SMALL, state())
    damage(tmp_path / "here" / file)

    with pytest.raises(CheckpointError, match=f"{file}: damaged"):
        checkpoint.read(tmp_path / "here")


@pytest.mark.parametrize("content", ["", "[1]", "3"])
def test_damaged_manifest_is_named(tmp_path: Path, content: str) -> None:
    checkpoint.save(tmp_path / "here", SMALL, state())
    (tmp_path / "here" / "manifest.json").write_text(content)

    with pytest.raises(CheckpointError, match="here: not readable"):
        checkpoint.read(tmp_path / "here")


def test_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        checkpoint.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        checkpoint.newest(tmp_path / "nowhere")


def test_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "here", parts_of(Network(7)), state())

    with pytest.raises(CheckpointError, match="another network"):
        checkpoint.load(tmp_path / "here")


def test_damaged_newest_is_passed_over_for_the_one_before(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint.keep(tmp_path, SMALL, state(step), is_best=False)
    damage(tmp_path / "step-00000002" / "weights.safetensors")
    saved = checkpoint.newest(tmp_path)

    assert saved.state.step == 1
    assert len(saved.complaints) == 1
    assert "step-00000002" in saved.complaints[0]


def test_damaged_checkpoint_is_replaced_by_a_whole_one(tmp_path: Path) -> None:
    checkpoint.keep(tmp_path, SMALL, state(), is_best=False)
    damage(tmp_path / "last" / "weights.safetensors")
    checkpoint.keep(tmp_path, SMALL, state(), is_best=False)

    assert checkpoint.newest(tmp_path).complaints == []


def test_best_and_the_two_newest_are_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        checkpoint.keep(tmp_path, SMALL, state(step), is_best=step == 2)

    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best", "last", "step-00000002", "step-00000004", "step-00000005",
    ]  # fmt: skip
    assert checkpoint.read(tmp_path / "best").state.step == 2
    assert checkpoint.read(tmp_path / "last").state.step == 5


@pytest.mark.parametrize("best", [1, 3, None])
def test_finished_run_keeps_what_it_had_learnt_and_no_more(tmp_path: Path, best: int | None) -> None:
    for step in (1, 2, 3):
        parts = {"weights": {"a": torch.zeros(1)}, "average": {"a": torch.full((1,), step)}, "optimizer": {}}
        checkpoint.keep(tmp_path, parts, state(step), is_best=step == best)
    checkpoint.keep_learnt(tmp_path)
    saved = checkpoint.read(tmp_path / "best")

    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", f"best-0000000{best or 3}"]
    assert (saved.state.step, saved.parts) == (best or 3, {"weights": {"a": torch.full((1,), best or 3)}})


def test_folder_of_a_run_stands_for_its_best_checkpoint(tmp_path: Path) -> None:
    network = Network()
    for step in (1, 2):
        checkpoint.keep(tmp_path / "checkpoints", parts_of(network), state(step), is_best=step == 1)

    assert checkpoint.load(tmp_path).state.step == 1


def test_kill_at_any_moment_of_a_save_leaves_the_newest_loadable(tmp_path: Path) -> None:
    script = Path(__file__).with_name("killed_saves.py")
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, tmp_path], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    *kills, left = done.stdout.splitlines()
    steps = [int(line.split()[0]) for line in kills]

    assert {line.split()[1] for line in kills} == {"0"}, "a half-written checkpoint had its name"
    # Until its name is there, a checkpoint is none: write, four fsync, and the rename itself.
    assert steps[:6] == [1] * 6
    assert steps[6:] == list(range(8, len(steps) + 2))
    assert left.split() == ["last", f"step-{steps[-1] - 1:08}", f"step-{steps[-1]:08}"]


def test_state_has_nothing_but_json(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "here", SMALL, state())

    assert json.loads((tmp_path / "here" / "state.json").read_text())["config"]["seed"] == 3
    assert {path.suffix for path in (tmp_path / "here").iterdir()} == {".json", ".safetensors"}

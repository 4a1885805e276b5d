"""Runs that are killed or stopped, and go on as if nothing had been."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from streamer.proof import verify
from tests.training.mortal import LEDGER, Mortal, config_of_test, run
from training import checkpoint
from training.checkpoint import Saved
from training.errors import CheckpointError, StoppedError
from training.folders import config_of, unfinished
from training.run import learn

pytestmark = pytest.mark.timeout(600)  # many runs in one test, and each saves some 400 MB at times

ROOT = Path(__file__).parents[2]
NUM_STEPS = 6
AT_EPOCHS, AT_STEPS = 1e9, 1e-9
"""Seconds between checkpoints."""


@pytest.fixture(autouse=True)
def determinism() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def unbroken(streamer: str, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """What the run comes to in one life."""
    folder = tmp_path_factory.mktemp("unbroken")
    finish(streamer, folder)
    return checkpoint.newest(folder / "checkpoints")


def finish(streamer: str, folder: Path, *, stop_after: int = 1000, seconds: float = AT_EPOCHS) -> None:
    asked = iter(range(stop_after))
    stopping = nullcontext(lambda: None if next(asked, None) is not None else signal.SIGINT)
    run(streamer, folder, observer=Mortal(-1), seconds=seconds, stopping=stopping)


def be_killed(streamer: str, folder: Path, *, step: int, seconds: float = AT_EPOCHS) -> None:
    """Train in a process that kills itself after a step."""
    command = [sys.executable, "-m", "tests.training.mortal", streamer, str(folder), str(step), str(seconds)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


def assert_equal(ours: Saved, theirs: Saved) -> None:
    """To the last bit: weights, average, momentum, random generators, schedule, and the cursor."""
    assert {name: set(part) for name, part in ours.parts.items()} == {
        name: set(part) for name, part in theirs.parts.items()
    }
    for name, part in ours.parts.items():
        for key, tensor in part.items():
            assert torch.equal(tensor, theirs.parts[name][key]), f"{name} {key}"
    assert (ours.state.random, ours.state.data, ours.state.loop["means"], ours.state.loop["progress"]) == (
        theirs.state.random, theirs.state.data, theirs.state.loop["means"], theirs.state.loop["progress"],
    )  # fmt: skip


def test_run_killed_and_stopped_and_damaged_ends_as_one_untouched(
    streamer: str, tmp_path: Path, unbroken: Saved
) -> None:
    be_killed(streamer, tmp_path, step=5)
    assert checkpoint.newest(tmp_path / "checkpoints").state.step == 3
    for step in (4, 5):
        with pytest.raises(StoppedError, match=f"stopped after step {step}; `sluice train --resume {tmp_path}`"):
            finish(streamer, tmp_path, stop_after=0)
    verdict = verify([tmp_path / LEDGER])
    assert (verdict.repeated, verdict.unexpected, verdict.committed) == (0, 0, 40 + 2 * 16)
    weights = tmp_path / "checkpoints" / "last" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    finish(streamer, tmp_path)

    assert_equal(checkpoint.newest(tmp_path / "checkpoints"), unbroken)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, NUM_STEPS + 1))
    assert [line["epoch"] for line in lines if "validation_loss" in line] == [0, 1]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_run_killed_at_any_step_ends_as_one_that_was_not(streamer: str, tmp_path: Path, unbroken: Saved) -> None:
    for number in range(10):
        folder = tmp_path / str(number)
        for step in sorted(random.Random(number).sample(range(1, NUM_STEPS), 2)):
            be_killed(streamer, folder, step=step, seconds=AT_STEPS)
        finish(streamer, folder, seconds=AT_STEPS)

        assert_equal(checkpoint.newest(folder / "checkpoints"), unbroken)
        assert verify([folder / LEDGER]).is_clean
        shutil.rmtree(folder)  # half a gigabyte


def test_unfinished_run_is_found_by_its_config_wherever_the_streamer_is(streamer: str, tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        finish(streamer, tmp_path / "20990101-run", stop_after=0)
    config = config_of_test("elsewhere:1", AT_EPOCHS)

    assert unfinished(tmp_path, config) == tmp_path / "20990101-run"
    assert unfinished(tmp_path, config.model_copy(update={"seed": 9})) is None
    (tmp_path / "20990101-run" / "result.json").touch()
    assert unfinished(tmp_path, config) is None


def test_run_killed_before_its_first_checkpoint_begins_anew(streamer: str, tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / ".step-00000001-half").mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 9.0}\n{"step"')
    with pytest.raises(StoppedError):
        finish(streamer, tmp_path, stop_after=0)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()

    assert json.loads(line)["samples"] == 16
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["last", "step-00000001"]


def test_checkpoint_of_another_optimizer_is_refused(streamer: str, tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        finish(streamer, tmp_path, stop_after=0)
    config = config_of_test(streamer, AT_EPOCHS)
    other = config.model_copy(update={"model": config.model.model_copy(update={"batch_norm": False})})

    with pytest.raises(CheckpointError, match="made by another run"):
        learn(other, tmp_path, observer=Mortal(-1))


def test_interrupted_command_exits_130_and_resumes(streamer: str, tmp_path: Path) -> None:
    settings = ["--set", "data.batch_size=8", "--set", "data.validation_split=test", "--streamer", streamer]
    command = [sys.executable, "-m", "sluice", "train", "--recipe", "smoke", "--no-load", *settings]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [*command, "--epochs", "9999"], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if line.startswith("after epoch 1: "))
        process.send_signal(signal.SIGINT)
        *_, last = process.stderr
    assert process.returncode == 130
    assert last.startswith("stopped after step "), last
    assert not (tmp_path / "model_repository" / "mnist" / "1").exists()
    (folder,) = (tmp_path / "runs").iterdir()
    step = checkpoint.newest(folder / "checkpoints").state.step

    assert f"stopped after step {step}; `sluice train --resume runs/{folder.name}`" in last
    assert unfinished(tmp_path / "runs", config_of(folder)) == folder

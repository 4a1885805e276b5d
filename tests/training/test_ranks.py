"""Ranks that train one network together, against one process that does the same."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from streamer.proof import Verdict, verify
from tests.training.ranked import LEDGER, ROOT, Watching, environments, run
from training import checkpoint, randomness
from training.config import BudgetConfig, TrainConfig
from training.errors import RankError
from training.overrides import overridden
from training.pace import Pace
from training.ranks import ALONE, Ranks, gathered
from training.recipes import smoke
from training.run import learn

pytestmark = pytest.mark.timeout(900)  # several processes on a few cores, and each saves some 400 MB at times

AT_EPOCHS, AT_STEPS = 1e9, 1e-9
"""Seconds between checkpoints."""


def config(streamer: str, **values: Any) -> TrainConfig:
    """What comes to the same however many take part; ``values`` by path, with ``__`` for the dot."""
    fixed = {
        "data.streamer": streamer,
        # Three steps of 12, and one of 2, in which some ranks have no share.
        "data.train_split": "train[:38]",
        "data.validation_split": "",
        "data.batch_size": 12,
        "model.dropout": 0.0,
        "optim.name": "sgd",
        "optim.lr": 0.01,
        "precision": "float32",
        "checkpoint.seconds": AT_EPOCHS,
        "log_steps": 1,
    }
    return overridden(smoke(), fixed | {path.replace("__", "."): value for path, value in values.items()})


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def verdict_of(folder: Path) -> Verdict:
    return verify(folder.glob(f"{LEDGER}*"))


def assert_ended(ends: list[tuple[int, str]]) -> None:
    for status, said in ends:
        assert status == 0, said


def assert_same(folder: Path, other: Path) -> None:
    """Within the noise of another order of sums."""
    assert losses(folder) == pytest.approx(losses(other), rel=1e-4)
    ours, theirs = (checkpoint.newest(place / "checkpoints") for place in (folder, other))
    assert (ours.state.data["epoch"], ours.state.data["position"]) == (theirs.state.data["epoch"], 0)
    for part in {"weights", "average"} & set(theirs.parts):
        for name, tensor in theirs.parts[part].items():
            torch.testing.assert_close(ours.parts[part][name], tensor, rtol=1e-3, atol=2e-4, msg=f"{part} {name}")


def test_two_ranks_come_to_what_one_comes_to(streamer: str, tmp_path: Path) -> None:
    # Steps of 12, of 12, and of 1, in which one rank has no share.
    same = config(streamer, data__train_split="train[:25]", budget__max_epochs=2)
    learn(same, tmp_path / "one", observer=Watching())
    assert_ended(run(tmp_path / "two", same, 2))

    assert_same(tmp_path / "two", tmp_path / "one")
    verdict = verdict_of(tmp_path / "two")
    assert (verdict.is_clean, verdict.committed, verdict.epochs, verdict.files) == (True, 50, 2, 2)


def test_norms_of_all_ranks_count_the_same_without_being_sent() -> None:
    command = [sys.executable, "-m", "tests.training.counted"]
    processes = [
        subprocess.Popen(command, cwd=ROOT, env=os.environ | place, stdout=subprocess.PIPE, text=True)
        for place in environments(2)
    ]
    first, second = (json.loads(process.communicate()[0]) for process in processes)

    assert first["sent"] is second["sent"] is False
    assert first["buffers"] == second["buffers"]
    assert first["buffers"]["norm1.num_batches_tracked"] == 3


@pytest.mark.slow
@pytest.mark.parametrize(("size", "num_samples"), [(2, 39), (3, 38), (4, 38)])
def test_norms_average_and_clipping_are_those_of_the_whole_batch(
    streamer: str, tmp_path: Path, size: int, num_samples: int
) -> None:
    """Shares of an epoch's last step are 2 and 1; 1, 1 and none; 1, 1, none and none."""
    values = {"model__batch_norm": True, "optim__clip_norm": 1.0, "ema__decay": 0.9, "ema__every": 2}
    same = config(streamer, data__train_split=f"train[:{num_samples}]", budget__max_epochs=2, **values)
    learn(same, tmp_path / "one", observer=Watching())
    assert_ended(run(tmp_path / "many", same, size))

    assert_same(tmp_path / "many", tmp_path / "one")
    verdict = verdict_of(tmp_path / "many")
    assert (verdict.is_clean, verdict.committed, verdict.epochs, verdict.files) == (True, 2 * num_samples, 2, size)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [AT_STEPS, AT_EPOCHS])
def test_four_ranks_killed_go_on_as_two_and_those_as_three(streamer: str, tmp_path: Path, seconds: float) -> None:
    same = config(streamer, budget__max_epochs=3, checkpoint__epochs=1, checkpoint__seconds=seconds)
    ends = run(tmp_path / "run", same, 4, hit=3, step=6)
    ends += run(tmp_path / "run", same, 2, hit=0, step=9)
    for status, said in ends:
        assert status == -signal.SIGKILL or (status == 1 and "another rank ended" in said), said
    assert_ended(run(tmp_path / "run", same, 3))

    verdict = verdict_of(tmp_path / "run")
    assert (verdict.is_clean, verdict.committed, verdict.epochs) == (True, 3 * 38, 3), verdict.findings
    learn(same, tmp_path / "one", observer=Watching())
    assert_same(tmp_path / "run", tmp_path / "one")


@pytest.mark.slow
def test_rank_asked_to_stop_stops_all_after_the_same_step(streamer: str, tmp_path: Path) -> None:
    # As many steps as a clock that each rank has of its own allows for: the first one's counts.
    timed = {"budget__seconds": 3.0, "budget__min_samples": 38 * 6, "budget__max_epochs": 9}
    same = config(streamer, checkpoint__epochs=1, **timed)
    ends = run(tmp_path / "run", same, 2, hit=1, step=1, by=signal.SIGTERM)
    step = checkpoint.newest(tmp_path / "run" / "checkpoints").state.step

    assert [status for status, _ in ends] == [1, 1]
    assert all(f"stopped after step {step};" in said for _, said in ends), ends
    assert step == 2  # what was said after one step is known after the next
    assert_ended(run(tmp_path / "run", same, 2))
    assert verdict_of(tmp_path / "run").is_clean


@pytest.mark.slow
def test_loss_that_is_not_finite_ends_all_ranks_at_the_same_step(streamer: str, tmp_path: Path) -> None:
    ends = run(tmp_path, config(streamer, optim__lr=10.0, budget__max_epochs=5), 2)

    first, second = (said.splitlines()[-1] for _, said in ends)
    assert first == second
    assert re.match(r"step \d+: the loss is (nan|inf)", first), ends


@pytest.mark.slow
def test_torchrun_starts_all_ranks_again_when_one_is_killed(streamer: str, tmp_path: Path) -> None:
    given = ["data.batch_size=12", "data.validation_split=test", "checkpoint.epochs=1"]
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1", "-m", "sluice", "train"]
    options = ["--recipe", "smoke", "--epochs", "6", "--no-load", "--streamer", streamer, "--resume", "auto"]
    options += ["--ledger", LEDGER, *(word for value in given for word in ("--set", value))]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, *command, *options], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        lines = list[str]()
        while not any(line.startswith("epoch 3/6") for line in lines):
            lines.append(process.stderr.readline())
            assert lines[-1], "".join(lines)
        listed = subprocess.run(["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, check=True)
        os.kill(int(listed.stdout.split()[-1]), signal.SIGKILL)
        said = process.stderr.read()
    (folder,) = (tmp_path / "runs").iterdir()

    assert process.returncode == 0, said
    assert f"going on with runs/{folder.name} after step " in said
    assert (folder / "result.json").exists()
    verdict = verdict_of(tmp_path)
    assert (verdict.is_clean, verdict.committed, verdict.files) == (True, 6 * 36, 2), verdict.findings


def test_process_that_no_launcher_started_is_alone() -> None:
    for environment in ({}, {"RANK": "0", "WORLD_SIZE": "1"}):
        with gathered(environment) as ranks:
            assert ranks is ALONE


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({"RANK": "0"}, "WORLD_SIZE in the environment: missing"),
        ({"WORLD_SIZE": "2"}, "RANK in the environment: missing"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK in the environment: 'x'; a whole number from 0 on"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK in the environment: 2; 0 to 1 are allowed"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR in the environment: missing"),
    ],
)
def test_environment_that_makes_no_sense_is_named(environment: dict[str, str], problem: str) -> None:
    with pytest.raises(RankError, match=problem), gathered(environment):
        pass


def test_step_that_ranks_cannot_share_evenly_is_rounded_up() -> None:
    class Three(Ranks):
        size = 3

    assert [Three().share_of(size) for size in (12, 13, 2)] == [4, 5, 1]
    assert ALONE.share_of(13) == 13


def test_ranks_draw_numbers_of_their_own_and_others_after_a_restart() -> None:
    drawn = []
    for rank, step in ((1, 0), (2, 0), (1, 5), (1, 0)):
        randomness.seed_rank(7, rank=rank, step=step)
        drawn.append(torch.rand(()).item())

    assert len(set(drawn)) == 3
    assert drawn[0] == drawn[3]


def test_number_of_epochs_is_what_all_have_agreed_on() -> None:
    pace = Pace(BudgetConfig(seconds=1e-9, min_samples=1, max_epochs=9), 40, decide=lambda epochs: epochs + 2)
    pace.plan(done=1)

    assert pace.epochs == 3

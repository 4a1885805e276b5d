import json
import math
from pathlib import Path

from training.journal import Journal
from training.loop import Step


def step(number: int, loss: float = 0.5) -> Step:
    return Step(
        number=number,
        epoch=0,
        epochs=1,
        samples=number * 16,
        position=0,
        loss=loss,
        accuracy=0.25,
        lr=1e-3,
        samples_per_second=9.0,
    )


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_line_is_there_at_once(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.stepped(step(1))
        journal.validated(step(1), loss=0.75, accuracy=0.5)

        assert lines(tmp_path) == [
            {
                "step": 1,
                "epoch": 0,
                "samples": 16,
                "loss": 0.5,
                "accuracy": 0.25,
                "lr": 1e-3,
                "samples_per_second": 9.0,
            },
            {"step": 1, "epoch": 0, "samples": 16, "validation_loss": 0.75, "validation_accuracy": 0.5},
        ]
    (board,) = (tmp_path / "tensorboard").iterdir()
    assert b"training/loss" in board.read_bytes()
    assert b"validation/accuracy" in board.read_bytes()


def test_steps_that_are_done_again_are_dropped(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        for number in (1, 2, 3):
            journal.stepped(step(number))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    with Journal(tmp_path, step=2) as journal:
        journal.stepped(step(3, loss=0.125))

    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(1, 0.5), (2, 0.5), (3, 0.125)]


def test_loss_that_nobody_has_read_yet_is_left_out(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.stepped(step(1, loss=math.nan))

    assert "loss" not in lines(tmp_path)[0]

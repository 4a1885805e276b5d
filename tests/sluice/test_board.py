from io import StringIO

import pytest
from rich.console import Console

from sluice.board import Board, summary, table, time_left
from training.search.logbook import Search, Trial, TrialState, parse

SEARCH: Search = parse(
    {"name": "toy", "budget": {"trials": 4, "epochs": 8}, "space": {"optim.lr": {"low": 1, "high": 2}}}, source="test"
)


def trial(number: int, epoch: int, state: TrialState, score: float = 0.5, **fields: object) -> Trial:
    scores = {epoch: score} if epoch else {}
    return Trial(number=number, id=f"t{number}", values={"optim.lr": 1.5}, state=state, scores=scores).model_copy(
        update=fields
    )


def test_nobody_knows_the_time_left_before_the_first_epoch() -> None:
    assert time_left([trial(1, 0, "running")], SEARCH, elapsed=100) is None


def test_time_left_counts_what_trials_usually_take() -> None:
    trials = [trial(1, 8, "finished"), trial(2, 2, "stopped"), trial(3, 2, "running")]

    # Trials end after 5 epochs on average: 3 of the third and 5 of the fourth are to come, 12 took 120 s.
    assert time_left(trials, SEARCH, elapsed=120) == pytest.approx(80)


def test_time_left_after_a_resume_counts_the_epochs_since() -> None:
    trials = [trial(1, 8, "finished"), trial(2, 8, "finished"), trial(3, 4, "running")]

    assert time_left(trials, SEARCH, elapsed=10, before=18) == pytest.approx(5 * (4 + 8))


def test_time_left_is_at_most_the_limit() -> None:
    limited = SEARCH.model_copy(update={"budget": SEARCH.budget.model_copy(update={"minutes": 2.0})})

    assert time_left([trial(1, 8, "finished")], limited, elapsed=100) == pytest.approx(20)


def test_running_trials_are_shown_below_the_best_others() -> None:
    over = [trial(1, 8, "finished", 0.7), trial(2, 8, "finished", 0.9)]
    console = Console(width=120, record=True, file=StringIO())
    console.print(table([*over, trial(3, 1, "running"), trial(4, 0, "waiting")], SEARCH, limit=3))
    rows = [line.split()[:2] for line in console.export_text().splitlines()[1:4]]

    assert rows == [["2", "finished"], ["3", "running"], ["4", "waiting"]]


@pytest.mark.parametrize("width", [60, 80, 200])
def test_settings_are_never_broken_within_a_word(width: int) -> None:
    values = {
        "optim.weight_decay": 0.000123,
        "optim.label_smoothing": 0.0625,
        "augmentation": "mirror|elastic",
        "data.batch_size": 64,
    }
    space = {name: {"low": 1, "high": 2} for name in values}
    search = parse({"name": "toy", "budget": {"trials": 4, "epochs": 8}, "space": space}, source="test")
    console = Console(width=width, record=True, file=StringIO())

    console.print(table([trial(1, 8, "finished", values=values)], search, limit=3, width=width))

    words = console.export_text().replace(",", " ").split()
    assert {"weight_decay", "0.000123", "label_smoothing", "0.0625", "mirror|elastic", "batch_size", "64"} <= set(words)


def test_trials_that_end_are_told_once_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    failed = trial(2, 0, "failed", failures=2, error="disk full")
    with Board(SEARCH) as board:
        board.changed((trial(1, 8, "finished", 0.75), trial(2, 0, "running")))
        board.changed((trial(1, 8, "finished", 0.75), failed))
        board.changed((trial(1, 8, "finished", 0.75), failed))
    lines = capsys.readouterr().err.splitlines()

    assert len(lines) == 1
    assert lines[0].startswith("trial 2 failed: disk full, - (lr 1.5); 2/4 trials done, 1 failed, best 75.00%")


def test_summary_counts_trials_and_names_the_winner() -> None:
    text = summary([trial(1, 8, "finished", 0.75), trial(2, 2, "stopped", 0.8)], SEARCH)

    assert "2 trials: 1 finished, 1 stopped" in text
    assert "best is trial 1: validation accuracy 75.00% with optim.lr = 1.5" in text
    assert "sluice train --recipe mnist --epochs 8" in text

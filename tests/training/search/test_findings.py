import csv
from io import StringIO
from pathlib import Path

import pytest

from training.search.findings import as_csv, importance, write
from training.search.logbook import Search, Trial, parse

pytest.importorskip("optuna", reason="pip install 'sluice[tune]'")

SEARCH: Search = parse(
    {
        "name": "toy",
        "budget": {"epochs": 4},
        "space": {
            "optim.lr": {"low": 1e-4, "high": 1e-2, "log": True},
            "model.dropout": {"low": 0.0, "high": 0.5},
            "augmentation": {"choices": ["", "augment-v1"]},
        },
    },
    source="test",
)


def trial(number: int) -> Trial:
    """A trial whose score is its learning rate's doing alone."""
    lr = 1e-4 * 100 ** (number / 24)
    values = {"optim.lr": lr, "model.dropout": number * 7 % 25 / 50, "augmentation": ("", "augment-v1")[number % 2]}
    scores = {1: 0.5 + 10 * lr} | ({4: 0.6 + 10 * lr} if number % 3 else {})
    return Trial(
        number=number, id=f"t{number}", values=values, scores=scores, state="finished" if number % 3 else "stopped"
    )


TRIALS = [trial(number) for number in range(25)]


def test_field_that_decides_is_the_most_important() -> None:
    too_short = TRIALS[0].model_copy(update={"scores": {}})
    shares = importance([too_short, *TRIALS], SEARCH)

    assert next(iter(shares)) == "optim.lr"
    assert set(shares) == set(SEARCH.space.names())


def test_table_has_every_trial_the_best_first_and_the_failed_last() -> None:
    failed = TRIALS[0].model_copy(update={"number": 99, "scores": {}, "state": "failed", "error": "no, sir"})
    rows = list(csv.DictReader(StringIO(as_csv([failed, *TRIALS], SEARCH))))

    assert len(rows) == 26
    assert (rows[0]["trial"], rows[0]["rank"], rows[0]["epochs"]) == ("23", "1", "4")
    assert (rows[-1]["trial"], rows[-1]["rank"], rows[-1]["error"]) == ("99", "", "no, sir")


def test_pictures_are_whole_files(tmp_path: Path) -> None:
    written = write(tmp_path, TRIALS, SEARCH)

    assert [path.name for path in written] == ["trials.csv", "importance.png", "parallel.png", "history.png"]
    assert all(path.read_bytes().endswith(b"IEND\xaeB`\x82") for path in written[1:])
    assert len(list(tmp_path.iterdir())) == 4


def test_one_trial_is_a_table_and_no_picture(tmp_path: Path) -> None:
    assert [path.name for path in write(tmp_path, TRIALS[:1], SEARCH)] == ["trials.csv"]

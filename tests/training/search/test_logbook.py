from pathlib import Path
from typing import Any

import pytest

from training.errors import SearchError
from training.search.logbook import Logbook, Search, Trial, best, command, parse, ranked, read


def search(**fields: Any) -> Search:
    return parse({"name": "shoes", "dataset": "shoes", **fields}, source="shoes.yaml")


def trial(number: int, scores: dict[int, float], **fields: Any) -> Trial:
    values = {"optim.lr": 0.00123456789, "augmentation": "augment-v1(rotate=5)"}
    return Trial(number=number, id=f"t{number}", values=values, scores=scores, **fields)


def test_file_with_every_section_is_read(tmp_path: Path) -> None:
    file = tmp_path / "shoes.yaml"
    file.write_text(
        "name: shoes\ndataset: shoes\ngoal: validation_loss\nbudget: {trials: 5, epochs: 4}\n"
        "fixed: {model.dropout: 0.2}\nspace:\n  optim.lr: {low: 3e-4, high: 1e-2, log: true}\n"
        "  optim.name: {choices: [adamw, sgd]}\n"
    )
    found = parse(read(file), source=str(file))

    assert (found.budget.trials, found.budget.first_look, found.is_better_when_higher) == (5, 1, False)
    assert [(name, value) for name, value in found.space.extremes()][:2] == [("optim.lr", 3e-4), ("optim.lr", 1e-2)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"trails": 5}, "trails: no such field"),
        ({"budget": {"trials": 0}}, "budget.trials: .*greater than or equal to 1"),
        ({"budget": {"epochs": 2, "min_epochs": 3}}, "budget: min_epochs is 3, and a trial has 2"),
        ({"recipe": "big"}, "recipe: no such recipe; known are mnist"),
        ({"goal": "test_accuracy"}, "goal: .*validation_accuracy"),
        ({"space": {"optim.lr": {"low": 1}}}, "space.optim.lr.high: has to be given"),
        ({"space": {"optim.lr": {"low": 2, "high": 1}}}, "space.optim.lr: low has to be less"),
        ({"space": {"optim.lr": {"choices": [1]}}}, "space.optim.lr.choices: .*at least 2"),
        ({"space": {"data.test_split": {"choices": ["a", "b"]}}}, "data.test_split cannot be varied"),
        ({"fixed": {"budget.seconds": 5}}, "budget.seconds cannot be varied or fixed"),
        ({"fixed": {"optim.lr": 0.1}}, "optim.lr: both fixed and varied"),
        ({"data": "/here", "streamer": "there:1"}, "data and streamer both"),
        ({"name": "Shoes!"}, "name: .*pattern"),
    ],
)
def test_unusable_field_is_named_with_its_file(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SearchError, match=f"shoes.yaml: {message}"):
        search(**fields)


@pytest.mark.parametrize(
    ("content", "message"), [("a: [", "not YAML"), ("- a", "has to hold fields"), (None, "No such")]
)
def test_file_that_is_no_search_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    file = tmp_path / "search.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SearchError, match=f"search.yaml: .*{message}"):
        read(file)


def test_trials_that_went_further_come_first() -> None:
    trials = (trial(1, {1: 0.9, 8: 0.91}), trial(2, {2: 0.95}), trial(3, {8: 0.93}), trial(4, {}))

    assert [each.number for each in ranked(trials, search())] == [3, 1, 2]
    assert [each.number for each in ranked(trials, search(goal="validation_loss"))] == [1, 3, 2]


def test_failed_trial_wins_nothing() -> None:
    trials = (trial(1, {8: 0.99}, state="failed", error="disk full"), trial(2, {2: 0.5}))

    assert best(trials, search()).number == 2
    with pytest.raises(SearchError, match="no trial has been measured yet; trial 1 failed: disk full"):
        best(trials[:1], search())


def test_command_can_be_given_to_a_shell() -> None:
    line = command(search(streamer="far:1", fixed={"optim.name": "adamw"}), trial(1, {8: 0.9}))

    assert line == (
        "sluice train --recipe mnist --epochs 8 --streamer far:1 --set name=shoes --set data.dataset=shoes "
        "--set 'data.train_split=train[:90%]' --set 'data.validation_split=train[90%:]' "
        "--set optim.name=adamw --set optim.lr=0.0012346 --set 'augmentation=augment-v1(rotate=5)'"
    )


def test_command_repeats_what_the_search_had_of_its_own() -> None:
    line = command(search(validation=20, seed=3), trial(1, {8: 0.9}))

    assert "--set seed=3 --set 'data.train_split=train[:80%]' --set 'data.validation_split=train[80%:]'" in line


@pytest.mark.parametrize(
    ("budget", "num_train", "epochs"),
    [({}, 54_000, 8), ({}, 5000, 8), ({}, 4999, 9), ({}, 243, 100), ({"epochs": 2}, 243, 2), ({"min_epochs": 2}, 9, 8)],
)
def test_trials_on_few_images_get_more_epochs_unless_somebody_said(
    budget: dict[str, int], num_train: int, epochs: int
) -> None:
    assert search(budget=budget).fitted(num_train).budget.epochs == epochs


def test_logbook_keeps_search_and_trials(tmp_path: Path) -> None:
    wanted = search(data=tmp_path, budget={"trials": 3})
    logbook = Logbook.create(tmp_path / "shoes", wanted)
    logbook.write_trials((trial(1, {1: 0.5}, state="running"),))

    assert Logbook(logbook.folder).search() == wanted
    assert Logbook(logbook.folder).trials() == (trial(1, {1: 0.5}, state="running"),)


def test_second_search_of_a_name_is_refused(tmp_path: Path) -> None:
    Logbook.create(tmp_path / "shoes", search())
    with pytest.raises(SearchError, match="sluice tune resume shoes"):
        Logbook.create(tmp_path / "shoes", search())


def test_missing_search_is_named_with_those_there_are(tmp_path: Path) -> None:
    Logbook.create(tmp_path / "shoes", search())
    with pytest.raises(SearchError, match="no search of this name; there are shoes"):
        Logbook(tmp_path / "boots").search()

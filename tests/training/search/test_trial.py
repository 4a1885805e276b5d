from typing import Any

import pytest

from training.errors import SearchError
from training.recipes import mnist
from training.search.logbook import Search, parse
from training.search.space import Range
from training.search.trial import check, configure, starting_point


def search(**fields: Any) -> Search:
    return parse({"name": "shoes", "dataset": "shoes", **fields}, source="test")


def test_trial_has_recipe_fixed_and_varied_fields_and_never_the_test_split() -> None:
    wanted = search(fixed={"optim.clip_norm": 1.0}, budget={"epochs": 3}, validation=20, seed=5)
    config = configure(wanted, {"optim.lr": 0.002}, streamer="far:1")

    assert (config.optim.lr, config.optim.clip_norm, config.seed, config.name) == (0.002, 1.0, 5, "shoes")
    assert (config.budget.seconds, config.budget.max_epochs) == (None, 3)
    assert (config.data.streamer, config.data.dataset) == ("far:1", "shoes")
    assert (config.data.train_split, config.data.validation_split) == ("train[:80%]", "train[80%:]")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"space": {"optim.rate": {"low": 1, "high": 2}}}, "optim.rate: no such field"),
        ({"space": {"optim.lr": {"low": 1, "high": 200}}}, "optim.lr = 200"),
        ({"space": {"optim.name": {"choices": ["adamw", "adam"]}}}, "optim.name = adam"),
        ({"fixed": {"precision": "int3"}}, "precision = int3"),
    ],
)
def test_field_that_no_trial_could_have_is_refused_before_the_search(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SearchError, match=f"search shoes: {message}"):
        check(search(**fields))


def test_search_starts_from_its_recipe() -> None:
    start = starting_point(search(fixed={"model.batch_norm": True}))

    assert start is not None
    assert (start["optim.lr"], start["augmentation"]) == (mnist().optim.lr, mnist().augmentation)
    assert starting_point(search(space={"optim.lr": {"low": 1e-5, "high": 1e-4}})) is None


def test_space_is_of_the_recipes_optimizer_or_the_one_that_is_fixed() -> None:
    for recipe, fixed in (("mnist", {}), ("mnist", {"optim.name": "adamw"}), ("smoke", {})):
        rates = search(recipe=recipe, fixed=fixed).space.root["optim.lr"]

        assert isinstance(rates, Range)
        assert (rates.high < 0.02) == (recipe == "smoke" or bool(fixed))

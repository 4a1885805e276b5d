import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from training.config import TrainConfig
from training.errors import SearchError
from training.overrides import overridden, recipe
from training.recipes import DEFAULT_RECIPE
from training.search.space import Choices, Range, Space, default_space, parse


def test_range_is_read_from_the_command_line() -> None:
    assert parse("optim.lr=1e-4..1e-2,log") == ("optim.lr", Range(low=1e-4, high=1e-2, log=True))
    assert parse("data.batch_size=32..256,log,whole")[1] == Range(low=32, high=256, log=True, whole=True)


def test_choices_are_read_from_the_command_line() -> None:
    assert parse("optim.name=adamw|sgd") == ("optim.name", Choices(choices=("adamw", "sgd")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim.lr", r"LOW\.\.HIGH"),
        ("optim.lr=1..2,linear", r"LOW\.\.HIGH"),
        ("optim.lr=a..b", "could not convert"),
        ("optim.lr=2..1", "low has to be less than high"),
        ("optim.lr=0..1,log", "above 0"),
        ("optim.lr=0.5..2,whole", "have to be whole"),
    ],
)
def test_unusable_entry_is_named(text: str, message: str) -> None:
    with pytest.raises(SearchError, match=f"--vary {text}: .*{message}"):
        parse(text)


@given(st.floats(1e-6, 1e3), st.floats(1.001, 1e6), st.booleans())
def test_range_holds_its_ends_and_nothing_beyond(low: float, factor: float, log: bool) -> None:
    entry = Range(low=low, high=low * factor, log=log)

    assert all(entry.holds(value) for value in entry.extremes())
    assert not entry.holds(low * factor * 1.001)
    assert not entry.holds(low / 1.001)
    assert not entry.holds("1")


def test_choices_hold_nothing_else() -> None:
    entry = Choices(choices=("adamw", "sgd"))

    assert [entry.holds(value) for value in ("adamw", "sgd", "adam", 1.0)] == [True, True, False, False]


def test_every_value_of_the_default_space_is_allowed() -> None:
    for name, value in default_space().extremes():
        overridden(TrainConfig(), {name: value})


def test_default_space_holds_the_default_recipe() -> None:
    config = recipe(DEFAULT_RECIPE)

    assert default_space().root["optim.lr"].holds(config.optim.lr)
    assert default_space().root["augmentation"].holds(config.augmentation)


def test_space_becomes_distributions_of_optuna() -> None:
    distributions = pytest.importorskip("optuna", reason="pip install 'sluice[tune]'").distributions
    space = Space({"a": Range(low=1, high=9, whole=True), "b": Choices(choices=("x", "y"))})

    assert space.distributions() == {
        "a": distributions.IntDistribution(1, 9),
        "b": distributions.CategoricalDistribution(("x", "y")),
    }


def test_space_without_a_field_is_refused() -> None:
    with pytest.raises(ValidationError):
        Space({})

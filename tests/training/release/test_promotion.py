from hypothesis import given
from hypothesis import strategies as st

from training.release.promotion import Margins, objections

CURRENT = {"accuracy": 0.99, "nll": 0.03, "ece": 0.004, "num_samples": 10_000.0}
CLASSES = {f"recall/{name}": 0.99 for name in "ab"} | {f"support/{name}": 1000.0 for name in "ab"}

figures = st.fixed_dictionaries(
    {
        "accuracy": st.floats(0, 1),
        "nll": st.floats(0, 10),
        "ece": st.floats(0, 1),
        "num_samples": st.integers(1, 10**6).map(float),
        "recall/a": st.floats(0, 1),
        "recall/b": st.floats(0, 1),
    }
)


def named(candidate: dict[str, float], current: dict[str, float]) -> list[str]:
    return [objection.what for objection in objections(candidate, current)]


@given(figures)
def test_equal_version_is_promoted(metrics: dict[str, float]) -> None:
    assert objections(metrics, metrics) == []


@given(figures, figures)
def test_of_two_versions_one_is_no_worse_in_any_one_figure(one: dict[str, float], other: dict[str, float]) -> None:
    assert set(named(one, other)).isdisjoint(named(other, one))


def test_worse_in_each_figure_is_named_with_the_numbers() -> None:
    worse = CURRENT | {"accuracy": 0.98, "nll": 0.2, "ece": 0.05}

    assert named(worse, CURRENT) == ["accuracy", "nll", "ece"]
    assert str(objections(worse, CURRENT)[0]) == (
        "accuracy 0.9800, the current version has 0.9900: worse by 0.0100, allowed is 0.0040"
    )


def test_same_difference_on_few_samples_is_noise() -> None:
    worse = {"accuracy": 0.98, "num_samples": 500.0}

    assert named(worse, CURRENT | {"num_samples": 500.0}) == ["nll", "ece"], "which it has no figures for"
    assert named(CURRENT | worse, CURRENT | {"num_samples": 500.0}) == []


def test_difference_within_the_margin_is_allowed_however_sure_it_is() -> None:
    many = CURRENT | {"num_samples": 1e9}

    assert named(many | {"accuracy": 0.9891}, many) == []
    assert named(many | {"accuracy": 0.9889}, many) == ["accuracy"]
    assert objections(many | {"accuracy": 0.9889}, many, Margins(accuracy=0.01)) == []


def test_one_class_that_suffers_is_named_though_the_rest_makes_up_for_it() -> None:
    current = CURRENT | CLASSES

    assert named(current | {"recall/a": 0.95, "recall/b": 1.0}, current) == ["recall/a"]


def test_class_of_few_samples_may_vary_more() -> None:
    current = CURRENT | CLASSES | {"support/a": 20.0}

    assert named(current | {"recall/a": 0.95}, current) == []


def test_figure_that_only_the_candidate_lacks_speaks_against_it() -> None:
    (objection,) = objections({"nll": 0.03, "ece": 0.004}, CURRENT)

    assert str(objection) == "accuracy: not measured; the current version has 0.9900"


def test_card_from_before_is_compared_by_its_former_names() -> None:
    before = {"test_accuracy": 0.99, "test_loss": 0.03}

    assert named({"accuracy": 0.90, "nll": 0.5, "ece": 0.2}, before) == ["accuracy", "nll"]

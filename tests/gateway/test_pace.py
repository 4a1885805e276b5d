import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.pace import Pace


@given(st.floats(1e-5, 1e-2), st.floats(0, 0.1), st.lists(st.integers(1, 64), min_size=2, max_size=30))
def test_line_is_found_again(per_image: float, per_batch: float, sizes: list[int]) -> None:
    pace = Pace()
    for size in [1, 64, *sizes]:
        pace.observe(size, per_image * size + per_batch)

    # The second size may have been taken for a hiccup.
    if per_image * 64 + per_batch <= 4 * (per_image + per_batch):
        assert pace.seconds(32) == pytest.approx(per_image * 32 + per_batch, rel=1e-6)


def test_batches_of_one_size_are_expected_as_they_were() -> None:
    pace = Pace()
    assert not pace.is_known
    for _ in range(10):
        pace.observe(8, 0.02)

    assert pace.seconds(8) == pytest.approx(0.02)


def test_hiccup_does_not_count_for_more_than_it_says() -> None:
    pace = Pace()
    for _ in range(100):
        pace.observe(8, 0.01)
    pace.observe(8, 10)

    assert pace.seconds(8) < 0.012


def test_model_that_has_become_slower_is_noticed() -> None:
    pace = Pace()
    for seconds in [0.01] * 100 + [0.03] * 200:
        pace.observe(8, seconds)

    assert pace.seconds(8) == pytest.approx(0.03, rel=0.05)


@given(st.lists(st.tuples(st.integers(1, 64), st.floats(1e-6, 10)), max_size=50), st.integers(1, 64))
def test_no_time_is_ever_negative(observed: list[tuple[int, float]], num_images: int) -> None:
    pace = Pace()
    for size, seconds in observed:
        pace.observe(size, seconds)

    assert min(pace.coefficients()) >= 0
    assert pace.seconds(num_images) >= 0

"""The arithmetic of slices."""

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamer.errors import InvalidPlanError
from streamer.slicing import Slice, find


@dataclass(frozen=True)
class Whole:
    num_samples: int
    fingerprint: bytes = b"digits"


percentages = st.one_of(st.integers(0, 100).map(str), st.decimals(0, 100, places=3).map(str)).map("{}%".format)


def members(bounds: str, size: int) -> NDArray[np.int64]:
    """Return which samples of a split of ``size`` are in a slice; none where it is refused as empty."""
    try:
        _, part = find(f"train[{bounds}]", {"train": Whole(size)})
    except InvalidPlanError as error:
        if "is empty" not in str(error):
            raise
        return np.empty(0, np.int64)
    return np.arange(size) if part is None else part.base_indices(np.arange(part.num_samples))


def cut(bounds: str, size: int = 60_000, fingerprint: bytes = b"digits") -> Slice:
    _, part = find(f"train[{bounds}]", {"train": Whole(size, fingerprint)})
    assert part is not None
    return part


@given(st.data(), st.integers(1, 3000))
def test_slices_on_both_sides_of_a_cut_are_the_split_exactly_once(data: st.DataObject, size: int) -> None:
    bound = data.draw(st.one_of(percentages, st.integers(-size, size).map(str)))

    both = np.concatenate([members(f":{bound}", size), members(f"{bound}:", size)])
    assert np.array_equal(np.sort(both), np.arange(size))


@given(st.lists(percentages, max_size=6), st.integers(1, 3000))
def test_slices_between_any_cuts_are_the_split_exactly_once(bounds: list[str], size: int) -> None:
    cuts = ["0%", *sorted(bounds, key=lambda bound: float(bound[:-1])), "100%"]

    parts = [members(f"{start}:{stop}", size) for start, stop in itertools.pairwise(cuts)]
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(size))


@given(st.integers(1, 99), st.integers(100, 3000))
def test_percentage_from_the_end_is_the_rest_to_a_hundred(percent: int, size: int) -> None:
    assert cut(f"-{percent}%:", size) == cut(f"{100 - percent}%:", size)


@pytest.mark.parametrize(
    ("bounds", "start", "stop"),
    [
        (":90%", 0, 54_000),
        ("90%:", 54_000, 60_000),
        ("10%:20%", 6_000, 12_000),
        (":55000", 0, 55_000),
        ("-5000:", 55_000, 60_000),
        ("1:-1", 1, 59_999),
        ("12.5%:7501", 7_500, 7_501),
        (":-10%", 0, 54_000),
        ("0.001%:", 1, 60_000),
    ],
)
def test_bounds_are_samples_or_percentages_from_either_end(bounds: str, start: int, stop: int) -> None:
    assert cut(bounds) == Slice(b"digits", 60_000, start, stop)


@pytest.mark.parametrize("bounds", [":", "0:", "0%:100%", ":60000", "-60000:", "-100%:", "-0:"])
def test_slice_of_everything_is_the_split_itself(bounds: str) -> None:
    whole = Whole(60_000)

    assert find(f"train[{bounds}]", {"train": whole}) == (whole, None)


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ("dev", "'dev' is no split; allowed are train and test, and slices like train[:90%]"),
        ("dev[:90%]", "'dev[:90%]' is no split"),
        ("", "'' is no split"),
        ("train[90%]", "'train[90%]' is no slice; allowed are train[:90%], train[90%:], train[-5000:] and the like"),
        ("train[:90%", "is no slice"),
        ("train[0:9:2]", "is no slice"),
        ("train[:9%]+train[11%:]", "is no slice"),
        ("train[:1e3]", "is no slice"),
        ("train[: 90%]", "is no slice"),
        ("train[:٣]", "is no slice"),
        ("train[:101%]", "'train[:101%]': 101% lies outside; -100% to 100% are allowed"),
        ("train[-100.1%:]", "-100.1% lies outside"),
        ("train[:201]", "201 lies outside; -200 to 200 are allowed"),
        ("train[:0]", "'train[:0]' is empty: it goes from 0 to 0 of 200; at least one sample is needed"),
        ("train[90%:10%]", "is empty: it goes from 180 to 20 of 200"),
        ("train[200:]", "is empty"),
        ("train[:0.2%]", "is empty"),
        (f"train[:{'9' * 5000}]", "is no slice"),
    ],
)
def test_bad_slice_is_refused_by_name(split: str, words: str) -> None:
    with pytest.raises(InvalidPlanError, match=r"^plan\.split: ") as caught:
        find(split, {"train": Whole(200), "test": Whole(100)})

    assert words in str(caught.value)
    assert len(str(caught.value)) < 250


def test_split_said_to_be_empty_has_no_slices() -> None:
    for bounds in ("0:", ":90%", "-0:", ":"):
        with pytest.raises(InvalidPlanError, match="is empty"):
            cut(bounds, size=0)


def test_data_sorted_by_class_has_all_classes_alike_on_both_sides() -> None:
    labels = np.repeat(np.arange(10), 600)

    for bounds, size in ((":90%", 5400), ("90%:", 600)):
        counts = np.bincount(labels[members(bounds, 6000)], minlength=10)
        assert counts.sum() == size
        # Six standard deviations of a draw without order.
        assert (np.abs(counts - size / 10) < 6 * np.sqrt(size / 10)).all()


def test_slices_of_other_data_are_of_another_order() -> None:
    ours, theirs = cut("90%:"), cut("90%:", fingerprint=b"letters")

    assert ours.fingerprint != theirs.fingerprint
    assert not np.array_equal(ours.base_indices(np.arange(100)), theirs.base_indices(np.arange(100)))


def test_fingerprint_is_of_the_content_however_it_is_written() -> None:
    assert cut(":90%").fingerprint == cut(":54000").fingerprint == cut("0:-10%").fingerprint
    others = {cut(bounds).fingerprint for bounds in ("90%:", ":54001", "1:54000")}
    assert len(others | {b"digits", cut(":90%").fingerprint}) == 5


def test_content_of_a_slice_is_that_of_saved_cursors() -> None:
    """A change of it would make every cursor that was saved mean other samples."""
    part = cut("90%:")

    assert part.fingerprint.hex() == "7347af03292b600587199705c329c881558fec7ec8b48734cc300eb5e81c0a20"
    assert part.base_indices(np.arange(5)).tolist() == [46488, 23153, 2158, 22405, 1564]


@pytest.mark.parametrize(("size", "dtype"), [(20_000, np.int32), ((1 << 31) + 1, np.int64)])
def test_table_is_the_arithmetic_of_all(size: int, dtype: type[np.signedinteger]) -> None:
    part = cut("1:10000", size)

    assert part.table().dtype == dtype
    assert np.array_equal(part.table(), part.base_indices(np.arange(9999)))

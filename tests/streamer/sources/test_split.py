import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamer.slicing import Slice
from streamer.sources.split import Fingerprint, MemorySplit, label_type


def random_split(size: int = 50, shape: tuple[int, ...] = (3, 5), num_classes: int = 7) -> MemorySplit:
    rng = np.random.default_rng(4)
    images = rng.integers(0, 256, (size, *shape), dtype=np.uint8)
    return MemorySplit("train", images, rng.integers(0, num_classes, size).astype(label_type(num_classes)), num_classes)


async def test_read_gives_samples_in_the_order_asked_for() -> None:
    split = random_split()

    images, labels = await split.read(np.array([7, 0, 7]))
    assert (images == split.images[[7, 0, 7]]).all()
    assert (labels == split.labels[[7, 0, 7]]).all()
    assert images.flags.c_contiguous


async def test_slice_reads_and_gathers_what_the_whole_has_there() -> None:
    whole = random_split()
    part = Slice(whole.fingerprint, 50, 10, 40)
    sliced, wanted = whole.sliced(part), np.array([7, 0, 29, 7])
    rows = part.base_indices(wanted)

    for images, labels in (await sliced.read(wanted), sliced.gather(wanted, np.empty((30, 3, 5), np.uint8))):
        assert (images == whole.images[rows]).all()
        assert (labels == whole.labels[rows]).all()
    assert (sliced.num_samples, sliced.fingerprint) == (30, part.fingerprint)
    assert sliced.images is whole.images


def test_arrays_become_read_only() -> None:
    split = random_split()

    with pytest.raises(ValueError, match="read-only"):
        split.images[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        split.labels[0] = 1


def test_fingerprint_is_that_of_saved_cursors() -> None:
    """A change of it would make every cursor that was saved mean other samples."""
    split = MemorySplit("train", np.arange(16, dtype=np.uint8).reshape(2, 2, 4), np.array([1, 2], np.uint8), 10)

    assert split.fingerprint.hex() == "d54edc3b949f5dbf2ce0bab43c858716fea1f3d4ff0dc83acbab1706daccc2f9"


@given(cuts=st.lists(st.integers(0, 50), max_size=6))
def test_fingerprint_does_not_depend_on_the_pieces(cuts: list[int]) -> None:
    split = random_split(num_classes=300)
    fingerprint = Fingerprint(split.images.shape)
    bounds = [0, *sorted(cuts), 50]
    for first, last in itertools.pairwise(bounds):
        fingerprint.add(split.images[first:last], split.labels[first:last])

    assert fingerprint.digest() == split.fingerprint


@pytest.mark.parametrize(
    ("num_classes", "expected"), [(2, "<u1"), (256, "<u1"), (257, "<u2"), (65536, "<u2"), (65537, "<u4")]
)
def test_labels_take_the_smallest_type_that_holds_them(num_classes: int, expected: str) -> None:
    assert label_type(num_classes) == np.dtype(expected)

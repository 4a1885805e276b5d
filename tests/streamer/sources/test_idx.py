import gzip
import struct

import numpy as np
import pytest

from streamer.errors import DataError
from streamer.sources import idx

IMAGES = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
LABELS = np.array([7, 0], np.uint8)


def test_images_and_labels_come_back_as_written() -> None:
    images = idx.parse_images(idx.unpack(idx.pack(idx.format_images(IMAGES)), file="i"), file="i")
    labels = idx.parse_labels(idx.format_labels(LABELS), file="l")

    assert np.array_equal(images, IMAGES)
    assert np.array_equal(labels, LABELS)
    assert images.flags.c_contiguous
    assert not images.flags.writeable


def test_pack_gives_the_same_bytes_each_time() -> None:
    assert idx.pack(b"content") == idx.pack(b"content")
    assert idx.pack(b"content")[4:8] == bytes(4), "no time in it"


@pytest.mark.parametrize(
    ("content", "expected", "found"),
    [
        (struct.pack(">4I", 2049, 1, 1, 1) + b"x", "2051", "2049"),
        (b"\x00\x00", "2051", "2 bytes"),
        (struct.pack(">3I", 2051, 1, 1), "a header of 16 bytes", "12 bytes"),
        (idx.format_images(IMAGES)[:-1], "24 bytes of images (2x3x4)", "23"),
        (idx.format_images(IMAGES) + b"x", "24 bytes of images (2x3x4)", "25"),
    ],
    ids=["labels", "no-magic", "short-header", "truncated", "trailing"],
)
def test_parse_images_names_file_expected_and_found(content: bytes, expected: str, found: str) -> None:
    with pytest.raises(DataError) as caught:
        idx.parse_images(content, file="some/file")

    assert str(caught.value.file) == "some/file"
    assert expected in caught.value.expected
    assert found in caught.value.found
    assert all(part in str(caught.value) for part in ("some/file", expected, found))


def test_parse_labels_refuses_images() -> None:
    with pytest.raises(DataError, match="expected IDX labels with magic number 2049, found 2051"):
        idx.parse_labels(idx.format_images(IMAGES), file="l")


@pytest.mark.parametrize("cut", [10, -1, -8])
def test_unpack_names_a_truncated_gzip_file(cut: int) -> None:
    raw = gzip.compress(bytes(range(256)) * 10)[:cut]

    with pytest.raises(DataError, match=r"some/file\.gz: expected a whole gzip file, found one cut short"):
        idx.unpack(raw, file="some/file.gz")


def test_unpack_names_a_damaged_gzip_file() -> None:
    raw = bytearray(gzip.compress(bytes(range(256)) * 10))
    raw[-6] ^= 1

    with pytest.raises(DataError, match="found a damaged one"):
        idx.unpack(bytes(raw), file="f")


def check(images: np.ndarray[tuple[int, int, int], np.dtype[np.uint8]], labels: list[int]) -> None:
    idx.check_pair(
        images,
        np.array(labels, np.uint8),
        images_file="the-images",
        labels_file="the-labels",
        image_shape=(28, 28),
        num_classes=10,
    )


def test_pair_with_fewer_labels_than_images_is_named() -> None:
    with pytest.raises(DataError, match="the-labels: expected 3 labels, one for each image of the-images, found 2"):
        check(np.zeros((3, 28, 28), np.uint8), [1, 2])


def test_pair_with_a_label_that_is_no_class_is_named() -> None:
    with pytest.raises(DataError, match="the-labels: expected labels from 0 to 9, found 10 at index 1"):
        check(np.zeros((2, 28, 28), np.uint8), [9, 10])


def test_pair_with_images_of_another_size_is_named() -> None:
    with pytest.raises(DataError, match="the-images: expected images of 28x28, found 28x27"):
        check(np.zeros((1, 28, 27), np.uint8), [1])


def test_pair_without_samples_is_named() -> None:
    with pytest.raises(DataError, match="at least one sample"):
        check(np.zeros((0, 28, 28), np.uint8), [])

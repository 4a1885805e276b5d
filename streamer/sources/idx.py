"""
IDX, the file format of MNIST: bytes in, numpy arrays out, and every fault named.

Source: "The MNIST database", section "File formats": a magic number (two zero bytes, 8 for unsigned bytes, the
number of dimensions), each dimension as a 4-byte number, big-endian, then the values row by row.
"""

import gzip
import struct
import zlib

import numpy as np
from numpy.typing import NDArray

from streamer.errors import DataError

IMAGES_MAGIC = 2051
LABELS_MAGIC = 2049

_GZIP_MAGIC = b"\x1f\x8b"


def unpack(raw: bytes, *, file: str) -> bytes:
    """
    Return what a gzip file holds, and anything else as it is.

    Args:
        raw: The whole file.
        file: Its name, for errors.

    Raises:
        DataError: The gzip stream is cut short or damaged.
    """
    if not raw.startswith(_GZIP_MAGIC):
        return raw
    try:
        return gzip.decompress(raw)
    except EOFError as error:
        raise DataError(file, expected="a whole gzip file", found=f"one cut short after {len(raw)} bytes") from error
    except (OSError, zlib.error) as error:
        raise DataError(file, expected="a gzip file", found=f"a damaged one ({error})") from error


def pack(content: bytes) -> bytes:
    """Gzip; the same content gives the same bytes, as no time is written."""
    return gzip.compress(content, mtime=0)


def parse_images(content: bytes, *, file: str) -> NDArray[np.uint8]:
    """
    Read images: uint8, shape (N, height, width), C-contiguous, read-only, without a copy.

    Args:
        content: The unpacked file.
        file: Its name, for errors.

    Raises:
        DataError: Wrong magic number, or more or fewer bytes than the header announces.
    """
    return _parse(content, IMAGES_MAGIC, "images", num_dimensions=3, file=file)


def parse_labels(content: bytes, *, file: str) -> NDArray[np.uint8]:
    """Read labels: uint8, shape (N,), read-only; arguments and errors as for :func:`parse_images`."""
    return _parse(content, LABELS_MAGIC, "labels", num_dimensions=1, file=file)


def check_pair(
    images: NDArray[np.uint8],
    labels: NDArray[np.uint8],
    *,
    images_file: str,
    labels_file: str,
    image_shape: tuple[int, int],
    num_classes: int,
) -> None:
    """
    Hold images and labels of one split against each other and against what the data set promises.

    Raises:
        DataError: Counts differ, the images have another shape, a label is no class, or there is no sample.
    """
    if images.shape[1:] != image_shape:
        found = _times(images.shape[1:])
        raise DataError(images_file, expected=f"images of {_times(image_shape)}", found=found)
    if len(images) != len(labels):
        expected = f"{len(images)} labels, one for each image of {images_file}"
        raise DataError(labels_file, expected=expected, found=str(len(labels)))
    if not len(labels):
        raise DataError(labels_file, expected="at least one sample", found="none")
    if labels.max() >= num_classes:
        at = int(np.argmax(labels >= num_classes))
        expected = f"labels from 0 to {num_classes - 1}"
        raise DataError(labels_file, expected=expected, found=f"{labels[at]} at index {at}")


def format_images(images: NDArray[np.uint8]) -> bytes:
    """Write images of shape (N, height, width) as the content of an IDX file."""
    return struct.pack(">4I", IMAGES_MAGIC, *images.shape) + images.tobytes()


def format_labels(labels: NDArray[np.uint8]) -> bytes:
    """Write labels of shape (N,) as the content of an IDX file."""
    return struct.pack(">2I", LABELS_MAGIC, *labels.shape) + labels.tobytes()


def _parse(content: bytes, magic: int, kind: str, *, num_dimensions: int, file: str) -> NDArray[np.uint8]:
    header = struct.Struct(f">{1 + num_dimensions}I")
    # The magic number first: a file of the other kind can be shorter than this kind's header.
    found = int.from_bytes(content[:4], "big")
    if len(content) < 4 or found != magic:
        shown = str(found) if len(content) >= 4 else f"a file of {len(content)} bytes"
        raise DataError(file, expected=f"IDX {kind} with magic number {magic}", found=shown)
    if len(content) < header.size:
        raise DataError(file, expected=f"a header of {header.size} bytes", found=f"{len(content)} bytes")
    shape = header.unpack_from(content)[1:]
    size = 1
    for length in shape:
        size *= length
    values = len(content) - header.size
    if values != size:
        expected = f"{size} bytes of {kind} ({_times(shape)}) after the header"
        raise DataError(file, expected=expected, found=str(values))
    return np.frombuffer(content, np.uint8, offset=header.size).reshape(shape)


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(str(length) for length in shape)

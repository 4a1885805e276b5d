import struct
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from imaging.decoding import ImageFile, Pixels, UndecodableError
from imaging.structure import (
    MAX_COMMENTS,
    MAX_HEADER_BYTES,
    MAX_PARTS,
    MAX_SCANS,
    MAX_SEGMENTS,
    MAX_VALUES,
    TooManyPartsError,
    check_parts,
    may_inflate,
)
from tests.digits import FORMATS, encoded
from tests.faults.gateway.files import chunk, many_scans_jpeg, png


def jpeg(segment: bytes, count: int) -> bytes:
    data = encoded(Image.new("L", (28, 28)), "JPEG")
    return data[:2] + segment * count + data[2:]


def gif(block: bytes, count: int) -> bytes:
    data = encoded(Image.new("L", (28, 28)), "GIF")
    palette = 3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0
    return data[: 13 + palette] + block * count + data[13 + palette :]


def tiff(tag: int, count: int) -> bytes:
    """One strip or tile of one byte at the same place, so often."""
    place = 8 + 4 * count
    tags = [(256, 4, 1, 4096), (257, 4, 1, 4096), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (tag, 4, count, 8)]
    entries = b"".join(struct.pack("<HHII", *each) for each in sorted(tags))
    return b"II*\0" + struct.pack("<I", place) + struct.pack("<I", 8) * count + struct.pack("<H", len(tags)) + entries


MANY: dict[str, Callable[[], bytes]] = {
    f"more than {MAX_PARTS} PNG chunks": lambda: png(before=chunk(b"tEXt", b"k\0v") * MAX_PARTS),
    # Each is joined to all before it: 16 MiB of these took minutes.
    f"more than {MAX_SEGMENTS} JPEG segments": lambda: jpeg(b"\xff\xe1\0\x09Exif\0\0z", MAX_SEGMENTS),
    f"more than {MAX_SCANS} JPEG scans": lambda: many_scans_jpeg(MAX_SCANS, 64),
    f"more than {MAX_PARTS} GIF blocks before the first frame": lambda: gif(b"\x21\xfe\x01c\0", MAX_PARTS),
    f"more than {MAX_PARTS} GIF blocks": lambda: gif(b"\0", MAX_PARTS),
    f"more than {MAX_VALUES} values of TIFF tag 273": lambda: tiff(273, MAX_VALUES + 1),
    f"more than {MAX_VALUES} values of TIFF tag 324": lambda: tiff(324, MAX_VALUES + 1),
    f"more than {MAX_COMMENTS} PNM comments": lambda: b"P2 28 28 255\n" + b"#\n" * (MAX_COMMENTS + 1) + b"1 " * 784,
    f"no PNM header in the first {MAX_HEADER_BYTES} bytes": lambda: (
        b"P5 #" + b"c" * MAX_HEADER_BYTES + b"\n28 28 255\n" + bytes(784)
    ),
}


@pytest.mark.parametrize("reason", MANY)
def test_too_many_parts_are_refused(reason: str) -> None:
    with pytest.raises(UndecodableError, match=f"^{reason}"):
        ImageFile(MANY[reason]())


@pytest.mark.parametrize("kind", FORMATS)
def test_large_files_of_programs_are_taken(kind: str) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (1000, 1000), np.uint8)
    check_parts(encoded(Image.fromarray(noise), kind))


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_progressive_jpeg_is_taken(mode: str) -> None:
    noise = Image.effect_noise((500, 400), 80).convert(mode)
    check_parts(encoded(noise, "JPEG", progressive=True, exif=b"Exif\0\0" + bytes(60_000)))


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "iCCP"])
def test_png_that_inflates_before_its_pixels_is_told(kind: str) -> None:
    assert may_inflate(png(before=chunk(kind.encode(), b"x")))
    assert not may_inflate(png())


def test_what_follows_the_end_does_not_count() -> None:
    check_parts(png() + chunk(b"tEXt", b"k\0v") * MAX_PARTS)
    check_parts(encoded(Image.new("L", (28, 28)), "JPEG") + b"\xff\xfe\0\x02" * MAX_SEGMENTS)
    check_parts(encoded(Image.new("L", (28, 28)), "GIF") + b"\0" * MAX_PARTS)


@pytest.mark.parametrize("kind", FORMATS)
def test_cut_files_are_left_to_the_decoder(digit: Pixels, kind: str) -> None:
    data = encoded(Image.fromarray(digit).resize((80, 80)), kind)
    for length in range(0, len(data), 7):
        try:
            check_parts(data[:length])
        except TooManyPartsError:
            assert kind == "PPM"  # without its header it has none of a lawful length


@pytest.mark.parametrize("place", [5000, 2**63])
def test_tiff_that_points_beyond_its_end_is_left_to_the_decoder(place: int) -> None:
    check_parts(b"II+\0\x08\0\0\0" + struct.pack("<Q", place) + bytes(2000))

"""
How many parts an image file is made of, found out before a decoder goes through them one by one.

Decoders take a few microseconds for each part, and some copy all parts before it: a small file of many keeps them busy
for minutes. Files as programs write them are far from every limit here.
"""

import re
import struct

MAX_PARTS = 10_000
"""Most chunks of a PNG; most blocks of a GIF before its first frame."""
MAX_SEGMENTS = 500
"""Most segments of a JPEG, those of its scans included."""
MAX_SCANS = 100
"""Most scans of a JPEG: each goes through all blocks of the image. Encoders write about ten."""
MAX_VALUES = 1 << 16
"""Most values of one TIFF tag, strips and tiles among them; text and other bytes aside."""
MAX_HEADER_BYTES = 4096
"""Longest header of a PNM, comments included."""
MAX_COMMENTS = 1000
"""Most comments between the pixels of a PNM that is text."""

# Files below this have too few parts of any kind.
_FEW_BYTES = 1024
# A marker with what belongs to it, in or behind the data of a scan; filling and restarts are none.
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_ALONE, _END, _SCAN = (0x01, 0xD8), 0xD9, 0xDA
_PNM_HEADER = re.compile(rb"P[^\s#]{1,6}(?:(?:\s++|#[^\r\n]*+)++[^\s#]{1,20}){2,3}")
# Types BYTE, ASCII, SBYTE, UNDEFINED; tags of the places and lengths of strips and tiles.
_TIFF_BYTES = frozenset({1, 2, 6, 7})
_TIFF_PLACES = frozenset({273, 279, 324, 325})


# Text and profiles of a PNG that are inflated when its header is read, a megabyte for each kilobyte.
_INFLATED = (b"zTXt", b"iTXt", b"iCCP")


class TooManyPartsError(ValueError):
    """A file of more parts than any program writes."""


def check_parts(data: bytes) -> None:
    """
    Refuse a file of too many parts. Whatever else is wrong with it is left to its decoder.

    Args:
        data: A whole file of any format.

    Raises:
        TooManyPartsError: Names the parts and the limit.
    """
    if len(data) <= _FEW_BYTES:
        return
    for magic, check in _CHECKS:
        if data.startswith(magic):
            check(data)
            return


def may_inflate(data: bytes) -> bool:
    """Tell whether reading the header of a file, without its pixels, may take far longer than its length suggests."""
    return any(kind in data for kind in _INFLATED)


def _check_png(data: bytes) -> None:
    position = 8
    for _ in range(MAX_PARTS):
        if data[position + 4 : position + 8] in (b"", b"IEND"):
            return
        position += 12 + int.from_bytes(data[position : position + 4])
    raise TooManyPartsError(f"more than {MAX_PARTS} PNG chunks")


def _check_jpeg(data: bytes) -> None:
    position = 2
    num_scans = 0
    for _ in range(MAX_SEGMENTS):
        marker = _MARKER.search(data, position)
        if marker is None or data[marker.start() + 1] == _END:
            return
        kind, position = data[marker.start() + 1], marker.end()
        if kind not in _ALONE:
            position += int.from_bytes(data[position : position + 2])
        num_scans += kind == _SCAN
        if num_scans > MAX_SCANS:
            raise TooManyPartsError(f"more than {MAX_SCANS} JPEG scans")
    raise TooManyPartsError(f"more than {MAX_SEGMENTS} JPEG segments")


def _check_gif(data: bytes) -> None:
    has_palette, size = data[10] & 0x80, data[10] & 7
    position = 13 + (3 << size + 1 if has_palette else 0)
    is_within = False
    for _ in range(MAX_PARTS):
        kind = data[position : position + 1]
        if not kind:
            return
        if is_within:
            # A part of an extension, its length in front; the last one is empty.
            is_within = kind != b"\0"
            position += 1 + kind[0]
        elif kind == b"!":
            is_within = True
            position += 2
        elif kind in b",;":
            return
        else:
            position += 1
    raise TooManyPartsError(f"more than {MAX_PARTS} GIF blocks before the first frame")


def _check_tiff(data: bytes) -> None:
    # As Pillow tells them apart, which takes no BigTIFF of the other byte order.
    order, is_big = "<" if data[:2] == b"II" else ">", data[2] == 43
    entry = struct.Struct(f"{order}HHQ8x" if is_big else f"{order}HHI4x")
    try:
        (position,) = struct.unpack_from(f"{order}Q" if is_big else f"{order}I", data, 8 if is_big else 4)
        (num_entries,) = struct.unpack_from(f"{order}Q" if is_big else f"{order}H", data, position)
        position += 8 if is_big else 2
        if num_entries > MAX_PARTS:
            raise TooManyPartsError(f"more than {MAX_PARTS} TIFF tags")
        for tag, kind, num_values in (
            entry.unpack_from(data, position + index * entry.size) for index in range(num_entries)
        ):
            if num_values > MAX_VALUES and (kind not in _TIFF_BYTES or tag in _TIFF_PLACES):
                raise TooManyPartsError(f"more than {MAX_VALUES} values of TIFF tag {tag}")
    except (struct.error, OverflowError):
        # It points beyond its end, or beyond any.
        return


def _check_pnm(data: bytes) -> None:
    header = _PNM_HEADER.match(data)
    if header is None or header.end() > MAX_HEADER_BYTES:
        raise TooManyPartsError(f"no PNM header in the first {MAX_HEADER_BYTES} bytes")
    if data[:2] in (b"P1", b"P2", b"P3") and data.count(b"#") > MAX_COMMENTS:
        raise TooManyPartsError(f"more than {MAX_COMMENTS} PNM comments")


_CHECKS = (
    (b"\x89PNG\r\n\x1a\n", _check_png),
    (b"\xff\xd8", _check_jpeg),
    (b"GIF8", _check_gif),
    (b"II", _check_tiff),
    (b"MM", _check_tiff),
    (b"P", _check_pnm),
)

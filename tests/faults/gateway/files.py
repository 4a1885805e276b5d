"""Image files: one as programs write it, and others that no program writes, put together byte by byte."""

import struct
import zlib

from PIL import Image

from tests.digits import encoded, seven

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_SIDE = 28


def seven_as(kind: str = "PNG") -> bytes:
    """Return a seven, 28x28 and grey, in a format of Pillow's."""
    return encoded(Image.fromarray(seven()), kind)


def chunk(kind: bytes, body: bytes) -> bytes:
    """One chunk of a PNG, with its checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def header(width: int = _SIDE, height: int = _SIDE) -> bytes:
    """Begin a PNG of 8-bit grey that declares this size."""
    return SIGNATURE + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))


def png(width: int = _SIDE, height: int = _SIDE, *, pixels: bytes | None = None, before: bytes = b"") -> bytes:
    """
    Return a PNG of 8-bit grey.

    Args:
        width: As it declares.
        height: As it declares.
        pixels: Filter byte and pixels of each row; ``None``: zeros, as many as it declares.
        before: Chunks before those of the pixels.
    """
    if pixels is None:
        pixels = bytes((width + 1) * height)
    return header(width, height) + before + chunk(b"IDAT", zlib.compress(pixels, 9)) + chunk(b"IEND", b"")


def animated_png(num_frames: int) -> bytes:
    """Return an APNG whose frames are all black (APNG specification 1.0)."""
    frame = zlib.compress(bytes((_SIDE + 1) * _SIDE), 9)
    control = struct.pack(">IIIIHHBB", _SIDE, _SIDE, 0, 0, 1, 100, 0, 0)
    parts = [chunk(b"acTL", struct.pack(">II", num_frames, 0)), chunk(b"fcTL", struct.pack(">I", 0) + control)]
    parts.append(chunk(b"IDAT", frame))
    for number in range(1, 2 * num_frames - 1, 2):
        parts.append(chunk(b"fcTL", struct.pack(">I", number) + control))
        parts.append(chunk(b"fdAT", struct.pack(">I", number + 1) + frame))
    return header() + b"".join(parts) + chunk(b"IEND", b"")


def many_scans_jpeg(num_scans: int, side: int) -> bytes:
    """
    Return a black progressive JPEG in which scan after scan says nothing about all blocks of the image.

    Source: ITU-T T.81, annexes B and G: a scan of the coefficients 1..63 is one run of empty blocks after another.
    """
    num_blocks = (-(-side // 8)) ** 2
    frame = b"\xff\xc2" + struct.pack(">HBHHB", 11, 8, side, side, 1) + b"\1\x11\0"
    quantisation = b"\xff\xdb\0\x43\0" + bytes([1] * 64)
    # One code of one bit each: DC difference 0; a run of 2**14 and as many more as 14 further bits say.
    codes = (
        b"\xff\xc4\0\x14\0" + bytes([1] + [0] * 15) + b"\0" + b"\xff\xc4\0\x14\x10" + bytes([1] + [0] * 15) + b"\xe0"
    )
    first = b"\xff\xda\0\x08\1\1\0\0\0\0" + bytes(num_blocks // 8 + 1)
    bits = ("0" + "1" * 14) * -(-num_blocks // 32767)
    bits += "1" * (-len(bits) % 8)
    runs = bytes(int(bits[start : start + 8], 2) for start in range(0, len(bits), 8)).replace(b"\xff", b"\xff\0")
    empty = b"\xff\xda\0\x08\1\1\0\1\x3f\0" + runs
    return b"\xff\xd8" + quantisation + frame + codes + first + empty * num_scans + b"\xff\xd9"


def odd_tiff(num_tags: int) -> bytes:
    """Return a TIFF header whose tags all say that they are longer than the file."""
    tags = b"".join(struct.pack("<HHII", 1000 + number, 1, 1 << 30, 8) for number in range(num_tags))
    return b"II*\0" + struct.pack("<IH", 8, num_tags) + tags + bytes(4)

"""
``Batch`` in wire format without copying its pixels, which protobuf would do up to three times.

Fields may stand in any order and a message may be joined from parts (last one wins, repeated fields add up:
https://protobuf.dev/programming-guides/encoding/). So the pixels are written last, behind what protobuf writes of all
other fields, and where they stand last they are read in place.
"""

from google.protobuf.message import DecodeError

from protos.streamer.v1 import sample_service_pb2 as pb

_IMAGES = pb.Batch.IMAGES_FIELD_NUMBER << 3 | 2

_MAX_VARINT_BITS = 63
# Low three bits of a tag.
_VARINT, _FIXED64, _DELIMITED, _FIXED32 = 0, 1, 2, 5


def encode(fields: pb.Batch, images: memoryview) -> bytes:
    """Return the message with all of ``fields``, which has no images, and these; they are copied once."""
    if not images.nbytes:
        return fields.SerializeToString()
    return b"".join((fields.SerializeToString(), bytes((_IMAGES,)), _varint(images.nbytes), images))


def decode(data: bytes) -> tuple[pb.Batch, memoryview]:
    """
    Return a message's fields but for the images, and those as a view into ``data``, or into a copy.

    Raises:
        google.protobuf.message.DecodeError: Not a Batch.
    """
    start = _start_of_trailing_images(data)
    if start is not None:
        tag_start, images_start = start
        fields, images = pb.Batch.FromString(data[:tag_start]), memoryview(data)[images_start:]
    else:
        fields = pb.Batch.FromString(data)
        images = memoryview(fields.images)
    fields.ClearField("images")
    return fields, images


def _start_of_trailing_images(data: bytes) -> tuple[int, int] | None:
    """Return where the tag of the images and their first byte stand, None unless they end the message."""
    place, end = 0, len(data)
    try:
        while place < end:
            tag_start = place
            tag, place = _read_varint(data, place)
            kind = tag & 7
            if kind == _DELIMITED:
                size, place = _read_varint(data, place)
                if tag == _IMAGES and place + size == end:
                    return tag_start, place
                place += size
            elif kind == _VARINT:
                _, place = _read_varint(data, place)
            elif kind in (_FIXED32, _FIXED64):
                place += 4 if kind == _FIXED32 else 8
            else:
                return None
    except IndexError:
        raise DecodeError("truncated message") from None
    return None


def _read_varint(data: bytes, place: int) -> tuple[int, int]:
    byte = data[place]
    value, shift = byte & 0x7F, 7
    while byte & 0x80:
        if shift > _MAX_VARINT_BITS:
            raise DecodeError("a number of more than 10 bytes")
        place += 1
        byte = data[place]
        value |= (byte & 0x7F) << shift
        shift += 7
    return value, place + 1


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append((value & 0x7F) | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)

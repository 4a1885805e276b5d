"""
Requests whose parts are counted before they are parsed.

A message of 32 MiB may hold 16 million empty images, and each becomes an object: a gigabyte, for a request that would
be refused for their number. How many there are is told by the outermost layer of the encoding, which is read here.
Source: https://protobuf.dev/programming-guides/encoding/
"""

from collections.abc import Callable
from typing import Any

from protos.gateway.v1 import image_service_pb2 as pb
from rpc.interceptor import UnfitError

# So many bytes cannot hold enough parts to matter.
_HARMLESS_BYTES = 64 * 1024
# Fields of a batch that are no images: model, version, top_k, and what later versions add.
_OTHER_FIELDS = 64
# Of 64 bits, 7 to a byte.
_MAX_VARINT_BYTES = 10


def batch_parser(max_images: int) -> Callable[[bytes], Any]:
    """
    Return what parses a ClassifyBatchRequest of up to so many images.

    It raises :class:`rpc.interceptor.UnfitError` where there are more, and protobuf's DecodeError as always.
    """

    def parse(data: bytes) -> Any:
        if len(data) > _HARMLESS_BYTES and num_fields(data, max_images + _OTHER_FIELDS) > max_images + _OTHER_FIELDS:
            raise UnfitError(f"images: more than {max_images}; allowed are 1..{max_images}")
        return pb.ClassifyBatchRequest.FromString(data)

    return parse


def num_fields(data: bytes, limit: int) -> int:
    """Return how many fields a message has, or a number above ``limit``; of a damaged one those before the damage."""
    position, count = 0, 0
    while position < len(data) and count <= limit:
        key, position = _varint(data, position)
        match key & 7:
            case 0:
                _, position = _varint(data, position)
            case 1:
                position += 8
            case 2:
                length, position = _varint(data, position)
                position += length
            case 5:
                position += 4
            case _:
                break
        count += 1
    return count


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """Return a number and where it ends; what is longer than any number is damage, which protobuf will tell."""
    value = 0
    for index, byte in enumerate(data[position : position + _MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, position + index + 1
    return 0, len(data)

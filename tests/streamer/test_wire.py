import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from protos.streamer.v1 import sample_service_pb2 as pb
from streamer.wire import decode, encode, pack_indices

FOUR_BYTES = 2**28

images = st.binary(max_size=400)
indices = st.lists(st.integers(0, FOUR_BYTES - 1), max_size=20).map(lambda each: np.array(each, np.int64))
fields = st.builds(
    pb.Batch,
    position=st.integers(0, 2**64 - 1),
    next_position=st.integers(0, 300),
    num_samples=st.integers(0, 2**32 - 1),
    labels=st.binary(max_size=200),
    crc32c=st.integers(0, 2**32 - 1),
    end_of_epoch=st.booleans(),
    timings=st.builds(pb.Timings),
    image_shape=st.lists(st.integers(0, 300), max_size=3),
    draining=st.booleans(),
)


def packed(values: NDArray[np.int64]) -> bytes:
    rows = pack_indices(values)
    assert rows is not None
    return rows


def whole(fields: pb.Batch, values: NDArray[np.int64], pixels: bytes) -> pb.Batch:
    message = pb.Batch(images=pixels, indices=values.tolist())
    message.MergeFrom(fields)
    return message


@given(fields, indices, images)
def test_message_is_the_one_that_protobuf_reads(fields: pb.Batch, values: NDArray[np.int64], pixels: bytes) -> None:
    message = encode(fields, packed(values), memoryview(pixels))

    assert pb.Batch.FromString(message) == whole(fields, values, pixels)


@given(fields, indices, indices, images)
def test_indices_are_those_in_the_message_whatever_was_expected(
    fields: pb.Batch, values: NDArray[np.int64], expected: NDArray[np.int64], pixels: bytes
) -> None:
    message = encode(fields, packed(values), memoryview(pixels))

    assert decode(message, (packed(expected), expected)).indices.tolist() == values.tolist()
    assert decode(message, (packed(values), values)).indices.tolist() == values.tolist()


@given(fields, indices, images)
def test_what_protobuf_writes_is_read_in_its_order_and_in_ours(
    fields: pb.Batch, values: NDArray[np.int64], pixels: bytes
) -> None:
    expected = whole(fields, values, pixels)
    for message in (expected.SerializeToString(), encode(fields, packed(values), memoryview(pixels))):
        read = decode(message)
        assert read.fields == fields
        assert read.indices.tolist() == values.tolist()
        assert read.images.tobytes() == pixels


@given(fields, indices, images, indices, images)
def test_joined_messages_are_read_as_protobuf_does(
    fields: pb.Batch, early: NDArray[np.int64], first: bytes, late: NDArray[np.int64], last: bytes
) -> None:
    """Of images the last ones count, indices add up."""
    for head in (
        pb.Batch(images=first, indices=early.tolist()).SerializeToString(),
        encode(pb.Batch(), packed(early), memoryview(first)),
    ):
        message = head + encode(fields, packed(late), memoryview(last))
        expected, read = pb.Batch.FromString(message), decode(message)
        assert read.images.tobytes() == expected.images
        assert read.indices.tolist() == list(expected.indices) == [*early.tolist(), *late.tolist()]
        assert read.fields == fields


@given(fields, st.lists(st.integers(0, 2**64 - 1), max_size=20), images)
def test_indices_of_any_size_are_read(fields: pb.Batch, values: list[int], pixels: bytes) -> None:
    fields.indices.extend(values)

    assert decode(encode(fields, None, memoryview(pixels))).indices.tolist() == values


def test_index_that_needs_more_than_four_bytes_is_left_to_protobuf() -> None:
    assert pack_indices(np.array([1, FOUR_BYTES])) is None
    assert packed(np.array([FOUR_BYTES - 1])) == b"\xff\xff\xff\x7f"


def test_images_are_not_copied() -> None:
    message = encode(pb.Batch(position=3), None, memoryview(b"x" * 300))
    assert np.shares_memory(decode(message).images, np.frombuffer(message, np.uint8))


@given(fields, indices, images, st.integers(1, 400))
def test_message_cut_anywhere_is_read_as_protobuf_does_or_refused(
    fields: pb.Batch, values: NDArray[np.int64], pixels: bytes, cut: int
) -> None:
    message = encode(fields, packed(values), memoryview(pixels))[:-cut]
    try:
        expected = pb.Batch.FromString(message)
    except DecodeError:
        with pytest.raises(DecodeError):
            decode(message)
    else:
        read = decode(message)
        assert read.images.tobytes() == expected.images
        assert read.indices.tolist() == list(expected.indices)


def test_number_without_end_is_refused_at_once() -> None:
    with pytest.raises(DecodeError):
        decode(b"\x08" + b"\x80" * 10**6)

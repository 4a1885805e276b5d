import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from protos.streamer.v1 import sample_service_pb2 as pb
from streamer.wire import decode, encode

images = st.binary(max_size=400)
batches = st.builds(
    pb.Batch,
    position=st.integers(0, 2**64 - 1),
    next_position=st.integers(0, 300),
    num_samples=st.integers(0, 2**32 - 1),
    labels=st.binary(max_size=200),
    indices=st.lists(st.integers(0, 2**64 - 1), max_size=20),
    crc32c=st.integers(0, 2**32 - 1),
    end_of_epoch=st.booleans(),
    timings=st.builds(pb.Timings),
    image_shape=st.lists(st.integers(0, 300), max_size=3),
    draining=st.booleans(),
)


@given(batches, images)
def test_message_is_the_one_that_protobuf_reads(fields: pb.Batch, pixels: bytes) -> None:
    expected = pb.Batch(images=pixels)
    expected.MergeFrom(fields)

    assert pb.Batch.FromString(encode(fields, memoryview(pixels))) == expected


@given(batches, images)
def test_what_protobuf_writes_is_read_in_its_order_and_in_ours(fields: pb.Batch, pixels: bytes) -> None:
    whole = pb.Batch(images=pixels)
    whole.MergeFrom(fields)
    for message in (whole.SerializeToString(), encode(fields, memoryview(pixels))):
        read, view = decode(message)
        assert read == fields
        assert view == pixels


@given(batches, images, images)
def test_last_images_win_as_in_protobuf(fields: pb.Batch, first: bytes, last: bytes) -> None:
    message = pb.Batch(images=first).SerializeToString() + encode(fields, memoryview(last))
    read, view = decode(message)
    assert view == pb.Batch.FromString(message).images
    assert read == fields


def test_images_are_not_copied() -> None:
    message = encode(pb.Batch(position=3), memoryview(b"x" * 300))
    assert decode(message)[1].obj is message


@given(batches, images, st.integers(1, 400))
def test_message_cut_anywhere_is_read_as_protobuf_does_or_refused(fields: pb.Batch, pixels: bytes, cut: int) -> None:
    message = encode(fields, memoryview(pixels))[:-cut]
    try:
        expected = pb.Batch.FromString(message)
    except DecodeError:
        with pytest.raises(DecodeError):
            decode(message)
    else:
        assert decode(message)[1] == expected.images


def test_number_without_end_is_refused_at_once() -> None:
    with pytest.raises(DecodeError):
        decode(b"\x08" + b"\x80" * 10**6)

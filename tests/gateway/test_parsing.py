import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from gateway.parsing import batch_parser, num_fields
from protos.gateway.v1 import image_service_pb2 as pb
from rpc.interceptor import UnfitError

EMPTY_IMAGE = b"\x0a\x00"


@given(
    st.lists(st.binary(max_size=300), max_size=20), st.text(max_size=200), st.integers(-5, 2**40), st.integers(0, 2**31)
)
def test_fields_are_counted_as_protobuf_writes_them(images: list[bytes], model: str, version: int, top_k: int) -> None:
    request = pb.ClassifyBatchRequest(
        images=[pb.Image(encoded=image) for image in images], model=model, model_version=version, top_k=top_k
    )

    assert num_fields(request.SerializeToString(), 1000) == len(images) + bool(model) + bool(version) + bool(top_k)


def test_counting_ends_at_the_limit() -> None:
    assert num_fields(EMPTY_IMAGE * 1000, 10) == 11


@given(st.binary(max_size=200))
def test_damaged_message_is_counted_without_end_or_error(data: bytes) -> None:
    assert num_fields(data, 1000) <= 200


def test_number_without_end_takes_no_time() -> None:
    # Quadratic in its length, it would take hours.
    assert num_fields(b"\xff" * (32 << 20), 1000) == 1


def test_batch_of_millions_is_refused_before_it_is_parsed() -> None:
    parse = batch_parser(1024)
    with pytest.raises(UnfitError, match=r"images: more than 1024; allowed are 1..1024"):
        parse(EMPTY_IMAGE * (1 << 20))

    assert len(parse(EMPTY_IMAGE * 1024).images) == 1024
    full = pb.ClassifyBatchRequest(images=[pb.Image(encoded=bytes(1000))] * 1024, model="mnist", top_k=3)
    assert parse(full.SerializeToString()) == full
    with pytest.raises(DecodeError):
        parse(b"\xff" * 100_000)

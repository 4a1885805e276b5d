"""Embed and Compare."""

from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from protos.gateway.v1 import image_service_pb2 as pb
from tests.gateway.fake_triton import FakeTriton, normalised
from tests.gateway.servicer.calls import INVALID, TRUNCATED, picture, refusal

METHODS = [
    pb.SIMILARITY_METHOD_EMBEDDING_COSINE,
    pb.SIMILARITY_METHOD_PIXEL_COSINE,
    pb.SIMILARITY_METHOD_SSIM,
]


async def test_embed_answers_with_the_models_vector(stub: Any, triton: FakeTriton, digit: NDArray[np.uint8]) -> None:
    response = await stub.Embed(pb.EmbedRequest(image=picture(digit)))

    np.testing.assert_array_equal(response.vector, normalised(digit[np.newaxis])[0])
    assert (response.model, response.model_version) == ("mnist", 1)
    assert [output.name for output in triton.requests[-1].outputs] == ["embedding__1"]


async def test_both_images_of_a_comparison_leave_in_one_request(
    stub: Any, triton: FakeTriton, digit: NDArray[np.uint8]
) -> None:
    turned = np.ascontiguousarray(digit.T)
    response = await stub.Compare(pb.CompareRequest(first=picture(digit), second=picture(turned)))

    (images,) = [images for images in triton.received if len(images) == 2]
    np.testing.assert_array_equal(images, [digit, turned])
    first, second = normalised(np.stack((digit, turned)))
    assert response.score == pytest.approx(first @ second, abs=1e-6)
    assert response.method == pb.SIMILARITY_METHOD_EMBEDDING_COSINE
    assert not response.HasField("same_class_probability")
    assert (response.model, response.model_version) == ("mnist", 1)


@pytest.mark.parametrize("method", METHODS, ids=pb.SimilarityMethod.Name)
async def test_equal_images_score_one_and_order_does_not_matter(
    stub: Any, digit: NDArray[np.uint8], method: pb.SimilarityMethod.ValueType
) -> None:
    async def score(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> float:
        request = pb.CompareRequest(first=picture(first), second=picture(second), method=method)
        response = await stub.Compare(request)
        assert response.method == method
        return float(response.score)

    turned = np.ascontiguousarray(digit.T)
    assert await score(digit, digit) == 1.0
    assert await score(digit, turned) == pytest.approx(await score(turned, digit), abs=1e-6)
    assert await score(digit, turned) < 0.999


async def test_comparing_pixels_asks_no_model(stub: Any, triton: FakeTriton, digit: NDArray[np.uint8]) -> None:
    triton.failure = grpc.StatusCode.INTERNAL, "the model is broken"
    for method in METHODS[1:]:
        request = pb.CompareRequest(first=picture(digit), second=picture(digit), method=method)
        assert (await stub.Compare(request)).score == 1.0


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"first": None}, "first: missing; give encoded or raw"),
        ({"second": None}, "second: missing; give encoded or raw"),
        ({"second": pb.Image()}, "second: missing; give encoded or raw"),
        ({"second": pb.Image(encoded=b"hello")}, "second.encoded: not a readable image"),
        ({"second": pb.Image(raw=pb.RawImage(height=2, width=2, pixels=b"123"))}, "second.raw.pixels: 3 bytes"),
        ({"first": pb.Image(encoded=TRUNCATED)}, "first.encoded: "),
        ({"method": 9}, "method: 9; allowed are 0 (SIMILARITY_METHOD_UNSPECIFIED)"),
    ],
)
async def test_bad_comparison_names_the_field_and_the_next_one_succeeds(
    stub: Any, digit: NDArray[np.uint8], change: dict[str, Any], told: str
) -> None:
    good: dict[str, Any] = {"first": picture(digit), "second": picture(digit)}
    code, details = await refusal(stub.Compare(pb.CompareRequest(**(good | change))))
    assert code is INVALID
    assert details.startswith(told)

    assert (await stub.Compare(pb.CompareRequest(**good))).score == 1.0

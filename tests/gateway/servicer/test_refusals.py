"""Bad input: each its status and a message that names the field; the next good request succeeds."""

from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from protos.gateway.v1 import image_service_pb2 as pb
from tests.gateway.fake_triton import label_of
from tests.gateway.servicer.calls import INVALID, TRUNCATED, picture, png, refusal


@pytest.mark.parametrize(
    ("request_", "code", "message"),
    [
        (pb.ClassifyRequest(), INVALID, "image: missing; give encoded or raw"),
        (
            pb.ClassifyRequest(image=pb.Image(polarity=pb.POLARITY_LIGHT_ON_DARK)),
            INVALID,
            "image: missing; give encoded or raw",
        ),
        (
            pb.ClassifyRequest(image=pb.Image(encoded=b"")),
            INVALID,
            "image.encoded: empty; accepted are PNG, JPEG, BMP, GIF, WebP, TIFF, PGM",
        ),
        (
            pb.ClassifyRequest(image=pb.Image(encoded=np.random.default_rng(0).bytes(500))),
            INVALID,
            "image.encoded: not a readable image: unknown format or damaged header; accepted are PNG, JPEG",
        ),
        (
            pb.ClassifyRequest(image=pb.Image(encoded=np.random.default_rng(0).bytes(200_000))),
            INVALID,
            "image.encoded: not a readable image: unknown format or damaged header; accepted are PNG, JPEG",
        ),
        (
            pb.ClassifyRequest(image=pb.Image(encoded=TRUNCATED)),
            INVALID,
            "image.encoded: not a readable image: image file is truncated",
        ),
        (
            pb.ClassifyRequest(image=pb.Image(raw=pb.RawImage(height=28, width=28, pixels=bytes(783)))),
            INVALID,
            "image.raw.pixels: 783 bytes; 28x28 with 1 channel takes 784",
        ),
        (
            pb.ClassifyRequest(image=pb.Image(encoded=b"x", polarity=7)),  # type: ignore[arg-type]  # no such member
            INVALID,
            "image.polarity: 7; allowed are 0 (POLARITY_UNSPECIFIED), 1 (POLARITY_LIGHT_ON_DARK), 2",
        ),
        (
            pb.ClassifyRequest(image=pb.Image(encoded=b"x", framing=9)),  # type: ignore[arg-type]  # no such member
            INVALID,
            "image.framing: 9; allowed are 0 (FRAMING_UNSPECIFIED), 1 (FRAMING_CENTER), 2",
        ),
        (
            pb.ClassifyRequest(image=picture(np.eye(28, dtype=np.uint8)), top_k=11),
            INVALID,
            "top_k: 11; mnist has 10 classes, allowed are 0..10",
        ),
        (
            pb.ClassifyRequest(image=picture(np.eye(28, dtype=np.uint8)), model_version=-1),
            grpc.StatusCode.NOT_FOUND,
            "model_version: mnist has no version -1; served are 1",
        ),
        (
            pb.ClassifyRequest(image=picture(np.eye(28, dtype=np.uint8)), model="resnet"),
            grpc.StatusCode.NOT_FOUND,
            "model: no model 'resnet'; loaded are mnist",
        ),
        (
            pb.ClassifyRequest(image=picture(np.eye(28, dtype=np.uint8)), model_version=9),
            grpc.StatusCode.NOT_FOUND,
            "model_version: mnist has no version 9; served are 1",
        ),
    ],
)
async def test_bad_request_names_its_field_and_the_next_succeeds(
    stub: Any, digit: NDArray[np.uint8], request_: pb.ClassifyRequest, code: grpc.StatusCode, message: str
) -> None:
    refused_code, details = await refusal(stub.Classify(request_))
    assert refused_code is code
    assert details.startswith(message)

    good = await stub.Classify(pb.ClassifyRequest(image=picture(digit)))
    assert good.prediction.label == label_of(digit)


async def test_png_cut_anywhere_never_gets_an_answer(stub: Any, digit: NDArray[np.uint8]) -> None:
    data = png(digit)
    cuts = range(1, len(data), 7)
    calls = [stub.Classify(pb.ClassifyRequest(image=pb.Image(encoded=data[:cut]))) for cut in cuts]

    assert {(await refusal(call))[0] for call in calls} == {INVALID}


@pytest.mark.parametrize(
    ("num_images", "message"),
    [(0, "images: 0 images; allowed are 1..1024"), (1025, "images: 1025 images; allowed are 1..1024")],
)
async def test_batch_of_a_size_not_allowed(stub: Any, digit: NDArray[np.uint8], num_images: int, message: str) -> None:
    request = pb.ClassifyBatchRequest(images=[picture(digit)] * num_images)
    assert await refusal(stub.ClassifyBatch(request)) == (INVALID, message)

    good = await stub.ClassifyBatch(pb.ClassifyBatchRequest(images=[picture(digit)]))
    assert good.results[0].prediction.label == label_of(digit)


@pytest.mark.parametrize(
    ("fields", "code", "message"),
    [
        ({"top_k": 11}, INVALID, "top_k: 11;"),
        ({"model_version": -3}, grpc.StatusCode.NOT_FOUND, "model_version: mnist has no version -3"),
        ({"model": "x" * 10_000}, grpc.StatusCode.NOT_FOUND, "model: no model 'xxx"),
        ({"model_version": 4}, grpc.StatusCode.NOT_FOUND, "model_version: mnist has no version 4"),
    ],
)
async def test_bad_batch_names_its_field(
    stub: Any, digit: NDArray[np.uint8], fields: dict[str, Any], code: grpc.StatusCode, message: str
) -> None:
    refused_code, details = await refusal(
        stub.ClassifyBatch(pb.ClassifyBatchRequest(images=[picture(digit)], **fields))
    )
    assert refused_code is code
    assert details.startswith(message)
    assert len(details) < 200

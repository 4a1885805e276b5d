"""Which model answers, and what it says about itself."""

import json
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from protos.gateway.v1 import image_service_pb2 as pb
from tests.gateway.fake_triton import FakeTriton, label_of
from tests.gateway.servicer.calls import INVALID, picture, refusal


async def test_card_decides_what_a_request_leaves_open(
    stub: Any, triton: FakeTriton, tmp_path: Path, digit: NDArray[np.uint8]
) -> None:
    folder = tmp_path / "mnist" / "2"
    folder.mkdir(parents=True)
    names = [f"class {index}" for index in range(10)]
    (folder / "card.json").write_text(json.dumps({"polarity": "dark_on_light", "class_names": names}))
    triton.models["mnist"].append(2)
    response = await stub.Classify(pb.ClassifyRequest(image=picture(digit), model_version=2))
    assert response.prediction.name == f"class {label_of(255 - digit)}"

    as_asked = picture(digit, polarity=pb.POLARITY_LIGHT_ON_DARK)
    response = await stub.Classify(pb.ClassifyRequest(image=as_asked, model_version=2))
    assert response.prediction.name == f"class {label_of(digit)}"


async def test_list_models_tells_what_is_ready_now(stub: Any, triton: FakeTriton) -> None:
    triton.models = {"mnist": [1, 3, 2], "other": [5]}
    first, second = (await stub.ListModels(pb.ListModelsRequest())).models

    assert (first.name, list(first.versions), first.default_version, first.is_default) == ("mnist", [3, 2, 1], 3, True)
    assert list(first.class_names) == list("0123456789")
    assert (second.name, second.is_default) == ("other", False)


async def test_explicit_version_that_went_away_is_not_found(
    stub: Any, triton: FakeTriton, digit: NDArray[np.uint8]
) -> None:
    triton.failure = grpc.StatusCode.UNAVAILABLE, "Request for unknown model: 'mnist' version 1 is not at ready state"
    code, details = await refusal(stub.Classify(pb.ClassifyRequest(image=picture(digit), model_version=1)))
    assert (code, details) == (grpc.StatusCode.NOT_FOUND, "model_version: mnist has no version 1 ready")


async def test_default_version_that_went_away_is_worth_another_try(
    stub: Any, triton: FakeTriton, digit: NDArray[np.uint8]
) -> None:
    triton.failure = grpc.StatusCode.UNAVAILABLE, "Request for unknown model: 'mnist' version 1 is not at ready state"
    code, details = await refusal(stub.Classify(pb.ClassifyRequest(image=picture(digit))))
    assert (code, details) == (grpc.StatusCode.UNAVAILABLE, "the model is being replaced; try again")


@pytest.mark.parametrize("method", ["Classify", "Embed"])
async def test_default_version_that_went_away_is_answered_by_the_next(
    stub: Any, triton: FakeTriton, digit: NDArray[np.uint8], method: str
) -> None:
    triton.models["mnist"] = [1, 2]
    await stub.ListModels(pb.ListModelsRequest())
    triton.models["mnist"] = [1]
    request = {"Classify": pb.ClassifyRequest, "Embed": pb.EmbedRequest}[method](image=picture(digit))

    assert (await getattr(stub, method)(request)).model_version == 1


async def test_model_without_embedding_is_named_and_still_compares_pixels(
    stub: Any, triton: FakeTriton, digit: NDArray[np.uint8]
) -> None:
    triton.embed = None
    triton.models["plain"] = [3]
    pair: dict[str, Any] = {"first": picture(digit), "second": picture(digit), "model": "plain"}
    lacks = "plain version 3 gives no embedding (embedding__1)"
    assert await refusal(stub.Embed(pb.EmbedRequest(image=picture(digit), model="plain"))) == (
        INVALID,
        f"model: {lacks}",
    )
    assert await refusal(stub.Compare(pb.CompareRequest(**pair))) == (
        INVALID,
        f"method: {lacks}; allowed are PIXEL_COSINE and SSIM",
    )
    assert (await stub.Compare(pb.CompareRequest(method=pb.SIMILARITY_METHOD_SSIM, **pair))).score == 1.0

"""A Triton that answers nonsense, or late."""

from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from gateway.server import GatewayServer
from gateway.settings import GatewaySettings
from protos.gateway.v1 import image_service_pb2 as pb
from protos.gateway.v1 import image_service_pb2_grpc
from tests.gateway.fake_triton import FakeTriton, confident, normalised
from tests.gateway.servicer.calls import picture, refusal


@pytest.mark.parametrize(
    ("answer", "name"),
    [
        (lambda images: confident(images) * np.nan, "NaN"),
        (lambda images: confident(images) * 2, "sum"),
        (lambda images: confident(images)[:, :9], "shape"),
    ],
)
async def test_poisoned_answer_is_internal_and_not_passed_on(
    stub: Any, triton: FakeTriton, digit: NDArray[np.uint8], answer: Any, name: str
) -> None:
    triton.answer = answer
    code, details = await refusal(stub.Classify(pb.ClassifyRequest(image=picture(digit))))
    assert code is grpc.StatusCode.INTERNAL
    assert details == "the model did not answer with probabilities that sum to 1"

    code, _ = await refusal(stub.ClassifyBatch(pb.ClassifyBatchRequest(images=[picture(digit)] * 3)))
    assert code is grpc.StatusCode.INTERNAL


@pytest.mark.parametrize("factor", [np.float32(2), np.float32(np.nan)])
async def test_embedding_that_is_not_of_unit_length_is_internal(
    stub: Any, triton: FakeTriton, digit: NDArray[np.uint8], factor: np.float32
) -> None:
    triton.embed = lambda images: normalised(images) * factor
    told = await refusal(stub.Compare(pb.CompareRequest(first=picture(digit), second=picture(digit.T.copy()))))
    assert told == (grpc.StatusCode.INTERNAL, "the model did not answer with vectors of unit length")


async def test_callers_deadline_ends_the_call_and_not_the_inference(
    stub: Any, triton: FakeTriton, digit: NDArray[np.uint8]
) -> None:
    triton.gate.clear()
    code, _ = await refusal(stub.Classify(pb.ClassifyRequest(image=picture(digit)), timeout=0.2))
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    triton.gate.set()

    await stub.Classify(pb.ClassifyRequest(image=picture(digit)))
    assert triton.num_cancelled == 0


async def test_upstream_timeout_bounds_a_caller_without_deadline(
    settings: GatewaySettings, triton: FakeTriton, digit: NDArray[np.uint8]
) -> None:
    impatient = settings.model_copy(update={"upstream_timeout_seconds": 0.1})
    triton.gate.clear()
    async with GatewayServer(impatient) as gateway, grpc.aio.insecure_channel(gateway.address) as channel:
        stub = image_service_pb2_grpc.ImageServiceStub(channel)
        refused = await refusal(stub.Classify(pb.ClassifyRequest(image=picture(digit))))
        triton.gate.set()

    assert refused == (grpc.StatusCode.DEADLINE_EXCEEDED, "no answer from the model within 0.1 s")
    assert triton.num_cancelled == 0

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from gateway.errors import (
    GatewayError,
    OverloadedError,
    UnknownVersionError,
    UnreachedError,
    UpstreamContractError,
    UpstreamFailedError,
    UpstreamUnavailableError,
)
from gateway.triton import PROBABILITIES, Rows, Triton
from tests.gateway.fake_triton import FakeTriton, confident


@pytest.fixture
async def adapter(triton: FakeTriton) -> AsyncIterator[Triton]:
    opened = Triton(triton.address, control_timeout_seconds=5)
    yield opened
    triton.gate.set()
    await opened.close(5)


def infer(adapter: Triton, num_images: int = 1, version: int = 1) -> Coroutine[Any, Any, Rows]:
    images = np.random.default_rng(num_images).integers(0, 256, (num_images, 28, 28), np.uint8)
    return adapter.asking("mnist", version, PROBABILITIES, width=10)(images.tobytes(), num_images)


async def test_images_arrive_as_sent_and_only_probabilities_are_asked_for(adapter: Triton, triton: FakeTriton) -> None:
    rows = await infer(adapter, 3)

    assert np.array_equal(rows, confident(triton.received[0]))
    assert list(triton.requests[0].inputs[0].shape) == [3, 1, 28, 28]
    assert [output.name for output in triton.requests[0].outputs] == ["probabilities__0"]


@pytest.mark.parametrize("num_images", [1, 2, 21, 22, 64])
async def test_request_of_any_size_is_what_protobuf_would_write(
    adapter: Triton, triton: FakeTriton, num_images: int
) -> None:
    await infer(adapter, num_images)
    (request,) = triton.requests

    assert len(request.raw_input_contents) == 1
    assert len(request.raw_input_contents[0]) == 784 * num_images
    assert (request.model_name, request.model_version) == ("mnist", "1")


@pytest.mark.parametrize(
    ("code", "details", "expected"),
    [
        (grpc.StatusCode.NOT_FOUND, "Request for unknown model: 'mnist' version 1 is not found", UnknownVersionError),
        (grpc.StatusCode.UNAVAILABLE, "'mnist' version 1 is not at ready state", UnknownVersionError),
        (grpc.StatusCode.UNAVAILABLE, "Socket closed", UpstreamUnavailableError),
        (grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size", OverloadedError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "", OverloadedError),
        (grpc.StatusCode.INVALID_ARGUMENT, "unexpected inference input", UpstreamContractError),
        (grpc.StatusCode.INTERNAL, "Traceback ... /secret/model.py", UpstreamFailedError),
        (grpc.StatusCode.UNKNOWN, "", UpstreamFailedError),
    ],
)
async def test_upstream_errors_are_told_in_our_words(
    adapter: Triton, triton: FakeTriton, code: grpc.StatusCode, details: str, expected: type[GatewayError]
) -> None:
    triton.failure = code, details
    with pytest.raises(GatewayError) as failed:
        await infer(adapter)

    assert type(failed.value) is expected
    assert isinstance(failed.value.__cause__, grpc.aio.AioRpcError)
    assert not details or details not in str(failed.value)


def set_output(**fields: Any) -> Callable[[Any], None]:
    def rewrite(response: Any) -> None:
        for name, value in fields.items():
            setattr(response.outputs[0], name, value)

    return rewrite


def reshape(response: Any) -> None:
    response.outputs[0].shape[1] = 11


def cut(response: Any) -> None:
    response.raw_output_contents[0] = response.raw_output_contents[0][:-4]


def drop(response: Any) -> None:
    del response.raw_output_contents[:]


@pytest.mark.parametrize(
    "rewrite",
    [
        reshape,
        cut,
        drop,
        set_output(datatype="FP64"),
        set_output(name="logits"),
    ],
    ids=["shape", "cut", "no output", "type", "name"],
)
async def test_answer_of_another_kind_breaks_the_contract(
    adapter: Triton, triton: FakeTriton, rewrite: Callable[[Any], None]
) -> None:
    triton.rewrite = rewrite
    with pytest.raises(UpstreamContractError, match="did not answer with probabilities"):
        await infer(adapter)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.5, -0.2])
def test_row_that_is_no_distribution_is_told_from_the_others(value: float) -> None:
    rows = np.full((3, 10), 0.1, np.float32)
    rows[1, 3] = value
    with np.errstate(invalid="ignore"):
        assert PROBABILITIES.holds(rows).tolist() == [True, False, True]


def test_negative_with_right_sum_is_no_distribution() -> None:
    assert not PROBABILITIES.holds(np.array([[1.5, -0.5] + [0.0] * 8], np.float32)).any()


async def test_model_infer_has_no_deadline(adapter: Triton, triton: FakeTriton) -> None:
    remaining: list[float | None] = []
    ask = triton.ModelInfer

    async def spy(request: Any, context: Any) -> Any:
        remaining.append(context.time_remaining())
        return await ask(request, context)

    await triton.stop()
    triton.ModelInfer = spy  # type: ignore[method-assign]  # our own double
    await triton.start()
    await infer(adapter)

    assert remaining == [None]


async def test_close_waits_for_calls_that_were_left(adapter: Triton, triton: FakeTriton) -> None:
    triton.gate.clear()
    pixels = np.zeros((1, 28, 28), np.uint8).tobytes()
    call = adapter.begin("ModelInfer", service_pb2.ModelInferRequest(model_name="mnist", raw_input_contents=[pixels]))
    await triton.arrived.wait()
    closing = asyncio.create_task(adapter.close(5))
    await asyncio.sleep(0)  # closing has begun
    triton.gate.set()
    await closing

    assert call.done()
    assert triton.num_cancelled == 0


async def test_ready_versions_leave_out_models_of_another_kind(adapter: Triton, triton: FakeTriton) -> None:
    triton.models = {"mnist": [3, 1]}
    assert [(one.name, one.version, one.num_classes, one.max_batch_size) for one in await adapter.ready_versions()] == [
        ("mnist", 3, 10, 64),
        ("mnist", 1, 10, 64),
    ]

    triton.dims = [3, 224, 224]
    assert await adapter.ready_versions() == []


async def test_version_that_is_not_described_takes_no_other_with_it(adapter: Triton, triton: FakeTriton) -> None:
    await adapter.ready_versions()
    triton.models = {"mnist": [1], "odd": [1], "letters": [1]}
    triton.undescribed = {"mnist", "odd"}
    found = await adapter.ready_versions()

    # What was known of it holds.
    assert sorted(one.name for one in found) == ["letters", "mnist"]
    assert adapter.index == {("mnist", 1), ("odd", 1), ("letters", 1)}


async def test_call_that_has_not_left_is_told_from_one_that_has(adapter: Triton, triton: FakeTriton) -> None:
    triton.gate.clear()
    sent = asyncio.create_task(infer(adapter))
    await triton.arrived.wait()
    await triton.stop()
    with pytest.raises(UpstreamUnavailableError) as lost:
        await sent
    assert not isinstance(lost.value, UnreachedError)
    with pytest.raises(UnreachedError):
        await infer(adapter)


async def test_ready_versions_fail_when_nobody_listens(adapter: Triton, triton: FakeTriton) -> None:
    await triton.stop()
    with pytest.raises(UpstreamUnavailableError, match="cannot be reached"):
        await adapter.ready_versions()


@pytest.mark.parametrize("scheme", ["", "ipv4:"])
async def test_triton_is_reached_without_the_proxy(dead_proxy: None, triton: FakeTriton, scheme: str) -> None:
    adapter = Triton(scheme + triton.address, control_timeout_seconds=5)
    assert [found.version for found in await adapter.ready_versions()] == [1]
    await adapter.close(5)


@pytest.mark.parametrize(
    ("version", "expected"),
    [("2.51.0", False), ("2.58.1", False), ("2.59.0", True), ("2.100.0", True), ("3.0.0", True), ("", False)],
)
async def test_cancelling_waits_for_a_server_that_bears_it(
    adapter: Triton, triton: FakeTriton, version: str, expected: bool
) -> None:
    assert not adapter.may_cancel
    triton.version = version
    await adapter.ready_versions()

    assert adapter.may_cancel is expected

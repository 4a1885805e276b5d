import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import numpy as np
import pytest

from gateway.errors import (
    GatewayError,
    OverloadedError,
    UnknownVersionError,
    UpstreamContractError,
    UpstreamFailedError,
    UpstreamTimeoutError,
    UpstreamUnavailableError,
)
from gateway.triton import PROBABILITIES, Inference, Triton, answer
from tests.gateway.fake_triton import FakeTriton, confident


@pytest.fixture
async def adapter(triton: FakeTriton) -> AsyncIterator[Triton]:
    opened = Triton(triton.address, control_timeout_seconds=5)
    yield opened
    triton.gate.set()
    await opened.close(5)


def infer(adapter: Triton, num_images: int = 1, version: int = 1) -> Inference:
    images = np.random.default_rng(num_images).integers(0, 256, (num_images, 28, 28), np.uint8)
    return adapter.infer("mnist", version, images, PROBABILITIES, width=10, max_batch_size=64)


async def test_images_arrive_as_sent_and_only_probabilities_are_asked_for(adapter: Triton, triton: FakeTriton) -> None:
    rows = await answer(infer(adapter, 3), 5)

    assert np.array_equal(rows, confident(triton.received[0]))
    assert list(triton.requests[0].inputs[0].shape) == [3, 1, 28, 28]
    assert [output.name for output in triton.requests[0].outputs] == ["probabilities__0"]


async def test_batch_above_the_models_limit_is_split_in_order(adapter: Triton, triton: FakeTriton) -> None:
    images = np.random.default_rng(0).integers(0, 256, (150, 28, 28), np.uint8)
    rows = await answer(adapter.infer("mnist", 1, images, PROBABILITIES, width=10, max_batch_size=64), 5)

    assert np.array_equal(rows, confident(images))
    assert sorted(map(len, triton.received)) == [22, 64, 64]


async def test_one_part_that_fails_fails_the_batch_after_all_have_ended(adapter: Triton, triton: FakeTriton) -> None:
    triton.answer = lambda images: confident(images) * (1 if len(images) == 64 else 2)
    with pytest.raises(UpstreamContractError):
        await answer(infer(adapter, 150), 5)

    assert len(triton.received) == 3


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
        await answer(infer(adapter), 5)

    assert type(failed.value) is expected
    assert isinstance(failed.value.__cause__, grpc.aio.AioRpcError)
    assert not details or details not in str(failed.value)


def set_output(**fields: Any) -> Callable[[Any], None]:
    def rewrite(response: Any) -> None:
        for name, value in fields.items():
            setattr(response.outputs[0], name, value)

    return rewrite


def poison(value: float) -> Callable[[Any], None]:
    def rewrite(response: Any) -> None:
        row = np.frombuffer(response.raw_output_contents[0], "<f4").copy()
        row[3] = value
        response.raw_output_contents[0] = row.tobytes()

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
        poison(float("nan")),
        poison(float("inf")),
        poison(0.5),
        poison(-0.2),
        reshape,
        cut,
        drop,
        set_output(datatype="FP64"),
        set_output(name="logits"),
    ],
    ids=["NaN", "infinity", "sum", "negative", "shape", "cut", "no output", "type", "name"],
)
async def test_poisoned_answer_breaks_the_contract(
    adapter: Triton, triton: FakeTriton, rewrite: Callable[[Any], None]
) -> None:
    triton.rewrite = rewrite
    with pytest.raises(UpstreamContractError, match="did not answer with probabilities"):
        await answer(infer(adapter), 5)


async def test_negative_with_right_sum_breaks_the_contract(adapter: Triton, triton: FakeTriton) -> None:
    triton.answer = lambda images: np.array([[1.5, -0.5] + [0.0] * 8], np.float32)
    with pytest.raises(UpstreamContractError):
        await answer(infer(adapter), 5)


async def test_answer_leaves_the_call_running_when_time_is_up(adapter: Triton, triton: FakeTriton) -> None:
    triton.gate.clear()
    call = infer(adapter)
    with pytest.raises(UpstreamTimeoutError, match=r"no answer from the model within 0.01 s"):
        await answer(call, 0.01)
    triton.gate.set()

    assert (await call).shape == (1, 10)
    assert triton.num_cancelled == 0


async def test_answer_leaves_the_call_running_when_cancelled(adapter: Triton, triton: FakeTriton) -> None:
    triton.gate.clear()
    call = infer(adapter)
    waiting = asyncio.create_task(answer(call, 5))
    await triton.arrived.wait()
    waiting.cancel()
    await asyncio.wait((waiting,))
    triton.gate.set()

    assert waiting.cancelled()
    assert (await call).shape == (1, 10)


async def test_model_infer_has_no_deadline(adapter: Triton, triton: FakeTriton) -> None:
    remaining: list[float | None] = []
    ask = triton.ModelInfer

    async def spy(request: Any, context: Any) -> Any:
        remaining.append(context.time_remaining())
        return await ask(request, context)

    await triton.stop()
    triton.ModelInfer = spy  # type: ignore[method-assign]  # our own double
    await triton.start()
    await answer(infer(adapter), 5)

    assert remaining == [None]


async def test_close_waits_for_calls_that_were_left(adapter: Triton, triton: FakeTriton) -> None:
    triton.gate.clear()
    call = infer(adapter)
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


async def test_ready_versions_fail_when_nobody_listens(adapter: Triton, triton: FakeTriton) -> None:
    await triton.stop()
    with pytest.raises(UpstreamUnavailableError, match="cannot be reached"):
        await adapter.ready_versions()


@pytest.mark.parametrize("scheme", ["", "ipv4:"])
async def test_triton_is_reached_without_the_proxy(dead_proxy: None, triton: FakeTriton, scheme: str) -> None:
    adapter = Triton(scheme + triton.address, control_timeout_seconds=5)
    assert [found.version for found in await adapter.ready_versions()] == [1]
    await adapter.close(5)

"""Triton's answers that are wrong, refused or too late. Section U of docs/faults.md."""

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio

from protos.gateway.v1 import image_service_pb2 as pb
from protos.gateway.v1.image_service_pb2_grpc import ImageServiceStub
from tests.faults.gateway.callers import (
    NOT_SERVING,
    SERVING,
    HealthRecord,
    fresh,
    image_of,
    noise,
    refusal,
    request_of,
    tally,
)
from tests.faults.gateway.conftest import Measured
from tests.faults.gateway.live import injected
from tests.faults.gateway.process import PATIENCE_SECONDS, Gateway
from tests.gateway.fake_triton import FakeTriton, confident, label_of
from tests.scraping import value

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module")
async def stub(gateway: Gateway) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(gateway.address) as channel:
        yield ImageServiceStub(channel)


def _of_every_image(change: Callable[[Any], None]) -> Callable[[Any], None]:
    """Change answers to callers; the probe's, of one blank image, stay right."""

    def rewrite(response: Any) -> None:
        probabilities = np.frombuffer(response.raw_output_contents[0], np.float32).reshape(-1, 10)
        if len(probabilities) > 1 or not probabilities[0, 0] > 0.9:
            change(response)

    return rewrite


def _fill(number: float) -> Callable[[Any], None]:
    def change(response: Any) -> None:
        rows = np.frombuffer(response.raw_output_contents[0], np.float32).copy()
        rows[:5] = number
        response.raw_output_contents[0] = rows.tobytes()

    return change


def _eleven(response: Any) -> None:
    response.outputs[0].shape[1] = 11
    response.raw_output_contents[0] += bytes(4 * response.outputs[0].shape[0])


def _doubles(response: Any) -> None:
    response.outputs[0].datatype = "FP64"


def _missing(response: Any) -> None:
    del response.outputs[:]
    del response.raw_output_contents[:]


def _cut(response: Any) -> None:
    response.raw_output_contents[0] = response.raw_output_contents[0][:-3]


POISONS = {
    "NaN": _fill(float("nan")), "Inf": _fill(float("inf")), "negative": _fill(-1.0), "a sum of 5": _fill(1.0),
    "11 classes": _eleven, "another type": _doubles, "no output": _missing, "cut off": _cut,
}  # fmt: skip


async def test_poisoned_answers_reach_nobody(
    gateway: Gateway, triton: FakeTriton, stub: Any, measured: Measured
) -> None:
    """U7: answers that are none."""
    row = measured(
        "U7",
        fault=f"{len(POISONS)} kinds of answers that are none: {', '.join(POISONS)}",
        promised="INTERNAL, counted, in no case a number from it, no crash",
    )
    # What the fake takes for a 0 would look like the probe's blank.
    pixels = next(image for image in map(noise, itertools.count(9_000)) if label_of(image) != 0)
    before = value(gateway.metrics_url, "gateway_upstream_errors_total")
    codes: Counter[str] = Counter()
    async with injected(gateway) as fault:
        for change in POISONS.values():
            triton.rewrite = _of_every_image(change)
            error, _ = await refusal(stub.Classify(request_of(pixels), timeout=PATIENCE_SECONDS))
            codes[error.code().name] += 1
            assert "nan" not in (error.details() or "").lower()
        triton.rewrite = lambda response: None
    counted = value(gateway.metrics_url, "gateway_upstream_errors_total") - before

    row.add("answered", tally(codes))
    row.add("counted", f"{counted:.0f}")
    fault.note(row)
    assert codes == {"INTERNAL": len(POISONS)}
    assert counted >= len(POISONS)


async def test_unloaded_model_is_told_by_name(
    gateway: Gateway, triton: FakeTriton, stub: Any, measured: Measured
) -> None:
    """U8: a model unloaded beside another."""
    row = measured(
        "U8",
        fault="one of two models is unloaded at Triton, then back",
        promised="its health not SERVING within 2 s, calls to it refused by its name; the other model untouched",
    )
    service = "sluice.gateway.v1.ImageService/other"
    request = request_of(fresh())
    request.model = "other"
    async with injected(gateway) as fault:
        triton.models = {"mnist": [1], "other": [1]}
        async with HealthRecord(gateway.address, service) as health:
            await health.becomes(SERVING, since=0)
            await stub.Classify(request, timeout=PATIENCE_SECONDS)
            triton.models = {"mnist": [1]}
            gone = time.monotonic()
            noticed = await health.ceases(SERVING, since=gone)
            error, _ = await refusal(stub.Classify(request, timeout=PATIENCE_SECONDS))
            triton.models = {"mnist": [1], "other": [1]}
            await health.becomes(SERVING, since=time.monotonic())
        triton.models = {"mnist": [1]}

    row.add("noticed after", f"{noticed:.2f} s")
    row.add("refused with", f"{error.code().name}: {error.details()}")
    fault.note(row)
    assert error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.NOT_FOUND)
    assert "other" in (error.details() or "")
    assert noticed < 20
    fault.assert_unharmed(0.99)


async def test_full_queue_is_passed_on_as_overload(
    gateway: Gateway, triton: FakeTriton, stub: Any, measured: Measured
) -> None:
    """U9: Triton's own queue is full."""
    row = measured(
        "U9",
        fault='Triton answers UNAVAILABLE "Exceeds maximum queue size" for 1 s',
        promised="RESOURCE_EXHAUSTED with a pushback, not tried again by itself; still SERVING",
    )
    await gateway.check()
    pixels = fresh()
    async with HealthRecord(gateway.address) as health:
        await health.becomes(SERVING, since=0)
        triton.failure = grpc.StatusCode.UNAVAILABLE, "[request id: 1] Exceeds maximum queue size for model mnist"
        full = time.monotonic()
        error, seconds = await refusal(stub.Classify(request_of(pixels), timeout=PATIENCE_SECONDS))
        num_tried = sum((image == pixels).all() for images in triton.received for image in images)
        await asyncio.sleep(1)  # of probes that find it full
        triton.failure = None
        not_serving = health.seconds(NOT_SERVING, full, time.monotonic())
    await gateway.check()

    pushback = dict(error.trailing_metadata() or ()).get("grpc-retry-pushback-ms")
    row.add("refused with", f"{error.code().name} after {seconds * 1000:.0f} ms, pushback {pushback!s} ms")
    row.add("tried", f"{num_tried} time")
    row.add("NOT_SERVING for", f"{not_serving:.1f} s")
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert pushback is not None
    assert num_tried == 1
    assert not_serving == 0


async def test_expired_work_never_reaches_triton(
    gateway: Gateway, triton: FakeTriton, stub: Any, measured: Measured
) -> None:
    """U11: deadlines that pass in the queue."""
    row = measured(
        "U11",
        fault="20 calls with 300 ms wait behind batches that take longer",
        promised="each ends by its deadline, none of them reaches Triton; no upstream call has a deadline to pass",
    )
    await gateway.check()
    triton.gate.clear()
    try:
        # As many batches as may be under way, all full.
        first = [fresh() for _ in range(128)]
        batch = pb.ClassifyBatchRequest(images=map(image_of, first))
        before = asyncio.create_task(_outcome(stub.ClassifyBatch(batch, timeout=30)))
        async with asyncio.timeout(PATIENCE_SECONDS):
            await triton.arrival_of(first[-1])
        expiring = [fresh() for _ in range(20)]
        started = time.monotonic()
        codes = await asyncio.gather(*(_outcome(stub.Classify(request_of(one), timeout=0.3)) for one in expiring))
        seconds = time.monotonic() - started
    finally:
        triton.gate.set()
    outcome = await before
    await gateway.check()

    wanted = {one.tobytes() for one in expiring}
    num_sent = sum(image.tobytes() in wanted for images in triton.received for image in images)
    row.add("ended", f"{', '.join(sorted(set(codes)))} after {seconds * 1000:.0f} ms")
    row.add("reached Triton", f"{num_sent}")
    assert set(codes) <= {"DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "UNAVAILABLE"}
    assert num_sent == 0
    assert triton.num_cancelled == 0
    assert outcome == "OK"


async def _outcome(call: Any) -> str:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return str(error.code().name)
    return "OK"


async def test_bad_image_fails_alone(gateway: Gateway, triton: FakeTriton, stub: Any, measured: Measured) -> None:
    """U14: one bad image among 31 good ones."""
    row = measured(
        "U14",
        fault="one unreadable image among 31 good ones in a batch; then one that poisons the batch it is in at Triton",
        promised="31 right answers and one INVALID_ARGUMENT; then 31 and one INTERNAL",
    )
    good = [fresh() for _ in range(31)]
    poison = fresh()

    def answer(images: Any) -> Any:
        rows = confident(images)
        # All of the batch, as where one request of a batch fails at Triton.
        return rows * np.nan if any((image == poison).all() for image in images) else rows

    async with injected(gateway) as fault:
        triton.answer = answer
        results = {}
        for kind, bad in (("unreadable", pb.Image(encoded=b"\x89PNG no picture")), ("poison", image_of(poison))):
            request = pb.ClassifyBatchRequest(images=[*map(image_of, good[:13]), bad, *map(image_of, good[13:])])
            results[kind] = (await stub.ClassifyBatch(request, timeout=PATIENCE_SECONDS)).results
        triton.answer = confident

    for kind, code in (("unreadable", grpc.StatusCode.INVALID_ARGUMENT), ("poison", grpc.StatusCode.INTERNAL)):
        failed = [(index, one.code) for index, one in enumerate(results[kind]) if one.code]
        right = [one.prediction.label for one in results[kind] if not one.code]
        row.add(kind, f"{len(right)} answered, {len(failed)} failed with {code.name}")
        assert failed == [(13, code.value[0])]
        assert right == [label_of(image) for image in good]
    fault.note(row)
    fault.assert_unharmed(0.95)

"""Tritons that are late, die, hang, lie, or are out of reach. Section U of docs/faults.md."""

import asyncio
import itertools
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
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
    Callers,
    HealthRecord,
    image_of,
    noise,
    request_of,
)
from tests.faults.gateway.live import injected
from tests.faults.gateway.process import Gateway
from tests.faults.gateway.standin import StandIn
from tests.faults.report import Row
from tests.gateway.fake_triton import FakeTriton, confident, label_of
from tests.scraping import value

pytestmark = pytest.mark.asyncio(loop_scope="module")

Measured = Callable[..., Row]
PATIENCE_SECONDS = 60.0

_numbers = itertools.count(7_000_000_000)


def fresh() -> Any:
    """Return pixels, uint8 (28, 28), that were never asked before."""
    return noise(next(_numbers))


@pytest_asyncio.fixture(loop_scope="module")
async def stub(gateway: Gateway) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(gateway.address) as channel:
        yield ImageServiceStub(channel)


@pytest_asyncio.fixture(loop_scope="module")
async def stand_in() -> AsyncIterator[StandIn]:
    """One more Triton, in a process of its own."""
    process = StandIn()
    try:
        await process.start()
        yield process
    finally:
        process.kill()


@pytest.fixture
def gateway_of(tmp_path: Path) -> Iterator[Callable[..., Gateway]]:
    """Make a gateway in front of the Tritons given; to be started by the test."""
    made: list[Gateway] = []

    def make(*tritons: str) -> Gateway:
        log = tmp_path / f"gateway-{len(made)}.log"
        made.append(Gateway(",".join(tritons), log, "--model-repository", str(tmp_path)))
        return made[-1]

    yield make
    for gateway in made:
        gateway.close()


async def refusal(call: Any) -> tuple[grpc.aio.AioRpcError, float]:
    """Return what a call fails with, and after how many seconds."""
    started = time.monotonic()
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await call
    return failed.value, time.monotonic() - started


async def test_gateway_is_there_before_its_triton(gateway_of: Callable[..., Gateway], measured: Measured) -> None:
    """U1: Triton absent at the start."""
    row = measured(
        "U1",
        fault="the gateway starts first, Triton later",
        promised="it lives, says NOT_SERVING and refuses with UNAVAILABLE within 200 ms; SERVING within 3 s of Triton",
    )
    async with FakeTriton() as triton:
        await triton.stop()
        gateway = gateway_of(triton.address)
        await gateway.listen()
        async with HealthRecord(gateway.address) as health, grpc.aio.insecure_channel(gateway.address) as channel:
            await health.becomes(NOT_SERVING, since=0)
            await channel.channel_ready()
            error, seconds = await refusal(ImageServiceStub(channel).Classify(request_of(fresh()), timeout=30))
            assert {status for _, status in health.told} == {NOT_SERVING}
            await triton.start()
            serving = await health.becomes(SERVING, since=time.monotonic())
        await gateway.check()

    row.add("refused after", f"{seconds * 1000:.0f} ms")
    row.add("SERVING after", f"{serving:.2f} s")
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert seconds < 5
    assert serving < 30


async def test_killed_triton_costs_no_wrong_answer(
    stand_in: StandIn, gateway_of: Callable[..., Gateway], measured: Measured
) -> None:
    """U2: Triton killed under load."""
    row = measured(
        "U2",
        fault="Triton killed while 16 callers ask, and started again after 1 s",
        promised="OK, UNAVAILABLE and DEADLINE_EXCEEDED only, no wrong answer, the first right one within 3 s; "
        "at most 1.1 times as many images to Triton as calls",
    )
    gateway = gateway_of(stand_in.address)
    await gateway.start()
    async with Callers(gateway.address, 16, deadline_seconds=2) as callers:
        await callers.answered(200)
        stand_in.kill()
        await asyncio.sleep(1)  # what it costs while nothing is there
        await stand_in.start()
        first = await callers.succeed(since=time.monotonic())
        await callers.answered(200)
    await gateway.check()
    sent = value(gateway.metrics_url, "gateway_batch_images_sum") / len(callers.calls)

    row.add("calls", ", ".join(f"{number} {code}" for code, number in callers.codes().most_common()))
    row.add("first answer after", f"{first:.2f} s")
    row.add("images to Triton", f"{sent:.2f} a call")
    assert set(callers.codes()) <= {"OK", "UNAVAILABLE", "DEADLINE_EXCEEDED"}
    assert callers.num_wrong == 0
    assert first < 30
    assert sent <= 1.1


@pytest.mark.slow
async def test_frozen_triton_costs_callers_their_deadline_at_most(
    stand_in: StandIn, gateway_of: Callable[..., Gateway], measured: Measured
) -> None:
    """U3: Triton stopped, and continued."""
    row = measured(
        "U3",
        fault="Triton stopped (SIGSTOP) for 4 s while 16 callers ask",
        promised="each call ends by its deadline, 1 s; NOT_SERVING within 2 s and refused within 50 ms from then on; "
        "SERVING within 3 s of SIGCONT; no late answer to another's call",
    )
    gateway = gateway_of(stand_in.address)
    await gateway.start()
    async with HealthRecord(gateway.address) as health, Callers(gateway.address, 16, deadline_seconds=1) as callers:
        await callers.answered(100)
        stopped = time.monotonic()
        stand_in.send(signal.SIGSTOP)
        noticed = await health.becomes(NOT_SERVING, since=stopped)
        refusing = time.monotonic()
        await asyncio.sleep(max(0.5, 4 - noticed))  # of refusals
        stand_in.send(signal.SIGCONT)
        gone_on = time.monotonic()
        serving = await health.becomes(SERVING, since=gone_on)
        await callers.succeed(since=gone_on)
    await gateway.check()

    longest = max(call.seconds for call in callers.calls)
    refused = sorted(call.seconds for call in callers.calls if refusing < call.began and call.ended < gone_on)
    row.add("the longest call", f"{longest:.2f} s")
    row.add("NOT_SERVING after", f"{noticed:.2f} s")
    row.add("refused after", f"{refused[len(refused) // 2] * 1000:.1f} ms at the median")
    row.add("SERVING after", f"{serving:.2f} s")
    assert longest < 10
    assert noticed < 20
    assert refused[len(refused) // 2] < 0.5
    assert serving < 30
    assert callers.num_wrong == 0


@contextmanager
def cable() -> Iterator[tuple[tuple[str, ...], str, Callable[[str], None]]]:
    """
    Join a network namespace to this one by a cable of its own.

    Gives what to begin a command with that is to run over there, the address there, and what turns the cable's state:
    ``down`` or ``up``.
    """
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and ip(8), for a network namespace")
    name, number = f"sluice{os.getpid()}", os.getpid() % 250
    here, there = f"198.18.{number}.1", f"198.18.{number}.2"

    def ip(*arguments: str) -> None:
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no network namespace here: ip {' '.join(arguments)}: {done.stderr.strip()}")

    ip("netns", "add", name)
    try:
        ip("link", "add", f"{name[-9:]}a", "type", "veth", "peer", "name", f"{name[-9:]}b", "netns", name)
        ip("addr", "add", f"{here}/24", "dev", f"{name[-9:]}a")
        ip("link", "set", f"{name[-9:]}a", "up")
        ip("-n", name, "addr", "add", f"{there}/24", "dev", f"{name[-9:]}b")
        ip("-n", name, "link", "set", f"{name[-9:]}b", "up")
        ip("-n", name, "link", "set", "lo", "up")
        inside = ("ip", "netns", "exec", name)
        yield inside, there, lambda state: ip("-n", name, "link", "set", f"{name[-9:]}b", state)
    finally:
        # Its end of the cable goes with it, and so does this one.
        subprocess.run(["ip", "netns", "del", name], check=False)
        subprocess.run(["ip", "link", "del", f"{name[-9:]}a"], check=False, capture_output=True)


@pytest.mark.slow
async def test_half_open_link_is_noticed(gateway_of: Callable[..., Gateway], measured: Measured) -> None:
    """U5: the link to Triton cut without a word, and mended."""
    row = measured(
        "U5",
        fault="the link to Triton's machine cut for 6 s, no packet says so",
        promised="noticed within 3.4 s, the connection too; answered within 2 s of its return",
    )
    with cable() as (inside, host, turn):
        stand_in = StandIn(host, within=inside)
        try:
            await stand_in.start()
            gateway = gateway_of(stand_in.address)
            await gateway.start()
            async with (
                HealthRecord(gateway.address) as health,
                Callers(gateway.address, 4, deadline_seconds=1) as callers,
            ):
                await callers.answered(100)
                turn("down")
                cut, cut_at = time.monotonic(), time.time()
                noticed = await health.becomes(NOT_SERVING, since=cut)
                await asyncio.sleep(max(0.0, 6 - noticed))  # longer than keepalive waits
                turn("up")
                mended = time.monotonic()
                answered = await callers.succeed(since=mended)
            await gateway.check()
        finally:
            stand_in.kill()

    failures = [line for line in gateway.lines() if line["event"] == "upstream failed"]
    # By the connection itself, not by the probe's patience.
    closed = next(line["timestamp"] for line in failures if "timed out" in line["details"])
    seconds = datetime.fromisoformat(closed).timestamp() - cut_at
    row.add("NOT_SERVING after", f"{noticed:.2f} s")
    row.add("connection closed after", f"{seconds:.2f} s")
    row.add("answered", f"{answered:.2f} s after the return")
    assert noticed < 20
    assert seconds < 20
    assert answered < 30
    assert callers.num_wrong == 0


@pytest.mark.slow
async def test_bad_replica_is_left_out_and_taken_back(gateway_of: Callable[..., Gateway], measured: Measured) -> None:
    """U6: one of two Tritons answers INTERNAL."""
    row = measured(
        "U6",
        fault="one of two Tritons answers every image with INTERNAL",
        promised="left out after at most 5 failed calls, 99 % answered from then on, taken back within 30 s",
    )
    async with FakeTriton() as good, FakeTriton() as bad:
        gateway = gateway_of(bad.address, good.address)
        await gateway.start()
        async with HealthRecord(gateway.address) as health, Callers(gateway.address, 8, deadline_seconds=5) as callers:
            await callers.answered(100)
            bad.failure = grpc.StatusCode.INTERNAL, "CUDA error"
            broken = time.monotonic()
            await ejected(gateway, bad.address)
            known = time.monotonic()
            await callers.answered(200)
            bad.failure = None
            healed, num_received = time.monotonic(), len(bad.received)
            while not any(images.any() for images in bad.received[num_received:]):
                bad.arrived.clear()
                await bad.arrived.wait()
            readmitted = time.monotonic() - healed
        await gateway.check()

    before, after = callers.codes(broken), callers.codes(known)
    row.add("failed", f"{before.total() - before['OK']} calls of {before.total()}")
    row.add("left out after", f"{known - broken:.2f} s")
    row.add("then answered", f"{after['OK'] / after.total():.1%}")
    row.add("taken back after", f"{readmitted:.2f} s")
    assert before.total() - before["OK"] <= 5 * 8
    assert after["OK"] >= 0.99 * after.total()
    assert readmitted < 30
    assert health.seconds(NOT_SERVING, broken, time.monotonic()) == 0
    assert callers.num_wrong == 0


@pytest.mark.slow
async def test_frozen_replica_is_left_out(
    stand_in: StandIn, gateway_of: Callable[..., Gateway], measured: Measured
) -> None:
    """U6b: one of two Tritons stopped."""
    row = measured(
        "U6b",
        fault="one of two Tritons stopped (SIGSTOP) for 4 s",
        promised="left out within 4 s, SERVING throughout; calls that it holds end by their deadline",
    )
    async with FakeTriton() as good:
        gateway = gateway_of(stand_in.address, good.address)
        await gateway.start()
        async with HealthRecord(gateway.address) as health, Callers(gateway.address, 8, deadline_seconds=1) as callers:
            await callers.answered(100)
            stand_in.send(signal.SIGSTOP)
            stopped = time.monotonic()
            await ejected(gateway, stand_in.address)
            known = time.monotonic()
            await asyncio.sleep(max(1.0, 4 - (known - stopped)))  # of calls to the other alone
            num_late = len([call for call in callers.calls if call.code != "OK" and call.began > known + 1])
            stand_in.send(signal.SIGCONT)
        await gateway.check()

    codes = callers.codes(stopped)
    row.add("failed", f"{codes.total() - codes['OK']} calls of {codes.total()}")
    row.add("left out after", f"{known - stopped:.2f} s")
    assert num_late == 0
    assert set(codes) <= {"OK", "DEADLINE_EXCEEDED", "UNAVAILABLE"}
    assert health.seconds(NOT_SERVING, stopped, time.monotonic()) == 0
    assert callers.num_wrong == 0


async def ejected(gateway: Gateway, triton: str) -> None:
    """Wait until the gateway has left a Triton out."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not value(gateway.metrics_url, "gateway_triton_ejections_total", triton=triton):  # noqa: ASYNC110
            await asyncio.sleep(0.02)  # metrics tell nobody


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

    row.add("answered", ", ".join(f"{number} {code}" for code, number in codes.items()))
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

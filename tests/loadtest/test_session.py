import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2

from gateway.server import GatewayServer
from loadtest.arrivals import OpenLoop
from loadtest.errors import StartError
from loadtest.images import Sample
from loadtest.plan import Plan
from loadtest.report import Report
from loadtest.runner import Runner
from loadtest.session import Session
from loadtest.tally import INTERRUPTED, OK
from loadtest.targets import KINDS, Kind
from tests.gateway.fake_triton import Context
from tests.loadtest.conftest import NewestTriton
from tests.loadtest.plans import plan_of

TEN_CALLS = OpenLoop(rate=100, max_outstanding=100)


async def report_of(plan: Plan, samples: list[Sample]) -> Report:
    session = Session(plan, samples)
    await session.run()
    report = session.report()
    assert report is not None
    return report


@pytest.mark.parametrize("kind", KINDS)
async def test_every_target_is_measured(
    kind: Kind, gateway: GatewayServer, triton: NewestTriton, samples: list[Sample]
) -> None:
    address = triton.address if kind == "triton" else gateway.address
    report = await report_of(plan_of(target=kind, address=address, batch_size=4), samples)

    assert report.is_complete
    assert report.model == "mnist version 1"
    assert set(report.tally.codes) == {OK}
    assert report.accuracy == (None if kind == "compare" else 1.0)
    assert report.tally.images == report.tally.count * {"classify": 1, "compare": 2}.get(kind, 4)


async def test_open_loop_sends_what_is_due(gateway: GatewayServer, samples: list[Sample]) -> None:
    report = await report_of(plan_of(address=gateway.address, pace=TEN_CALLS, duration_seconds=0.1), samples)

    assert report.tally.codes == {OK: 10}


async def test_wrong_answers_are_counted(gateway: GatewayServer, samples: list[Sample]) -> None:
    known_wrong = [replace(sample, label=((sample.label or 0) + 1) % 10) for sample in samples]
    report = await report_of(plan_of(address=gateway.address, pace=TEN_CALLS, duration_seconds=0.1), known_wrong)

    assert (report.tally.judged, report.tally.right, report.accuracy) == (10, 0, 0.0)


@contextmanager
def stop_answering(triton: NewestTriton) -> Iterator[None]:
    triton.failure = grpc.StatusCode.RESOURCE_EXHAUSTED, "full"
    yield


class FailingDisplay:
    """Makes every call fail from the start of the run on."""

    def __init__(self, triton: NewestTriton) -> None:
        self._triton = triton

    def follow(self, plan: Plan, runner: Runner) -> Any:
        return stop_answering(self._triton)


async def test_failures_are_in_the_codes(gateway: GatewayServer, triton: NewestTriton, samples: list[Sample]) -> None:
    plan = plan_of(address=gateway.address, pace=TEN_CALLS, duration_seconds=0.1)
    session = Session(plan, samples, display=FailingDisplay(triton))
    await session.run()
    report = session.report()

    assert report is not None
    assert report.tally.codes == {"RESOURCE_EXHAUSTED": 10}


async def test_absent_server_ends_it_before_the_start(samples: list[Sample]) -> None:
    session = Session(plan_of(), samples)
    with pytest.raises(StartError, match=r"127\.0\.0\.1:1 does not answer"):
        await session.run()

    assert session.report() is None


async def test_interrupted_test_reports_what_it_has(
    gateway: GatewayServer, triton: NewestTriton, samples: list[Sample]
) -> None:
    """Answers stop coming once five calls were measured; then it is interrupted."""

    class Watch:
        def follow(self, plan: Plan, runner: Runner) -> Any:
            return self._watching(runner)

        @contextmanager
        def _watching(self, runner: Runner) -> Iterator[None]:
            answer = triton.answer

            def answer_five(images: Any) -> Any:
                if runner.measured.succeeded >= 5:
                    triton.gate.clear()
                    asyncio.get_running_loop().call_soon(running.cancel)
                return answer(images)

            triton.answer = answer_five
            yield

    session = Session(plan_of(address=gateway.address, duration_seconds=60), samples, display=Watch())
    running = asyncio.create_task(session.run())
    with pytest.raises(asyncio.CancelledError):
        await running
    report = session.report()

    assert report is not None
    assert not report.is_complete
    assert report.tally.succeeded >= 5
    assert report.tally.count == report.tally.succeeded + report.tally.codes[INTERRUPTED]
    assert report.elapsed_seconds < 30


async def test_interrupted_warm_up_has_nothing_to_report(
    gateway: GatewayServer, triton: NewestTriton, samples: list[Sample]
) -> None:
    session = Session(plan_of(address=gateway.address, warm_up_seconds=60), samples)
    running = asyncio.create_task(session.run())
    triton.arrived.clear()
    await triton.arrived.wait()
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running

    assert session.report() is None


class CountingTriton(NewestTriton):
    """Counts what it runs, as Triton does, every request a batch of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: Counter[int] = Counter()

    async def ModelInfer(self, request: Any, context: Context) -> Any:
        self.sizes[request.inputs[0].shape[0]] += 1
        return await super().ModelInfer(request, context)

    async def ModelStatistics(self, request: Any, context: Context) -> Any:
        answer = service_pb2.ModelStatisticsResponse()
        images = sum(size * count for size, count in self.sizes.items())
        version = answer.model_stats.add(
            name="mnist", version="1", inference_count=images, execution_count=self.sizes.total()
        )
        for size, count in self.sizes.items():
            version.batch_stats.add(batch_size=size).compute_infer.count = count
        return answer


async def test_batches_are_those_of_the_measurement(samples: list[Sample]) -> None:
    """Not those of the warm-up, and not what ran before; the calls around its start may fall on either side."""
    async with CountingTriton() as triton:
        triton.sizes[64] = 1000
        plan = plan_of(target="triton", address=triton.address, triton=triton.address, batch_size=4, pace=TEN_CALLS)
        report = await report_of(plan, samples)

    assert report.batches is not None
    ran = report.batches["mnist", 1]
    assert set(ran.sizes) == {4}
    assert abs(ran.batches - report.tally.count) < report.tally.count
    assert ran.mean == 4

"""What a stall of the server does to the figures, over real gRPC and in real time: the reason for the open loop."""

import asyncio
import math
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from loadtest.arrivals import ClosedLoop, OpenLoop, Pace
from loadtest.caller import Caller
from loadtest.images import Sample
from loadtest.latency import Latencies
from loadtest.runner import Runner
from loadtest.targets import make
from protos.gateway.v1 import image_service_pb2 as pb
from tests.gateway.fake_triton import Context

SERVICE_SECONDS = 0.005
STALL = (0.5, 2.5)
SECONDS = 3.0
RATE = 50.0
# What a slow machine takes to answer all whom the stall kept waiting.
PATIENCE = 0.3


class StallingServer:
    """Answers Classify after 5 ms, but nothing at all while it stalls; its clock starts with the measurement."""

    address: str

    def __init__(self) -> None:
        self._started = math.inf

    def start_clock(self) -> None:
        self._started = asyncio.get_running_loop().time()

    async def classify(self, request: bytes, context: Context) -> bytes:
        await asyncio.sleep(seconds_to_answer(asyncio.get_running_loop().time() - self._started))
        return pb.ClassifyResponse().SerializeToString()


def seconds_to_answer(moment: float) -> float:
    """Return what a call takes that arrives at a moment of the server's clock."""
    begin, end = STALL
    return (end - moment if begin <= moment < end else 0.0) + SERVICE_SECONDS


@pytest.fixture
async def stalling() -> AsyncIterator[StallingServer]:
    servicer, server = StallingServer(), grpc.aio.server()
    handler: Any = grpc.unary_unary_rpc_method_handler(servicer.classify)
    service = pb.DESCRIPTOR.services_by_name["ImageService"].full_name
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"Classify": handler}),))
    servicer.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    yield servicer
    await server.stop(0)


async def measured(stalling: StallingServer, pace: Pace, samples: list[Sample]) -> Latencies:
    target = make("classify", samples, image_format="png", model="", batch_size=1, seed=0)
    async with Caller(stalling.address, target, timeout_seconds=10) as caller:
        await caller.start()
        runner = Runner(caller.ask, pace, warm_up_seconds=0.1, duration_seconds=SECONDS, timeout_seconds=10)
        await runner.run(stalling.start_clock)
    assert runner.measured.succeeded == runner.measured.count
    return runner.measured.succeeded_latencies


async def test_open_loop_is_right_about_a_stall(stalling: StallingServer, samples: list[Sample]) -> None:
    latencies = await measured(stalling, OpenLoop(rate=RATE, max_outstanding=1000), samples)

    expected = sorted(seconds_to_answer(number / RATE) for number in range(int(SECONDS * RATE)))
    assert latencies.count == len(expected)
    assert latencies.at(99) == pytest.approx(expected[-len(expected) // 100 - 1], abs=PATIENCE)
    assert latencies.at(90) == pytest.approx(expected[-len(expected) // 10 - 1], abs=PATIENCE)
    assert latencies.slowest == pytest.approx(expected[-1], abs=PATIENCE)


async def test_closed_loop_hides_a_stall(stalling: StallingServer, samples: list[Sample]) -> None:
    """One call of many was slow; two thirds of the users who came in these three seconds would have waited."""
    latencies = await measured(stalling, ClosedLoop(callers=1), samples)

    assert latencies.slowest > 1.9
    # A tenth of what the open loop says, also on a machine ten times as slow.
    assert latencies.at(90) < 0.16

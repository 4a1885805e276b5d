"""One of two Tritons that fails or hangs. Section U of docs/faults.md."""

import asyncio
import signal
import time

import grpc
import pytest

from tests.faults.gateway.callers import NOT_SERVING, Callers, HealthRecord
from tests.faults.gateway.conftest import GatewayOf, Measured
from tests.faults.gateway.process import Gateway, until
from tests.faults.gateway.standin import StandIn
from tests.gateway.fake_triton import FakeTriton
from tests.scraping import value

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.mark.slow
async def test_bad_replica_is_left_out_and_taken_back(gateway_of: GatewayOf, measured: Measured) -> None:
    """U6: one of two Tritons answers INTERNAL."""
    row = measured(
        "U6",
        fault="one of two Tritons answers every image with INTERNAL",
        promised="left out after at most 5 failed calls, 99 % answered from then on, taken back within 30 s",
    )
    async with FakeTriton() as good, FakeTriton() as bad:
        gateway = gateway_of(f"{bad.address},{good.address}")
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
async def test_frozen_replica_is_left_out(stand_in: StandIn, gateway_of: GatewayOf, measured: Measured) -> None:
    """U6b: one of two Tritons stopped."""
    row = measured(
        "U6b",
        fault="one of two Tritons stopped (SIGSTOP) for 4 s",
        promised="left out within 4 s, SERVING throughout; calls that it holds end by their deadline",
    )
    async with FakeTriton() as good:
        gateway = gateway_of(f"{stand_in.address},{good.address}")
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
    await until(lambda: value(gateway.metrics_url, "gateway_triton_ejections_total", triton=triton))

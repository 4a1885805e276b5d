"""Tritons that are late, die, hang, or are out of reach. Section U of docs/faults.md."""

import asyncio
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime

import grpc
import pytest

from protos.gateway.v1.image_service_pb2_grpc import ImageServiceStub
from tests.faults.gateway.callers import (
    NOT_SERVING,
    SERVING,
    Callers,
    HealthRecord,
    fresh,
    refusal,
    request_of,
    tally,
)
from tests.faults.gateway.conftest import GatewayOf, Measured
from tests.faults.gateway.process import started
from tests.faults.gateway.standin import StandIn
from tests.gateway.fake_triton import FakeTriton
from tests.scraping import value

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_gateway_is_there_before_its_triton(gateway_of: GatewayOf, measured: Measured) -> None:
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
    stand_in: StandIn, gateway_of: GatewayOf, measured: Measured
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
        stand_in.close()
        await asyncio.sleep(1)  # what it costs while nothing is there
        await stand_in.start()
        first = await callers.succeed(since=time.monotonic())
        await callers.answered(200)
    await gateway.check()
    sent = value(gateway.metrics_url, "gateway_batch_images_sum") / len(callers.calls)

    row.add("calls", tally(callers.codes()))
    row.add("first answer after", f"{first:.2f} s")
    row.add("images to Triton", f"{sent:.2f} a call")
    assert set(callers.codes()) <= {"OK", "UNAVAILABLE", "DEADLINE_EXCEEDED"}
    assert callers.num_wrong == 0
    assert first < 30
    assert sent <= 1.1


@pytest.mark.slow
async def test_frozen_triton_costs_callers_their_deadline_at_most(
    stand_in: StandIn, gateway_of: GatewayOf, measured: Measured
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
async def test_half_open_link_is_noticed(gateway_of: GatewayOf, measured: Measured) -> None:
    """U5: the link to Triton cut without a word, and mended."""
    row = measured(
        "U5",
        fault="the link to Triton's machine cut for 6 s, no packet says so",
        promised="noticed within 3.4 s, the connection too; answered within 2 s of its return",
    )
    with cable() as (inside, host, turn):
        async with started(StandIn(host, within=inside)) as stand_in:
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

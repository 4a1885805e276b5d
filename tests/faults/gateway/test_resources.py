"""Gateways that have too much to do, or too little to do it with. Section R of docs/faults.md."""

import asyncio
import contextlib
import os
import resource
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio
from PIL import Image

from protos.gateway.v1 import image_service_pb2 as pb
from protos.gateway.v1.image_service_pb2_grpc import ImageServiceStub
from tests.digits import encoded
from tests.faults.gateway.callers import noise, request_of
from tests.faults.gateway.conftest import GatewayOf, Measured
from tests.faults.gateway.live import Live
from tests.faults.gateway.process import MEBI, Gateway, started
from tests.faults.gateway.standin import StandIn
from tests.faults.gateway.wire import socket_to

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

_CGROUP = Path("/sys/fs/cgroup/memory")
# Batches of 8, each 0.1 s.
_CAPACITY = 80


@pytest_asyncio.fixture(loop_scope="module")
async def small_triton() -> AsyncIterator[StandIn]:
    """Answers 80 images a second, and not one more."""
    async with started(StandIn(batch_seconds=0.1, max_batch_size=8)) as process:
        yield process


@dataclass(frozen=True, slots=True)
class Offered:
    """What became of calls that came at fixed times."""

    goodput: float
    """Answers in time, a second."""
    p99_seconds: float
    """Of those."""
    shed_seconds: float
    """Of those that were refused, the median; 0 where none was."""

    def __str__(self) -> str:
        return f"{self.goodput:.0f}/s, p99 {self.p99_seconds:.2f} s, refused after {self.shed_seconds * 1000:.1f} ms"


async def offer(stub: Any, per_second: float, seconds: float) -> Offered:
    """Call at fixed times, whatever becomes of the calls before; each has 1 s."""
    answered, shed = list[float](), list[float]()

    async def call(seed: int) -> None:
        began = time.monotonic()
        try:
            await stub.Classify(request_of(noise(seed)), timeout=1)
            answered.append(time.monotonic() - began)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                shed.append(time.monotonic() - began)

    calls = set[asyncio.Task[None]]()
    start = time.monotonic()
    for number in range(round(per_second * seconds)):
        await asyncio.sleep(start + number / per_second - time.monotonic())  # at fixed times
        calls.add(asyncio.create_task(call(number)))
    await asyncio.gather(*calls)
    return Offered(
        len(answered) / (time.monotonic() - start),
        sorted(answered)[int(0.99 * len(answered))] if answered else 0.0,
        statistics.median(shed) if shed else 0.0,
    )


async def test_overload_costs_little_goodput(small_triton: StandIn, gateway_of: GatewayOf, measured: Measured) -> None:
    """R1: more calls than can be answered, at fixed times."""
    row = measured(
        "R1",
        fault=f"1, 3 and 10 times the {_CAPACITY} images a second that Triton can answer, at fixed times, 1 s each",
        promised="at 3 and 10 times at least 80 % of the best, p99 of the answered within 1 s, refused within 20 ms; "
        "as before within 5 s",
    )
    gateway = gateway_of(small_triton.address)
    await gateway.start()
    async with grpc.aio.insecure_channel(gateway.address) as channel:
        stub: Any = ImageServiceStub(channel)
        found = {times: await offer(stub, times * _CAPACITY, 5) for times in (1, 3, 10)}
        await asyncio.sleep(5)  # in which it is to become as before
        after = await offer(stub, 0.5 * _CAPACITY, 2)
    await gateway.check()

    for times, offered in found.items():
        row.add(f"{times} times", offered)
    row.add("5 s later, half of it", after)
    best = max(offered.goodput for offered in found.values())
    assert found[3].goodput > 0.5 * best
    assert found[10].goodput > 0.5 * best
    assert after.shed_seconds == 0


async def test_memory_limit_is_never_reached(small_triton: StandIn, gateway_of: GatewayOf, measured: Measured) -> None:
    """R2: large images and bombs, with little memory."""
    row = measured(
        "R2",
        fault="a limit of 512 MiB, while 32 callers send images of a million pixels and bombs for 5 s",
        promised="never killed for want of memory; what is too much is refused",
    )
    gateway = gateway_of(
        small_triton.address, "--max-pixels", "1000000", "--max-in-flight-bytes", str(16 * MEBI),
        "--max-message-bytes", str(4 * MEBI),
    )  # fmt: skip
    rng = np.random.default_rng(2)
    large = encoded(Image.fromarray(rng.integers(0, 256, (1000, 1000), np.uint8)))
    bomb = encoded(Image.fromarray(np.zeros((8000, 8000), np.uint8)))
    codes: dict[str, int] = {}
    async with memory_limit(gateway, 512 * MEBI) as group:
        async with grpc.aio.insecure_channel(gateway.address) as channel:
            stub: Any = ImageServiceStub(channel)

            async def send(image: bytes) -> None:
                while True:
                    try:
                        await stub.Classify(pb.ClassifyRequest(image=pb.Image(encoded=image)), timeout=5)
                        code = "OK"
                    except grpc.aio.AioRpcError as error:
                        code = error.code().name
                    codes[code] = codes.get(code, 0) + 1

            senders = [asyncio.create_task(send(bomb if number % 4 == 0 else large)) for number in range(32)]
            await asyncio.sleep(5)  # so long is the fault
            for task in senders:
                task.cancel()
            await asyncio.wait(senders)
        if gateway.is_alive:
            await gateway.recover()
        height = int((group / "memory.max_usage_in_bytes").read_text())
        killed = "oom_kill 0" not in (group / "memory.oom_control").read_text() or not gateway.is_alive

    row.add("at the height", f"{height / MEBI:.0f} MiB")
    row.add("calls", ", ".join(f"{number} {code}" for code, number in sorted(codes.items())))
    assert not killed
    assert set(codes) <= {"OK", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}
    assert codes["INVALID_ARGUMENT"] > 0


@contextlib.asynccontextmanager
async def memory_limit(gateway: Gateway, num_bytes: int) -> AsyncIterator[Path]:
    """Start a gateway under a limit; it leaves the limit with its last process."""
    group, own = _CGROUP / f"sluice-{os.getpid()}", str(os.getpid())
    before = _own_group()
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(num_bytes))
        # What is started from here on begins in there.
        (group / "cgroup.procs").write_text(own)
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        pytest.skip(f"no memory limit here, which takes root and control groups of version 1: {error}")
    try:
        try:
            await gateway.start()
        finally:
            (_CGROUP / before / "cgroup.procs").write_text(own)
        yield group
    finally:
        gateway.close()
        group.rmdir()


def _own_group() -> str:
    """Return the path, in the hierarchy, of the group that this process is in."""
    groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    return next((path.lstrip("/") for _, controllers, path in groups if controllers == "memory"), "")


async def core_share(gateway: Gateway, seconds: float) -> float:
    """Return how much of a core a gateway uses over a span of time from now on."""
    before, began = gateway.cpu_seconds, time.monotonic()
    await asyncio.sleep(seconds)  # the span that is measured
    return (gateway.cpu_seconds - before) / (time.monotonic() - began)


async def test_files_run_out_and_come_back(small_triton: StandIn, gateway_of: GatewayOf, measured: Measured) -> None:
    """R3: more connections than the process may open files."""
    row = measured(
        "R3",
        fault="at most 64 open files, and 200 connections for 3 s",
        promised="who is connected is answered, no spinning (20 % of a core at most beyond that), "
        "new ones taken again when files are free",
    )
    gateway = gateway_of(small_triton.address)
    await gateway.start()
    resource.prlimit(gateway.pid, resource.RLIMIT_NOFILE, (64, 64))
    async with Live(gateway.address) as live:
        await live.ended(50)
        alone = await core_share(gateway, 1)
        async with AsyncExitStack() as stack:
            for _ in range(200):
                await stack.enter_async_context(socket_to(gateway.address))
            share = await core_share(gateway, 3) - alone
            num_fds = len(os.listdir(f"/proc/{gateway.pid}/fd"))
        quality = live.quality()
    await gateway.recover()

    row.add("open files", f"{num_fds}")
    row.add("CPU beyond the callers'", f"{max(share, 0.0):.0%} of a core")
    row.add("who was connected", quality)
    assert num_fds <= 64
    assert quality.success > 0.9, live.failures[:5]
    assert share < 0.5

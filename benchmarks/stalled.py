"""
``python -m benchmarks.stalled``: what readers that have stopped cost the streamer and a reader that goes on.

The one that goes on takes turns alone and beside 100 that stopped in the middle of an epoch; these are in a process of
their own and open their streams before each such turn.
"""

import argparse
import asyncio
import os
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, aclosing, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc

from benchmarks import digits
from benchmarks.interleaved import Spread
from benchmarks.processes import child
from benchmarks.report import RESULTS, figures, publish, surroundings, table
from benchmarks.window import cpu_seconds
from protos.streamer.v1 import sample_service_pb2 as pb
from protos.streamer.v1.sample_service_pb2_grpc import SampleServiceStub
from sluice.line import streamer_service
from sluice.ports import settings_with_free_ports
from sluice.supervisor import Supervisor
from streamer.client import Plan, SampleClient

BATCH_SIZE = 256
NUM_STALLED = 100
# Turns alone and beside the others; short and many, as machines change from minute to minute.
ROUNDS, SECONDS = 15, 1.5
# So long they have to be ready for what they were sent before they stopped.
_SETTLE_SECONDS = 1.0

KINDS = {
    "PullBatches, our client": "pull",
    "StreamBatches, windows of 512 KiB": "windows",
    "StreamBatches, gRPC's defaults": "defaults",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Rate:
    """Of one turn."""

    samples_per_second: float
    cpu_seconds: float
    """Of readers and streamer, for a million samples: machines that are shared change it less than the rate."""


async def main(rounds: int, seconds: float) -> None:
    """Measure each kind of stopped reader, print the tables and write them to the results."""
    rows, memory = [], []
    for name, kind in KINDS.items():
        alone, beside, grown = await _measure(kind, rounds, seconds)
        pairs = list(zip(alone, beside, strict=True))
        lost = Spread.of([100 * (1 - with_.samples_per_second / each.samples_per_second) for each, with_ in pairs])
        shown = f"{lost.median:.1f} ({lost.lowest:.1f} to {lost.highest:.1f})"
        rows.append(_row(f"alone ({name})", alone, ""))
        rows.append(_row(f"beside {NUM_STALLED} stopped ({name})", beside, shown))
        memory.append([name, f"{grown / NUM_STALLED / 1024:,.0f}"])
        print(f"{name}: lost {shown} %, {memory[-1][1]} KiB each", flush=True)
    publish(_report(rows, memory, rounds, seconds), RESULTS / "stalled.md")


def _row(name: str, rates: list[Rate], lost: str) -> list[str]:
    cpu = Spread.of([each.cpu_seconds for each in rates])
    shown = f"{cpu.median:.2f} ({cpu.lowest:.2f} to {cpu.highest:.2f})"
    return [name, *figures(Spread.of([each.samples_per_second for each in rates])), lost, shown]


async def _measure(kind: str, rounds: int, seconds: float) -> tuple[list[Rate], list[Rate], float]:
    """Return rates alone and beside stopped readers, and by how many bytes the latter made the streamer grow."""
    with TemporaryDirectory(prefix="sluice-stalled-") as folder, stopped_readers() as stopped:
        data = Path(folder) / "data"
        data.mkdir()
        digits.write_mnist(data)
        settings = settings_with_free_ports().model_copy(update={"data": data, "logs": Path(folder) / "logs"})
        async with Supervisor(settings.logs, print) as supervisor:
            address = await supervisor.start(streamer_service(settings))
            process = supervisor.pid("streamer")
            await _rate(address, seconds)
            before = _resident_bytes(process)
            alone: list[Rate] = []
            beside: list[Rate] = []
            grown = 0.0
            for number in range(rounds):
                # Each goes first in every second round.
                for is_alone in (True, False) if number % 2 else (False, True):
                    await asyncio.to_thread(stopped, address, kind, 0 if is_alone else NUM_STALLED)
                    await asyncio.sleep(_SETTLE_SECONDS)
                    if not (is_alone or grown):
                        grown = _resident_bytes(process) - before
                    (alone if is_alone else beside).append(await _rate(address, seconds))
            return alone, beside, grown


async def _rate(address: str, seconds: float) -> Rate:
    """Read epoch after epoch."""
    # With all that it started: the streamer, and the stopped readers.
    working = (os.getpid(),)
    async with SampleClient(address) as client:
        samples, epoch, started, used = 0, 0, time.perf_counter(), cpu_seconds(working)
        while True:
            plan = Plan(dataset="mnist", seed=1, epoch=epoch, batch_size=BATCH_SIZE)
            async with aclosing(client.batches(plan)) as batches:
                async for batch in batches:
                    samples += len(batch.labels)
                    if (passed := time.perf_counter() - started) > seconds:
                        used = cpu_seconds(working) - used
                        return Rate(samples_per_second=samples / passed, cpu_seconds=used / samples * 1e6)
            epoch += 1


@contextmanager
def stopped_readers() -> Iterator[Any]:
    """Yield what opens so many streams of a kind at an address, in the place of those that were open."""
    with child(_stop) as readers:

        def ask(*wanted: object) -> None:
            readers.pipe.send(wanted)
            readers.pipe.recv()

        yield ask


def _stop(pipe: Connection) -> None:
    asyncio.run(_open_and_stop(pipe))


async def _open_and_stop(pipe: Connection) -> None:
    while True:
        address, kind, count = pipe.recv()
        async with AsyncExitStack() as stack:
            await asyncio.gather(*(_open(address, kind, stack) for _ in range(count)))
            pipe.send(True)
            # Nothing of this loop runs until it is asked for something else.
            while not pipe.poll(None):
                pass


async def _open(address: str, kind: str, stack: AsyncExitStack) -> None:
    if kind == "pull":
        client = await stack.enter_async_context(SampleClient(address))
        batches = client.batches(Plan(dataset="mnist", seed=1, batch_size=BATCH_SIZE))
        await anext(await stack.enter_async_context(aclosing(batches)))
        return
    options: list[tuple[str, Any]] = [("grpc.use_local_subchannel_pool", 1)]
    if kind == "windows":
        options += [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 512 * 1024)]
    channel = await stack.enter_async_context(grpc.aio.insecure_channel(address, options=options))
    asked = pb.StreamBatchesRequest(plan=pb.Plan(dataset="mnist", seed=1, batch_size=BATCH_SIZE))
    call = SampleServiceStub(channel).StreamBatches(asked)
    stack.callback(call.cancel)
    await call.read()


def _resident_bytes(process: int) -> float:
    status = Path(f"/proc/{process}/status").read_text()
    return float(status.partition("VmRSS:")[2].split()[0]) * 1024


def _report(rows: list[list[str]], memory: list[list[str]], rounds: int, seconds: float) -> str:
    return "\n".join(
        [
            "# Readers that stop",
            "",
            surroundings("python -m benchmarks.stalled", ("grpcio", "numpy", "protobuf")),
            f"One reader (PullBatches, our client, batches of {BATCH_SIZE}, checked) takes turns alone and beside "
            f"{NUM_STALLED} that stopped in mid-epoch, {rounds} turns of {seconds:g} s each in one run; client, "
            "streamer and the stopped readers share the cores. What is lost is the median over pairs of turns; CPU is "
            "that of readers and streamer together.",
            "",
            table(("", "samples/s, median", "lowest", "highest", "lost, %", "CPU s per million"), rows),
            "",
            "What the streamer's memory (VmRSS) grew by when the first of them had stopped:",
            "",
            table(("", "KiB for each"), memory),
            "",
        ]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stalled")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    given = parser.parse_args()
    asyncio.run(main(given.rounds, given.seconds))

"""Turns of h2load: each sends for about as long, by the rate of the one before, and counts answers alone."""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc

from benchmarks import h2load
from benchmarks.contest import Pace
from benchmarks.frames import FRAME_BYTES, framed
from benchmarks.h2load import Load
from benchmarks.window import Turn, cpu_seconds, machine_cpu_seconds

Take = Callable[[], Awaitable[Turn]]
"""Has one turn."""

_TRIAL_CALLS = 4
_MOST_SECONDS = 300.0
_FIRST_ANSWER_SECONDS = 60.0
_OPTIONS = (("grpc.enable_http_proxy", 0),)


class Sending:
    """
    A contender that h2load asks; the first turn has a warm-up before it.

    Args:
        load: What it is asked, by how many.
        answer_bytes: Of each answer's body.
        images: In each call.
        servers: Processes whose CPU time is told.
        pace: Of its turns.

    Attributes:
        failed: Calls without an answer, so far; they are no items.
    """

    def __init__(
        self, load: Load, *, answer_bytes: int, pace: Pace, images: int = 1, servers: Sequence[int] = ()
    ) -> None:
        self.failed = 0
        self._load = load
        self._answer_bytes = answer_bytes
        self._images = images
        self._servers = servers
        self._pace = pace
        # Calls a second of the latest turn.
        self._rate = 0.0

    async def __call__(self) -> Turn:
        """
        Have a turn.

        Raises:
            H2loadError: h2load could not.
        """
        if not self._rate:
            await self._send(_TRIAL_CALLS * self._load.callers)
            await self._send(h2load.calls_for(self._rate, self._pace.warm_seconds, self._load.callers))
        calls = h2load.calls_for(self._rate, self._pace.seconds, self._load.callers)
        servers, ours, machine = cpu_seconds(self._servers), cpu_seconds([os.getpid()]), machine_cpu_seconds()
        answers, seconds = await self._send(calls)
        ours = cpu_seconds([os.getpid()]) - ours
        self.failed += calls - answers
        return Turn(
            items=answers * self._images,
            seconds=seconds,
            reader_cpu_seconds=0.0,
            server_cpu_seconds=cpu_seconds(self._servers) - servers,
            other_cpu_seconds=max(0.0, machine_cpu_seconds() - machine - ours),
        )

    async def _send(self, calls: int) -> tuple[int, float]:
        report = await h2load.run(self._load, calls=calls, timeout_seconds=_MOST_SECONDS)
        self._rate = report.requests / report.seconds
        return report.answers(self._answer_bytes), report.seconds


async def sending(
    body: Path,
    address: str,
    path: str,
    message: bytes,
    *,
    pace: Pace,
    callers: tuple[int, int],
    images: int = 1,
    servers: Sequence[int] = (),
) -> Sending:
    """
    Return a contender that asks for a gRPC method again and again, which has answered once.

    Args:
        body: File that is written for h2load.
        address: ``host:port``.
        path: Of the method.
        message: The request.
        pace: Of its turns.
        callers: Connections, and calls in flight on each.
        images: In each call.
        servers: Processes whose CPU time is told.

    Raises:
        H2loadError: The call fails.
    """
    size = await answer_bytes(address, path, message)
    await asyncio.to_thread(body.write_bytes, framed(message))
    connections, streams = callers
    load = Load(address=address, path=path, body=body, connections=connections, streams=streams)
    return Sending(load, answer_bytes=size, pace=pace, images=images, servers=servers)


async def answer_bytes(address: str, path: str, message: bytes) -> int:
    """
    Return how many bytes of body the answer to a gRPC call has.

    Raises:
        H2loadError: The call fails, as each of many would.
    """
    async with grpc.aio.insecure_channel(address, options=_OPTIONS) as channel:
        try:
            method: Any = channel.unary_unary(path)
            answer: bytes = await method(message, timeout=_FIRST_ANSWER_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise h2load.H2loadError(f"{address}{path}: {error.code().name}: {error.details()}") from error
    return FRAME_BYTES + len(answer)


async def in_turns(contenders: Mapping[str, Take], rounds: int, report: Callable[[str], None]) -> dict[str, list[Turn]]:
    """Let each have its turn, again and again: A B C A B C; told one line for each."""
    turns: dict[str, list[Turn]] = {name: [] for name in contenders}
    for number in range(1, rounds + 1):
        for name, take in contenders.items():
            started = time.perf_counter()
            turn = await take()
            turns[name].append(turn)
            took = time.perf_counter() - started
            report(f"round {number}: {name}: {turn.rate:,.0f} a second ({took:.1f} s)")
    return turns

"""
One turn of a contender, in a process of its own that ends with the turn.

So nothing of a contender works while another is measured, and the luck of a process, as where its memory lies, is part
of the spread. ``python -m benchmarks.turn MODULE:FUNCTION OPTIONS ORDER`` is that process: it calls the function with
the options and gets what is to be done. Standard library alone, as it runs in other environments too.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.window import Turn, Window

Work = Callable[[Window], Awaitable[None] | None]
"""Works until the window says that it is over."""

_ROOT = Path(__file__).parent.parent
_MARK = "turn: "
# For a process to put things away once it has said what it did; then it is killed.
_END_SECONDS = 10.0


class TurnError(RuntimeError):
    """A contender could not be measured; the message says why, in one line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """What has its turn."""

    target: str
    """``MODULE:FUNCTION``, which takes the options and returns a :data:`Work`."""
    options: Mapping[str, object]
    """What can be written as JSON."""
    servers: Sequence[int] = ()
    """Processes that work for it."""
    python: str = sys.executable
    """What runs it."""


async def take_turn(
    program: Program, *, warm_seconds: float, seconds: float, timeout_seconds: float, temporary: Path
) -> Turn:
    """
    Run a program for a turn, and return what it did.

    Cancelling this kills it, and all it started.

    Args:
        program: What runs.
        warm_seconds: Before what is measured, from the first item on.
        seconds: Measured.
        timeout_seconds: Longest it may take in all, to start included.
        temporary: Folder for what it leaves behind.

    Raises:
        TurnError: It failed, or took too long.
    """
    order = {"warm_seconds": warm_seconds, "seconds": seconds, "servers": list(program.servers)}
    process = await asyncio.create_subprocess_exec(
        program.python, "-m", "benchmarks.turn", program.target, json.dumps(program.options), json.dumps(order),
        cwd=_ROOT, env={**os.environ, "TMPDIR": str(temporary)},
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        async with asyncio.timeout(timeout_seconds):
            answer = await _answer(process)
        with suppress(TimeoutError):
            async with asyncio.timeout(_END_SECONDS):
                await process.wait()
    except TimeoutError as error:
        raise TurnError(f"did not end within {timeout_seconds:g} s") from error
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
    if "problem" in answer:
        raise TurnError(answer["problem"])
    return Turn(**answer)


async def _answer(process: asyncio.subprocess.Process) -> dict[str, Any]:
    assert process.stdout is not None
    async for line in process.stdout:
        # What libraries print is passed over.
        if line.startswith(_MARK.encode()):
            answer: dict[str, Any] = json.loads(line[len(_MARK) :])
            return answer
    raise TurnError(f"ended with status {await process.wait()} and no answer")


def _main(target: str, options: str, order: str) -> None:
    try:
        answer = asdict(_turn(target, json.loads(options), Window(**json.loads(order))))
    except Exception as error:
        answer = {"problem": f"{type(error).__name__}: {error}".splitlines()[0]}
    print(f"\n{_MARK}{json.dumps(answer)}", flush=True)


def _turn(target: str, options: Mapping[str, Any], window: Window) -> Turn:
    module, _, function = target.partition(":")
    work: Work = getattr(importlib.import_module(module), function)(**options)
    working = work(window)
    if inspect.isawaitable(working):
        asyncio.run(_awaited(working))
    return window.turn


async def _awaited(working: Awaitable[None]) -> None:
    await working


if __name__ == "__main__":
    _main(*sys.argv[1:])

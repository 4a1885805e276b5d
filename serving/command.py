"""A program run to its end, with a deadline, that does not outlive its caller."""

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple


class Outcome(NamedTuple):
    """How a program ended."""

    code: int
    output: str
    """Standard output and standard error, in the order written."""


async def run(
    *command: str | Path,
    timeout_seconds: float,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Outcome:
    """
    Run a program without input and return its exit status and output.

    Cancelling this, or the deadline, kills the program and waits for it.

    Args:
        command: Program and arguments; no shell is involved.
        timeout_seconds: How long it may take.
        folder: Where it runs, the current one if None.
        environment: Variables laid over those of this process.

    Raises:
        OSError: The program cannot be started, e.g. because there is none of this name.
        TimeoutError: It ran longer than allowed.
    """
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=folder,
        env={**os.environ, **(environment or {})},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(timeout_seconds):
            output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return Outcome(process.returncode or 0, output.decode(errors="replace"))

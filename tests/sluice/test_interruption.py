import asyncio
import os
import signal

import pytest

from sluice.interruption import run_until_stopped


class Work:
    """Runs until it is cancelled, and takes its time to clean up."""

    def __init__(self) -> None:
        self.running = asyncio.Event()
        self.cleaning = asyncio.Event()
        self.may_end = asyncio.Event()
        self.is_clean = False

    async def run(self) -> None:
        try:
            self.running.set()
            await asyncio.Event().wait()
        finally:
            self.cleaning.set()
            await self.may_end.wait()
            self.is_clean = True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
async def test_signal_lets_the_work_clean_up(number: signal.Signals) -> None:
    work = Work()
    stopped = asyncio.create_task(run_until_stopped(work.run()))
    await work.running.wait()
    os.kill(os.getpid(), number)
    await work.cleaning.wait()
    work.may_end.set()

    assert await stopped is False
    assert work.is_clean


async def test_second_signal_cuts_the_cleaning_short() -> None:
    work = Work()
    stopped = asyncio.create_task(run_until_stopped(work.run()))
    await work.running.wait()
    os.kill(os.getpid(), signal.SIGINT)
    await work.cleaning.wait()
    os.kill(os.getpid(), signal.SIGINT)

    assert await stopped is False
    assert not work.is_clean


async def test_work_that_ends_by_itself_was_not_stopped() -> None:
    assert await run_until_stopped(asyncio.sleep(0)) is True


async def test_error_of_the_work_is_raised() -> None:
    async def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await run_until_stopped(fail())

import asyncio
import os
import signal
import sys

import pytest

from sluice.interruption import asked_to_stop, run_until_stopped


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


async def test_sigterm_unwinds_a_process_without_a_loop() -> None:
    program = (
        "import signal; from sluice.interruption import unwind_on_sigterm\n"
        "unwind_on_sigterm()\n"
        "try: print('running', flush=True); signal.pause()\n"
        "finally: print('clean')"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    assert await process.stdout.readline() == b"running\n"
    process.terminate()

    assert await process.stdout.read() == b"clean\n"
    assert await process.wait() == 143


def test_first_signal_is_noted_for_the_loop_that_asks() -> None:
    told: list[str] = []
    before = signal.getsignal(signal.SIGTERM)
    with asked_to_stop(told.append) as asked:
        assert asked() is None
        signal.raise_signal(signal.SIGTERM)
        assert asked() == signal.SIGTERM

    assert told == ["stopping after this step; once more stops at once"]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_second_signal_stops_at_once(number: signal.Signals, raised: type[BaseException]) -> None:
    with asked_to_stop(lambda _: None):
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(raised):
            signal.raise_signal(number)

"""What has its turn in the tests; run in processes of their own."""

import itertools
import os
import subprocess
import sys
import time

from benchmarks.turn import Work
from benchmarks.window import Window


def counts(items: int = 1) -> Work:
    """Do nothing but count, so many at a time."""

    async def work(window: Window) -> None:
        print("what a library says")
        for _ in itertools.count():
            if window.add(items):
                return

    return work


def paced(seconds: float) -> Work:
    """Take so long for each item."""

    def work(window: Window) -> None:
        while not window.add(1):
            time.sleep(seconds)  # the work of an item

    return work


def fails() -> Work:
    """Fail, as what cannot be measured does."""
    raise ValueError("no such thing\nand more that nobody wants to read")


def dies() -> Work:
    """End without a word."""
    sys.exit(3)


def hangs(fifo: str) -> Work:
    """Never come to an end, nor what it starts, which holds the pipe open until it is killed."""
    held = os.open(fifo, os.O_WRONLY)
    # Ends by itself at last, should even the test be killed.
    waits = "import signal; signal.alarm(300); signal.pause()"
    child = subprocess.Popen([sys.executable, "-c", waits], pass_fds=[held])

    def work(window: Window) -> None:
        child.wait()

    return work

"""A process beside this one, for as long as something is done with it."""

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import NamedTuple


class Child(NamedTuple):
    """Such a process."""

    pipe: Connection
    """To what it was given."""
    process_id: int


@contextmanager
def child(work: Callable[..., None], *arguments: object) -> Iterator[Child]:
    """
    Run a function in a process of its own, which is ended when this is left.

    Args:
        work: Of a module; gets a pipe to this process, which is closed when this process ends, and the arguments.
        arguments: What can be pickled.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run, args=(work, theirs, *arguments), daemon=True)
    process.start()
    # Held by the child alone: when it dies, whoever waits for it here is told.
    theirs.close()
    try:
        assert process.pid is not None
        yield Child(ours, process.pid)
    finally:
        process.terminate()
        process.join()
        ours.close()


def _run(work: Callable[..., None], pipe: Connection, *arguments: object) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who started this
    work(pipe, *arguments)

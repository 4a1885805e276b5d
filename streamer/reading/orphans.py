"""Worker processes whose trainer is killed."""

import multiprocessing
import os
import select
import sys
import threading

_watching_process = -1


def end_with_parent() -> None:
    """
    From now on end this process, at once, when the one that started it is gone; on Linux, elsewhere nothing happens.

    Workers of a ``DataLoader`` notice that by themselves, and then wait until their last batches have gone through a
    pipe. Nobody reads it any more, and workers that were forked keep it open for each other: they would stay for ever.
    """
    global _watching_process
    parent = multiprocessing.parent_process()
    if sys.platform != "linux" or parent is None or parent.pid is None or _watching_process == os.getpid():
        return
    _watching_process = os.getpid()
    try:
        parent_end = os.pidfd_open(parent.pid)
    except ProcessLookupError:
        os._exit(1)
    except OSError:
        return  # before Linux 5.3, or not allowed
    threading.Thread(target=_outlive, args=(parent_end,), name="sluice-parent-watch", daemon=True).start()


def _outlive(parent_end: int) -> None:
    poll = select.poll()
    poll.register(parent_end, select.POLLIN)
    poll.poll()
    # Not by an exception: what runs at the end of a process is what waits for ever.
    os._exit(1)

"""Which thread of a process goes first where cores are scarce."""

import os
import threading
from contextlib import suppress
from pathlib import Path


def take() -> None:
    """
    Let the other threads of this process, those they start among them, wait while the calling one works.

    For an event loop among gRPC's own threads. These wake for every event, to tell the loop of it, and the kernel lets
    who wakes interrupt who works: on busy cores several times for each call. As batch work they come when the loop
    waits, or has had its slice of time; a core that is idle takes them at once, as before.

    Changes nothing where threads have been given another policy than the usual, or cannot be.

    Source: sched(7), "SCHED_BATCH".
    """
    if not hasattr(os, "SCHED_BATCH"):
        return
    for name in os.listdir(_TASKS):
        thread = int(name)
        # It may have ended, or whoever runs this process does not let it.
        with suppress(OSError):
            if thread != threading.get_native_id() and os.sched_getscheduler(thread) == os.SCHED_OTHER:
                os.sched_setscheduler(thread, os.SCHED_BATCH, os.sched_param(0))


_TASKS = Path("/proc/self/task")

"""
Keeps a Triton for its owner: however the owner ends, nothing of the server is left behind.

Run as a script, by path: ``keeper.py OWNER PREFIX GRACE_SECONDS COMMAND...``. Triton's own ways do not do: killed,
or stopped while it loads, it leaves its stubs, the processes that models run in, for ever. So the keeper adopts
whatever Triton loses, and ends it. Standard library only; it starts in some 20 ms and then waits on events alone.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def keep(owner: int, prefix: str, grace_seconds: float, command: list[str]) -> int:
    """
    Run ``command`` until it ends, the owner does, or SIGTERM comes; then leave nothing of it.

    After the owner's end or the first signal the command has ``grace_seconds``; a second signal kills at once.

    Args:
        owner: Process that started this one.
        prefix: What the names of the command's regions in /dev/shm begin with.
        grace_seconds: Not negative.
        command: Program and arguments.

    Returns:
        Exit status as a shell gives it: 128 + N after signal N.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signals, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # Not SIG_IGN, which the command would inherit.
        signal.signal(number, lambda *_: None)
    keeper = os.getpid()

    def die_with_keeper() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != keeper:
            os._exit(1)

    try:
        owner_end = os.pidfd_open(owner)
    except ProcessLookupError:
        return 1
    if os.getppid() != owner:
        return 1  # it ended before we could watch it, and its number may be another's by now
    server = subprocess.Popen(command, process_group=0, preexec_fn=die_with_keeper)
    server_end = os.pidfd_open(server.pid)
    try:
        if server_end not in _first(None, server_end, owner_end, signals):
            with contextlib.suppress(BlockingIOError):
                os.read(signals, 4096)
            os.kill(server.pid, signal.SIGTERM)
            _first(grace_seconds, server_end, signals)
    finally:
        # Not reaped yet, so the group's number is still ours.
        os.killpg(server.pid, signal.SIGKILL)
        code = server.wait()
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitpid(-1, 0)
        sweep(prefix)
    return code if code >= 0 else 128 - code


def _first(seconds: float | None, *descriptors: int) -> set[int]:
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return {descriptor for descriptor, _ in poll.poll(None if seconds is None else seconds * 1000)}


def sweep(prefix: str) -> None:
    """Remove the regions of shared memory whose names begin with ``prefix``."""
    for region in SHARED_MEMORY.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            region.unlink()


if __name__ == "__main__":
    sys.exit(keep(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]), sys.argv[4:]))

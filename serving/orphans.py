"""
Whose a Triton is: names that carry their owner, and what is left of owners that are gone.

Regions in /dev/shm and command lines carry a prefix ``sluice_<pid namespace>_<pid of the owner>_<random>_``. The
namespace is in it because containers may share /dev/shm, where one's process number says nothing to the other.
"""

import asyncio
import contextlib
import os
import re
import secrets
import signal
from collections.abc import Callable
from pathlib import Path

from serving.keeper import SHARED_MEMORY, sweep

_PROGRAMS = ("tritonserver", "triton_python_backend_stub", "keeper.py")


def new_prefix() -> str:
    """Return a prefix that says this process is the owner."""
    return f"sluice_{_namespace()}_{os.getpid()}_{secrets.token_hex(3)}_"


async def clear(grace_seconds: float) -> None:
    """
    Leave nothing of owners that are gone: a server just stopping gets its time, everything else is ended.

    Args:
        grace_seconds: How long a keeper that outlives its owner may take to finish.
    """
    left = _processes(_is_of_dead_owner)
    keepers = {pid: prefix for pid, (program, prefix) in left.items() if program == "keeper.py"}
    await asyncio.gather(*(_end_of(pid, grace_seconds) for pid in keepers))
    _kill(_processes(_is_of_dead_owner))
    for region in SHARED_MEMORY.glob("sluice_*"):
        if (prefix := _prefix_in(region.name)) and _is_of_dead_owner(prefix):
            sweep(prefix)


def kill(prefix: str) -> None:
    """End every process with this prefix at once, and remove its shared memory."""
    _kill(_processes(lambda found: found == prefix))
    sweep(prefix)


def kill_stubs(prefix: str, version: str) -> None:
    """
    End the processes that one version of a model runs in.

    Args:
        prefix: Of their Triton.
        version: Its folder, below the one that Triton was started in: ``mnist/1``.
    """
    stubs = _processes(lambda found: found == prefix)
    _kill({pid: found for pid, found in stubs.items() if _folder_served_by(pid) == version})


def _folder_served_by(pid: int) -> str:
    # A stub's first argument is its model's file.
    with contextlib.suppress(OSError, ValueError):
        program, file = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:2]
        if os.path.basename(program) == "triton_python_backend_stub":
            return os.path.dirname(os.path.normpath(file))
    return ""


def _namespace() -> str:
    return f"{os.stat('/proc/self/ns/pid').st_ino:x}"


def _prefix_in(text: str) -> str | None:
    match = re.search(r"sluice_[0-9a-f]+_[0-9]+_[0-9a-f]+_", text)
    return match[0] if match else None


def _is_of_dead_owner(prefix: str) -> bool:
    _, namespace, owner, *_ = prefix.split("_")
    return namespace == _namespace() and not Path("/proc", owner).exists()


def _processes(wanted: Callable[[str], bool]) -> dict[int, tuple[str, str]]:
    """Return program and prefix by process number, of this user's keepers, servers and stubs."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):  # it may end while we look
            if entry.stat().st_uid != os.getuid():
                continue
            arguments = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            names = {os.path.basename(argument) for argument in arguments[:5]}
            program = next((program for program in _PROGRAMS if program in names), None)
            prefix = _prefix_in("\0".join(arguments))
            if program and prefix and wanted(prefix):
                found[int(entry.name)] = (program, prefix)
    return found


def _kill(processes: dict[int, tuple[str, str]]) -> None:
    for pid, (_, prefix) in processes.items():
        with contextlib.suppress(OSError):
            descriptor = os.pidfd_open(pid)
            try:
                # The number may have been given anew in between; what the descriptor holds is checked once more.
                if _prefix_in(Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")) == prefix:
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            finally:
                os.close(descriptor)


async def _end_of(pid: int, seconds: float) -> None:
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(descriptor, ended.set)
    try:
        async with asyncio.timeout(seconds):
            await ended.wait()
    except TimeoutError:
        pass  # killed by the caller
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)

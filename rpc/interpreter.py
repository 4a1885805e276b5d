"""How this project starts processes of its own beside a running one."""

import os
import sys


def command(module: str, *arguments: str) -> list[str]:
    """
    Return what runs a module in a process that finds what this one finds, together with :func:`environment`.

    Not multiprocessing: it would run the caller's main module again, leave its processes behind when this one is
    killed, and refuse where this one is itself a worker.
    """
    return [sys.executable, "-P", "-m", module, *arguments]


def environment() -> dict[str, str]:
    """Return this process' environment, with the places that it imports from."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(os.path.abspath(entry) for entry in sys.path)}

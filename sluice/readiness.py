"""How a service tells its supervisor that it is ready: one line on an inherited pipe, no polling."""

import ctypes
import os
import signal
import sys

_READY_VARIABLE = "SLUICE_READY_FD"
_PARENT_VARIABLE = "SLUICE_PARENT_PID"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def announce(address: str) -> None:
    """Tell the supervisor, where there is one, the address this process listens on; else say it to the user."""
    descriptor = os.environ.pop(_READY_VARIABLE, None)
    if descriptor is None:
        ending = "; Ctrl-C ends it" if sys.stderr.isatty() else ""
        print(f"listening on {address}{ending}", file=sys.stderr)
        return
    with os.fdopen(int(descriptor), "w") as pipe:
        pipe.write(f"{address}\n")


def environment(descriptor: int | None = None) -> dict[str, str]:
    """Return the environment of a child that ends with this process, and announces itself on ``descriptor``."""
    bound = {**os.environ, _PARENT_VARIABLE: str(os.getpid())}
    return bound if descriptor is None else {**bound, _READY_VARIABLE: str(descriptor)}


def end_with_parent() -> None:
    """Have the kernel end this process when the one that wants it so dies, however that happens; Linux only."""
    parent = os.environ.pop(_PARENT_VARIABLE, None)
    if parent is None or sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != int(parent):  # it died before the call above
        os.kill(os.getpid(), signal.SIGTERM)

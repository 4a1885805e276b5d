"""How a service tells its supervisor that it is ready: one line on an inherited pipe, no polling."""

import ctypes
import os
import signal
import sys

_VARIABLE = "SLUICE_READY_FD"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def announce(address: str) -> None:
    """Tell the supervisor, where there is one, the address this process listens on; else say it to the user."""
    descriptor = os.environ.pop(_VARIABLE, None)
    if descriptor is None:
        print(f"listening on {address}; Ctrl-C ends it", file=sys.stderr)
        return
    with os.fdopen(int(descriptor), "w") as pipe:
        pipe.write(f"{address}\n")


def environment(descriptor: int) -> dict[str, str]:
    """Return the environment of a service that is to announce itself on ``descriptor``."""
    return {**os.environ, _VARIABLE: str(descriptor)}


def end_with_parent() -> None:
    """Have the kernel end this process when its supervisor dies, however that happens; Linux only."""
    if _VARIABLE not in os.environ or sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it died before the call above
        os.kill(os.getpid(), signal.SIGTERM)

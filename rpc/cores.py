"""How many cores this process may use: what the scheduler lets it have, and what its control groups pay for."""

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_GROUPS = Path("/proc/self/cgroup")
_MOUNT = Path("/sys/fs/cgroup")


def num_cores(groups: Path = _GROUPS, mount: Path = _MOUNT) -> int:
    """
    Return how many cores this process may use, 1 or more; a part of one counts as one.

    On Linux a container sees all cores of its host, and is held to its limit by the quota of a control group.

    Args:
        groups: Names the groups that this process is in.
        mount: Where control groups lie, of version 2 and of version 1.

    Source: https://docs.kernel.org/admin-guide/cgroup-v2.html#cpu-interface-files and
    https://docs.kernel.org/scheduler/sched-bwc.html.
    """
    if sys.platform != "linux":
        return os.cpu_count() or 1
    limits = (limit for folder in _folders(groups, mount) if (limit := _limit(folder)) is not None)
    return max(1, math.ceil(min((float(len(os.sched_getaffinity(0))), *limits))))


def _folders(groups: Path, mount: Path) -> Iterator[Path]:
    """Yield those of its groups that may have a limit, and of all groups around them."""
    for line in _read(groups).splitlines():
        _, controllers, path = line.split(":", 2)
        # Version 2 names no controllers, and has one tree for all.
        if not controllers or "cpu" in controllers.split(","):
            # A container may be told its path on the host and see its own part alone: then its group is the root.
            group = PurePosixPath(path.lstrip("/"))
            yield from (mount / ("cpu" if controllers else "") / each for each in (group, *group.parents))


def _limit(folder: Path) -> float | None:
    """Return how many cores' time a group may use, None where it has no limit."""
    quota, _, period = _read(folder / "cpu.max").strip().partition(" ")
    if not quota:
        quota, period = (_read(folder / f"cpu.cfs_{each}_us").strip() for each in ("quota", "period"))
    return None if quota in ("", "max", "-1") else int(quota) / int(period)


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""

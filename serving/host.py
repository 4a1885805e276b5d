"""What this machine must bring for the embedded Triton; nothing here changes it."""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from serving import libpython
from serving.errors import UnsupportedHostError

MIN_GLIBC = (2, 35)
"""The wheel with Triton is built for manylinux_2_35."""

PYTHONS = ((3, 11), (3, 12), (3, 13))
"""Versions that Sluice runs on and that the wheel has a stub for."""

MIN_SHARED_MEMORY_BYTES = 64 << 20
"""Triton's Python backend exchanges tensors through /dev/shm: 1 MiB an instance, more for large batches."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    name: str
    ok: bool
    """False only where the embedded Triton cannot run, or not until ``remedy``."""
    detail: str
    remedy: str | None = None
    """One sentence or command that helps; None where nothing has to be done, or can be."""


def examine(cache: Path) -> list[Finding]:
    """
    Look at everything the embedded Triton needs of this machine, in the order in which it matters.

    Args:
        cache: The folder that downloads are kept in.
    """
    return [_platform(), _glibc(), _python(), _libpython(cache), _torch(), _shared_memory(), _gpu()]


def require() -> None:
    """
    Refuse a machine that no installation can help.

    Raises:
        UnsupportedHostError: Names each thing that does not fit.
    """
    lacking = [finding for finding in (_platform(), _glibc(), _python()) if not finding.ok]
    if lacking:
        reasons = "; ".join(f"{finding.name} is {finding.detail} ({finding.remedy})" for finding in lacking)
        raise UnsupportedHostError(f"the embedded Triton does not run here: {reasons}")


def _platform() -> Finding:
    found = f"{platform.system()} {platform.machine()}"
    return Finding(
        name="platform",
        ok=found == "Linux x86_64",
        detail=found,
        remedy=None if found == "Linux x86_64" else "use Linux on x86_64, or point the gateway at a Triton elsewhere",
    )


def _glibc() -> Finding:
    wanted = ".".join(map(str, MIN_GLIBC))
    remedy = f"use a system with glibc {wanted} or newer, such as Debian 12 or Ubuntu 22.04"
    try:
        # "glibc 2.36"
        version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()[1]
        ok = tuple(map(int, version.split(".")[:2])) >= MIN_GLIBC
    except (ValueError, OSError, IndexError):
        return Finding(name="glibc", ok=False, detail="absent", remedy=remedy)
    return Finding(name="glibc", ok=ok, detail=version, remedy=None if ok else remedy)


def _python() -> Finding:
    ok = sys.version_info[:2] in PYTHONS and sys.implementation.name == "cpython"
    versions = ", ".join(f"{major}.{minor}" for major, minor in PYTHONS)
    return Finding(
        name="Python",
        ok=ok,
        detail=f"{sys.implementation.name} {platform.python_version()}",
        remedy=None if ok else f"use CPython {versions}",
    )


def _libpython(cache: Path) -> Finding:
    if libpython.BUNDLED:
        return Finding(name="libpython", ok=True, detail="comes with Triton")
    path = libpython.find(cache)
    if path is not None:
        return Finding(name="libpython", ok=True, detail=str(path))
    if shutil.which("apt-get") and shutil.which("dpkg"):
        detail = f"no {libpython.NAME}; the first start tries to fetch it from the system's packages"
    else:
        detail = f"no {libpython.NAME}"
    return Finding(name="libpython", ok=False, detail=detail, remedy=libpython.REMEDY)


def _torch() -> Finding:
    # Looking for the package, not importing it: that takes seconds.
    ok = importlib.util.find_spec("torch") is not None
    return Finding(
        name="torch",
        ok=ok,
        detail="installed" if ok else "absent; models run in it",
        remedy=None if ok else "pip install torch",
    )


def _shared_memory() -> Finding:
    remedy = "give the container more, e.g. --shm-size 256m"
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        return Finding(name="shared memory", ok=False, detail="no /dev/shm", remedy=remedy)
    ok = free >= MIN_SHARED_MEMORY_BYTES and os.access("/dev/shm", os.W_OK)
    detail = f"{free >> 20} MiB free in /dev/shm"
    return Finding(name="shared memory", ok=ok, detail=detail, remedy=None if ok else remedy)


def _gpu() -> Finding:
    names = _gpu_names()
    if names:
        return Finding(name="GPU", ok=True, detail=", ".join(names))
    if Path("/dev/nvidia0").exists():
        return Finding(name="GPU", ok=True, detail="/dev/nvidia0")
    return Finding(name="GPU", ok=True, detail="none; models run on the CPU")


def _gpu_names() -> list[str]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name", "--format=csv,noheader"]
    try:
        listing = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return listing.stdout.split("\n")[:-1] if listing.returncode == 0 else []

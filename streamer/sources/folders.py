"""
Images in folders named by their classes.

Either ``folder/<class>/**`` or ``folder/train/<class>/**`` and, where there is one, ``folder/test/<class>/**``. The
classes are the names of the folders, sorted; the samples lie in the order of their paths, sorted by code point,
class by class, whatever the file system says. Without ``test`` a share of each class is held out: the images whose
paths' hashes are the smallest, so that the choice does not depend on the machine.

As they are, images become grey where all of them are, and else colour (a palette counts as such); transparency is
dropped and orientation applied. All have to be of one size unless one is given to scale them to. For a network they
become what the gateway makes of the same file: 28x28, grey, bright ink on a dark ground.
"""

import asyncio
import hashlib
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from imaging.decoding import ImageFile, UndecodableError, open_header
from imaging.framing import SIDE, Manner, frame
from streamer.errors import DataError
from streamer.sources.shards import in_thread
from streamer.sources.split import Samples, label_type

SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"))

_GREY_MODES = frozenset(("1", "L", "LA", "La"))
_COLOUR_MODES = frozenset(("CMYK", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "YCbCr"))
# Left by other programs, and holding no class.
_FOREIGN = frozenset(("__MACOSX", "@eaDir"))
# Decoded by one thread before another may go on.
_PIECE = 32
# Names of one kind that a message lists before it counts.
_MOST_NAMED = 5

Report = Callable[[str], None]


@dataclass(frozen=True, eq=False, slots=True)
class ImageFolder:
    """One split of a folder of images; each read decodes them anew."""

    name: str
    class_names: tuple[str, ...]
    files: tuple[Path, ...]
    labels: NDArray[Any]
    image_shape: tuple[int, ...]
    decode: Callable[[Path], NDArray[np.uint8]]
    """Gives an image of this shape, or raises DataError."""
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
            image[:] = self.decode(self.files[index])


def look(
    folder: Path,
    *,
    size: tuple[int, int] | None = None,
    manner: Manner | None = None,
    held_out: float,
    threads: Executor,
    report: Report,
) -> Mapping[str, ImageFolder]:
    """
    Find the images of a folder and read their headers; blocks for some 50 microseconds an image.

    Args:
        folder: Holds a folder for each class, or ``train`` and ``test`` that do.
        size: Height and width to scale to; None: all have the same. Of no effect with a manner.
        manner: How they become what a network takes, as the gateway does it; None: they stay as they are.
        held_out: Share of each class that becomes the split ``test``, at least one image of each class that has
            two; 0 for none. Of no effect where there is a ``test``.
        threads: Decodes later.
        report: Told about files that are left out, and in a line what becomes of size and colour.

    Raises:
        DataError: Names files that are no images, or differ in size, or a folder without any.
    """
    classes, found = _find(folder, report)
    if "test" not in found:
        found |= _hold_out(folder, found["train"], held_out)
    files = [path for labelled in found.values() for path, _ in labelled]
    headers = _headers(folder, files)
    if manner is None:
        shape = _common_shape(files, headers, size)
        decode = partial(_decode, shape=shape, is_scaled=size is not None)
    else:
        _require_two(folder, classes)
        shape, decode = (SIDE, SIDE), partial(_frame, manner=manner)
        if told := _told(headers):
            report(f"{folder}: {told}")
    return {
        name: ImageFolder(
            name=name,
            class_names=tuple(unicodedata.normalize("NFC", one) for one in classes),
            files=tuple(path for path, _ in labelled),
            labels=np.array([label for _, label in labelled], label_type(len(classes))),
            image_shape=shape,
            decode=decode,
            threads=threads,
        )
        for name, labelled in found.items()
    }


_Labelled = list[tuple[Path, int]]
_Header = tuple[str, tuple[int, int]]
"""Pillow's mode, and width and height."""


def _is_divided(folder: Path) -> bool:
    # A class may be called train, but then it holds images.
    train = folder / "train"
    return train.is_dir() and bool(_folders(train))


def _folders(folder: Path) -> list[Path]:
    found = [path for path in folder.iterdir() if path.is_dir() and not _is_foreign(path.name)]
    return sorted(found, key=lambda path: path.name)


def _is_foreign(name: str) -> bool:
    return name.startswith(".") or name in _FOREIGN


def _find(folder: Path, report: Report) -> tuple[tuple[str, ...], dict[str, _Labelled]]:
    parts = {"train": folder}
    if _is_divided(folder):
        parts = {name: folder / name for name in ("train", "test") if (folder / name).is_dir()}
        if others := [path.name for path in _folders(folder) if path.name not in parts]:
            report(f"{folder}: left out {_some(others)}, as there are train and test")
    classes = tuple(path.name for path in _folders(parts["train"]))
    if not classes:
        raise DataError(folder, expected="a folder for each class, with its images", found="no folder")
    _require_readable_names(parts["train"], classes)
    for part in parts.values():
        if outside := [path.name for path in sorted(part.iterdir()) if path.suffix.lower() in SUFFIXES]:
            report(f"{part}: {len(outside)} images left out that are in no class's folder, like {outside[0]}")
    return classes, {name: _find_part(part, classes, report, name) for name, part in parts.items()}


def _require_readable_names(folder: Path, classes: tuple[str, ...]) -> None:
    seen: dict[str, str] = {}
    for name in classes:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            shown = name.encode("utf-8", "surrogateescape")
            raise DataError(folder, expected="folders whose names are UTF-8", found=str(shown)) from error
        other = seen.setdefault(unicodedata.normalize("NFC", name), name)
        if other != name:
            raise DataError(folder / name, expected="a class of another name", found=f"two folders called {name}")


def _require_two(folder: Path, classes: tuple[str, ...]) -> None:
    if len(classes) > 1:
        return
    inside = [path.name for path in _folders(folder / classes[0])] if (folder / classes[0]).is_dir() else []
    remedy = f"it holds folders itself, {_some(inside)}: is {folder / classes[0]} meant?" if inside else ""
    raise DataError(
        folder, expected="at least two classes, a folder for each", found=f"one, {classes[0]}", remedy=remedy
    )


def _find_part(part: Path, classes: tuple[str, ...], report: Report, name: str) -> _Labelled:
    labels = {name: label for label, name in enumerate(classes)}
    labelled: _Labelled = []
    for folder in _folders(part):
        if folder.name not in labels:
            raise DataError(folder, expected=f"a class that train has too ({', '.join(classes)})", found="another")
        files = sorted(_files(folder), key=lambda path: path.as_posix())
        images = [path for path in files if path.suffix.lower() in SUFFIXES]
        others = [path for path in files if path.suffix.lower() not in SUFFIXES]
        if others:
            report(f"{folder}: {len(others)} files left out that are no images by their names, like {others[0].name}")
        if not images and name == "train":
            raise DataError(folder, expected=f"at least one image ({' '.join(sorted(SUFFIXES))})", found="none")
        labelled += [(path, labels[folder.name]) for path in images]
    if not labelled:
        raise DataError(part, expected="at least one image", found="none")
    return labelled


def _files(folder: Path) -> list[Path]:
    found = []
    for path in folder.rglob("*"):
        if not any(_is_foreign(name) for name in path.relative_to(folder).parts) and path.is_file():
            found.append(path)
    return found


def _hold_out(folder: Path, files: _Labelled, share: float) -> dict[str, _Labelled]:
    def draw(path: Path) -> bytes:
        return hashlib.sha256(f"sluice held out {path.relative_to(folder).as_posix()}".encode()).digest()

    chosen: set[Path] = set()
    by_label: defaultdict[int, list[Path]] = defaultdict(list)
    for path, label in files:
        by_label[label].append(path)
    for paths in by_label.values():
        members = sorted(paths, key=draw)
        count = min(len(members) - 1, max(1, round(share * len(members)))) if share else 0
        chosen |= set(members[:count])
    splits = {
        "train": [(path, label) for path, label in files if path not in chosen],
        "test": [(path, label) for path, label in files if path in chosen],
    }
    return {name: members for name, members in splits.items() if members}


def _headers(folder: Path, files: Sequence[Path]) -> list[_Header]:
    """Read all headers, so that one look names every file that is none."""
    headers: list[_Header] = []
    errors: list[tuple[Path, Exception]] = []
    for path in files:
        try:
            with open_header(path) as image:
                headers.append((image.mode, image.size))
        except (OSError, UndecodableError) as error:
            errors.append((path, error))
    if not errors:
        return headers
    others = f"; so in {len(errors) - 1} other files: {_some([str(path) for path, _ in errors[1:]])}"
    raise _not_an_image(*errors[0], others=others if len(errors) > 1 else "") from errors[0][1]


def _told(headers: Sequence[_Header]) -> str:
    """Say in a line what images lose on their way to the network; empty for nothing."""
    num_coloured = sum(mode in _COLOUR_MODES for mode, _ in headers)
    sizes = Counter(size for _, size in headers)
    losses = []
    if set(sizes) != {(SIDE, SIDE)}:
        (least, most) = min(sizes, key=_area), max(sizes, key=_area)
        span = _shown(least) if least == most else f"{_shown(least)} to {_shown(most)}"
        losses.append(f"sizes are {span} pixels (height x width)")
    if num_coloured:
        losses.append(f"{num_coloured:,} are in colour or may be")
    return f"{len(headers):,} images become {SIDE}x{SIDE} grey; {', '.join(losses)}" if losses else ""


def _area(size: tuple[int, int]) -> tuple[int, int]:
    return size[0] * size[1], size[0]


def _shown(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"


def _common_shape(files: Sequence[Path], headers: Sequence[_Header], size: tuple[int, int] | None) -> tuple[int, ...]:
    first, is_grey = headers[0][1], True
    for path, (mode, found) in zip(files, headers, strict=True):
        if mode not in _GREY_MODES and mode not in _COLOUR_MODES:
            raise DataError(path, expected="8 bits for each of grey or colour", found=f"an image of mode {mode}")
        is_grey = is_grey and mode in _GREY_MODES
        # Lying on its side is settled when it is decoded.
        if size is None and sorted(found) != sorted(first):
            raise _another_size(path, (first[1], first[0]), (found[1], found[0]))
    height, width = size or _decoded_size(files[0])
    return (height, width) if is_grey else (height, width, 3)


def _decoded_size(path: Path) -> tuple[int, int]:
    with open_header(path) as image:
        upright = ImageOps.exif_transpose(image)
        return upright.height, upright.width


def _decode(path: Path, *, shape: tuple[int, ...], is_scaled: bool) -> NDArray[np.uint8]:
    try:
        with open_header(path) as image:
            upright = ImageOps.exif_transpose(image).convert("L" if len(shape) == 2 else "RGB")
    except (OSError, ValueError, SyntaxError, UndecodableError) as error:
        raise _not_an_image(path, error) from error
    height, width = shape[:2]
    if is_scaled:
        upright = upright.resize((width, height), Image.Resampling.BILINEAR)
    elif (upright.width, upright.height) != (width, height):
        raise _another_size(path, (height, width), (upright.height, upright.width))
    return np.asarray(upright)


def _frame(path: Path, *, manner: Manner) -> NDArray[np.uint8]:
    try:
        return frame(*ImageFile(path.read_bytes()).planes(), manner)
    except (OSError, UndecodableError) as error:
        raise _not_an_image(path, error) from error


def _not_an_image(path: Path, error: Exception, *, others: str = "") -> DataError:
    reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
    return DataError(path, expected="an image that can be decoded", found=f"something else ({reason}){others}")


def _another_size(path: Path, expected: tuple[int, int], found: tuple[int, int]) -> DataError:
    return DataError(
        path,
        expected=f"{expected[0]}x{expected[1]} pixels (height x width) as in the first image",
        found=f"{found[0]}x{found[1]}",
        remedy="FOLDER:stretch brings all images to what the network takes, `sluice data pack --size` to any size",
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more

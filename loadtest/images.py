"""Real images with known answers: a streamer's test split, or a folder with one subfolder a class."""

import io
import os
import random
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from loadtest.errors import NoImagesError
from protos.gateway.v1 import image_service_pb2 as pb
from streamer.client import Plan, Retry, SampleClient
from streamer.errors import StreamerError

Format = Literal["png", "raw"]

MAX_IMAGES = 10_000
"""Of a folder; from a larger one as many are drawn. MNIST's test split has as many."""

_DATASET, _SPLIT = "mnist", "test"
_BATCH = 500
_ANSWER_SECONDS = 10.0
_MODES = ("L", "RGB", "RGBA")


@dataclass(frozen=True, eq=False, slots=True)
class Sample:
    """One image and what it shows."""

    pixels: NDArray[np.uint8]
    """Shape (H, W), (H, W, 3) or (H, W, 4)."""
    name: str
    """Of its class."""
    label: int | None
    """Class index; None where only the name is known."""
    png: bytes | None = None
    """The PNG file it came from, where it did."""

    def message(self, image_format: Format) -> pb.Image:
        """Return it as the gateway takes it."""
        if image_format == "png":
            return pb.Image(encoded=self.png or _as_png(self.pixels))
        height, width = self.pixels.shape[:2]
        channels = self.pixels.shape[2] if self.pixels.ndim == 3 else 1
        return pb.Image(
            raw=pb.RawImage(height=height, width=width, channels=channels, pixels=self.pixels.tobytes()),
        )


async def from_streamer(address: str) -> Sequence[Sample]:
    """
    Read the test split of a streamer once, in file order.

    Args:
        address: ``host:port``.

    Raises:
        NoImagesError: It cannot be read; names both ways to have images.
    """
    # The user waits: one attempt says what is wrong.
    retry = Retry(max_attempts=1, first_batch_seconds=_ANSWER_SECONDS)
    samples: list[Sample] = []
    try:
        async with SampleClient(address, retry=retry) as client:
            names = {info.name: info.class_names for info in await client.datasets()}.get(_DATASET, ())
            plan = Plan(dataset=_DATASET, split=_SPLIT, batch_size=_BATCH)
            async with aclosing(client.batches(plan)) as batches:
                async for batch in batches:
                    samples += [
                        Sample(pixels, names[label] if names else str(label), label)
                        for pixels, label in zip(batch.images, batch.labels.tolist(), strict=True)
                    ]
    except StreamerError as error:
        raise NoImagesError(
            f"no images to send: {error}. Give --streamer HOST:PORT of one that runs, "
            "or --images FOLDER with one subfolder of images for each class, named as the class"
        ) from error
    return samples


def from_folder(folder: Path, *, seed: int) -> Sequence[Sample]:
    """
    Read a folder's images, at most :data:`MAX_IMAGES` of them; a subfolder's name is the class of what is in it.

    Hidden files are passed over.

    Args:
        folder: Of folders of images that Pillow reads.
        seed: Of the choice where there are more.

    Raises:
        NoImagesError: There are none, or one cannot be read; names the file and what is expected.
    """
    if not folder.is_dir():
        raise NoImagesError(f"--images {folder}: no such folder; it needs one subfolder of images for each class")
    files = sorted(path for path in folder.glob("*/*") if path.is_file() and not _is_hidden(path))
    if not files:
        raise NoImagesError(f"--images {folder}: no images; it needs one subfolder of images for each class")
    if len(files) > MAX_IMAGES:
        files = random.Random(seed).sample(files, MAX_IMAGES)
    return [_read(path) for path in files]


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".") or path.parent.name.startswith(".")


def _read(path: Path) -> Sample:
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            kind = image.format
            pixels = np.asarray(image if image.mode in _MODES else image.convert(_mode_for(image)))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise NoImagesError(f"--images: {path} cannot be read as an image: {error}") from error
    name = os.fsdecode(path.parent.name)
    return Sample(pixels, name, int(name) if name.isdecimal() else None, content if kind == "PNG" else None)


def _mode_for(image: Image.Image) -> str:
    if image.has_transparency_data:
        return "RGBA"
    return "L" if image.mode in ("1", "I", "I;16", "F") else "RGB"


def _as_png(pixels: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()

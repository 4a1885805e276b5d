"""Images and options on their way to a gateway; what cannot be sent is said here."""

import asyncio
import os
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from gateway.asking.failures import ImageError, InvalidInputError
from protos.gateway.v1 import image_service_pb2 as pb

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

Wire = TypeVar("Wire")

Polarity = Literal["unspecified", "light_on_dark", "dark_on_light"]
Framing = Literal["unspecified", "center", "stretch"]
SimilarityMethod = Literal["unspecified", "embedding_cosine", "pixel_cosine", "ssim"]
ImageInput: TypeAlias = "str | os.PathLike[str] | bytes | NDArray[np.uint8] | PillowImage"
"""
A path to an image file, a file's bytes, pixels as uint8 of shape (H, W), (H, W, 3) or (H, W, 4), or a Pillow image.
"""

_POLARITIES = {
    "unspecified": pb.POLARITY_UNSPECIFIED,
    "light_on_dark": pb.POLARITY_LIGHT_ON_DARK,
    "dark_on_light": pb.POLARITY_DARK_ON_LIGHT,
}
_FRAMINGS = {
    "unspecified": pb.FRAMING_UNSPECIFIED,
    "center": pb.FRAMING_CENTER,
    "stretch": pb.FRAMING_STRETCH,
}
METHODS: dict[SimilarityMethod, pb.SimilarityMethod.ValueType] = {
    "unspecified": pb.SIMILARITY_METHOD_UNSPECIFIED,
    "embedding_cosine": pb.SIMILARITY_METHOD_EMBEDDING_COSINE,
    "pixel_cosine": pb.SIMILARITY_METHOD_PIXEL_COSINE,
    "ssim": pb.SIMILARITY_METHOD_SSIM,
}
"""Of each name its number on the wire."""

# One call of classify_batch; more images leave in several calls, one after the other.
_CALL_IMAGES = 256
_CALL_BYTES = 8 << 20


async def calls_of(images: Iterable[ImageInput], polarity: Polarity, framing: Framing) -> AsyncIterator[list[pb.Image]]:
    """Yield the images as messages, as many at a time as leave in one call."""
    messages: list[pb.Image] = []
    num_bytes = 0
    for image in images:
        message = await message_of(image, polarity, framing)
        size = message.ByteSize()
        if messages and (len(messages) == _CALL_IMAGES or num_bytes + size > _CALL_BYTES):
            yield messages
            messages, num_bytes = [], 0
        messages.append(message)
        num_bytes += size
    if messages:
        yield messages


async def requests_of(
    images: Iterable[ImageInput] | AsyncIterable[ImageInput],
    options: pb.ClassifyRequest,
    polarity: Polarity,
    framing: Framing,
) -> AsyncIterator[pb.ClassifyRequest | ImageError]:
    """
    Yield a request for each image, or why it cannot be sent.

    Raises:
        InvalidInputError: An option is unknown.
    """
    _chosen("polarity", polarity, _POLARITIES)
    _chosen("framing", framing, _FRAMINGS)
    index = 0
    async for image in _each(images):
        try:
            request = pb.ClassifyRequest(image=await message_of(image, polarity, framing))
            request.MergeFrom(options)
            yield request
        except OSError as error:
            yield ImageError(f"images[{index}]: {error.filename}: {error.strerror}", index=index)
        except InvalidInputError as error:
            yield ImageError(f"images[{index}]: {error}", index=index)
        index += 1


async def _each(images: Iterable[ImageInput] | AsyncIterable[ImageInput]) -> AsyncIterator[ImageInput]:
    if isinstance(images, AsyncIterable):
        async for image in images:
            yield image
    elif isinstance(images, Sequence | np.ndarray):
        for image in images:
            yield image
    else:
        # A generator may take its time, and the event loop has other work.
        iterator = iter(images)
        while found := await asyncio.to_thread(_next, iterator):
            yield found[0]


def _next(iterator: Iterator[ImageInput]) -> tuple[ImageInput] | None:
    return next(((image,) for image in iterator), None)


async def message_of(image: ImageInput, polarity: Polarity, framing: Framing) -> pb.Image:
    """
    Return an image as the gateway takes it.

    Raises:
        InvalidInputError: It is none of :data:`ImageInput`, or an option is unknown.
        OSError: The file cannot be read.
    """
    message = pb.Image(
        polarity=_chosen("polarity", polarity, _POLARITIES), framing=_chosen("framing", framing, _FRAMINGS)
    )
    if isinstance(image, (str, os.PathLike)):
        message.encoded = await asyncio.to_thread(Path(image).read_bytes)
    elif isinstance(image, (bytes, bytearray, memoryview)):
        message.encoded = bytes(image)
    elif isinstance(image, np.ndarray):
        message.raw.CopyFrom(_raw(image))
    elif hasattr(image, "getexif"):
        await asyncio.to_thread(_add_pillow, message, image)
    else:
        raise InvalidInputError(
            f"image: {type(image).__name__}; allowed are a path, bytes of an image file, a uint8 array, a Pillow image"
        )
    return message


def method_of(name: SimilarityMethod) -> pb.SimilarityMethod.ValueType:
    """
    Return a method's number on the wire.

    Raises:
        InvalidInputError: No method has that name.
    """
    return _chosen("method", name, METHODS)


def checked(name: str, value: int) -> int:
    """
    Return a count or a number that the wire can carry; protobuf's own complaint names no field.

    Raises:
        InvalidInputError: It is below 0 or needs more than 31 bits.
    """
    if not 0 <= value < 2**31:
        raise InvalidInputError(f"{name}: {value}; allowed is 0 or more")
    return value


def _chosen(name: str, value: Any, allowed: Mapping[Any, Wire]) -> Wire:
    if value not in allowed:
        raise InvalidInputError(f"{name}: {value!r}; allowed are {', '.join(allowed)}")
    return allowed[value]


def _raw(pixels: NDArray[Any]) -> pb.RawImage:
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or channels not in (1, 3, 4):
        raise InvalidInputError(
            f"image: an array of {pixels.dtype} with shape {pixels.shape}; allowed is uint8 with shape (H, W), "
            "(H, W, 3) or (H, W, 4)"
        )
    height, width = pixels.shape[:2]
    return pb.RawImage(height=height, width=width, channels=channels, pixels=pixels.tobytes())


def _add_pillow(message: pb.Image, image: "PillowImage") -> None:
    """More than 8 bits go as a TIFF, which keeps them; the rest as pixels, turned as EXIF says."""
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        file = BytesIO()
        image.save(file, "TIFF")
        message.encoded = file.getvalue()
        return
    if image.has_transparency_data:
        image = image.convert(image.mode.upper()) if image.mode in ("La", "RGBa") else image
        mode = "RGBA"
    else:
        mode = "L" if image.mode in ("1", "L") else "RGB"
    message.raw.CopyFrom(_raw(np.asarray(image if image.mode == mode else image.convert(mode))))

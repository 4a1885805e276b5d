"""Pixels in every shape, colour mode and format that may hold them. Section I of docs/faults.md."""

import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin

from imaging.decoding import Pixels
from protos.gateway.v1 import image_service_pb2 as pb
from tests.digits import LOSSLESS, difference, encoded, enlarged, seven
from tests.faults.gateway.asker import Asker
from tests.faults.gateway.conftest import Measured
from tests.faults.gateway.process import PATIENCE_SECONDS

pytestmark = pytest.mark.asyncio(loop_scope="module")


def digits() -> Iterator[Pixels]:
    """Give ten digits, 28x28 as MNIST has them: a seven, turned, mirrored and with other strokes."""
    digit = seven()
    for turns in range(4):
        yield np.ascontiguousarray(np.rot90(digit, turns))
        yield np.ascontiguousarray(np.rot90(digit[:, ::-1], turns))
    yield np.roll(digit, 2, axis=0)
    yield (digit.astype(np.uint16) * 200 // 255).astype(np.uint8)


def as_jpeg(image: Image.Image, **options: Any) -> bytes:
    return encoded(image, "JPEG", quality=95, **options)


def _lossless_variants(digit: Pixels) -> Iterator[tuple[str, bytes]]:
    """Give files that hold the same digit, to the last bit."""
    grey = Image.fromarray(digit)
    opaque = Image.new("L", grey.size, 255)
    for kind in LOSSLESS:
        yield kind, encoded(grey, kind)
    yield "WebP lossless", encoded(grey.convert("RGB"), "WEBP", lossless=True)
    yield "16 bit PNG", encoded(Image.fromarray(digit.astype(np.uint16) * 257))
    yield "16 bit TIFF", encoded(Image.fromarray(digit.astype(np.uint16) * 257), "TIFF")
    yield "32 bit TIFF", encoded(Image.fromarray(_full(digit).astype(np.int32) * 1000), "TIFF")
    yield "float TIFF", encoded(Image.fromarray(_full(digit).astype(np.float32) / 255), "TIFF")
    yield "palette", encoded(grey.convert("P"))
    yield "LA", encoded(Image.merge("LA", (grey, opaque)))
    yield "RGB", encoded(grey.convert("RGB"))
    yield "RGBA", encoded(Image.merge("RGBA", (grey, grey, grey, opaque)))
    yield "white ink on transparency", encoded(Image.merge("LA", (opaque, grey)))
    yield "CMYK TIFF", encoded(Image.merge("CMYK", [Image.new("L", grey.size)] * 3 + [ImageOps.invert(grey)]), "TIFF")
    yield "dark on light", encoded(ImageOps.invert(grey))
    yield "black ink on transparency", encoded(Image.merge("LA", (Image.new("L", grey.size), grey)))
    yield "gamma", encoded(grey, pnginfo=_gamma())
    for orientation, turned in _ORIENTATIONS.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        yield f"EXIF {orientation}", encoded(Image.fromarray(turned(digit)), exif=exif)


# What has to be done to an upright image so that the orientation makes it upright again.
_ORIENTATIONS: dict[int, Callable[[Pixels], Pixels]] = {
    1: np.ascontiguousarray,
    2: lambda pixels: np.ascontiguousarray(pixels[:, ::-1]),
    3: lambda pixels: np.ascontiguousarray(pixels[::-1, ::-1]),
    4: lambda pixels: np.ascontiguousarray(pixels[::-1]),
    5: lambda pixels: np.ascontiguousarray(pixels.T),
    6: lambda pixels: np.ascontiguousarray(np.rot90(pixels)),
    7: lambda pixels: np.ascontiguousarray(pixels[::-1, ::-1].T),
    8: lambda pixels: np.ascontiguousarray(np.rot90(pixels, -1)),
}


def _gamma() -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add(b"gAMA", struct.pack(">I", 45455))
    return info


def _full(digit: Pixels) -> Pixels:
    """With all of the range, which an image of wide pixels is taken to have."""
    return (digit.astype(np.uint16) * 255 // int(digit.max())).astype(np.uint8)


async def test_same_digit_in_every_colour_mode(ask: Asker, measured: Measured) -> None:
    """I9: one digit in many files."""
    row = measured(
        "I9",
        fault="10 digits in 28 lossless files each: 16 and 32 bits, float, palette, 1 bit, LA, RGBA, CMYK, "
        "EXIF 1 to 8, inverted, gamma, transparent ground; and as JPEG, grey and CMYK",
        promised="the model gets the pixels of the plain PNG, to the last bit; from a JPEG within 4 grey levels",
    )
    num_equal, lossy = 0, [0.0]
    for digit in digits():
        plain = (await ask.image(encoded(Image.fromarray(digit)))).pixels
        assert plain is not None
        assert np.array_equal(plain, digit)
        for name, data in _lossless_variants(digit):
            asked = await ask.image(data)
            expected = _full(digit) if name in ("32 bit TIFF", "float TIFF") else digit
            assert asked.pixels is not None, (name, asked.text)
            assert np.array_equal(asked.pixels, expected), name
            num_equal += 1
        binary = np.where(digit >= 128, 255, 0).astype(np.uint8)
        one_bit = (await ask.image(encoded(Image.fromarray(binary).convert("1")))).pixels
        assert np.array_equal(one_bit, binary) if one_bit is not None else False
        grey = Image.fromarray(digit)
        for image in (grey, grey.convert("RGB").convert("CMYK")):
            pixels = (await ask.image(as_jpeg(image))).pixels
            assert pixels is not None
            lossy.append(difference(pixels, digit))
    scan = (await ask.image(encoded(Image.fromarray(255 - enlarged(seven()))))).pixels
    row.add("equal", num_equal)
    row.add("of a JPEG", f"{max(lossy):.1f} grey levels in the mean at most")
    ask.note(row)
    assert scan is not None
    assert difference(scan, seven()) < 1
    assert max(lossy) <= 4


async def test_strange_shapes_and_contents_get_an_answer(ask: Asker, measured: Measured) -> None:
    """I12: images without a digit."""
    row = measured(
        "I12",
        fault="1x1, 4000x3, 3x4000, all black, all white, floats that are NaN or infinite",
        promised="a finite answer whose probabilities sum to 1, or INVALID_ARGUMENT",
    )
    shapes = ((1, 1), (4000, 3), (3, 4000), (28, 28), (200, 300))
    images = [Image.new("L", shape, ground) for shape in shapes for ground in (0, 255)]
    for image in images:
        asked = await ask.message(pb.ClassifyRequest(image=pb.Image(encoded=encoded(image)), top_k=10))
        assert asked.response is not None, asked.text
        assert abs(sum(each.probability for each in asked.response.top) - 1) <= 1e-5
    row.add("answered", len(images))
    for number in (np.nan, np.inf, -np.inf):
        floats = np.zeros((28, 28), np.float32)
        floats[3, 3] = number
        await ask.refused(encoded(Image.fromarray(floats), "TIFF"))
    ask.note(row)


@pytest.mark.slow
@hypothesis_settings(
    deadline=None,
    max_examples=250,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(images=st.lists(st.binary(min_size=784, max_size=784), min_size=4, max_size=4), kind=st.sampled_from(LOSSLESS))
async def test_answers_depend_on_the_pixels_alone(
    ask: Asker, measured: Measured, images: list[bytes], kind: str
) -> None:
    """I15: what must hold for any image."""
    row = measured(
        "I15",
        fault="any pixels, in any lossless format",
        promised="the model gets these pixels; the same bytes get the same answer; a batch the answers of its images",
    )
    singles, messages = [], []
    for pixels in images:
        image = np.frombuffer(pixels, np.uint8).reshape(28, 28)
        message = pb.Image(encoded=encoded(Image.fromarray(image), kind), polarity=pb.POLARITY_LIGHT_ON_DARK)
        asked = await ask.message(pb.ClassifyRequest(image=message, top_k=10))
        assert asked.pixels is not None
        assert asked.response is not None
        assert np.array_equal(asked.pixels, image)
        messages.append(message)
        singles.append(asked.response.top)
    again = await ask.message(pb.ClassifyRequest(image=messages[0], top_k=10))
    assert again.response is not None
    assert again.response.top == singles[0]
    batch = await ask.stub.ClassifyBatch(pb.ClassifyBatchRequest(images=messages, top_k=10), timeout=PATIENCE_SECONDS)
    assert [result.top for result in batch.results] == singles
    row.add("images", int(row.figures.get("images", "0")) + len(images))

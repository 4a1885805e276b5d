"""Images that are hostile or unusual, through the wire: section I of docs/faults.md."""

import random
import struct
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin

from gateway.settings import GatewaySettings
from imaging.decoding import FORMATS, Pixels
from protos.gateway.v1 import image_service_pb2 as pb
from protos.gateway.v1.image_service_pb2_grpc import ImageServiceStub
from tests.digits import LOSSLESS, difference, encoded, enlarged, seven
from tests.faults.gateway.files import animated_png, chunk, header, many_scans_jpeg, odd_tiff, png
from tests.faults.gateway.process import MEBI, Gateway, Meter
from tests.faults.report import Row
from tests.gateway.fake_triton import FakeTriton

pytestmark = pytest.mark.asyncio(loop_scope="module")

Measured = Callable[..., Row]

_SECONDS = 60.0
_ACCEPTED = "accepted are PNG, JPEG, BMP, GIF, WebP, TIFF, PGM"
# On a machine ten times slower than most, which is busy.
_MOST_SECONDS = 10.0
INVALID_ARGUMENT = grpc.StatusCode.INVALID_ARGUMENT


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(triton: FakeTriton, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    """With the default settings, and a probe that leaves what arrives at Triton to the tests."""
    folder = tmp_path_factory.mktemp("gateway")
    options = ("--model-repository", str(folder), "--probe-interval-seconds", "3600")
    process = Gateway(triton.address, folder / "gateway.log", *options)
    try:
        await process.start()
        yield process
    finally:
        process.close()


@dataclass(frozen=True, slots=True)
class Asked:
    """What became of one image."""

    code: grpc.StatusCode | None
    """``None``: it was answered."""
    text: str
    pixels: Pixels | None
    """What arrived at Triton, uint8 (28, 28)."""
    response: pb.ClassifyResponse | None


class Asker:
    """
    Sends images to the gateway and looks at what arrives at Triton.

    Attributes:
        slowest_seconds: The longest that any image took.
    """

    def __init__(self, stub: Any, triton: FakeTriton, gateway: Gateway) -> None:
        self.stub = stub
        self.slowest_seconds = 0.0
        self._triton = triton
        self._meter = Meter(gateway)

    async def image(self, data: bytes, **options: Any) -> Asked:
        """Ask about an image file."""
        return await self.message(pb.ClassifyRequest(image=pb.Image(encoded=data), **options))

    async def message(self, request: pb.ClassifyRequest) -> Asked:
        self._triton.received.clear()
        started = time.monotonic()
        try:
            response = await self.stub.Classify(request, timeout=_SECONDS)
        except grpc.aio.AioRpcError as error:
            return Asked(error.code(), error.details() or "", None, None)
        finally:
            self.slowest_seconds = max(self.slowest_seconds, time.monotonic() - started)
        (received,) = self._triton.received
        return Asked(None, "", received[0], response)

    async def refused(self, *images: bytes, text: str = _ACCEPTED) -> None:
        """Fail unless each of these is refused with INVALID_ARGUMENT and a text fit to be shown."""
        for data in images:
            asked = await self.image(data)
            assert (asked.code, asked.text[:15]) == (INVALID_ARGUMENT, "image.encoded: "), data[:40]
            assert text in asked.text
            assert not any(word in asked.text for word in ("Traceback", ".py", "0x7", "<_io", "PIL")), asked.text

    @property
    def peak_bytes(self) -> int:
        """Memory of the gateway at its height, beyond what it was at first."""
        return self._meter.cost().peak_bytes

    def note(self, row: Row) -> None:
        """Add what it took, and fail where a single image took so long that something is wrong."""
        row.add("slowest", f"{self.slowest_seconds * 1000:.0f} ms")
        row.add("cost of all", self._meter.cost())
        assert self.slowest_seconds < _MOST_SECONDS


@pytest_asyncio.fixture(loop_scope="module")
async def ask(gateway: Gateway, triton: FakeTriton) -> AsyncIterator[Asker]:
    """Of a gateway that is well before and after."""
    await gateway.check()
    options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(gateway.address, options=options) as channel:
        yield Asker(ImageServiceStub(channel), triton, gateway)
    await gateway.check()


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


async def test_what_is_no_image_is_refused(ask: Asker, measured: Measured) -> None:
    """I1: nothing, one byte, text, random bytes."""
    row = measured(
        "I1",
        fault="empty, one byte, text, 1,000 times random bytes",
        promised="INVALID_ARGUMENT that names the field and what is accepted",
    )
    rng = random.Random(1)
    await ask.refused(b"", b"x", b"no image\n", *(rng.randbytes(rng.randrange(1, 3000)) for _ in range(1000)))
    ask.note(row)


async def test_cut_files_are_never_answered_with_half_an_image(
    ask: Asker, triton: FakeTriton, measured: Measured
) -> None:
    """I2: files cut at every byte."""
    row = measured(
        "I2",
        fault="PNG and JPEG cut at every byte, five more formats at every 13th",
        promised="INVALID_ARGUMENT, or the whole image; never half of it",
    )
    image = Image.fromarray(seven())
    num_cuts = num_whole = 0
    for kind in FORMATS:
        data = encoded(image, kind)
        whole = (await ask.image(data)).pixels
        assert whole is not None
        step = 1 if kind in ("PNG", "JPEG") else 13
        cuts = [data[:length] for length in range(0, len(data), step)]
        for start in range(0, len(cuts), 1000):
            triton.received.clear()
            batch = [pb.Image(encoded=cut) for cut in cuts[start : start + 1000]]
            response = await ask.stub.ClassifyBatch(pb.ClassifyBatchRequest(images=batch), timeout=_SECONDS)
            num_cuts += len(batch)
            num_whole += sum(result.code == 0 for result in response.results)
            assert {result.code for result in response.results} <= {0, INVALID_ARGUMENT.value[0]}
            assert all(np.array_equal(one, whole) for images in triton.received for one in images), kind
    row.add("cuts", num_cuts)
    row.add("whole all the same", num_whole)
    ask.note(row)


async def test_damaged_chunks_are_refused(ask: Asker, measured: Measured) -> None:
    """I3: a wrong checksum, too few pixels, too many."""
    row = measured(
        "I3",
        fault="PNG with a wrong checksum, with too few pixels, with 64 MiB of pixels for 28x28",
        promised="the first two INVALID_ARGUMENT, the third answered or refused within 16 MiB",
    )
    data = encoded(Image.fromarray(seven()))
    place = data.index(b"IDAT") + 4
    await ask.refused(data[:place] + bytes((data[place] ^ 1,)) + data[place + 1 :], png(pixels=bytes(100)))
    asked = await ask.image(png(pixels=bytes(64 * MEBI)))
    row.add("64 MiB", "answered" if asked.code is None else asked.code.name)
    ask.note(row)
    assert asked.code in (None, INVALID_ARGUMENT)
    assert ask.peak_bytes <= 16 * MEBI


async def test_declared_sizes_are_refused_from_the_header(ask: Asker, measured: Measured) -> None:
    """I4: sizes that nobody has memory for."""
    row = measured(
        "I4",
        fault="headers that declare 60,000x60,000, 1x2,147,483,647 and 0x28",
        promised="INVALID_ARGUMENT from the header, at most 8 MiB",
    )
    for width, height in ((60_000, 60_000), (1, 2**31 - 1), (0, 28)):
        await ask.refused(header(width, height) + chunk(b"IDAT", zlib.compress(bytes(1000))), text="")
    ask.note(row)
    assert ask.peak_bytes <= 8 * MEBI


async def test_pixels_beyond_the_limit_are_refused_before_they_are_decoded(ask: Asker, measured: Measured) -> None:
    """I5: a bomb, and the largest image that is allowed."""
    limit = GatewaySettings().max_pixels
    row = measured(
        "I5",
        fault="13,000x13,000 in 164 kB; one row over the limit of pixels; the limit itself",
        promised="the first two INVALID_ARGUMENT within 8 MiB; the third answered within 13 bytes a pixel",
    )
    side = int(limit**0.5)
    assert side * side == limit
    await ask.refused(png(13_000, 13_000), png(side, side + 1), text=f"allowed are {limit}")
    row.add("refused within", f"{ask.peak_bytes / MEBI:.1f} MiB")
    assert ask.peak_bytes <= 8 * MEBI
    asked = await ask.image(png(side, side))
    ask.note(row)
    assert asked.code is None
    assert ask.peak_bytes <= 13 * limit


async def test_bombs_in_metadata_are_refused(ask: Asker, measured: Measured) -> None:
    """I6: text and colour profiles that unpack to much."""
    row = measured(
        "I6",
        fault="zTXt, iTXt and iCCP chunks that unpack to 64 MiB",
        promised="INVALID_ARGUMENT, or answered without them; at most 16 MiB",
    )
    bomb = zlib.compress(bytes(64 * MEBI), 9)
    chunks = {"zTXt": b"k\0\0" + bomb, "iTXt": b"k\0\1\0\0\0" + bomb, "iCCP": b"p\0\0" + bomb}
    for name, body in chunks.items():
        asked = await ask.image(png(before=chunk(name.encode(), body)))
        row.add(name, "answered" if asked.code is None else asked.code.name)
        assert asked.code in (None, INVALID_ARGUMENT)
    ask.note(row)
    assert ask.peak_bytes <= 16 * MEBI


async def test_other_formats_are_refused(ask: Asker, measured: Measured) -> None:
    """I7: formats whose parsers are not to run."""
    row = measured(
        "I7",
        fault="EPS, PDF, SVG, ICO, TGA, JPEG 2000, Photoshop, an archive",
        promised="INVALID_ARGUMENT that names the accepted formats",
    )
    image = Image.fromarray(seven())
    files = [encoded(image, kind) for kind in ("EPS", "PDF", "ICO", "TGA", "SGI", "DDS", "PCX", "ICNS")]
    files += [b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"8BPS\0\1" + bytes(100), b"PK\3\4" + bytes(100)]
    files += [b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(100)]
    await ask.refused(*files)
    row.add("refused", len(files))
    ask.note(row)


async def test_bytes_decide_on_the_format(ask: Asker, measured: Measured) -> None:
    """I8: what a caller calls its image does not count."""
    row = measured(
        "I8",
        fault="metadata that calls each of seven formats image/png",
        promised="nothing is believed: the bytes alone decide",
    )
    for kind in FORMATS:
        request = pb.ClassifyRequest(image=pb.Image(encoded=encoded(Image.fromarray(seven()), kind)))
        answer = await ask.stub.Classify(request, timeout=_SECONDS, metadata=(("image-type", "image/png"),))
        assert answer.model == "mnist"
    row.add("answered", len(FORMATS))


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


async def test_much_in_little_costs_little(ask: Asker, gateway: Gateway, measured: Measured) -> None:
    """I10: frames, chunks and scans without end."""
    row = measured(
        "I10",
        fault="APNG of 1,000 and 10,000 frames, 100,000 text chunks, progressive JPEG of 1,000 scans of 4096x4096, "
        "TIFF of 5,000 tags that are too long",
        promised="the first frame alone, or INVALID_ARGUMENT; at most 64 MiB; nothing in the log but the calls",
    )
    files = {
        "1,000 frames": animated_png(1000),
        "10,000 frames": animated_png(10_000),
        "chunks": png(before=chunk(b"tEXt", b"k\0v") * 100_000),
        "scans": many_scans_jpeg(1000, 4096),
        "tags": odd_tiff(5000),
    }
    num_lines = len(gateway.lines())
    for name, data in files.items():
        started = time.monotonic()
        asked = await ask.image(data)
        row.add(name, f"{asked.code.name if asked.code else 'answered'} after {time.monotonic() - started:.2f} s")
        assert asked.code in (None, INVALID_ARGUMENT)
    ask.note(row)
    assert ask.peak_bytes <= 64 * MEBI
    assert {line["event"] for line in gateway.lines()[num_lines:]} <= {"rpc"}


async def test_what_follows_an_image_is_ignored(ask: Asker, measured: Measured) -> None:
    """I11: a file that is two things."""
    row = measured(
        "I11", fault="PNG with junk, a script or an archive behind it", promised="answered as without; nothing is kept"
    )
    data = encoded(Image.fromarray(seven()))
    for junk in (b"junk", b"<script>alert(1)</script>", b"PK\3\4" + bytes(1000), data):
        asked = await ask.image(data + junk)
        assert asked.pixels is not None
        assert np.array_equal(asked.pixels, seven())
    ask.note(row)


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


async def test_counts_are_checked(ask: Asker, measured: Measured) -> None:
    """I13: too few images, too many."""
    limit = GatewaySettings().max_batch_images
    row = measured(
        "I13",
        fault=f"batches of 0, {limit} and {limit + 1}; comparisons with an image missing; no source",
        promised="INVALID_ARGUMENT that names the field and the limit; the largest batch answered",
    )
    image = pb.Image(encoded=encoded(Image.fromarray(seven())))

    async def text_of(call: Any) -> str:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is INVALID_ARGUMENT
        return caught.value.details() or ""

    for count in (0, limit + 1):
        asked = ask.stub.ClassifyBatch(pb.ClassifyBatchRequest(images=[image] * count), timeout=_SECONDS)
        assert await text_of(asked) == f"images: {count} images; allowed are 1..{limit}"
    full = await ask.stub.ClassifyBatch(pb.ClassifyBatchRequest(images=[image] * limit), timeout=_SECONDS)
    assert [result.code for result in full.results] == [0] * limit
    compare = ask.stub.Compare
    assert (await text_of(compare(pb.CompareRequest(first=image)))).startswith("second: missing")
    assert (await text_of(compare(pb.CompareRequest(second=image)))).startswith("first: missing")
    assert (await text_of(compare(pb.CompareRequest(first=image, second=pb.Image())))).startswith("second: missing")
    row.add("largest batch", f"{len(full.results)} answers")


async def test_strings_are_escaped(ask: Asker, gateway: Gateway, measured: Measured) -> None:
    """I14: names that are meant for somebody else."""
    row = measured(
        "I14",
        fault="model names with NUL, newlines, ../, right-to-left marks, escape codes, 10 kB",
        promised="NOT_FOUND with the name escaped and cut; one line of JSON in the log for each call",
    )
    names = ["a\0b", "a\nb", "../../etc/passwd", "\u202egnp", "\x1b[31mred", "x" * 10_000, '{"event": "forged"}']
    num_lines = len(gateway.lines())
    data = encoded(Image.fromarray(seven()))
    for name in names:
        asked = await ask.image(data, model=name)
        assert asked.code is grpc.StatusCode.NOT_FOUND
        assert asked.text.isascii()
        assert asked.text.isprintable()
        assert len(asked.text) < 300
    row.add("refused", len(names))
    # Logged after those.
    await gateway.check()
    lines = [line for line in gateway.lines()[num_lines:] if line.get("code") != "OK"]
    assert [(line["event"], line["code"]) for line in lines] == [("rpc", "NOT_FOUND")] * len(names)
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
    batch = await ask.stub.ClassifyBatch(pb.ClassifyBatchRequest(images=messages, top_k=10), timeout=_SECONDS)
    assert [result.top for result in batch.results] == singles
    row.add("images", int(row.figures.get("images", "0")) + len(images))

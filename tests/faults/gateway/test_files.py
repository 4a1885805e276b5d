"""Image files that are damaged, hostile or none at all. Section I of docs/faults.md."""

import random
import time
import zlib

import numpy as np
import pytest

from gateway.settings import GatewaySettings
from imaging.decoding import FORMATS
from protos.gateway.v1 import image_service_pb2 as pb
from tests.digits import seven
from tests.faults.gateway.asker import INVALID_ARGUMENT, Asker
from tests.faults.gateway.conftest import Measured
from tests.faults.gateway.files import animated_png, chunk, header, many_scans_jpeg, odd_tiff, png, seven_as
from tests.faults.gateway.process import MEBI, PATIENCE_SECONDS, Gateway
from tests.gateway.fake_triton import FakeTriton

pytestmark = pytest.mark.asyncio(loop_scope="module")


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
    num_cuts = num_whole = 0
    for kind in FORMATS:
        data = seven_as(kind)
        whole = (await ask.image(data)).pixels
        assert whole is not None
        step = 1 if kind in ("PNG", "JPEG") else 13
        cuts = [data[:length] for length in range(0, len(data), step)]
        for start in range(0, len(cuts), 1000):
            triton.received.clear()
            batch = [pb.Image(encoded=cut) for cut in cuts[start : start + 1000]]
            response = await ask.stub.ClassifyBatch(pb.ClassifyBatchRequest(images=batch), timeout=PATIENCE_SECONDS)
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
    data = seven_as()
    place = data.index(b"IDAT") + 4
    await ask.refused(data[:place] + bytes((data[place] ^ 1,)) + data[place + 1 :], png(pixels=bytes(100)))
    row.add("64 MiB", await ask.answered_or_refused(png(pixels=bytes(64 * MEBI))))
    ask.note(row)
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
        row.add(name, await ask.answered_or_refused(png(before=chunk(name.encode(), body))))
    ask.note(row)
    assert ask.peak_bytes <= 16 * MEBI


async def test_other_formats_are_refused(ask: Asker, measured: Measured) -> None:
    """I7: formats whose parsers are not to run."""
    row = measured(
        "I7",
        fault="EPS, PDF, SVG, ICO, TGA, JPEG 2000, Photoshop, an archive",
        promised="INVALID_ARGUMENT that names the accepted formats",
    )
    files = [seven_as(kind) for kind in ("EPS", "PDF", "ICO", "TGA", "SGI", "DDS", "PCX", "ICNS")]
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
        request = pb.ClassifyRequest(image=pb.Image(encoded=seven_as(kind)))
        answer = await ask.stub.Classify(request, timeout=PATIENCE_SECONDS, metadata=(("image-type", "image/png"),))
        assert answer.model == "mnist"
    row.add("answered", len(FORMATS))


async def test_much_in_little_costs_little(ask: Asker, unprobed: Gateway, measured: Measured) -> None:
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
    num_lines = len(unprobed.lines())
    for name, data in files.items():
        started = time.monotonic()
        outcome = await ask.answered_or_refused(data)
        row.add(name, f"{outcome} after {time.monotonic() - started:.2f} s")
    ask.note(row)
    assert ask.peak_bytes <= 64 * MEBI
    assert {line["event"] for line in unprobed.lines()[num_lines:]} <= {"rpc"}


async def test_what_follows_an_image_is_ignored(ask: Asker, measured: Measured) -> None:
    """I11: a file that is two things."""
    row = measured(
        "I11", fault="PNG with junk, a script or an archive behind it", promised="answered as without; nothing is kept"
    )
    data = seven_as()
    for junk in (b"junk", b"<script>alert(1)</script>", b"PK\3\4" + bytes(1000), data):
        asked = await ask.image(data + junk)
        assert asked.pixels is not None
        assert np.array_equal(asked.pixels, seven())
    ask.note(row)

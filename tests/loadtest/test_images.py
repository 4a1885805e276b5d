import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from loadtest.errors import NoImagesError
from loadtest.images import MAX_IMAGES, Sample, from_folder, from_streamer
from streamer.server import serve
from streamer.settings import StreamerSettings


@pytest.fixture
async def streamer(tiny_mnist: Path) -> AsyncIterator[str]:
    """Address of one with twenty test images, each filled with its label."""
    address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    settings = StreamerSettings(port=0, metrics_port=0, data=tiny_mnist)
    serving = asyncio.create_task(serve(settings, on_ready=address.set_result))
    # Ends early only where it could not start, and then says why.
    serving.add_done_callback(lambda task: address.done() or address.cancel())
    yield await address
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)


async def test_test_split_is_read_with_its_answers(streamer: str) -> None:
    samples = await from_streamer(streamer)

    assert [sample.label for sample in samples] == [number % 10 for number in range(20)]
    assert all(sample.pixels.shape == (28, 28) and sample.name == str(sample.label) for sample in samples)
    assert all((sample.pixels == 25 * int(sample.name)).all() for sample in samples)


async def test_missing_streamer_names_both_ways_to_have_images() -> None:
    with pytest.raises(NoImagesError, match=r"127\.0\.0\.1:1: .*--streamer HOST:PORT .*--images FOLDER"):
        await from_streamer("127.0.0.1:1")


def test_subfolder_names_the_class(image_folder: Path, samples: list[Sample]) -> None:
    (image_folder / ".DS_Store").write_text("no image")
    (image_folder / "3" / ".hidden").write_text("no image")
    read = from_folder(image_folder, seed=0)

    assert sorted(sample.name for sample in read) == sorted(sample.name for sample in samples)
    assert {sample.pixels.tobytes(): sample.label for sample in read} == {
        sample.pixels.tobytes(): sample.label for sample in samples
    }


def test_png_file_is_sent_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "seven").mkdir()
    file = tmp_path / "seven" / "a.png"
    Image.new("P", (30, 20), 3).save(file)
    (sample,) = from_folder(tmp_path, seed=0)

    assert sample.label is None
    assert sample.message("png").encoded == file.read_bytes()
    assert (sample.message("raw").raw.height, sample.message("raw").raw.width) == (20, 30)


def test_other_formats_become_png(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    Image.new("RGB", (30, 20), (1, 2, 3)).save(tmp_path / "7" / "a.bmp")
    (sample,) = from_folder(tmp_path, seed=0)
    raw = sample.message("raw").raw

    assert sample.message("png").encoded.startswith(b"\x89PNG")
    assert (raw.height, raw.width, raw.channels, raw.pixels[:3]) == (20, 30, 3, b"\x01\x02\x03")


def test_grey_pixels_are_sent_with_one_channel() -> None:
    raw = Sample(np.arange(6, dtype=np.uint8).reshape(2, 3), "0", 0).message("raw").raw

    assert (raw.height, raw.width, raw.channels, raw.pixels) == (2, 3, 1, bytes(range(6)))


@pytest.mark.parametrize(
    ("files", "words"),
    [
        pytest.param([], "no images", id="empty"),
        pytest.param(["a.png"], "no images", id="no subfolders"),
        pytest.param(["7/a.png"], r"7/a\.png cannot be read as an image", id="not an image"),
    ],
)
def test_unusable_folder_is_named(files: list[str], words: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"not an image")

    with pytest.raises(NoImagesError, match=words):
        from_folder(tmp_path, seed=0)


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(NoImagesError, match="nowhere: no such folder"):
        from_folder(tmp_path / "nowhere", seed=0)


def test_large_folder_is_drawn_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadtest.images.MAX_IMAGES", 5)
    (tmp_path / "7").mkdir()
    for number in range(12):
        Image.new("L", (28, 28), number).save(tmp_path / "7" / f"{number}.png")
    first, again, other = (
        {int(sample.pixels[0, 0]) for sample in from_folder(tmp_path, seed=seed)} for seed in (1, 1, 2)
    )

    assert MAX_IMAGES == 10_000
    assert first == again != other
    assert len(first) == 5

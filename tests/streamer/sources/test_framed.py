import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from gateway.images import Limits, open_encoded
from streamer.errors import DataError
from streamer.sources import idx
from streamer.sources.framed import MANNERS
from streamer.sources.places import Reading, open_dataset, parted
from streamer.sources.split import Dataset

LIMITS = Limits(max_bytes=1 << 24, max_pixels=1 << 24)


def picture(width: int, height: int) -> Image.Image:
    """A bright shape, off the middle of a dark ground."""
    image = Image.new("L", (width, height), 5)
    ImageDraw.Draw(image).polygon([(2, height - 3), (width // 2, 2), (width - 8, height // 2)], fill=230)
    return image


def lying(path: Path) -> None:
    about = Image.Exif()
    about[0x0112] = 6
    picture(45, 31).save(path, exif=about)


def transparent(path: Path) -> None:
    shape = picture(40, 40)
    Image.merge("LA", (Image.new("L", shape.size, 20), shape)).save(path)


FILES: dict[str, Callable[[Path], None]] = {
    "grey.png": lambda path: picture(31, 45).save(path),
    "as taken.png": lambda path: picture(28, 28).save(path),
    "dark on light.png": lambda path: picture(20, 28).point(lambda level: 255 - level).save(path),
    "colour.png": lambda path: Image.merge("RGB", (picture(64, 64), *2 * [Image.new("L", (64, 64))])).save(path),
    "alpha.png": transparent,
    "palette.gif": lambda path: picture(50, 20).convert("P").save(path),
    "one bit.png": lambda path: picture(33, 33).point(lambda v: 255 * (v > 99), "1").save(path),
    "sixteen bits.png": lambda path: Image.fromarray(np.asarray(picture(30, 40)).astype(np.uint16) * 257).save(path),
    "photograph.jpg": lying,
    "print.jpg": lambda path: picture(90, 60).convert("CMYK").save(path),
    "small.webp": lambda path: picture(9, 9).save(path, lossless=True),
    "blank.bmp": lambda path: Image.new("L", (12, 13), 77).save(path),
}  # fmt: skip


async def opened(place: object, cache: Path, said: list[str] | None = None) -> Dataset:
    report = print if said is None else said.append
    return await open_dataset("pictures", str(place), Reading(cache=cache), report=report)


async def everything(dataset: Dataset, split: str) -> tuple[NDArray[np.uint8], list[int]]:
    images, labels = await dataset.splits[split].read(np.arange(dataset.splits[split].num_samples))
    return images, labels.tolist()


def write_idx(folder: Path, images: NDArray[np.uint8], labels: NDArray[np.uint8], kind: str = "train") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / f"{kind}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx.format_images(images)))
    (folder / f"{kind}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx.format_labels(labels)))
    return folder


@pytest.mark.parametrize("word", sorted(MANNERS))
async def test_streamed_pixels_are_those_that_the_gateway_makes_of_the_same_file(tmp_path: Path, word: str) -> None:
    for part in ("train", "test"):
        for number, (name, write) in enumerate(FILES.items()):
            path = tmp_path / "all" / part / str(number % 2) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path)
    images, _ = await everything(await opened(f"{tmp_path}/all:{word}", tmp_path), "train")
    files = sorted((tmp_path / "all" / "train").rglob("*.*"))

    assert len(files) == len(images) == len(FILES)
    for image, file in zip(images, files, strict=True):
        served = open_encoded(file.read_bytes(), LIMITS).frame(MANNERS[word])
        np.testing.assert_array_equal(image, served, err_msg=file.name)


async def test_what_is_lost_is_told_in_a_line(tmp_path: Path) -> None:
    for name, image in {"a/1.png": picture(31, 45), "b/1.png": picture(64, 64).convert("RGB")}.items():
        (tmp_path / "all" / name).parent.mkdir(parents=True)
        image.save(tmp_path / "all" / name)
    said: list[str] = []
    await opened(f"{tmp_path}/all:stretch", tmp_path, said)

    sizes = "sizes are 45x31 to 64x64 pixels (height x width), 1 are in colour or may be"
    assert said == [f"{tmp_path}/all: 2 images become 28x28 grey; {sizes}"]


async def test_folder_without_a_word_stays_as_it_is(tmp_path: Path) -> None:
    for name in ("a/1.png", "b/1.png"):
        (tmp_path / "all" / name).parent.mkdir(parents=True)
        picture(64, 48).convert("RGB").save(tmp_path / "all" / name)

    assert (await opened(tmp_path / "all", tmp_path)).splits["train"].image_shape == (48, 64, 3)


async def test_idx_files_of_another_size_are_framed_and_a_tenth_is_held_out(tmp_path: Path) -> None:
    images = np.repeat(np.asarray(picture(32, 32))[None], 30, axis=0)
    folder = write_idx(tmp_path / "idx", images, np.arange(30, dtype=np.uint8) % 3)
    said: list[str] = []
    dataset = await opened(f"{folder}:stretch", tmp_path, said)
    (train, train_labels), (_, test_labels) = await everything(dataset, "train"), await everything(dataset, "test")

    np.testing.assert_array_equal(train[0], np.asarray(picture(32, 32).resize((28, 28), Image.Resampling.BOX)))
    assert (len(train_labels), len(test_labels)) == (27, 3)
    assert sorted(train_labels + test_labels) == sorted(np.arange(30) % 3)
    assert [line.removeprefix(f"{folder}: ") for line in said] == [
        "30 images of 32x32 in train become 28x28",
        "has no test split; 3 images of train become one",
    ]


async def test_a_handful_of_images_leaves_one_to_test_on(tmp_path: Path) -> None:
    folder = write_idx(tmp_path / "idx", np.zeros((3, 28, 28), np.uint8), np.arange(3, dtype=np.uint8))
    dataset = await opened(f"{folder}:stretch", tmp_path)

    assert {name: split.num_samples for name, split in dataset.splits.items()} == {"train": 2, "test": 1}


async def test_what_is_28x28_stays_bit_for_bit(tiny_mnist: Path, tmp_path: Path) -> None:
    plain, framed = await opened(tiny_mnist, tmp_path), await opened(f"{tiny_mnist}:center", tmp_path)

    for name in ("train", "test"):
        assert framed.splits[name].fingerprint == plain.splits[name].fingerprint


async def test_one_class_is_refused(tmp_path: Path) -> None:
    folder = write_idx(tmp_path / "idx", np.zeros((5, 28, 28), np.uint8), np.zeros(5, np.uint8))

    with pytest.raises(DataError, match=f"{folder}: expected at least two classes, found one"):
        await opened(f"{folder}:stretch", tmp_path)


@pytest.mark.parametrize(
    ("place", "parts"),
    [
        ("shoes:stretch", ("shoes", "stretch")),
        ("/a b/c:center", ("/a b/c", "center")),
        ("s3://bucket/shoes:stretch", ("s3://bucket/shoes", "stretch")),
        ("s3://bucket/shoes", ("s3://bucket/shoes", None)),
        ("shoes:zoom", ("shoes:zoom", None)),
    ],
)
def test_word_behind_a_place_is_told_from_it(place: str, parts: tuple[str, str | None]) -> None:
    assert parted(place) == parts

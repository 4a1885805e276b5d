import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imaging.framing import Manner
from streamer.errors import DataError
from streamer.sources.folders import ImageFolder, look

Look = Callable[..., Mapping[str, ImageFolder]]


@pytest.fixture
def looked() -> Iterator[tuple[Look, list[str]]]:
    """Looks into a folder and keeps what was reported."""
    said: list[str] = []
    with ThreadPoolExecutor(2) as threads:

        def look_into(
            folder: Path, *, size: tuple[int, int] | None = None, held_out: float = 0.0, manner: Manner | None = None
        ) -> Mapping[str, ImageFolder]:
            return look(folder, size=size, manner=manner, held_out=held_out, threads=threads, report=said.append)

        yield look_into, said


def draw(path: Path, value: int = 0, *, mode: str = "L", size: tuple[int, int] = (6, 4)) -> None:
    """Write an image of one colour, 6 wide and 4 high."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


async def read_all(split: ImageFolder) -> tuple[list[int], list[int]]:
    """Return the first byte of each image, and the labels."""
    images, labels = await split.read(np.arange(split.num_samples))
    return images.reshape(len(images), -1)[:, 0].tolist(), labels.tolist()


async def test_classes_and_samples_come_sorted_by_path(looked: tuple[Look, list[str]], tmp_path: Path) -> None:
    for value, name in enumerate(("b/2.png", "b/10.PNG", "a/z.bmp", "a/deep/x.png", "B/1.pgm")):
        draw(tmp_path / name, 10 * value)

    train = looked[0](tmp_path)["train"]
    assert train.class_names == ("B", "a", "b")
    assert await read_all(train) == ([40, 30, 20, 10, 0], [0, 1, 1, 2, 2])
    assert train.image_shape == (4, 6)


async def test_one_image_in_colour_makes_all_of_them_so(looked: tuple[Look, list[str]], tmp_path: Path) -> None:
    draw(tmp_path / "a" / "1.png", 7)
    draw(tmp_path / "a" / "2.png", 0x00FF, mode="RGB")

    train = looked[0](tmp_path)["train"]
    images, _ = await train.read(np.array([1, 0]))
    assert train.image_shape == (4, 6, 3)
    assert images[:, 0, 0].tolist() == [[255, 0, 0], [7, 7, 7]]


async def test_train_and_test_folders_are_the_splits(looked: tuple[Look, list[str]], tmp_path: Path) -> None:
    for name in ("train/a/1.png", "train/b/1.png", "test/b/1.png"):
        draw(tmp_path / name)

    splits = looked[0](tmp_path, held_out=0.5)
    assert {name: split.labels.tolist() for name, split in splits.items()} == {"train": [0, 1], "test": [1]}


def test_class_called_train_is_a_class(looked: tuple[Look, list[str]], tmp_path: Path) -> None:
    for name in ("train/1.png", "tram/1.png"):
        draw(tmp_path / name)

    assert looked[0](tmp_path)["train"].class_names == ("train", "tram")


def test_share_of_each_class_is_held_out_the_same_everywhere(looked: tuple[Look, list[str]], tmp_path: Path) -> None:
    for place in ("here", "there"):
        for number in range(20):
            draw(tmp_path / place / "many" / f"{number}.png")
        draw(tmp_path / place / "one" / "1.png")
        draw(tmp_path / place / "two" / "1.png")
        draw(tmp_path / place / "two" / "2.png")

    here, there = (looked[0](tmp_path / place, held_out=0.1) for place in ("here", "there"))
    assert np.bincount(here["test"].labels).tolist() == [2, 0, 1]
    assert np.bincount(here["train"].labels).tolist() == [18, 1, 1]
    assert [path.name for path in here["test"].files] == ["0.png", "3.png", "2.png"]
    for name, split in here.items():
        relative = [path.relative_to(tmp_path / "here") for path in split.files]
        assert relative == [path.relative_to(tmp_path / "there") for path in there[name].files]
        assert relative == sorted(relative)


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n"])
def test_file_that_is_no_image_is_named(looked: tuple[Look, list[str]], tmp_path: Path, content: bytes) -> None:
    draw(tmp_path / "a" / "1.png")
    (tmp_path / "a" / "2.png").write_bytes(content)

    with pytest.raises(DataError, match=r"a/2\.png: expected an image that can be decoded"):
        looked[0](tmp_path)


async def test_image_cut_short_is_named_when_it_is_read(looked: tuple[Look, list[str]], tmp_path: Path) -> None:
    for number in range(40):
        draw(tmp_path / "a" / f"{number:02}.bmp", size=(40, 40))
    bad = tmp_path / "a" / "33.bmp"
    bad.write_bytes(bad.read_bytes()[:1200])

    with pytest.raises(DataError, match=f"{bad}: expected an image that can be decoded, found something else"):
        await read_all(looked[0](tmp_path)["train"])


def test_image_of_another_size_is_named_with_the_way_out(looked: tuple[Look, list[str]], tmp_path: Path) -> None:
    draw(tmp_path / "a" / "1.png")
    draw(tmp_path / "a" / "2.png", size=(6, 5))

    with pytest.raises(DataError, match=r"2\.png: expected 4x6 pixels .*, found 5x6; FOLDER:stretch"):
        looked[0](tmp_path)


async def test_given_size_scales_all_images(looked: tuple[Look, list[str]], tmp_path: Path) -> None:
    draw(tmp_path / "a" / "1.png", 50)
    draw(tmp_path / "a" / "2.png", 60, size=(9, 5))

    train = looked[0](tmp_path, size=(3, 2))["train"]
    assert train.image_shape == (3, 2)
    assert await read_all(train) == ([50, 60], [0, 0])


async def test_photograph_taken_on_its_side_is_turned(looked: tuple[Look, list[str]], tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    image, about = Image.new("L", (6, 4)), Image.Exif()
    image.putpixel((0, 0), 255)
    about[274] = 6
    image.save(tmp_path / "a" / "1.png", exif=about)

    train = looked[0](tmp_path)["train"]
    images, _ = await train.read(np.array([0]))
    assert train.image_shape == (6, 4)
    assert images[0, 0, 3] == 255


def test_sixteen_bit_image_is_refused_rather_than_clipped(looked: tuple[Look, list[str]], tmp_path: Path) -> None:
    draw(tmp_path / "a" / "1.png", 40_000, mode="I;16")

    with pytest.raises(DataError, match=r"1\.png: expected 8 bits .*, found an image of mode I;16"):
        looked[0](tmp_path)


def test_other_files_are_left_out_and_reported(looked: tuple[Look, list[str]], tmp_path: Path) -> None:
    draw(tmp_path / "a" / "1.png")
    (tmp_path / "a" / "notes.txt").touch()
    (tmp_path / "a" / ".DS_Store").touch()

    assert looked[0](tmp_path)["train"].num_samples == 1
    assert looked[1] == [f"{tmp_path}/a: 1 files left out that are no images by their names, like notes.txt"]


def test_class_without_images_is_named(looked: tuple[Look, list[str]], tmp_path: Path) -> None:
    draw(tmp_path / "a" / "1.png")
    (tmp_path / "b").mkdir()

    with pytest.raises(DataError, match=f"{tmp_path}/b: expected at least one image"):
        looked[0](tmp_path)


def test_test_class_that_train_lacks_is_named(looked: tuple[Look, list[str]], tmp_path: Path) -> None:
    for name in ("train/a/1.png", "test/c/1.png"):
        draw(tmp_path / name)

    with pytest.raises(DataError, match=f"{tmp_path}/test/c: expected a class that train has too"):
        looked[0](tmp_path)


def test_folder_without_classes_is_named(looked: tuple[Look, list[str]], tmp_path: Path) -> None:
    draw(tmp_path / "1.png")

    with pytest.raises(DataError, match=f"{tmp_path}: expected a folder for each class"):
        looked[0](tmp_path)


def test_every_file_that_is_no_image_is_named_at_once(looked: tuple[Look, list[str]], tmp_path: Path) -> None:
    draw(tmp_path / "a" / "1.png")
    for number in (2, 3, 4):
        (tmp_path / "a" / f"{number}.png").write_bytes(b"no image")

    with pytest.raises(DataError, match=r"2\.png: .*; so in 2 other files: .*/3\.png, .*/4\.png"):
        looked[0](tmp_path)


@pytest.mark.parametrize("name", [".cache/1.png", "a/.thumbnails/1.png", "__MACOSX/a/._1.png", "a/._1.png"])
def test_what_other_programs_leave_behind_is_no_sample(
    looked: tuple[Look, list[str]], tmp_path: Path, name: str
) -> None:
    draw(tmp_path / "a" / "1.png")
    draw(tmp_path / name)

    train = looked[0](tmp_path)["train"]
    assert (train.class_names, train.num_samples) == (("a",), 1)


def test_images_in_no_class_and_other_splits_are_reported(looked: tuple[Look, list[str]], tmp_path: Path) -> None:
    for name in ("train/a/1.png", "test/a/1.png", "val/a/1.png", "train/2.png"):
        draw(tmp_path / name)

    looked[0](tmp_path)
    assert looked[1] == [
        f"{tmp_path}: left out val, as there are train and test",
        f"{tmp_path}/train: 1 images left out that are in no class's folder, like 2.png",
    ]


def test_share_is_held_out_of_train_where_test_is_missing(looked: tuple[Look, list[str]], tmp_path: Path) -> None:
    for number in range(10):
        draw(tmp_path / "train" / "a" / f"{number}.png")

    splits = looked[0](tmp_path, held_out=0.2)
    assert {name: split.num_samples for name, split in splits.items()} == {"train": 8, "test": 2}


def test_one_class_is_refused_for_a_network_and_what_may_be_meant_is_named(
    looked: tuple[Look, list[str]], tmp_path: Path
) -> None:
    for name in ("pictures/boot/1.png", "pictures/shoe/1.png"):
        draw(tmp_path / name)

    assert looked[0](tmp_path)["train"].class_names == ("pictures",)
    with pytest.raises(DataError, match=f"at least two .*, found one, pictures; .*boot, shoe: is {tmp_path}/pictures"):
        looked[0](tmp_path, manner=Manner())


def test_names_of_classes_are_composed(looked: tuple[Look, list[str]], tmp_path: Path) -> None:
    draw(tmp_path / "Hu\u0308te und Mu\u0308tzen" / "1.png")

    assert looked[0](tmp_path)["train"].class_names == ("H\u00fcte und M\u00fctzen",)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((b"gr\xfcn", b"rot"), "expected folders whose names are UTF-8, found .*xfcn"),
        (("gr\u00fcn".encode(), "gru\u0308n".encode()), "expected a class of another name, found two"),
    ],
)
def test_names_that_no_card_could_hold_are_refused(
    looked: tuple[Look, list[str]], tmp_path: Path, names: tuple[bytes, bytes], message: str
) -> None:
    for name in names:
        draw(tmp_path / os.fsdecode(name) / "1.png")

    with pytest.raises(DataError, match=message):
        looked[0](tmp_path)

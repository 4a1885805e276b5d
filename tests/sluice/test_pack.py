from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from rpc.settings import SettingsError
from sluice.commands import app
from sluice.pack import PackOptions, run
from streamer.errors import DataError
from streamer.sources.places import Reading, open_dataset
from streamer.sources.split import Dataset


async def opened(place: Path, cache: Path) -> Dataset:
    return await open_dataset("set", str(place), Reading(cache=cache), report=print)


async def test_known_data_set_is_packed_from_the_users_folder(
    tiny_mnist: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = PackOptions(source="mnist", out=str(tmp_path / "packed"), cache=tmp_path, data=tiny_mnist)
    await run(options, report=print)

    said = capsys.readouterr().out
    assert f"mnist train: 40 images of 28x28, 0.0 MB in {tmp_path}/packed" in said
    packed, memory = await opened(tmp_path / "packed", tmp_path), await opened(tiny_mnist, tmp_path)
    assert packed.splits["train"].fingerprint == memory.splits["train"].fingerprint
    assert packed.splits["test"].fingerprint == memory.splits["test"].fingerprint


async def test_folder_of_images_is_packed_larger_than_memory_would_hold(tmp_path: Path) -> None:
    for number in range(60):
        path = tmp_path / "pictures" / f"class {number % 3}" / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (10, 6), (number, 0, 0)).save(path)
    options = PackOptions(source=str(tmp_path / "pictures"), out=str(tmp_path / "packed"), cache=tmp_path, size="3x5")
    await run(options, report=print)

    dataset = await opened(tmp_path / "packed", tmp_path)
    images, labels = await dataset.splits["train"].read(np.arange(54))
    assert dataset.class_names == ("class 0", "class 1", "class 2")
    assert images.shape == (54, 3, 5, 3)
    assert (images[:, 0, 0, 0] % 3 == labels).all()
    assert dataset.splits["test"].num_samples == 6


@pytest.mark.parametrize("size", ["x", "0x3", "3x", "big", "-3", "2049x9", "99999"])
async def test_size_that_is_none_is_refused_before_anything_is_made(tmp_path: Path, size: str) -> None:
    with pytest.raises(SettingsError, match=f"--size {size}: (expected HEIGHTxWIDTH|1 to 2048 pixels)"):
        await run(PackOptions(source=str(tmp_path), out=str(tmp_path / "out"), cache=tmp_path, size=size), report=print)
    assert not (tmp_path / "out").exists()


def test_command_line_packs_and_says_so(tiny_mnist: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["data", "pack", str(tiny_mnist), str(tmp_path / "packed"), "--block-kib", "1"])

    assert result.exit_code == 0, result.output
    assert f"index: {tmp_path}/packed/index.json" in result.output


async def test_folder_is_packed_as_the_network_takes_it(tmp_path: Path) -> None:
    for number in range(20):
        path = tmp_path / "pictures" / f"class {number % 2}" / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.linear_gradient("L").resize((10 + number, 16)).save(path)
    place = f"{tmp_path}/pictures:stretch"
    options = PackOptions(source=place, out=str(tmp_path / "packed"), cache=tmp_path)
    await run(options, report=print)

    packed, loose = await opened(tmp_path / "packed", tmp_path), await opened(Path(place), tmp_path)
    assert packed.splits["train"].image_shape == (28, 28)
    assert packed.splits["train"].fingerprint == loose.splits["train"].fingerprint
    with pytest.raises(SettingsError, match=r"--size 64: .*pictures:stretch says the size, too"):
        await run(replace(options, size="64"), report=print)


async def test_packed_images_of_another_size_are_refused_for_a_network(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        Image.new("RGB", (10, 6)).save(tmp_path / "pictures" / name / "1.png")
    await run(
        PackOptions(source=str(tmp_path / "pictures"), out=str(tmp_path / "packed"), cache=tmp_path), report=print
    )

    with pytest.raises(DataError, match=r"28x28, grey, found 6x10 in colour; pack them anew .*FOLDER:stretch"):
        await opened(Path(f"{tmp_path}/packed:stretch"), tmp_path)

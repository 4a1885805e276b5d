"""The page for users without machine learning, followed to the letter: their own folder of pictures, to answers."""

import asyncio
import gzip
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gateway.client import Classification, ImageClient
from rpc.settings import cache_folder
from streamer.errors import StreamerError
from streamer.sources import datasets, idx
from tests.line.processes import environment, free_ports, read_until

pytestmark = [
    pytest.mark.triton,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("triton_installed"),
]

PAGE = Path(__file__).parents[2] / "docs" / "tune-your-own-data.md"
# What the search of the page takes half an hour for is not shown by its length.
SHORTER = {"sluice tune --dataset shoes --trials 20": "--trials 2 --epochs 12 --set data.batch_size=32"}
CLASSES = {0: "T-shirt", 1: "Hose für Große", 5: "sandal", 7: "sneaker", 8: "bag"}
# Height and width.
SIZES = ((45, 31), (64, 64), (28, 20), (28, 28), (80, 99))
NUM_KNOWN, NUM_NEW = 60, 20


def commands() -> list[str]:
    """The page's first block, a line each without what it says about them."""
    block = re.search(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert block is not None
    return [line.partition("  #")[0].strip() for line in block[1].splitlines()]


def photographed(pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], number: int) -> Image.Image:
    """The same thing as somebody else would have kept it: in another size, in colour, cut out, or on white paper."""
    height, width = SIZES[number % len(SIZES)]
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    match number % 4:
        case 1:
            return Image.merge("RGB", (image, image, image.point(lambda level: level * 3 // 4)))
        case 2:
            return image.point(lambda level: 255 - level)
        case 3:
            return Image.merge("LA", (image, image.point(lambda level: 255 * (level > 0))))
    return image


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's working folder: ``shoes/CLASS/*.png`` to learn from, ``new/CLASS/*.png`` that nobody has seen."""
    try:
        files = datasets.cached("fashion-mnist", data=None, cache=cache_folder())
    except StreamerError:
        files = None
    if files is None:
        pytest.skip("no Fashion-MNIST on this machine: `sluice data fetch fashion-mnist` gets it")
    folder = tmp_path_factory.mktemp("black-box")
    for split, place, count in (("train", "shoes", NUM_KNOWN), ("test", "new", NUM_NEW)):
        paths = files.splits[split]
        images = idx.parse_images(gzip.decompress(paths.images.read_bytes()), file="images")
        labels = idx.parse_labels(gzip.decompress(paths.labels.read_bytes()), file="labels")
        for label, name in CLASSES.items():
            (folder / place / name).mkdir(parents=True)
            for number, index in enumerate(np.flatnonzero(labels == label)[:count]):
                photographed(images[index], number).save(folder / place / name / f"{number:03}.png")
    (folder / "new.png").write_bytes((folder / "new" / CLASSES[8] / "000.png").read_bytes())
    return folder


class Terminal:
    """Shells in a user's folder, with ports that nobody else has."""

    def __init__(self, folder: Path) -> None:
        ports = free_ports()
        self.gateway = f"127.0.0.1:{ports['gateway']}"
        self._folder = folder
        self._environment = {
            **environment(folder),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            **{f"SLUICE_{name.replace('-', '_').upper()}_PORT": str(port) for name, port in ports.items()},
        }

    def run(self, line: str) -> str:
        """Run a line to its end and return what it printed."""
        with self._started(line) as process:
            printed, _ = process.communicate(timeout=600)
        assert process.returncode == 0, f"{line}:\n{printed}"
        return printed

    @contextmanager
    def left_running(self, line: str) -> Iterator[list[str]]:
        """Run a line beside the others, until Ctrl-C; gives what it printed once it was up."""
        with self._started(f"exec env {line}") as process:
            yield read_until(process, "Ctrl-C stops")
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)

    @contextmanager
    def _started(self, line: str) -> Iterator[subprocess.Popen[str]]:
        process = subprocess.Popen(
            ["bash", "-c", line], cwd=self._folder, env=self._environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def test_page_leads_from_a_folder_of_pictures_to_answers_with_its_names(folder: Path) -> None:
    install, serve, *others, classify = commands()
    terminal = Terminal(folder)
    with terminal.left_running(serve) as told:
        for line in others:
            terminal.run(f"{line} {SHORTER.get(line, '')}")
        answer = terminal.run(classify)
        names, answers = asyncio.run(ask(terminal.gateway, sorted((folder / "new").rglob("*.png"))))
    right = np.mean([path.parent.name == name for path, name in answers.items()])

    assert shlex.split(install)[:2] == ["pip", "install"]
    assert told[0].startswith("shoes: 300 images become 28x28 grey; sizes are 28x20 to 80x99 pixels")
    assert told[0].endswith("75 are in colour or may be")
    assert list(SHORTER) == [line for line in others if line in SHORTER]
    assert names == tuple(sorted(CLASSES.values()))
    assert answer.partition(": ")[2].partition(" (")[0] == answers[folder / "new" / CLASSES[8] / "000.png"]
    # A fifth is chance.
    assert right > 0.6, answers


async def ask(gateway: str, files: list[Path]) -> tuple[tuple[str, ...], dict[Path, str]]:
    """Return the names of the model's classes, and each file's answer."""
    async with ImageClient(gateway) as client:
        (names,) = [model.class_names for model in await client.models() if model.name == "shoes"]
        answers = await client.classify_batch(files, model="shoes")
    named = [answer.name if isinstance(answer, Classification) else str(answer) for answer in answers]
    return tuple(names), dict(zip(files, named, strict=True))

"""``sluice demo``: from data to predictions through every part of the line, in one go."""

import asyncio
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from rich.columns import Columns
from rich.console import Console, Group
from rich.progress import track
from rich.text import Text

from gateway.client import Classification, ImageClient
from rpc.settings import load
from serving.installation import install
from serving.settings import TritonSettings
from sluice import picture
from sluice.access import Access, own_tls
from sluice.line import gateway_service, streamer_service, triton_service
from sluice.ports import settings_with_free_ports
from sluice.readiness import environment
from sluice.supervisor import ServiceError, Supervisor
from streamer.client import Plan, SampleClient
from streamer.settings import StreamerSettings
from streamer.sources.datasets import find

_CALLERS = 16
_SHOWN = 5
_READ_BATCH = 500
_LEAST_SAMPLES = 40_000
_SERVING_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One test image with what the gateway said about it."""

    image: npt.NDArray[np.uint8]
    truth: int
    said: Classification
    seconds: float


async def run(*, seed: int, minutes: float) -> None:
    """
    Train on the stream, publish, serve, classify every test image, print what came of it.

    Cancelling it stops every process it started.

    Args:
        seed: Of the training run.
        minutes: Time for training, about.

    Raises:
        ServiceError: A part of the line did not start; the message holds the end of its log.
    """
    console = Console()
    say = partial(console.print, highlight=False, soft_wrap=not console.is_terminal)
    started = time.perf_counter()
    settings = settings_with_free_ports()
    triton_settings = load(TritonSettings)
    async with Supervisor(settings.logs, say) as supervisor:
        _head(console, 1, "Data and streamer")
        sources = load(StreamerSettings)
        # Both happen here, where their progress is seen, and before the time that training takes.
        await find("mnist", data=sources.data, cache=sources.cache, report=say)
        await install(triton_settings.cache, say)
        streamer = await supervisor.start(streamer_service(settings))
        images, labels = await _test_split(console, streamer)
        _head(console, 2, "Training over the stream")
        version = await _train(streamer, seed=seed, minutes=minutes)
        _head(console, 3, "Triton and gateway")
        triton = await supervisor.start(triton_service(settings))
        gateway = await supervisor.start(gateway_service(settings, triton))
        async with ImageClient(gateway, tls=own_tls(), api_key=Access().api_key()) as client:
            await client.wait_ready(timeout_seconds=_SERVING_SECONDS)
            say(f"Triton {triton} runs the model; the gateway {gateway} answers for it")
            _head(console, 4, f"{len(labels):,} test images as PNG files through the gateway, {_CALLERS} callers")
            answers, seconds = await _classify(console, client, images, labels)
    _report(console, answers, seconds)
    say(
        f"\nDone in {(time.perf_counter() - started) / 60:.1f} minutes; nothing was left running. How to go on:\n"
        f"  make up                                starts the line with version {version} of the model\n"
        "  .venv/bin/sluice classify FILE...      asks it about your own pictures\n"
        "  SLUICE_DATA=FOLDER make demo           trains on full MNIST (IDX files) from a folder",
    )


async def _test_split(console: Console, streamer: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Read the held-out images [N, H, W] and labels [N] from the stream, in file order."""
    async with SampleClient(streamer) as client:
        (dataset,) = [dataset for dataset in await client.datasets() if dataset.name == "mnist"]
        plan = Plan(dataset="mnist", split="test", batch_size=_READ_BATCH)
        batches = [batch async for batch in client.batches(plan)]
    sizes = {name: split.num_samples for name, split in dataset.splits.items()}
    console.print(f"{streamer} streams mnist: {sizes['train']:,} training and {sizes['test']:,} test images")
    return np.concatenate([batch.images for batch in batches]), np.concatenate([batch.labels for batch in batches])


async def _train(streamer: str, *, seed: int, minutes: float) -> int:
    """Train in a process of its own, whose progress bar is shown, and return the version it published."""
    options = ("--streamer", streamer, "--seed", str(seed), "--minutes", str(minutes))
    # A demonstration is to read digits on a slow machine, too.
    least = ("--set", f"budget.min_samples={_LEAST_SAMPLES}")
    process = await asyncio.create_subprocess_exec(
        # A second demo may well be worse than the first.
        *(sys.executable, "-m", "sluice", "train", *options, *least, "--force", "--no-load", "--json"),
        stdout=asyncio.subprocess.PIPE,
        env=environment(),
    )
    try:
        output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
    if process.returncode != 0:
        raise ServiceError(f"training ended with status {process.returncode}; what it said is above")
    return int(json.loads(output)["version"])


async def _classify(
    console: Console,
    client: ImageClient,
    images: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int64],
) -> tuple[list[Answer], float]:
    """Ask about every image, and return the answers with the seconds that took."""
    with tempfile.TemporaryDirectory(prefix="sluice-demo-") as folder:
        files = [_write_png(Path(folder) / f"{number:05}.png", image) for number, image in enumerate(images)]
        numbers = iter(
            track(range(len(files)), console=console, description="classifying", disable=not console.is_terminal)
        )
        answers: list[Answer | None] = [None] * len(files)

        async def caller() -> None:
            for number in numbers:
                begun = time.perf_counter()
                said = await client.classify(files[number])
                seconds = time.perf_counter() - begun
                answers[number] = Answer(image=images[number], truth=int(labels[number]), said=said, seconds=seconds)

        started = time.perf_counter()
        async with asyncio.TaskGroup() as callers:
            for _ in range(_CALLERS):
                callers.create_task(caller())
        seconds = time.perf_counter() - started
    return [answer for answer in answers if answer is not None], seconds


def _write_png(path: Path, image: npt.NDArray[np.uint8]) -> Path:
    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, "PNG")
    path.write_bytes(encoded.getvalue())
    return path


def _report(console: Console, answers: Sequence[Answer], seconds: float) -> None:
    names = [str(number) for number in range(10)]
    counts = np.zeros((10, 10), np.int64)
    for answer in answers:
        counts[answer.truth, answer.said.label] += 1
    right = int(np.trace(counts))
    console.print(f"[bold]Accuracy through the gateway: {right / len(answers):.2%}[/] ({right:,} of {len(answers):,})")
    console.print("\nConfusion matrix, rows true and columns predicted:")
    console.print(picture.confusion(counts, names), highlight=False)
    p50, p95, p99 = np.percentile([answer.seconds for answer in answers], [50, 95, 99]) * 1000
    console.print(
        f"\nLatency p50 {p50:.1f} ms, p95 {p95:.1f} ms, p99 {p99:.1f} ms; {len(answers) / seconds:,.0f} images/s "
        f"with {_CALLERS} callers on {len(os.sched_getaffinity(0))} cores, the client's share included",
        highlight=False,
        soft_wrap=not console.is_terminal,
    )
    misread = sorted(
        (answer for answer in answers if answer.truth != answer.said.label),
        key=lambda answer: -answer.said.probability,
    )
    if not misread:
        console.print("No digit was misread.")
        return
    shown = misread[:_SHOWN]
    console.print(f"\nMisread with the most confidence, {len(shown)} of {len(misread)}:")
    console.print(Columns([_drawn(answer, console) for answer in shown], padding=(0, 2)))


def _drawn(answer: Answer, console: Console) -> Group:
    caption = f"{answer.truth} read as {answer.said.label} ({answer.said.probability:.0%})"
    return Group(picture.digit(answer.image, colour=console.color_system is not None), Text(caption))


def _head(console: Console, number: int, title: str) -> None:
    console.print(f"\n[bold]{number}. {title}[/]", highlight=False)

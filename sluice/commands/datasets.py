"""Commands for data sets on this machine."""

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from rpc.settings import load
from sluice.commands.progress import say
from streamer.settings import StreamerSettings


def fetch(
    name: Annotated[str, typer.Argument(help="Name of the data set: mnist or fashion-mnist.")] = "mnist",
    folder: Annotated[Path | None, typer.Option("--data", help="Folder of IDX files to check instead.")] = None,
) -> None:
    """Get a data set into the local cache and say what it holds."""
    from streamer.sources.datasets import find
    from streamer.sources.memory import load as read

    settings = load(StreamerSettings, data=folder)

    async def run() -> None:
        files = await find(name, data=settings.data, cache=settings.cache, report=say, refresh=True)
        dataset = await read(files)
        for split in dataset.splits.values():
            print(f"{name} {split.name}: {split.num_samples:,} images in {files.folder}")

    asyncio.run(run())


def pack(
    source: Annotated[
        str,
        typer.Argument(
            help="Name of a known data set, or its folder (IDX files, images by class), or s3://...; "
            "FOLDER:stretch makes 28x28 of any images."
        ),
    ],
    out: Annotated[str, typer.Argument(help="New folder, or s3://bucket/prefix.")],
    name: Annotated[str, typer.Option(help="Name in the index; by default that of the source.")] = "",
    size: Annotated[str, typer.Option(help="HEIGHTxWIDTH to scale images to; by default all have one size.")] = "",
    held_out: Annotated[
        float, typer.Option(min=0, max=0.9, help="Share of each class that becomes the split test where none is named.")
    ] = 0.1,
    shard_mib: Annotated[int, typer.Option(min=1, max=65536, help="Size of a shard, in MiB.")] = 64,
    block_kib: Annotated[
        int, typer.Option(min=1, max=65536, help="Size of a block, the unit of cache and download, in KiB.")
    ] = 256,
) -> None:
    """Write a data set as shards, which need not fit into memory to be read; see docs/data.md."""
    from sluice.interruption import run_until_stopped
    from sluice.pack import PackOptions, run

    settings = load(StreamerSettings)
    options = PackOptions(
        source=source,
        out=out,
        cache=settings.cache,
        data=settings.data,
        name=name,
        size=size,
        held_out=held_out,
        shard_bytes=shard_mib * 1024**2,
        block_bytes=block_kib * 1024,
    )
    if not asyncio.run(run_until_stopped(run(options, report=say))):
        raise KeyboardInterrupt

"""Commands for a running streamer, and for the ledgers of what was read from it."""

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from rpc import log
from sluice.options import JsonObject, StreamerAddress


def verify(
    ledgers: Annotated[list[Path], typer.Argument(metavar="LEDGER...", help="Of all ranks and restarts of one run.")],
    as_json: JsonObject = False,
) -> None:
    """Print lost, repeated, unexpected and recovered samples; exits 1 when any but the last is not 0."""
    from sluice.stream import check

    raise typer.Exit(0 if check(ledgers, as_json=as_json) else 1)


def list_datasets(
    streamer: StreamerAddress = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False,
) -> None:
    """List what a running streamer serves: data set, split, images, their shape, classes, start of the fingerprint."""
    from sluice.stream import list_datasets as run

    asyncio.run(run(streamer, as_json=as_json))


def bench(
    streamer: Annotated[
        str | None,
        typer.Option(help="Address, host:port, or several, separated by commas; by default where its settings put it."),
    ] = None,
    dataset: Annotated[str, typer.Option(help="Name as the streamer lists it.")] = "mnist",
    batch_size: Annotated[int, typer.Option(min=1, help="Samples in a batch.")] = 256,
    seconds: Annotated[float, typer.Option(help="Seconds of each of the five turns.")] = 2.0,
    transform: Annotated[str, typer.Option(help="Transform with its parameters; see docs/transforms.md.")] = "",
    as_json: JsonObject = False,
) -> None:
    """Read as fast as it goes: samples/s, MB/s and the share of time that the reader waited, medians of five turns."""
    from sluice.interruption import run_until_stopped
    from sluice.stream import BenchOptions
    from sluice.stream import bench as run

    # What the client says of broken streams is no part of the result.
    log.configure("warning")
    options = BenchOptions(
        streamer=streamer, dataset=dataset, batch_size=batch_size, seconds=seconds, transform=transform
    )
    if not asyncio.run(run_until_stopped(run(options, as_json=as_json))):
        raise KeyboardInterrupt

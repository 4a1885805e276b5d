"""Commands that run for as long as somebody needs them, and the demonstration of them all."""

import asyncio
from typing import Annotated

import typer

from gateway.settings import GatewaySettings
from rpc import log
from serving.settings import TritonSettings
from sluice.commands.progress import say
from sluice.options import with_options
from sluice.readiness import announce
from sluice.settings import UpSettings
from streamer.settings import StreamerSettings


@with_options(UpSettings)
def up(settings: UpSettings) -> None:
    """Start Triton, streamer and gateway; Ctrl-C stops all of it."""
    from sluice.interruption import run_until_stopped
    from sluice.line import run

    asyncio.run(run_until_stopped(run(settings, report=lambda line: print(line, flush=True))))


def demo(
    seed: Annotated[int, typer.Option(min=0, help="Seeds weights and the order of the samples.")] = 0,
    minutes: Annotated[
        float,
        typer.Option(min=0.1, help="Time to fill with whole epochs: at least 40,000 samples, at most 20 epochs."),
    ] = 3.0,
) -> None:
    """Train on the stream, serve, classify real digits; ends by itself. SLUICE_DATA=FOLDER takes MNIST from there."""
    from sluice.demo import run
    from sluice.interruption import run_until_stopped

    if not asyncio.run(run_until_stopped(run(seed=seed, minutes=minutes))):
        raise KeyboardInterrupt


@with_options(StreamerSettings)
def streamer(settings: StreamerSettings) -> None:
    """Stream training samples over gRPC."""
    from streamer import server
    from streamer.processes import workers

    log.configure(settings.log_level)
    serve = workers.serve if settings.num_workers > 1 else server.serve
    asyncio.run(serve(settings, on_ready=announce))


@with_options(GatewaySettings)
def gateway(settings: GatewaySettings) -> None:
    """Classify images over gRPC, in front of Triton."""
    from gateway import server, workers
    from rpc import loop

    log.configure(settings.log_level)
    if settings.num_workers > 1:
        # It serves nobody itself.
        asyncio.run(workers.serve(settings, on_ready=announce))
    else:
        loop.run(server.serve(settings, on_ready=announce))


@with_options(TritonSettings)
def triton(settings: TritonSettings) -> None:
    """Run a Triton Inference Server without a container; installs it on first use."""
    from serving.triton import serve
    from sluice.interruption import run_until_stopped

    log.configure()
    asyncio.run(run_until_stopped(serve(settings, on_ready=announce, report=say)))

"""Commands that ask what serves: about one image, about two, or as much as it can take."""

import asyncio
from pathlib import Path
from typing import Annotated, Literal

import typer

from gateway.settings import GatewaySettings
from rpc.address import joined
from rpc.settings import load
from sluice.access import Access
from sluice.options import GatewayAddress, JsonObject, with_access

# As in gateway.client, which takes as long to import as NumPy.
Similarity = Literal["unspecified", "embedding_cosine", "pixel_cosine", "ssim"]
ModelAsked = Annotated[str, typer.Option(help="Model name; the server's default when not given.")]


@with_access
def classify(
    *,
    files: Annotated[list[Path], typer.Argument(help="Images: PNG, JPEG, BMP, GIF, WebP, TIFF or PGM.")],
    server: GatewayAddress = None,
    model: ModelAsked = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a file.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Tell where the time of each call went at the gateway.")
    ] = False,
    access: Access,
) -> None:
    """Print class and probability for each file; exits 1 when one of them cannot be read."""
    from sluice.classify import run

    asking = run(
        files,
        server=server or _gateway_address(),
        model=model,
        as_json=as_json,
        verbose=verbose,
        tls=access.client_tls(is_own=server is None),
        api_key=access.api_key(),
    )
    raise typer.Exit(1 if asyncio.run(asking) else 0)


@with_access
def compare(
    *,
    first: Annotated[Path, typer.Argument(help="An image: PNG, JPEG, BMP, GIF, WebP, TIFF or PGM.")],
    second: Annotated[Path, typer.Argument(help="Another one; the order does not matter.")],
    method: Annotated[
        Similarity, typer.Option(help="How; by default the cosine of the model's embeddings.")
    ] = "unspecified",
    server: GatewayAddress = None,
    model: ModelAsked = "",
    as_json: JsonObject = False,
    access: Access,
) -> None:
    """Print how alike two images are: -1..1, and 1 for equal ones."""
    from sluice.compare import run

    asking = run(
        first,
        second,
        server=server or _gateway_address(),
        model=model,
        method=method,
        as_json=as_json,
        tls=access.client_tls(is_own=server is None),
        api_key=access.api_key(),
    )
    asyncio.run(asking)


@with_access
def loadtest(
    *,
    target: Annotated[
        str,
        typer.Option(
            metavar="[classify|classify-batch|compare|triton]",
            help="What to ask: an RPC of the gateway, or ModelInfer straight at Triton.",
        ),
    ] = "classify",
    rate: Annotated[
        float | None, typer.Option(help="Open loop: calls a second on a fixed schedule, however slow the answers are.")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(help="Closed loop: callers that each wait for an answer before the next call [8].")
    ] = None,
    duration: Annotated[float, typer.Option(help="Seconds to measure.")] = 10.0,
    warm_up: Annotated[float, typer.Option("--warm-up", help="Seconds before that, not counted.")] = 2.0,
    timeout: Annotated[float, typer.Option(help="Seconds that a call may take.")] = 5.0,
    max_outstanding: Annotated[
        int | None,
        typer.Option(help="Open loop: calls that may wait for an answer; one more counts as NOT_SENT [10000]."),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images a call of classify-batch [64] or triton [1].")] = None,
    image_format: Annotated[
        str | None, typer.Option("--format", metavar="[png|raw]", help="How images are sent to the gateway [png].")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model name; the server's default when not given.")] = None,
    server: GatewayAddress = None,
    triton: Annotated[
        str | None, typer.Option(help="Address of Triton's gRPC, host:port; by default where its settings put it.")
    ] = None,
    triton_metrics: Annotated[
        str | None, typer.Option(help="Address of Triton's metrics, host:port; by default where its settings put it.")
    ] = None,
    streamer: Annotated[
        str | None, typer.Option(help="Streamer whose test images are sent; by default where its settings put it.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of images to send instead, one subfolder for each class.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seeds the order of the images and the choice of pairs.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="File for the result as JSON, with ghz's field names; - prints it.")
    ] = None,
    access: Access,
) -> None:
    """Measure latency, throughput and accuracy under load; Ctrl-C ends it early with what it has."""
    from sluice.loadtest import LoadTestOptions, run

    options = LoadTestOptions(
        target=target,
        rate=rate,
        concurrency=concurrency,
        max_outstanding=max_outstanding,
        duration=duration,
        warm_up=warm_up,
        timeout=timeout,
        batch_size=batch_size,
        image_format=image_format,
        model=model,
        server=server,
        triton=triton,
        triton_metrics=triton_metrics,
        streamer=streamer,
        images=images,
        seed=seed,
        json=json_file,
        access=access,
    )
    raise typer.Exit(run(options))


def _gateway_address() -> str:
    place = load(GatewaySettings)
    return joined(place.host, place.port)

"""Commands that bring a network in front of its users, and take it back."""

from pathlib import Path
from typing import Annotated

import typer

from sluice.access import Access
from sluice.commands.progress import say
from sluice.options import GatewayAddress, LoadingTriton, Precision, StreamerAddress, TellsTriton, with_access

ModelName = Annotated[str | None, typer.Option(help="Name of the model; by default the run's.")]


def export(
    run: Annotated[Path, typer.Argument(help="A run or one of its checkpoints.")],
    out: Annotated[Path, typer.Option(help="New folder for model, card, golden answers and manifest.")],
    precision: Annotated[
        Precision, typer.Option(help="Arithmetic; auto: the fastest here that keeps the accuracy.")
    ] = "auto",
    streamer: StreamerAddress = None,
    name: ModelName = None,
) -> None:
    """Write a run's network as a version to publish later, here or elsewhere; see docs/publishing.md."""
    from sluice.release import ExportOptions
    from sluice.release import export as run_export

    options = ExportOptions(run=run, out=out, precision=precision, streamer=streamer, name=name)
    print(run_export(options, report=say))


def publish(
    source: Annotated[Path, typer.Argument(help="A run, a checkpoint, or a folder that `sluice export` wrote.")],
    name: ModelName = None,
    force: Annotated[bool, typer.Option("--force", help="Also where it is worse than the current version.")] = False,
    precision: Annotated[
        Precision, typer.Option(help="Of a run; auto: the fastest here that keeps the accuracy.")
    ] = "auto",
    streamer: StreamerAddress = None,
    triton: LoadingTriton = None,
    load: TellsTriton = True,
) -> None:
    """Publish a network as the next version, unless it is worse than the current one; Triton loads it where it runs."""
    from sluice.release import PublishOptions
    from sluice.release import publish as run_publish

    options = PublishOptions(
        source=source, name=name, force=force, precision=precision, streamer=streamer, triton=triton, load=load
    )
    print(run_publish(options, report=say))


def rollback(
    model: Annotated[str, typer.Argument(help="Name of the model.")],
    to: Annotated[int | None, typer.Option(min=1, help="Version; by default the one below the newest.")] = None,
    triton: Annotated[
        str | None,
        typer.Option(help="Triton to load the version, host:port; by default one that answers here."),
    ] = None,
    load: Annotated[bool, typer.Option(help="Whether to tell a Triton.")] = True,
) -> None:
    """Let an earlier version answer again; those above it are kept out of sight, and --to brings them back."""
    from sluice.release import RollbackOptions
    from sluice.release import rollback as run_rollback

    print(run_rollback(RollbackOptions(model=model, to=to, triton=triton, load=load), report=say))


@with_access
def route(
    *,
    model: Annotated[str | None, typer.Argument(help="Name of the model; without it all are shown.")] = None,
    default: Annotated[int | None, typer.Option(min=1, help="Version that answers callers who name none.")] = None,
    canary: Annotated[
        list[str] | None, typer.Option(help="Version that gets a share of them, such as 4=10%; may be repeated.")
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Let the highest version answer that is ready.")] = False,
    server: GatewayAddress = None,
    triton: Annotated[
        str | None,
        typer.Option(help="Triton to load versions it does not have yet, host:port; by default one that answers here."),
    ] = None,
    access: Access,
) -> None:
    """Show or set which version of a model answers, and which canaries get a share; see docs/publishing.md."""
    from sluice.route import RouteOptions, run

    options = RouteOptions(
        model=model, default=default, canary=canary or (), clear=clear, server=server, triton=triton, access=access
    )
    for line in run(options, report=say):
        print(line)

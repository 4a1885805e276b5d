"""Commands for searches of the best settings."""

from pathlib import Path
from typing import Annotated

import typer

from rpc import log
from sluice.commands.progress import say

RayCluster = Annotated[
    str | None, typer.Option(help="Ray cluster, HOST:PORT or auto; by default Ray on this machine alone.")
]
SearchName = Annotated[str, typer.Argument(help="Of a search, running or not.")]


def search(
    context: typer.Context,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="YAML file of the search; options are laid over it.")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Name as the streamer lists it [mnist].")] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a data set, streamed for this search; FOLDER:center frames digits, else all of an image is "
            "scaled."
        ),
    ] = None,
    streamer: Annotated[
        str | None,
        typer.Option(help="Address of a running streamer; by default one that has the data, else one of its own."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the search and of its model; by default the data set's.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Named run that every trial starts from [mnist].")] = None,
    trials: Annotated[int | None, typer.Option(help="Combinations to try [20].")] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Epochs of a trial that is not stopped early [8; more for few images].")
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="End after this time with what there is.")] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD=LOW..HIGH[,log][,whole] or FIELD=A|B|C",
            help="What to vary, once for each; by default learning rate, decay, smoothing, dropout, augmentation.",
        ),
    ] = None,
    fixed: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="What every trial has, once for each.")
    ] = None,
    goal: Annotated[
        str | None, typer.Option(metavar="[validation_accuracy|validation_loss]", help="What is to be best.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seeds what is tried, weights and the order of samples.")] = None,
    cpus: Annotated[int | None, typer.Option(help="Cores of a trial [4, or all].")] = None,
    gpus: Annotated[
        float | None, typer.Option(help="GPUs of a trial, or a part of one [1, where there is one].")
    ] = None,
    concurrency: Annotated[int | None, typer.Option(help="Most trials at once [as many as fit].")] = None,
    address: RayCluster = None,
) -> None:
    """Search for the best settings of a run, on this machine or a Ray cluster; see docs/tune-your-own-data.md."""
    if context.invoked_subcommand is not None:
        return
    from sluice.tune import TuneOptions, begin

    log.configure("warning")
    options = TuneOptions(
        file=file,
        name=name,
        dataset=dataset,
        data=data,
        streamer=streamer,
        recipe=recipe,
        goal=goal,
        trials=trials,
        epochs=epochs,
        minutes=minutes,
        seed=seed,
        vary=vary or (),
        fixed=fixed or (),
        cpus=cpus,
        gpus=gpus,
        concurrency=concurrency,
    )
    if not begin(options, cluster=address, report=say):
        raise KeyboardInterrupt


def resume(
    name: Annotated[str, typer.Argument(help="Of a search that was stopped or killed.")],
    address: RayCluster = None,
) -> None:
    """Go on with a search; no finished trial is done again, and failed ones get another chance."""
    from sluice.tune import resume as run

    log.configure("warning")
    if not run(name, cluster=address, report=say):
        raise KeyboardInterrupt


def show(
    name: SearchName,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array, and draw nothing.")] = False,
) -> None:
    """Print all trials of a search, the best first, and write its CSV and pictures."""
    from sluice.tune import show as run

    run(name, as_json=as_json)


def best(name: SearchName) -> None:
    """Print the command that trains a search's winner, measures it on the test split, and publishes it."""
    from sluice.tune import best_command

    print(best_command(name))

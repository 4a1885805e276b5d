"""Commands that train a network and measure one."""

import json
from pathlib import Path
from typing import Annotated

import typer

from rpc import log
from sluice.commands.progress import say
from sluice.options import LoadingTriton, Precision, StreamerAddress, TellsTriton


def train(
    recipe: Annotated[str | None, typer.Option(help="Named run to start from: mnist or smoke [mnist].")] = None,
    streamer: StreamerAddress = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a data set, streamed for this run; FOLDER:center frames digits, else all of an image is "
            "scaled. Data set and model are called as the folder is."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seeds weights and the order of the samples.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Exactly this many epochs, however long they take.")] = None,
    minutes: Annotated[
        float | None,
        typer.Option(help="Time to fill with whole epochs: at least one, at most the recipe's."),
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="A field of the config, as in optim.lr=0.05; repeatable."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with a recipe and fields, as --print-config writes it.")
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the whole config as YAML, with each field's meaning, and end.")
    ] = False,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="[auto|FOLDER]",
            help="Go on with the run in FOLDER; auto: with the newest unfinished one of this config, else begin.",
        ),
    ] = None,
    triton: LoadingTriton = None,
    load: TellsTriton = True,
    ledger: Annotated[
        Path | None, typer.Option(help="File that proves what was trained on, for `sluice stream verify`.")
    ] = None,
    precision: Annotated[
        Precision,
        typer.Option(help="Of the published version; auto: the fastest on this machine that keeps the accuracy."),
    ] = "float32",
    force: Annotated[
        bool, typer.Option("--force", help="Publish also what is worse than the current version.")
    ] = False,
    mlflow: Annotated[
        str | None,
        typer.Option(
            metavar="[local|URI]",
            help="Keep the run in MLflow, too: in mlflow.db here, or at http://HOST:PORT or the like.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """
    Train on the stream and publish the next version; Triton loads it where it runs.

    Ctrl-C once keeps the run's state after the step, for --resume; twice stops at once.
    """
    from sluice.interruption import unwind_on_sigterm
    from sluice.training import TrainOptions, configure, run
    from training.errors import StoppedError
    from training.overrides import as_yaml

    log.configure("warning")  # to standard error, as the result is on the other
    unwind_on_sigterm()
    options = TrainOptions(
        recipe=recipe,
        streamer=streamer,
        seed=seed,
        epochs=epochs,
        minutes=minutes,
        lr=lr,
        triton=triton,
        data=data,
        load=load,
        ledger=ledger,
        assignments=tuple(assignments or ()),
        config=config,
        resume=resume,
        precision=precision,
        force=force,
        mlflow=mlflow,
    )
    if print_config:
        print(as_yaml(configure(options)), end="")
        return
    try:
        result = run(options, report=say)
    except StoppedError as stopped:
        say(str(stopped))
        raise typer.Exit(128 + stopped.signal) from stopped
    if result is not None:  # else another rank tells
        print(json.dumps(result.as_json()) if as_json else result.as_text())


def evaluate(
    target: Annotated[
        Path | None,
        typer.Argument(help="A run, a checkpoint, or a version such as model_repository/mnist/1; else the newest run."),
    ] = None,
    streamer: StreamerAddress = None,
    dataset: Annotated[
        str | None, typer.Option(help="Name as the streamer lists it; else what it was trained on.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split to measure on, or a slice of one such as train[90%:].")] = "test",
    validation: Annotated[
        str | None, typer.Option(help="Split to fit the temperature on; by default the run's own, '' for none.")
    ] = None,
    corruptions: Annotated[bool, typer.Option("--corruptions", help="Measure on spoilt images, too.")] = False,
    samples: Annotated[int, typer.Option(min=1, help="Images that each corruption is tried on.")] = 1000,
    ood: Annotated[
        str, typer.Option(help="Other data sets to tell apart, separated by commas: fashion-mnist, noise, inverted.")
    ] = "",
    seed: Annotated[int, typer.Option(min=0, help="Seeds the corruptions.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results; by default the run's, or one in runs for a version.")
    ] = None,
    report: Annotated[bool, typer.Option(help="Whether to write report.html and its figures.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print what is in evaluation.json.")] = False,
) -> None:
    """Measure accuracy, calibration, robustness and the detection of unknown images; see docs/evaluation.md."""
    from sluice.evaluate import EvaluateOptions, run
    from sluice.interruption import unwind_on_sigterm

    log.configure("warning")
    unwind_on_sigterm()
    options = EvaluateOptions(
        target=target,
        streamer=streamer,
        dataset=dataset,
        split=split,
        validation=validation,
        corruptions=corruptions,
        samples=samples,
        ood=ood,
        seed=seed,
        out=out,
        report=report,
    )
    outcome = run(options, say=say)
    print(outcome.record.model_dump_json(by_alias=True) if as_json else outcome.as_text())

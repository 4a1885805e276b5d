"""The commands of ``sluice``. Each imports what it needs when it runs: ``--help`` does not wait for torch."""

import asyncio
import json
import sys
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated, Literal

import typer

from gateway.settings import GatewaySettings
from rpc import log
from rpc.address import joined
from rpc.settings import load
from serving.settings import TritonSettings
from sluice.options import with_options
from sluice.readiness import announce
from sluice.settings import UpSettings
from streamer.settings import StreamerSettings

app = typer.Typer(
    help="Train image classifiers from a network stream of samples and serve them over gRPC.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its boxes cut the names of settings off
)
data = typer.Typer(help="Data sets on this machine.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data, name="data")
stream = typer.Typer(
    help="A running streamer, and proof of what was read from it.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(stream, name="stream")
tune = typer.Typer(
    help="Search for the best settings of a run; see docs/tune-your-own-data.md.",
    invoke_without_command=True,
    rich_markup_mode=None,
)
app.add_typer(tune, name="tune")


# As in gateway.client, which takes as long to import as NumPy.
Similarity = Literal["unspecified", "embedding_cosine", "pixel_cosine", "ssim"]
# As in training.release.precision, which imports torch.
Precision = Literal["auto", "float32", "bfloat16", "float16", "int8"]


def _gateway_address() -> str:
    place = load(GatewaySettings)
    return joined(place.host, place.port)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@app.callback(invoke_without_command=True)
def _version(
    show: Annotated[bool, typer.Option("--version", help="Print the version and end.")] = False,
) -> None:
    if show:
        print(f"sluice {installed_version('sluice')}")
        raise typer.Exit


@app.command()
@with_options(UpSettings)
def up(settings: UpSettings) -> None:
    """Start Triton, streamer and gateway; Ctrl-C stops all of it."""
    from sluice.interruption import run_until_stopped
    from sluice.line import run

    asyncio.run(run_until_stopped(run(settings, report=lambda line: print(line, flush=True))))


@app.command()
def demo(
    seed: Annotated[int, typer.Option(min=0, help="Seeds weights and the order of the samples.")] = 0,
    minutes: Annotated[
        float,
        typer.Option(min=0.1, help="Time to fill with whole epochs: at least 40,000 samples, at most 25 epochs."),
    ] = 3.0,
) -> None:
    """Train on the stream, serve, classify real digits; ends by itself. SLUICE_DATA=FOLDER takes MNIST from there."""
    from sluice.demo import run
    from sluice.interruption import run_until_stopped

    if not asyncio.run(run_until_stopped(run(seed=seed, minutes=minutes))):
        raise KeyboardInterrupt


@app.command()
@with_options(StreamerSettings)
def streamer(settings: StreamerSettings) -> None:
    """Stream training samples over gRPC."""
    from streamer import server
    from streamer.processes import workers

    log.configure(settings.log_level)
    serve = workers.serve if settings.num_workers > 1 else server.serve
    asyncio.run(serve(settings, on_ready=announce))


@app.command()
@with_options(GatewaySettings)
def gateway(settings: GatewaySettings) -> None:
    """Classify images over gRPC, in front of Triton."""
    from gateway.server import serve

    log.configure(settings.log_level)
    asyncio.run(serve(settings, on_ready=announce))


@app.command()
@with_options(TritonSettings)
def triton(settings: TritonSettings) -> None:
    """Run a Triton Inference Server without a container; installs it on first use."""
    from serving.triton import serve
    from sluice.interruption import run_until_stopped

    log.configure()
    asyncio.run(run_until_stopped(serve(settings, on_ready=announce, report=_say)))


@data.command()
def fetch(
    name: Annotated[str, typer.Argument(help="Name of the data set: mnist or fashion-mnist.")] = "mnist",
    folder: Annotated[Path | None, typer.Option("--data", help="Folder of IDX files to check instead.")] = None,
) -> None:
    """Get a data set into the local cache and say what it holds."""
    from streamer.sources.datasets import find
    from streamer.sources.memory import load as read

    settings = load(StreamerSettings, data=folder)

    async def run() -> None:
        files = await find(name, data=settings.data, cache=settings.cache, report=_say, refresh=True)
        dataset = await read(files)
        for split in dataset.splits.values():
            print(f"{name} {split.name}: {split.num_samples:,} images in {files.folder}")

    asyncio.run(run())


@data.command()
def pack(
    source: Annotated[
        str, typer.Argument(help="Name of a known data set, or its folder (IDX files, images by class), or s3://...")
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
    if not asyncio.run(run_until_stopped(run(options, report=_say))):
        raise KeyboardInterrupt


@stream.command()
def verify(
    ledgers: Annotated[list[Path], typer.Argument(metavar="LEDGER...", help="Of all ranks and restarts of one run.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print lost, repeated, unexpected and recovered samples; exits 1 when any but the last is not 0."""
    from sluice.stream import check

    raise typer.Exit(0 if check(ledgers, as_json=as_json) else 1)


@stream.command("ls")
def list_datasets(
    streamer: Annotated[
        str | None, typer.Option(help="Address of the streamer, host:port; by default where its settings put it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False,
) -> None:
    """List what a running streamer serves: data set, split, images, their shape, classes, start of the fingerprint."""
    from sluice.stream import list_datasets as run

    asyncio.run(run(streamer, as_json=as_json))


@stream.command()
def bench(
    streamer: Annotated[
        str | None,
        typer.Option(help="Address, host:port, or several, separated by commas; by default where its settings put it."),
    ] = None,
    dataset: Annotated[str, typer.Option(help="Name as the streamer lists it.")] = "mnist",
    batch_size: Annotated[int, typer.Option(min=1, help="Samples in a batch.")] = 256,
    seconds: Annotated[float, typer.Option(help="Seconds of each of the five turns.")] = 2.0,
    transform: Annotated[str, typer.Option(help="Transform with its parameters; see docs/transforms.md.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
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


@app.command()
def train(
    recipe: Annotated[str | None, typer.Option(help="Named run to start from: mnist or smoke [mnist].")] = None,
    streamer: Annotated[
        str | None, typer.Option(help="Address of the streamer, host:port; by default where its settings put it.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seeds weights and the order of the samples.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Exactly this many epochs, however long they take.")] = None,
    minutes: Annotated[
        float | None,
        typer.Option(help="Time to fill with whole epochs: at least 40,000 samples, at most 25 epochs [3]."),
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="A field of the config, as in optim.lr=0.001; repeatable."),
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
    triton: Annotated[
        str | None,
        typer.Option(help="Triton to load the new version, host:port; by default one that answers here."),
    ] = None,
    load: Annotated[bool, typer.Option(help="Whether to have a Triton load the new version.")] = True,
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
        load=load,
        ledger=ledger,
        assignments=tuple(assignments or ()),
        config=config,
        resume=resume,
        precision=precision,
        force=force,
    )
    if print_config:
        print(as_yaml(configure(options)), end="")
        return
    try:
        result = run(options, report=_say)
    except StoppedError as stopped:
        _say(str(stopped))
        raise typer.Exit(128 + stopped.signal) from stopped
    print(json.dumps(result.as_json()) if as_json else result.as_text())


@app.command()
def evaluate(
    target: Annotated[
        Path | None,
        typer.Argument(help="A run, a checkpoint, or a version such as model_repository/mnist/1; else the newest run."),
    ] = None,
    streamer: Annotated[
        str | None, typer.Option(help="Address of the streamer, host:port; by default where its settings put it.")
    ] = None,
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
    outcome = run(options, say=_say)
    print(outcome.record.model_dump_json(by_alias=True) if as_json else outcome.as_text())


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run or one of its checkpoints.")],
    out: Annotated[Path, typer.Option(help="New folder for model, card, golden answers and manifest.")],
    precision: Annotated[
        Precision, typer.Option(help="Arithmetic; auto: the fastest here that keeps the accuracy.")
    ] = "auto",
    streamer: Annotated[
        str | None, typer.Option(help="Address of the streamer, host:port; by default where its settings put it.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model; by default the run's.")] = None,
) -> None:
    """Write a run's network as a version to publish later, here or elsewhere; see docs/publishing.md."""
    from sluice.release import ExportOptions
    from sluice.release import export as run_export

    options = ExportOptions(run=run, out=out, precision=precision, streamer=streamer, name=name)
    print(run_export(options, report=_say))


@app.command()
def publish(
    source: Annotated[Path, typer.Argument(help="A run, a checkpoint, or a folder that `sluice export` wrote.")],
    name: Annotated[str | None, typer.Option(help="Name of the model; by default the run's.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Also where it is worse than the current version.")] = False,
    precision: Annotated[
        Precision, typer.Option(help="Of a run; auto: the fastest here that keeps the accuracy.")
    ] = "auto",
    streamer: Annotated[
        str | None, typer.Option(help="Address of the streamer, host:port; by default where its settings put it.")
    ] = None,
    triton: Annotated[
        str | None,
        typer.Option(help="Triton to load the new version, host:port; by default one that answers here."),
    ] = None,
    load: Annotated[bool, typer.Option(help="Whether to have a Triton load the new version.")] = True,
) -> None:
    """Publish a network as the next version, unless it is worse than the current one; Triton loads it where it runs."""
    from sluice.release import PublishOptions
    from sluice.release import publish as run_publish

    options = PublishOptions(
        source=source, name=name, force=force, precision=precision, streamer=streamer, triton=triton, load=load
    )
    print(run_publish(options, report=_say))


@app.command()
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

    print(run_rollback(RollbackOptions(model=model, to=to, triton=triton, load=load), report=_say))


@tune.callback()
def tune_search(
    context: typer.Context,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="YAML file of the search; options are laid over it.")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Name as the streamer lists it [mnist].")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of a data set, which is then streamed for this search.")
    ] = None,
    streamer: Annotated[
        str | None,
        typer.Option(help="Address of a running streamer; by default one that has the data, else one of its own."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the search and of its model; by default the data set's.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Named run that every trial starts from [mnist].")] = None,
    trials: Annotated[int | None, typer.Option(help="Combinations to try [20].")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of a trial that is not stopped early [8].")] = None,
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
    address: Annotated[
        str | None, typer.Option(help="Ray cluster, HOST:PORT or auto; by default Ray on this machine alone.")
    ] = None,
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
    if not begin(options, cluster=address, report=_say):
        raise KeyboardInterrupt


@tune.command()
def resume(
    name: Annotated[str, typer.Argument(help="Of a search that was stopped or killed.")],
    address: Annotated[
        str | None, typer.Option(help="Ray cluster, HOST:PORT or auto; by default Ray on this machine alone.")
    ] = None,
) -> None:
    """Go on with a search; no finished trial is done again, and failed ones get another chance."""
    from sluice.tune import resume as run

    log.configure("warning")
    if not run(name, cluster=address, report=_say):
        raise KeyboardInterrupt


@tune.command()
def show(
    name: Annotated[str, typer.Argument(help="Of a search, running or not.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array, and draw nothing.")] = False,
) -> None:
    """Print all trials of a search, the best first, and write its CSV and pictures."""
    from sluice.tune import show as run

    run(name, as_json=as_json)


@tune.command("best")
def best_of(name: Annotated[str, typer.Argument(help="Of a search, running or not.")]) -> None:
    """Print the command that trains a search's winner on all training images and publishes it."""
    from sluice.tune import best_command

    print(best_command(name))


@app.command()
def classify(
    files: Annotated[list[Path], typer.Argument(help="Images: PNG, JPEG, BMP, GIF, WebP, TIFF or PGM.")],
    server: Annotated[
        str | None, typer.Option(help="Address of the gateway, host:port; by default where its settings put it.")
    ] = None,
    model: Annotated[str, typer.Option(help="Model name; the server's default when not given.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a file.")] = False,
) -> None:
    """Print digit and probability for each file; exits 1 when one of them cannot be read."""
    from sluice.classify import run

    failed = asyncio.run(run(files, server=server or _gateway_address(), model=model, as_json=as_json))
    raise typer.Exit(1 if failed else 0)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="An image: PNG, JPEG, BMP, GIF, WebP, TIFF or PGM.")],
    second: Annotated[Path, typer.Argument(help="Another one; the order does not matter.")],
    method: Annotated[
        Similarity, typer.Option(help="How; by default the cosine of the model's embeddings.")
    ] = "unspecified",
    server: Annotated[
        str | None, typer.Option(help="Address of the gateway, host:port; by default where its settings put it.")
    ] = None,
    model: Annotated[str, typer.Option(help="Model name; the server's default when not given.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print how alike two images are: -1..1, and 1 for equal ones."""
    from sluice.compare import run

    asyncio.run(run(first, second, server=server or _gateway_address(), model=model, method=method, as_json=as_json))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def health(context: typer.Context) -> None:
    """Ask gateway, streamer or Triton whether it is well: one line, and exit status 0 or 1."""
    from sluice.health import main

    raise typer.Exit(main(context.args))


@app.command()
def loadtest(
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
    server: Annotated[
        str | None, typer.Option(help="Address of the gateway, host:port; by default where its settings put it.")
    ] = None,
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
    )
    raise typer.Exit(run(options))


@app.command()
def doctor() -> None:
    """Say what is missing here and what to do about it; exits 1 when something is."""
    from sluice.doctor import examine, render

    findings = examine()
    render(findings)
    raise typer.Exit(0 if all(finding.ok for finding in findings) else 1)

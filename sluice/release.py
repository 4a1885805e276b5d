"""``sluice export``, ``publish`` and ``rollback``: from a run to a version that answers, and back to an earlier one."""

import asyncio
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rpc.address import joined
from rpc.settings import SettingsError, load
from serving import soundness
from serving.control import TritonControl
from serving.errors import ServingError
from serving.settings import TritonSettings
from streamer.settings import StreamerSettings
from training import checkpoint
from training.devices import device_of_choice
from training.errors import ExportError, TrainingError
from training.model import Network, fold
from training.reading import describe
from training.release import candidate, manifest, versions
from training.release.export import Export
from training.release.golden import SERVED_FLOAT32_TOLERANCE, TOLERANCES, Golden
from training.release.precision import Choice
from training.release.publish import Card, Draft, publish_draft, publish_export, write

_LOOK_SECONDS = 1.0
_LOAD_SECONDS = 120.0
# Below any max_batch_size that serves well.
_GOLDEN_BATCH = 8

Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions:
    """What ``sluice export`` was told."""

    run: Path
    """A run or a checkpoint."""
    out: Path
    precision: Choice = "auto"
    streamer: str | None = None
    """``host:port``; None: where the settings put it."""
    name: str | None = None
    """Of the model; None: as in the run's config."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishOptions:
    """What ``sluice publish`` was told."""

    source: Path
    """A run, a checkpoint, or a folder that ``sluice export`` wrote."""
    name: str | None = None
    force: bool = False
    """Also where it is worse than the current version."""
    precision: Choice = "auto"
    """Of a run; what is exported has its own."""
    streamer: str | None = None
    triton: str | None = None
    """``host:port`` of the Triton that has to load it; None: one that answers where the settings put it."""
    load: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class RollbackOptions:
    """What ``sluice rollback`` was told."""

    model: str
    to: int | None = None
    """None: the version below the newest."""
    triton: str | None = None
    load: bool = True


def export(options: ExportOptions, *, report: Report) -> str:
    """
    Write a run's network as a version without a number, and return what was written.

    Args:
        options: From the command line.
        report: Told what is going on, in lines.

    Raises:
        SettingsError: The folder holds something already.
        TrainingError: There is no such run, or the precision is not to be had.
        streamer.errors.StreamerError: The streamer cannot be reached or does not have the data.
    """
    if options.out.exists() and any(options.out.iterdir()):
        raise SettingsError(f"--out {options.out}: holds files already; name a new folder")
    network, draft = _draft(options.run, options.streamer, options.precision, options.name, report)
    card, exported = write(network, options.out, draft)
    explain(exported, report)
    return f"{options.out}: {card.model} in {card.precision} for device {card.device}; `sluice publish {options.out}`"


def publish(options: PublishOptions, *, report: Report) -> str:
    """
    Publish a run or an export as the next version, have Triton load it where one runs, and return what came of it.

    A version that Triton does not load, or that answers differently there, is withdrawn again.

    Args:
        options: From the command line.
        report: Told what is going on, in lines.

    Raises:
        PromotionError: It is worse than the current version.
        TrainingError: It is damaged, made for another device, or cannot be written.
        ServingError: Triton refused it, or one that was named does not answer.
        streamer.errors.StreamerError: The streamer cannot be reached or does not have the data.
    """
    repository = load(TritonSettings).model_repository
    if (options.source / manifest.MODEL).exists():
        card = publish_export(options.source, repository, name=options.name, force=options.force)
    else:
        network, draft = _draft(options.source, options.streamer, options.precision, options.name, report)
        card, exported = publish_draft(network, repository, draft, force=options.force)
        explain(exported, report)
    report(f"published {repository / card.model / str(card.version)}")
    address = options.load and asyncio.run(deploy(repository, card, options.triton, report))
    tell_route(repository / card.model, card.version, report, is_loaded=bool(address))
    loaded = f"loaded by Triton at {address}" if address else "`sluice up` serves it"
    accuracy = card.metrics.get("accuracy")
    measured = "" if accuracy is None else f", {accuracy:.2%} of {card.metrics.get('num_samples', 0):.0f} images right"
    return f"{card.model} version {card.version}: {card.precision}{measured}; {loaded}"


def rollback(options: RollbackOptions, *, report: Report) -> str:
    """
    Let an earlier version answer again, and return what came of it; requests in flight get their answers.

    Args:
        options: From the command line.
        report: Told what is going on, in lines.

    Raises:
        PublishError: There is no such version, it is damaged, or callers are routed to one that would be withdrawn.
        ServingError: Triton did not load it, or one that was named does not answer; everything is as before.
    """
    repository = load(TritonSettings).model_repository
    before = versions.published(repository / options.model)
    moved = versions.roll_back(repository / options.model, options.to)
    address = options.load and asyncio.run(_follow(repository, moved, options.triton, report))
    gone = ", ".join(map(str, moved.withdrawn)) or "none"
    answering = f"answers, from Triton at {address}" if address else "is the newest; `sluice up` serves it"
    routed = versions.routed(repository / options.model)
    if routed and routed[0] != moved.version:
        answering = f"is the newest; callers go to {routed[0]}, as {options.model} is routed"
    undo = f"; `sluice rollback {options.model} --to {before[-1]}` undoes this" if before else ""
    return f"{options.model} version {moved.version} {answering}; withdrawn: {gone}{undo}"


async def reproduce(control: TritonControl, folder: Path, card: Card) -> None:
    """
    See that Triton gives a version's golden answers; one from before there were any passes.

    Args:
        control: Connected to the Triton.
        folder: Of the version.
        card: Of the version.

    Raises:
        ExportError: It answers differently; says in what.
        ControlError: It does not answer.
    """
    if not (folder / manifest.GOLDEN).exists():
        return
    golden = Golden.load(folder / manifest.GOLDEN)
    answers = [
        await control.infer(card.model, golden.images[start : start + _GOLDEN_BATCH], card.version)
        for start in range(0, len(golden.images), _GOLDEN_BATCH)
    ]
    probabilities, embeddings = (np.concatenate(column) for column in zip(*answers, strict=True))
    tolerance = SERVED_FLOAT32_TOLERANCE if card.precision == "float32" else TOLERANCES[card.precision]
    if problem := golden.differences(probabilities, embeddings, tolerance):
        raise ExportError(f"{card.model} version {card.version} in Triton: {problem}")


async def load_also(
    repository: Path, model: str, wanted: Collection[int], triton: str | None, report: Report
) -> str | None:
    """
    Have Triton load versions of a model beside those it has anyway, and return its address; None where none runs.

    Args:
        repository: Of the models.
        model: Name in there.
        wanted: The versions. Nothing is done where all of them are ready.
        triton: ``host:port`` of one that has to be there; None: one that answers where the settings put it, if any.
        report: Told which damaged versions were passed over, in lines.

    Raises:
        ServingError: The one that was named does not answer, or does not load one of them; the others go on running.
    """
    async with TritonControl(_address(triton)) as control:
        if not await _is_there(control, must=triton is not None):
            return None
        if not set(wanted) <= set(await control.versions(model)):
            await _load(control, repository, model, report, also=wanted)
            if absent := set(wanted).difference(await control.versions(model)):
                missing = ", ".join(map(str, sorted(absent)))
                raise ServingError(f"{model} version {missing}: not loaded by Triton at {_address(triton)}")
    return _address(triton)


async def deploy(repository: Path, card: Card, triton: str | None, report: Report) -> str | None:
    """
    Have Triton load a new version, see that it answers as it should, and return the address; else withdraw it.

    Args:
        repository: Of the models.
        card: Of the version.
        triton: ``host:port`` of one that has to be there; None: one that answers where the settings put it, if any.
        report: Told which damaged versions were passed over, in lines.

    Raises:
        ServingError: The one that was named does not answer, or the version is withdrawn.
    """
    model = repository / card.model
    async with TritonControl(_address(triton)) as control:
        if not await _is_there(control, must=triton is not None):
            return None
        try:
            await _load(control, repository, card.model, report)
            await reproduce(control, model / str(card.version), card)
        except (ServingError, TrainingError) as error:
            versions.withdraw(model, card.version)
            # What ran before goes on running; Triton may have lost more than this version.
            with suppress(ServingError):
                await _load(control, repository, card.model, report)
            raise ServingError(f"version {card.version} is withdrawn: {error}") from error
    return _address(triton)


def tell_route(model: Path, version: int, report: Report, *, is_loaded: bool) -> None:
    """Say where callers of a model, by its folder, are sent, unless it is to the version that was just published."""
    routed = versions.routed(model)
    if routed and routed[0] != version:
        done = "published and loaded" if is_loaded else "published"
        report(
            f"version {version} is {done}; {model.name} is routed to {routed[0]}: "
            f"`sluice route {model.name} --default {version}`"
        )


def explain(exported: Export, report: Report) -> None:
    """Say which precision was taken, and what it is worth."""
    for precision, rates in exported.rates.items():
        each = ", ".join(f"{rate:,.0f} images/s in batches of {size}" for size, rate in rates.items())
        report(f"{precision}: {each}{' (taken)' if precision == exported.precision else ''}")
    for reason in exported.passed_over.values():
        report(f"passed over: {reason}")
    if exported.accuracy_change is not None:
        report(f"accuracy against float32: {100 * exported.accuracy_change:+.3f} points")


async def _follow(repository: Path, moved: versions.Rollback, triton: str | None, report: Report) -> str | None:
    """Have Triton serve what is in sight now, or put everything back; return the address."""
    folder = moved.model / str(moved.version)
    async with TritonControl(_address(triton)) as control:
        try:
            if not await _is_there(control, must=triton is not None):
                return None
            await _load(control, repository, moved.model.name, report)
            if (folder / manifest.CARD).exists():
                await reproduce(control, folder, Card.read(folder))
        except BaseException:
            moved.undo()
            # Triton may have followed already.
            with suppress(ServingError):
                await _load(control, repository, moved.model.name, report)
            raise
    return _address(triton)


async def _load(
    control: TritonControl, repository: Path, model: str, report: Report, *, also: Collection[int] = ()
) -> None:
    found = await asyncio.to_thread(soundness.inspect, repository, model, also=also)
    for reason in found.damaged.values():
        report(f"passed over: {reason}")
    await soundness.load(control, repository, model, found)


async def _is_there(control: TritonControl, *, must: bool) -> bool:
    try:
        # Live, not ready: one version that does not load, or is being unloaded, makes the server unready.
        await control.wait_live(timeout_seconds=_LOAD_SECONDS if must else _LOOK_SECONDS)
    except ServingError:
        if must:
            raise
        return False
    return True


def _address(triton: str | None) -> str:
    settings = load(TritonSettings)
    return triton or joined(settings.host, settings.grpc_port)


def _draft(
    run: Path, streamer: str | None, precision: Choice, name: str | None, report: Report
) -> tuple[Network, Draft]:
    """Calibrate and measure what a run had learnt, on the splits of its config."""
    kept = checkpoint.load(run)
    place = load(StreamerSettings)
    address = streamer or joined(place.host, place.port)
    report(f"asking the streamer at {address}")
    config = kept.state.config.data.model_copy(update={"streamer": address})
    data = asyncio.run(describe(config))
    if data.train.fingerprint.hex() != kept.state.fingerprint:
        raise TrainingError(
            f"{run}: trained on other data than the {config.dataset} that the streamer at {address} serves now"
        )
    network = fold(kept.network).to(device_of_choice())
    draft, _ = candidate.draft(
        network, data, config, name=name or kept.state.config.name, source=run, precision=precision
    )
    return network, draft

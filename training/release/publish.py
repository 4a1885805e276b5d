"""A new version in the model repository: proven first, and then there as a whole or not at all."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from imaging.framing import Framing, Manner, Polarity
from training.devices import device_of_choice
from training.errors import ExportError, PromotionError, PublishError
from training.model import EMBEDDING_SIZE, IMAGE_SIZE, Network
from training.release import manifest
from training.release.export import Examples, Export, answers, export, load_served
from training.release.golden import TOLERANCES, Golden
from training.release.manifest import CARD, FILES, GOLDEN, MODEL
from training.release.precision import ANY_DEVICE, Choice, Precision, device_name
from training.release.promotion import Metrics, objections
from training.release.versions import next_version, published, sync

_NUM_CLASSES = re.compile(r'name: "probabilities__0"[^}]*dims: \[ *([0-9]+) *\]')


class DatasetCard(BaseModel):
    """The data a version was trained on."""

    name: str
    num_train: int
    fingerprint: str
    """Hex digest of the training split, as the streamer gives it."""


class Card(BaseModel):
    """What Triton cannot tell the gateway about a version; ``card.json`` beside its weights."""

    model_config = ConfigDict(frozen=True)

    # By its alias: pydantic's base class has a "schema" of its own.
    card_schema: int = Field(1, alias="schema")
    model: str
    version: int
    """0 for one that has no number yet."""
    created: str
    class_names: list[str]
    image_shape: tuple[int, int] = (IMAGE_SIZE, IMAGE_SIZE)
    polarity: Polarity = "auto"
    framing: Framing = "auto"
    device: str = ANY_DEVICE
    precision: Precision = "float32"
    digest: str
    """``sha256:`` and the hex digest of ``model.pt``."""
    metrics: dict[str, float]
    """Figures that a later version is compared by: :data:`training.release.promotion.Metrics`."""
    dataset: DatasetCard

    @classmethod
    def read(cls, folder: Path) -> Self:
        """
        Return the card of a version.

        Raises:
            PublishError: There is none, or it is none of ours.
        """
        try:
            return cls.model_validate_json((folder / CARD).read_bytes())
        except OSError as error:
            raise PublishError(f"{folder / CARD}: {error.strerror}") from error
        except ValidationError as error:
            problem = error.errors()[0]
            raise PublishError(f"{folder / CARD}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """What is exported, and what its card shall say."""

    name: str
    """Folder of the model in the repository."""
    class_names: list[str]
    """By label."""
    metrics: dict[str, float]
    """See :attr:`Card.metrics`."""
    dataset: DatasetCard
    """What it was trained on."""
    precision: Choice = "float32"
    """This and the next two: see :func:`training.release.export.export`."""
    temperature: float = 1.0
    examples: Examples | None = None
    manner: Manner = field(default_factory=Manner)
    """In which a gateway makes its images of files."""


def write(network: Network, folder: Path, draft: Draft, *, device: torch.device | None = None) -> tuple[Card, Export]:
    """
    Export ``network`` into ``folder`` with card and manifest, as a version without a number.

    Args:
        network: The trained network; not changed.
        folder: Made if missing.
        draft: What is exported, how, and what its card says.
        device: Where it will be served; by default the GPU where torch sees one, else the CPU.

    Raises:
        ExportError: As :func:`training.release.export.export`.
        PublishError: The folder cannot be written.
    """
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        exported = export(
            network,
            folder,
            precision=draft.precision,
            temperature=draft.temperature,
            examples=draft.examples,
            device=device,
        )
        metrics = dict(draft.metrics)
        if draft.temperature != 1.0:
            metrics["temperature"] = draft.temperature
        card = Card(
            model=draft.name,
            version=0,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            class_names=draft.class_names,
            polarity=draft.manner.polarity,
            framing=draft.manner.framing,
            device=exported.device,
            precision=exported.precision,
            digest=f"sha256:{manifest.sha256(folder / MODEL)}",
            metrics=metrics,
            dataset=draft.dataset,
        )
        _write_card(folder, card)
    return card, exported


def publish(
    network: Network,
    repository: Path,
    *,
    name: str,
    class_names: list[str],
    metrics: dict[str, float],
    dataset: DatasetCard,
    precision: Choice = "float32",
    temperature: float = 1.0,
    examples: Examples | None = None,
    force: bool = False,
) -> Card:
    """
    Export ``network`` as the next version of ``name``: :func:`publish_draft` of these fields of :class:`Draft`.

    Raises:
        ExportError, PromotionError, PublishError: As that.
    """
    draft = Draft(
        name=name,
        class_names=class_names,
        metrics=metrics,
        dataset=dataset,
        precision=precision,
        temperature=temperature,
        examples=examples,
    )
    card, _ = publish_draft(network, repository, draft, force=force)
    return card


def publish_draft(
    network: Network, repository: Path, draft: Draft, *, force: bool = False, device: torch.device | None = None
) -> tuple[Card, Export]:
    """
    Export ``network`` as the next version of its model; a reader sees the whole version or none of it.

    Loading it is Triton's business, and asking for that the caller's.

    Args:
        network: The trained network; not changed.
        repository: Triton's model repository; made if missing, ``config.pbtxt`` included.
        draft: What is exported, how, and what its card says.
        force: Publish also what is worse than the current version.
        device: As for :func:`write`.

    Raises:
        ExportError: The exported file does not answer like ``network``, or the precision is not to be had.
        PromotionError: It is worse than the current version.
        PublishError: The repository cannot be written.
    """
    with _staging(repository, draft.name, len(draft.class_names)) as staged:
        if not force:
            _require_no_worse(staged.parent, draft.metrics)
        card, exported = write(network, staged, draft, device=device)
        return _place(staged, card), exported


def publish_export(folder: Path, repository: Path, *, name: str | None = None, force: bool = False) -> Card:
    """
    Publish what :func:`write` wrote, here or elsewhere, as the next version; the folder stays as it is.

    Args:
        folder: With the four files of a version.
        repository: As for :func:`publish`.
        name: Of the model; by default as in its card.
        force: As for :func:`publish`.

    Raises:
        ManifestError: A file is not what was exported.
        ExportError: It does not give its golden answers on this machine.
        PublishError: It was made for another device, or the repository cannot be written.
        PromotionError: It is worse than the current version.
    """
    if not (folder / manifest.MANIFEST).is_file():
        raise PublishError(f"{folder}: no {manifest.MANIFEST} here; `sluice export` writes a folder that has one")
    manifest.verify(folder)
    card = Card.read(folder)
    require_alike(folder, card)
    card = card.model_copy(update={"model": name or card.model})
    with _staging(repository, card.model, len(card.class_names)) as staged:
        if not force:
            _require_no_worse(staged.parent, card.metrics)
        for file in FILES:
            shutil.copyfile(folder / file, staged / file)
        return _place(staged, card)


def require_alike(folder: Path, card: Card) -> None:
    """
    See that a version may be served on this machine, and gives its golden answers here.

    Raises:
        PublishError: It was made for another device.
        ExportError: It answers differently.
    """
    device = device_of_choice()
    if card.device not in (ANY_DEVICE, device_name(device)):
        raise PublishError(
            f"{folder}: made in {card.precision} for {card.device}, and this is {device_name(device)}: "
            "export it here, or with --precision float32, which runs anywhere"
        )
    # Float32 to the last digits is the CPU's; a GPU rounds on its way through the tensor cores.
    device = torch.device("cpu") if card.device == ANY_DEVICE else device
    golden = Golden.load(folder / GOLDEN)
    found = answers(load_served(folder / MODEL, device), golden.images, device)
    if problem := golden.differences(*found, TOLERANCES[card.precision]):
        raise ExportError(f"{folder / MODEL}: {problem}")


def prepare(repository: Path, name: str) -> Path:
    """
    Return the model's folder, made if missing; ask before a long run whether its result will have a place.

    Raises:
        PublishError: It cannot be written.
    """
    model = repository / name
    try:
        model.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PublishError(f"{model}: cannot write: {error.strerror} (SLUICE_MODEL_REPOSITORY)") from error
    if not os.access(model, os.W_OK):
        raise PublishError(f"{model}: cannot write: not permitted (SLUICE_MODEL_REPOSITORY)")
    return model


def triton_config(name: str, num_classes: int) -> str:
    """Return ``config.pbtxt`` of a model with this network's inputs and outputs."""
    warmup = f"data_type: TYPE_UINT8 dims: [ 1, {IMAGE_SIZE}, {IMAGE_SIZE} ] zero_data: true"
    return _CONFIG.format(name=name, num_classes=num_classes, size=IMAGE_SIZE, embedding=EMBEDDING_SIZE, warmup=warmup)


def _write_config(path: Path, content: str) -> None:
    if path.exists():
        return  # an operator's tuning outlives a publication
    temporary = path.with_suffix(".partial")
    temporary.write_text(content)
    sync(temporary)
    temporary.rename(path)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PublishError(f"{path}: cannot write: {error.strerror or error}") from error


@contextmanager
def _staging(repository: Path, name: str, num_classes: int) -> Iterator[Path]:
    """Give a folder in the model's own, which Triton does not see and which is gone afterwards."""
    model = prepare(repository, name)
    with _writing(model):
        _write_config(model / "config.pbtxt", triton_config(name, num_classes))
        _require_classes(model / "config.pbtxt", num_classes)
        # The leading dot keeps Triton from taking an unfinished folder for a version.
        staged = Path(tempfile.mkdtemp(prefix=".staged-", dir=model))
        try:
            yield staged
        finally:
            shutil.rmtree(staged, ignore_errors=True)


def _place(staged: Path, card: Card) -> Card:
    """Let a staged folder become the next version."""
    model = staged.parent
    staged.chmod(0o755)  # mkdtemp makes it private; Triton may run as another user
    while True:
        card = card.model_copy(update={"version": next_version(model)})
        _write_card(staged, card)
        sync(*(staged / name for name in (*FILES, manifest.MANIFEST)), staged)
        try:
            staged.rename(model / str(card.version))
        except OSError:
            if (model / str(card.version)).exists():
                continue  # another publisher took the number in between
            raise
        sync(model)
        return card


def _require_no_worse(model: Path, metrics: Metrics) -> None:
    versions = published(model)
    if not versions:
        return
    try:
        current = Card.read(model / str(versions[-1]))
    except PublishError:
        return  # made by hand: there is nothing to compare with
    if found := objections(metrics, current.metrics):
        reasons = "; ".join(map(str, found))
        raise PromotionError(
            f"not published: worse than {model.name} version {current.version}: {reasons}. "
            "`sluice publish --force` publishes it all the same"
        )


def _require_classes(config: Path, num_classes: int) -> None:
    match = _NUM_CLASSES.search(config.read_text())
    if match and int(match[1]) != num_classes:
        raise PublishError(
            f"{config}: the model of this name has {match[1]} classes, and this network {num_classes}: "
            "publish it under another name"
        )


def _write_card(folder: Path, card: Card) -> None:
    (folder / CARD).write_text(card.model_dump_json(indent=2, by_alias=True) + "\n")
    manifest.write(folder, model=card.model, version=card.version)


_CONFIG = """\
# Written by training/release/publish.py for ({name}, {num_classes} classes); a test compares the two.
# One file for two worlds: in NVIDIA's image `backend: "pytorch"` selects libtorch, in the embedded Triton
# serving/backends/pytorch/model.py. Names follow libtorch's rule: inputs by forward's argument, outputs by __index.
name: "{name}"
backend: "pytorch"
max_batch_size: 64
input [ {{ name: "image" data_type: TYPE_UINT8 dims: [ 1, {size}, {size} ] }} ]
output [
  {{ name: "probabilities__0" data_type: TYPE_FP32 dims: [ {num_classes} ] }},
  {{ name: "embedding__1" data_type: TYPE_FP32 dims: [ {embedding} ] }}
]
instance_group [ {{ kind: KIND_AUTO }} ]
# No delay: batches form while others run, and waiting for more only cost throughput where it was measured.
# No queue policy either: with it, 2.51.0 stops prefetching and throughput decays (server#8870).
dynamic_batching {{ }}
# The default, latest 1, would drop the running version before the gateway has routed away from it.
version_policy {{ latest {{ num_versions: 3 }} }}
# TorchScript specialises on the first shapes it sees: a version takes traffic only after both ends were run.
model_warmup [
  {{ name: "one" batch_size: 1 inputs {{ key: "image" value {{ {warmup} }} }} }},
  {{ name: "full" batch_size: 64 inputs {{ key: "image" value {{ {warmup} }} }} }}
]
"""

"""A new version in the model repository: whole or not at all."""

import hashlib
import os
import re
import shutil
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from training.errors import PublishError
from training.export import export
from training.model import EMBEDDING_SIZE, IMAGE_SIZE, Network

_VERSION = re.compile(r"[1-9][0-9]*")


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
    created: str
    class_names: list[str]
    image_shape: tuple[int, int] = (IMAGE_SIZE, IMAGE_SIZE)
    polarity: str = "auto"
    framing: str = "auto"
    device: str = "any"
    precision: str = "float32"
    digest: str
    """``sha256:`` and the hex digest of ``model.pt``."""
    metrics: dict[str, float]
    dataset: DatasetCard


def publish(
    network: Network,
    repository: Path,
    *,
    name: str,
    class_names: list[str],
    metrics: dict[str, float],
    dataset: DatasetCard,
) -> Card:
    """
    Export ``network`` as the next version of ``name``; a reader sees the whole version or none of it.

    Loading it is Triton's business, and asking for that the caller's.

    Args:
        network: The trained network; moved to the CPU.
        repository: Triton's model repository; made if missing, ``config.pbtxt`` included.
        name: Folder of the model in the repository.
        class_names: By label.
        metrics: Measured figures for the card, by name.
        dataset: What it was trained on.

    Raises:
        ExportError: The exported file does not answer like ``network``.
        PublishError: The repository cannot be written.
    """
    model = prepare(repository, name)
    try:
        _write_config(model / "config.pbtxt", triton_config(name, len(class_names)))
        # The leading dot keeps Triton from taking an unfinished folder for a version.
        staged = Path(tempfile.mkdtemp(prefix=".staged-", dir=model))
    except OSError as error:
        raise PublishError(f"{model}: cannot write: {error.strerror}") from error
    try:
        export(network, staged / "model.pt")
        digest = hashlib.sha256((staged / "model.pt").read_bytes()).hexdigest()
        staged.chmod(0o755)  # mkdtemp makes it private; Triton may run as another user
        while True:
            card = Card(
                model=name,
                version=next_version(model),
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                class_names=class_names,
                digest=f"sha256:{digest}",
                metrics=metrics,
                dataset=dataset,
            )
            (staged / "card.json").write_text(card.model_dump_json(indent=2, by_alias=True) + "\n")
            _sync(staged / "model.pt", staged / "card.json", staged)
            try:
                staged.rename(model / str(card.version))
            except OSError:
                if (model / str(card.version)).exists():
                    continue  # another publisher took the number in between
                raise
            _sync(model)
            return card
    except OSError as error:
        raise PublishError(f"{model}: cannot write: {error.strerror}") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


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


def next_version(model: Path) -> int:
    """Return the number after the highest version in a model's folder, 1 when there is none."""
    versions = [int(entry.name) for entry in model.iterdir() if _VERSION.fullmatch(entry.name)]
    return max(versions, default=0) + 1


def triton_config(name: str, num_classes: int) -> str:
    """Return ``config.pbtxt`` of a model with this network's inputs and outputs."""
    warmup = f"data_type: TYPE_UINT8 dims: [ 1, {IMAGE_SIZE}, {IMAGE_SIZE} ] zero_data: true"
    return _CONFIG.format(name=name, num_classes=num_classes, size=IMAGE_SIZE, embedding=EMBEDDING_SIZE, warmup=warmup)


def _write_config(path: Path, content: str) -> None:
    if path.exists():
        return  # an operator's tuning outlives a publication
    temporary = path.with_suffix(".partial")
    temporary.write_text(content)
    _sync(temporary)
    temporary.rename(path)


def _sync(*paths: Path) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


_CONFIG = """\
# Written by training/publish.py for ({name}, {num_classes} classes); a test compares the two.
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

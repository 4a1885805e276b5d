"""From a trained network to what Triton serves: TorchScript, in the precision that pays, proven to answer alike."""

import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from serving.backends.pytorch.preparation import prepared
from training.devices import device_of_choice
from training.errors import ExportError
from training.model import Network, ServedNetwork
from training.release.golden import TOLERANCES, Floats, Golden
from training.release.manifest import GOLDEN, MODEL
from training.release.precision import (
    ANY_DEVICE,
    DTYPES,
    NO_INT8,
    Choice,
    Precision,
    Rates,
    Served,
    by_speed,
    device_name,
    measure,
)

ACCURACY_GATE = 0.0002
"""Largest change of accuracy that a lower precision may bring, as a share: 0.02 points."""

_BATCH_SIZE = 64


@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """Labelled images that the network was not trained on, and that are not those of the final test."""

    images: npt.NDArray[np.uint8]
    """[N, 28, 28]"""
    labels: npt.NDArray[np.integer[Any]]
    """[N]"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """What was exported, and why in this form."""

    precision: Precision
    device: str
    """Where it may be served, as a card says it."""
    accuracy_change: float | None = None
    """Share of the examples by which it does better than float32; none where that was not measured."""
    rates: Mapping[Precision, Rates] = field(default_factory=dict)
    """Images a second by precision and batch size; empty where only one precision was wanted."""
    passed_over: Mapping[Precision, str] = field(default_factory=dict)
    """Faster precisions, and what spoke against each."""


def export(
    network: Network,
    folder: Path,
    *,
    precision: Choice = "float32",
    temperature: float = 1.0,
    examples: Examples | None = None,
    device: torch.device | None = None,
) -> Export:
    """
    Write ``model.pt`` and ``golden.safetensors``: uint8 image in, probabilities and unit-length embedding out.

    The file is read back, prepared as Triton's backend does it, and compared with the network before this returns.
    ``auto`` measures every precision and takes the fastest that answers alike and keeps the accuracy.

    Args:
        network: Any device; it is not changed.
        folder: Exists; the two files in it are replaced.
        precision: Float32 runs on any device; another is for this one.
        temperature: See :class:`training.model.ServedNetwork`.
        examples: Needed for another precision than float32, whose accuracy is judged on them.
        device: Where it will be served; by default the GPU where torch sees one, else the CPU.

    Raises:
        ExportError: The file does not answer like the network, the precision is not to be had or changes the
            accuracy by more than :data:`ACCURACY_GATE`, or there are no examples to judge it by.
    """
    if precision == "int8":
        raise ExportError(NO_INT8)
    if precision != "float32" and (examples is None or len(examples.labels) == 0):
        raise ExportError(f"precision {precision}: labelled images are needed to see that it keeps the accuracy")
    device = device or device_of_choice()
    reference = ServedNetwork(network, temperature=temperature).cpu()
    golden = Golden.of(reference, None if examples is None else examples.images)
    golden.save(folder / GOLDEN)
    with tempfile.TemporaryDirectory(prefix=".candidates-", dir=folder) as place:
        candidates = _Candidates(network, temperature, golden, examples, device, Path(place))
        chosen = candidates.choose(precision)
        candidates.file(chosen.precision).replace(folder / MODEL)
    return chosen


def save(served: torch.nn.Module, path: Path) -> None:
    """Write a :class:`training.model.ServedNetwork` as frozen TorchScript; it is moved to the CPU."""
    with _torchscript():
        frozen = torch.jit.freeze(torch.jit.script(served.cpu().eval()))
        frozen.save(str(path))


def load_served(path: Path, device: torch.device) -> Served:
    """
    Return a ``model.pt`` as Triton's backend runs it: on ``device``, frozen, on the CPU packed for oneDNN.

    Raises:
        ExportError: It is no TorchScript.
    """
    with _torchscript():
        try:
            module = torch.jit.load(str(path), map_location=device)  # type: ignore[no-untyped-call]  # so in torch
        except (RuntimeError, ValueError) as error:
            raise ExportError(f"{path}: no TorchScript: {str(error).strip().splitlines()[-1]}") from error
        served: Served = prepared(module, device)
    return served


def answers(served: Served, images: npt.NDArray[np.uint8], device: torch.device) -> tuple[Floats, Floats]:
    """Return probabilities [N, K] and embeddings [N, D] of images [N, 1, 28, 28], in batches as large as Triton's."""
    parts: list[tuple[torch.Tensor, torch.Tensor]] = []
    with torch.inference_mode():
        for start in range(0, len(images), _BATCH_SIZE):
            part = torch.from_numpy(np.ascontiguousarray(images[start : start + _BATCH_SIZE]))
            parts.append(served(part.to(device)))
    probabilities, embeddings = (torch.cat(columns).cpu().numpy() for columns in zip(*parts, strict=True))
    return probabilities, embeddings


class _Candidates:
    """The network in every precision asked for, each made once, in a file of its own."""

    def __init__(
        self,
        network: Network,
        temperature: float,
        golden: Golden,
        examples: Examples | None,
        device: torch.device,
        place: Path,
    ) -> None:
        self._network = network
        self._temperature = temperature
        self._golden = golden
        self._examples = examples
        self._device = device
        self._place = place
        self._made: dict[Precision, Served] = {}
        self._accuracies: dict[Precision, float] = {}

    def file(self, precision: Precision) -> Path:
        return self._place / f"{precision}.pt"

    def choose(self, wanted: Choice) -> Export:
        """Return what is wanted, or the fastest that passes; raises as :func:`export`."""
        self._make("float32")
        # On the CPU: a GPU rounds float32 on its way through the tensor cores.
        self._require_alike("float32", torch.device("cpu"))
        if wanted == "float32":
            return Export(precision="float32", device=ANY_DEVICE)
        if wanted != "auto":
            self._make(_known(wanted))
            return self._passed(_known(wanted))
        passed_over: dict[Precision, str] = {}
        for precision in DTYPES:
            try:
                self._make(precision)
            except ExportError as error:
                passed_over[precision] = str(error)
        rates = measure(self._made, self._device)
        for precision in by_speed(rates):
            try:
                return replace(self._passed(precision), rates=rates, passed_over=passed_over)
            except ExportError as error:
                passed_over[precision] = str(error)
        raise AssertionError("float32 passes: it was compared above and is its own measure")

    def _make(self, precision: Precision) -> None:
        """Write the file, read it back, and see that this device can run it."""
        if precision in self._made:
            return
        served = ServedNetwork(self._network, temperature=self._temperature, dtype=DTYPES[precision])
        try:
            save(served, self.file(precision))
            candidate = load_served(self.file(precision), self._device)
            answers(candidate, self._golden.images[:1], self._device)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise ExportError(f"precision {precision}: not to be had on {self._device}: {reason}") from error
        self._made[precision] = candidate

    def _passed(self, precision: Precision) -> Export:
        if precision == "float32":
            return Export(precision=precision, device=ANY_DEVICE, accuracy_change=0.0)
        self._require_alike(precision, self._device)
        change = self._accuracy(precision) - self._accuracy("float32")
        if not abs(change) <= ACCURACY_GATE:
            assert self._examples is not None
            raise ExportError(
                f"precision {precision}: accuracy changes by {100 * change:+.3f} points on "
                f"{len(self._examples.labels)} images, allowed is {100 * ACCURACY_GATE:g}"
            )
        return Export(precision=precision, device=device_name(self._device), accuracy_change=change)

    def _require_alike(self, precision: Precision, device: torch.device) -> None:
        served = self._made[precision] if device == self._device else load_served(self.file(precision), device)
        found = answers(served, self._golden.images, device)
        if problem := self._golden.differences(*found, TOLERANCES[precision]):
            raise ExportError(f"precision {precision}: {problem}")

    def _accuracy(self, precision: Precision) -> float:
        assert self._examples is not None, "export() asks for them"
        if precision not in self._accuracies:
            probabilities, _ = answers(self._made[precision], self._examples.images[:, np.newaxis], self._device)
            right = probabilities.argmax(axis=1) == self._examples.labels
            self._accuracies[precision] = float(right.mean())
        return self._accuracies[precision]


def _known(choice: Choice) -> Precision:
    assert choice != "auto"
    assert choice != "int8"
    return choice


@contextmanager
def _torchscript() -> Iterator[None]:
    with warnings.catch_warnings():
        # TorchScript is what Triton's libtorch serves; torch announces its end at each use.
        warnings.filterwarnings("ignore", message=".*torch.jit.*", category=DeprecationWarning)
        yield

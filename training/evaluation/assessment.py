"""All there is to say about a trained network from one pass over a split, calibrated on another."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from streamer.client import SplitInfo
from streamer.loading import TensorBatch
from training.devices import device_of_choice
from training.evaluation import record
from training.evaluation.calibration import fit_temperature
from training.evaluation.evaluate import Evaluation, Mistakes, Predictions, judge, predict
from training.evaluation.record import Calibration, Mistake, Record
from training.evaluation.subjects import Answer, Subject
from training.release.export import Examples


@dataclass(frozen=True, kw_only=True, slots=True)
class Assessment:
    """What was measured."""

    evaluation: Evaluation
    """At the temperature fitted."""
    record: Record
    """The same, with the worst mistakes, as it goes into ``evaluation.json``."""
    predictions: Predictions
    """Of the split, embeddings included."""
    examples: Examples
    """What a lower precision may be judged by: the images of the validation split, or without one those measured on."""

    @property
    def temperature(self) -> float:
        """What the served network has to divide logits by, above 0."""
        return self.evaluation.temperature


def assess(
    subject: Subject,
    batches: Iterable[TensorBatch],
    *,
    validation: Iterable[TensorBatch] = (),
    fitted_on: str = "",
    source: Path,
    kind: str,
    dataset: str,
    split: SplitInfo,
    class_names: Sequence[str],
) -> Assessment:
    """
    Fit a temperature on the validation split, where there is one, and measure on the other.

    Args:
        subject: Answers the images.
        batches: Of the split to measure on.
        validation: Of the split to fit on.
        fitted_on: Its name; empty for none, and then the temperature is 1.
        source: Folder that the subject came from.
        kind: ``checkpoint`` or ``version``.
        dataset: Name as the streamer lists it.
        split: The one to measure on.
        class_names: By label, of all classes that the subject knows.

    Raises:
        ValueError: A split holds no sample.
        TrainingError: An answer is not finite.
    """
    temperature, images = 1.0, _Images()
    if fitted_on:
        fitted = predict(subject, validation, watch=images)
        temperature = fit_temperature(fitted.logits_NK, fitted.label_N)
        examples = Examples(images.all(), fitted.label_N)
    mistakes = Mistakes(temperature=temperature)
    started = time.perf_counter()

    def watch(batch: TensorBatch, answer: Answer) -> None:
        mistakes(batch, answer)
        if not fitted_on:
            images(batch, answer)

    predictions = predict(subject, batches, embeddings=True, watch=watch)
    if not fitted_on:
        examples = Examples(images.all(), predictions.label_N)
    seconds = time.perf_counter() - started
    evaluation = judge(predictions, num_classes=len(class_names), temperature=temperature)
    raw = judge(predictions, num_classes=len(class_names)) if fitted_on else None
    measured = Record(
        created=record.now(),
        subject=str(source),
        kind=kind,
        device=device_of_choice().type,
        dataset=dataset,
        split=split.name,
        fingerprint=split.fingerprint.hex(),
        class_names=list(class_names),
        num_samples=evaluation.num_samples,
        accuracy=evaluation.accuracy,
        accuracy_interval=evaluation.accuracy_interval,
        confusion=evaluation.confusion.tolist(),
        classes=record.class_rows(evaluation, class_names),
        served=Calibration.of(evaluation),
        raw=None if raw is None else Calibration.of(raw),
        fitted_on=fitted_on,
        mistakes=[Mistake.of(sample) for sample in mistakes.worst],
        samples_per_second=evaluation.num_samples / max(seconds, 1e-9),
    )
    return Assessment(evaluation=evaluation, record=measured, predictions=predictions, examples=examples)


class _Images:
    """Keeps the images of a pass, 784 bytes each."""

    def __init__(self) -> None:
        self._parts: list[npt.NDArray[np.uint8]] = []

    def __call__(self, batch: TensorBatch, answer: Answer) -> None:
        self._parts.append(batch.images.numpy())

    def all(self) -> npt.NDArray[np.uint8]:
        """Return them, [N, H, W]."""
        return np.concatenate(self._parts)

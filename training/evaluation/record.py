"""An evaluation as a file: ``evaluation.json``, which the report and other programs read."""

import base64
import math
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from training.errors import TrainingError
from training.evaluation.evaluate import Corrupted, Detection, Evaluation, Sample

FILE = "evaluation.json"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class Bin(_Frozen):
    """Samples of like confidence."""

    confidence: float
    """Mean probability of the predicted class."""
    accuracy: float
    count: int


class Calibration(_Frozen):
    """How far probabilities can be believed, at one temperature."""

    temperature: float
    nll: float
    """Mean negative log-likelihood, in nats."""
    brier: float
    """0..2."""
    ece: float
    """Expected calibration error, over bins of equal mass."""
    bins: list[Bin]

    @classmethod
    def of(cls, evaluation: Evaluation) -> "Calibration":
        """Take what concerns probabilities."""
        bins = evaluation.reliability
        return cls(
            temperature=evaluation.temperature,
            nll=evaluation.loss,
            brier=evaluation.brier,
            ece=evaluation.calibration_error,
            bins=[
                Bin(confidence=float(confidence), accuracy=float(accuracy), count=int(count))
                for confidence, accuracy, count in zip(bins.confidence_B, bins.accuracy_B, bins.count_B, strict=True)
            ],
        )


class ClassRow(_Frozen):
    """One class against all others; None where there is nothing to divide by."""

    name: str
    support: int
    """Samples of the class."""
    precision: float | None
    recall: float | None
    f1: float | None


class CorruptionRow(_Frozen):
    """Accuracy on images spoilt in one way."""

    name: str
    severity: int
    accuracy: float


class OutlierRow(_Frozen):
    """How well a score tells known images from others."""

    other: str
    score: str
    num_known: int
    num_other: int
    auroc: float
    fpr_at_95: float
    """Share of the others that pass where 95 % of the known images do."""


class Picture(_Frozen):
    """A grey image."""

    shape: tuple[int, int]
    """Height and width."""
    pixels: str
    """uint8, row by row, as base64."""

    @classmethod
    def of(cls, image_HW: npt.NDArray[np.uint8]) -> "Picture":
        """Take an image over, [H, W]."""
        height, width = image_HW.shape
        return cls(shape=(height, width), pixels=base64.b64encode(image_HW.tobytes()).decode())

    def array(self) -> npt.NDArray[np.uint8]:
        """Return the image, [H, W]."""
        return np.frombuffer(base64.b64decode(self.pixels), np.uint8).reshape(self.shape)


class Mistake(_Frozen):
    """An image that was classified wrong, with great confidence."""

    index: int
    """In the split, or in its slice."""
    label: int
    predicted: int
    probability: float
    """Of the predicted class."""
    picture: Picture

    @classmethod
    def of(cls, sample: Sample) -> "Mistake":
        """Take a sample over."""
        return cls(
            index=sample.index,
            label=sample.label,
            predicted=sample.predicted,
            probability=sample.probability,
            picture=Picture.of(sample.image_HW),
        )


class Record(_Frozen):
    """One evaluation of one subject on one split."""

    # By its alias: pydantic's base class has a "schema" of its own.
    record_schema: int = Field(1, alias="schema")
    created: str
    """UTC, ISO 8601."""
    subject: str
    """The folder that was evaluated: a checkpoint or a published version."""
    kind: str
    """``checkpoint`` or ``version``."""
    device: str
    dataset: str
    split: str
    fingerprint: str
    """Hex digest of the split."""
    class_names: list[str]
    num_samples: int
    accuracy: float
    accuracy_interval: tuple[float, float]
    """95 % confidence, Wilson's."""
    confusion: list[list[int]]
    """Rows are true classes."""
    classes: list[ClassRow]
    served: Calibration
    """With the temperature that is, or would be, served."""
    raw: Calibration | None = None
    """At temperature 1; None where that is what is served."""
    fitted_on: str = ""
    """The split that the temperature was fitted on; empty where none was."""
    corruptions: list[CorruptionRow] = []
    corrupted_samples: int = 0
    """Images that each corruption was tried on."""
    example: Picture | None = None
    """One of them, as it was before."""
    corruption_seed: int = 0
    outliers: list[OutlierRow] = []
    mistakes: list[Mistake] = []
    """The most confident ones first."""
    samples_per_second: float
    """On the split's own images, reading them included."""
    notes: list[str] = []
    """What a reader of the figures has to know, in sentences."""

    @property
    def corruption_accuracy(self) -> float | None:
        """Mean accuracy over all corruptions and severities; None where there was none."""
        rows = self.corruptions
        return math.fsum(row.accuracy for row in rows) / len(rows) if rows else None


def class_rows(evaluation: Evaluation, class_names: Sequence[str]) -> list[ClassRow]:
    """Return the measures of each class, by label."""
    measured = evaluation.classes
    return [
        ClassRow(
            name=name,
            support=int(measured.support_K[label]),
            precision=_number(measured.precision_K[label]),
            recall=_number(measured.recall_K[label]),
            f1=_number(measured.f1_K[label]),
        )
        for label, name in enumerate(class_names)
    ]


def corruption_rows(results: Sequence[Corrupted]) -> list[CorruptionRow]:
    """Take results over."""
    return [CorruptionRow(name=row.name, severity=row.severity, accuracy=row.accuracy) for row in results]


def outlier_rows(results: Sequence[Detection]) -> list[OutlierRow]:
    """Take results over."""
    return [OutlierRow.model_validate(row, from_attributes=True) for row in results]


def now() -> str:
    """Return the time, as in :attr:`Record.created`."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def write(record: Record, path: Path) -> None:
    """
    Write a record, whole or not at all.

    Raises:
        TrainingError: The file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w") as file:
            file.write(record.model_dump_json(indent=1, by_alias=True) + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except OSError as error:
        raise TrainingError(f"{path}: cannot write: {error.strerror}") from error


def read(path: Path) -> Record:
    """
    Read a record.

    Raises:
        TrainingError: It is missing, or is none.
    """
    try:
        return Record.model_validate_json(path.read_bytes())
    except OSError as error:
        raise TrainingError(f"{path}: cannot read: {error.strerror}") from error
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(str(part) for part in fault["loc"]) or "JSON"
        raise TrainingError(f"{path}: not an evaluation: {place}: {fault['msg']}") from error


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)

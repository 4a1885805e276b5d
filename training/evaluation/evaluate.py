"""
What a network gets right on samples it was not trained on, how sure it may be of it, and when it fails.

Axes: N samples, H height, W width, D embedding, K classes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from streamer.loading import TensorBatch
from training.errors import TrainingError
from training.evaluation import corruptions, measures, outliers
from training.evaluation.measures import ClassMeasures, Reliability, log_softmax
from training.evaluation.subjects import Answer, NetworkSubject, Subject
from training.model import Network

STAND_INS = ("noise", "inverted")
"""What :func:`stand_ins` makes up."""

_BATCH_SIZE = 500


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Evaluation:
    """Measures over one split."""

    num_samples: int
    accuracy: float
    """Share classified right, 0..1."""
    loss: float
    """Mean negative log-likelihood in nats."""
    confusion: npt.NDArray[np.int64]
    """[K, K] counts: rows are true classes, columns predicted ones."""
    accuracy_interval: tuple[float, float]
    """Where the accuracy on endless such data lies, with 95 % confidence."""
    brier: float
    """Mean squared distance of the probabilities from the truth, 0..2."""
    reliability: Reliability
    classes: ClassMeasures
    temperature: float
    """What the logits were divided by."""

    @property
    def calibration_error(self) -> float:
        """Mean distance of confidence from accuracy over bins of equal mass, 0..1."""
        return self.reliability.error

    def metrics(self, class_names: Sequence[str]) -> dict[str, float]:
        """
        Return the figures of a card, by name; a class that the split has no sample of has none.

        Args:
            class_names: By label, K of them.
        """
        figures = {
            "accuracy": self.accuracy,
            "nll": self.loss,
            "brier": self.brier,
            "ece": self.calibration_error,
            "temperature": self.temperature,
            "num_samples": float(self.num_samples),
        }
        for name, recall, support in zip(class_names, self.classes.recall_K, self.classes.support_K, strict=True):
            if support:
                figures |= {f"recall/{name}": float(recall), f"support/{name}": float(support)}
        return figures


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Predictions:
    """Everything a subject said about some samples."""

    logits_NK: npt.NDArray[np.float32]
    embedding_ND: npt.NDArray[np.float32]
    """Of unit length; D is 0 where nobody asked for them."""
    label_N: npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Sample:
    """One image that was classified wrong."""

    index: int
    """In the split, or in its slice."""
    label: int
    predicted: int
    probability: float
    """Of the predicted class, 0..1."""
    image_HW: npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Corrupted:
    """How a subject fares on images spoilt in one way."""

    name: str
    severity: int
    accuracy: float


@dataclass(frozen=True, slots=True)
class Detection:
    """How well a score tells the known images from other ones."""

    other: str
    """What the other images are."""
    score: str
    num_known: int
    num_other: int
    auroc: float
    fpr_at_95: float


def evaluate(
    network: Network, batches: Iterable[TensorBatch], *, num_classes: int, temperature: float = 1.0
) -> Evaluation:
    """
    Return the measures of ``network``, in float32 and evaluation mode, over all ``batches``.

    Args:
        network: On the device to evaluate it on.
        batches: Images uint8 [N, 28, 28], as the streamer sends them without a transform.
        num_classes: Labels are 0 to ``num_classes`` - 1.
        temperature: Divides the logits, as the served network does.

    Raises:
        ValueError: There was no sample.
        TrainingError: An answer is not finite.
    """
    predictions = predict(NetworkSubject(network), batches)
    return judge(predictions, num_classes=num_classes, temperature=temperature)


def predict(
    subject: Subject,
    batches: Iterable[TensorBatch],
    *,
    embeddings: bool = False,
    watch: Callable[[TensorBatch, Answer], None] | None = None,
) -> Predictions:
    """
    Return what ``subject`` says about all ``batches``; in memory, without the images.

    Args:
        subject: Answers the images.
        batches: Images uint8 [N, 28, 28].
        embeddings: Whether to keep them: 2 kB a sample.
        watch: Sees each batch with its answer.

    Raises:
        ValueError: There was no sample.
        TrainingError: An answer is not finite.
    """
    logits, vectors, labels = [], [], []
    for batch in batches:
        answer = subject.answer(batch.images)
        if watch is not None:
            watch(batch, answer)
        logits.append(answer.logits_NK)
        vectors.append(answer.embedding_ND if embeddings else answer.embedding_ND[:, :0])
        labels.append(batch.labels.numpy())
    if not logits:
        raise ValueError("nothing to evaluate: the split holds no sample")
    logits_NK = np.concatenate(logits)
    if not np.isfinite(logits_NK).all():
        raise TrainingError("the network's answers are not all finite: its weights are broken; nothing to measure")
    return Predictions(logits_NK=logits_NK, embedding_ND=np.concatenate(vectors), label_N=np.concatenate(labels))


def judge(predictions: Predictions, *, num_classes: int, temperature: float = 1.0) -> Evaluation:
    """
    Return the measures of predictions.

    Args:
        predictions: At least one.
        num_classes: Labels are 0 to ``num_classes`` - 1.
        temperature: Divides the logits.
    """
    label_N = predictions.label_N
    log_probability_NK = log_softmax(predictions.logits_NK.astype(np.float64) / temperature)
    probability_NK = np.exp(log_probability_NK)
    confusion = measures.confusion_matrix(label_N, probability_NK.argmax(axis=1), num_classes=num_classes)
    num_samples, num_right = len(label_N), int(np.trace(confusion))
    return Evaluation(
        num_samples=num_samples,
        accuracy=num_right / num_samples,
        loss=measures.negative_log_likelihood(log_probability_NK, label_N),
        confusion=confusion,
        accuracy_interval=measures.wilson_interval(num_right, num_samples),
        brier=measures.brier(probability_NK, label_N),
        reliability=measures.reliability(probability_NK, label_N),
        classes=measures.class_measures(confusion),
        temperature=temperature,
    )


class Mistakes:
    """
    The most confidently wrong images of a pass, kept while it goes on; give it to :func:`predict` to watch.

    Args:
        limit: Most that are kept.
        temperature: Divides the logits.
    """

    def __init__(self, limit: int = 24, *, temperature: float = 1.0) -> None:
        self._limit = limit
        self._temperature = temperature
        self.worst: list[Sample] = []
        """By falling confidence, then by index."""

    def __call__(self, batch: TensorBatch, answer: Answer) -> None:
        """Look at one batch."""
        probability_NK = np.exp(log_softmax(answer.logits_NK.astype(np.float64) / self._temperature))
        predicted_N, label_N = probability_NK.argmax(axis=1), batch.labels.numpy()
        found = [
            Sample(
                index=int(batch.indices[place]),
                label=int(label_N[place]),
                predicted=int(predicted_N[place]),
                probability=float(probability_NK[place].max()),
                image_HW=batch.images[place].numpy().copy(),
            )
            for place in np.flatnonzero(predicted_N != label_N)
        ]
        ranked = sorted(self.worst + found, key=lambda sample: (-sample.probability, sample.index))
        self.worst = ranked[: self._limit]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Images:
    """Samples held in memory, to be looked at more than once."""

    image_NHW: npt.NDArray[np.uint8]
    label_N: npt.NDArray[np.int64]
    index_N: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.label_N)

    @classmethod
    def first_of(cls, batches: Iterable[TensorBatch], limit: int) -> "Images":
        """Take up to ``limit`` samples from the beginning; reads no batch more than that takes."""
        kept: list[TensorBatch] = []
        for batch in batches:
            kept.append(batch)
            if sum(len(one.labels) for one in kept) >= limit:
                break
        if not kept:
            raise ValueError("nothing to evaluate: the split holds no sample")
        return cls(
            image_NHW=np.concatenate([batch.images.numpy() for batch in kept])[:limit],
            label_N=np.concatenate([batch.labels.numpy() for batch in kept])[:limit],
            index_N=np.concatenate([batch.indices for batch in kept])[:limit],
        )


def robustness(
    subject: Subject, images: Images, *, names: Iterable[str] = tuple(corruptions.CORRUPTIONS), seed: int = 0
) -> Iterator[Corrupted]:
    """
    Yield the accuracy on spoilt images, for each corruption and severity.

    Args:
        subject: Answers the images.
        images: At least one.
        names: Keys of :data:`training.evaluation.corruptions.CORRUPTIONS`.
        seed: Of the corruptions.
    """
    for name in names:
        for severity in corruptions.SEVERITIES:
            spoilt_NHW = corruptions.corrupt(images.image_NHW, name, severity, indices=images.index_N, seed=seed)
            predicted_N = _answer(subject, spoilt_NHW).logits_NK.argmax(axis=1)
            yield Corrupted(name, severity, float((predicted_N == images.label_N).mean()))


def detect(
    subject: Subject,
    known: Predictions,
    references: Images,
    others: Images,
    *,
    other: str,
    temperature: float = 1.0,
) -> list[Detection]:
    """
    Return how well each score tells known images from others.

    Args:
        subject: Answers the images.
        known: Of images that the network was not trained on, embeddings included.
        references: Training images, which the embeddings are compared with.
        others: Images of no known class.
        other: What these are.
        temperature: Divides the logits for the probability.
    """
    reference_RD = _answer(subject, references.image_NHW).embedding_ND
    answer = _answer(subject, others.image_NHW)

    def probability(logits_NK: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        return outliers.max_log_probability(log_softmax(logits_NK.astype(np.float64) / temperature))

    scores = {
        "probability": (probability(known.logits_NK), probability(answer.logits_NK)),
        "neighbours": (
            outliers.neighbour_similarity(known.embedding_ND, reference_RD),
            outliers.neighbour_similarity(answer.embedding_ND, reference_RD),
        ),
    }
    if subject.gives_logits:
        scores["energy"] = outliers.negative_energy(known.logits_NK), outliers.negative_energy(answer.logits_NK)
    return [
        Detection(
            other=other,
            score=name,
            num_known=len(known.label_N),
            num_other=len(others),
            auroc=(result := outliers.separation(*pair)).auroc,
            fpr_at_95=result.fpr_at_95,
        )
        for name, pair in scores.items()
    ]


def stand_ins(images: Images, *, seed: int = 0) -> dict[str, Images]:
    """Return images of no class, made up where no other data set is at hand: noise, and known ones dark on bright."""
    noise_NHW = np.random.default_rng(seed).integers(0, 256, images.image_NHW.shape, np.uint8)
    inverted_NHW = 255 - images.image_NHW
    return {
        name: Images(image_NHW=image_NHW, label_N=images.label_N, index_N=images.index_N)
        for name, image_NHW in zip(STAND_INS, (noise_NHW, inverted_NHW), strict=True)
    }


def _answer(subject: Subject, image_NHW: npt.NDArray[np.uint8]) -> Answer:
    answers = [
        subject.answer(torch.from_numpy(image_NHW[start : start + _BATCH_SIZE].copy()))
        for start in range(0, len(image_NHW), _BATCH_SIZE)
    ]
    return Answer(
        np.concatenate([answer.logits_NK for answer in answers]),
        np.concatenate([answer.embedding_ND for answer in answers]),
    )

"""Evaluation of subjects whose answers are known, and of a network."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from streamer.loading import StreamedDataset, TensorBatch
from streamer.plan import Plan
from training.errors import ExportError, TrainingError
from training.evaluation.evaluate import Images, Mistakes, detect, evaluate, judge, predict, robustness, stand_ins
from training.evaluation.measures import log_softmax
from training.evaluation.subjects import Answer, NetworkSubject, ServedSubject
from training.model import Network
from training.release.export import export


class Reader:
    """
    Takes an image for the class that its brightest pixel, 25 a class as in tiny MNIST, says it is.

    Args:
        confidence: Logit of that class; the others have 0. A tenth of it for a brightness that no class has.
    """

    gives_logits = True

    def __init__(self, confidence: float = 5.0) -> None:
        self._confidence = confidence

    def answer(self, image_NHW: torch.Tensor) -> Answer:
        grey_N = image_NHW.flatten(1).max(dim=1).values.numpy()
        logits_NK = np.zeros((len(grey_N), 10), np.float32)
        known_N = np.where(grey_N % 25 == 0, 1, 0.1)
        logits_NK[np.arange(len(grey_N)), np.minimum(grey_N // 25, 9)] = self._confidence * known_N
        even = np.full_like(logits_NK, 10**-0.5)
        return Answer(logits_NK, np.where(known_N[:, None] == 1, logits_NK / self._confidence, even))


def tiny(streamer: str, split: str = "test") -> StreamedDataset:
    return StreamedDataset(streamer, Plan(dataset="mnist", split=split, batch_size=8))


def mislabelled(batches: StreamedDataset, indices: Sequence[int]) -> Iterator[TensorBatch]:
    for batch in batches:
        batch.labels[np.isin(batch.indices, indices)] = 0
        yield batch


def test_network_is_evaluated_as_it_answers(streamer: str) -> None:
    torch.manual_seed(0)
    network = Network(dropout=0.5).train()
    result = evaluate(network, tiny(streamer), num_classes=10)
    with torch.inference_mode():
        image_NHW = torch.arange(20, dtype=torch.uint8).remainder(10).mul(25).reshape(20, 1, 1, 1).expand(20, 1, 28, 28)
        logits_NK = network.eval()(image_NHW / 255.0)
    labels = torch.arange(20) % 10

    assert result.num_samples == result.confusion.sum() == 20
    assert result.accuracy == pytest.approx((logits_NK.argmax(dim=1) == labels).double().mean().item())
    assert result.loss == pytest.approx(torch.nn.functional.cross_entropy(logits_NK, labels).item(), rel=1e-5)


def test_card_has_the_figures_that_a_promotion_compares(streamer: str) -> None:
    names = [f"class {label}" for label in range(10)]
    predictions = predict(Reader(), mislabelled(tiny(streamer), [3, 4]))
    figures = judge(predictions, num_classes=10, temperature=2).metrics(names)

    assert (figures["accuracy"], figures["num_samples"], figures["temperature"]) == (0.9, 20, 2)
    assert (figures["recall/class 0"], figures["support/class 0"]) == (0.5, 4)
    assert (figures["recall/class 3"], figures["support/class 3"]) == (1, 1)
    assert {"nll", "ece", "brier"} < figures.keys()


def test_temperature_changes_how_sure_and_not_what(streamer: str) -> None:
    predictions = predict(Reader(), mislabelled(tiny(streamer), [3]))
    sure, unsure = (judge(predictions, num_classes=10, temperature=temperature) for temperature in (1, 100))

    assert (sure.accuracy, unsure.accuracy) == (0.95, 0.95)
    assert sure.reliability.confidence_B.min() > 0.9
    assert unsure.reliability.confidence_B.max() < 0.2


def test_split_without_a_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate(Network(), [], num_classes=10)


def test_broken_weights_are_named(streamer: str) -> None:
    with pytest.raises(TrainingError, match="not all finite: its weights are broken"):
        predict(Reader(float("nan")), tiny(streamer))


def test_most_confident_mistakes_are_kept_over_all_batches(streamer: str) -> None:
    mistakes = Mistakes(3, temperature=2)
    predict(Reader(), mislabelled(tiny(streamer), [2, 9, 14, 19]), watch=mistakes)
    probability = np.exp(log_softmax(np.array([[2.5] + [0.0] * 9])))[0, 0]

    assert [(one.index, one.label, one.predicted) for one in mistakes.worst] == [(2, 0, 2), (9, 0, 9), (14, 0, 4)]
    assert mistakes.worst[0].probability == pytest.approx(probability)
    assert (mistakes.worst[2].image_HW == 100).all()


def test_served_model_answers_like_the_network_it_was_made_from(streamer: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Network()
    export(network, tmp_path)
    ours = predict(NetworkSubject(network), tiny(streamer), embeddings=True)
    served = predict(ServedSubject(tmp_path / "model.pt", torch.device("cpu")), tiny(streamer), embeddings=True)

    np.testing.assert_allclose(log_softmax(served.logits_NK), log_softmax(ours.logits_NK), atol=1e-5)
    np.testing.assert_allclose(served.embedding_ND, ours.embedding_ND, atol=1e-5)


def test_file_that_is_no_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"no archive")

    with pytest.raises(ExportError, match=r"model\.pt: no TorchScript"):
        ServedSubject(tmp_path / "model.pt", torch.device("cpu"))


def test_first_images_are_taken_and_no_more(streamer: str) -> None:
    images = Images.first_of(tiny(streamer), 10)

    assert len(images) == 10
    assert images.index_N.tolist() == list(range(10))
    assert (images.image_NHW[7] == 175).all()


def test_robustness_tells_each_corruption_and_severity(streamer: str) -> None:
    """Brightness changes what the brightest pixel says; a shift within the frame does not."""
    results = list(robustness(Reader(), Images.first_of(tiny(streamer), 20), names=["shift", "brightness"]))

    assert [(one.name, one.severity) for one in results[3:7]] == [
        ("shift", 4), ("shift", 5), ("brightness", 1), ("brightness", 2),
    ]  # fmt: skip
    assert [one.accuracy for one in results[:5]] == [1] * 5
    assert results[-1].accuracy == 0.1


def test_other_images_are_told_from_known_ones(streamer: str) -> None:
    known = predict(Reader(), tiny(streamer), embeddings=True)
    images = Images.first_of(tiny(streamer, "train"), 40)
    references = Images(image_NHW=np.tile(images.image_NHW, (4, 1, 1)), label_N=images.label_N, index_N=images.index_N)
    strange = stand_ins(images)["inverted"]  # of a brightness that no class has
    results = detect(Reader(), known, references, strange, other="inverted", temperature=2)

    assert {one.score: (one.auroc, one.fpr_at_95) for one in results} == {
        "probability": (1, 0), "neighbours": (1, 0), "energy": (1, 0),
    }  # fmt: skip
    assert {(one.other, one.num_known, one.num_other) for one in results} == {("inverted", 20, 40)}


def test_probabilities_have_no_energy(streamer: str) -> None:
    class Served(Reader):
        gives_logits = False

    known = predict(Served(), tiny(streamer), embeddings=True)
    images = Images.first_of(tiny(streamer), 8)

    assert {one.score for one in detect(Served(), known, images, images, other="same")} == {"probability", "neighbours"}

"""What a gateway answers, as its caller sees it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gateway.asking.failures import ImageError
from gateway.asking.inputs import METHODS, SimilarityMethod
from protos.gateway.v1 import image_service_pb2 as pb


@dataclass(frozen=True, slots=True)
class Prediction:
    """One class and how probable it is."""

    label: int
    """Class index; for MNIST the digit."""
    name: str
    """Class name."""
    probability: float
    """0..1."""


@dataclass(frozen=True, slots=True)
class Classification:
    """What an image shows."""

    label: int
    """Index of the most probable class; for MNIST the digit."""
    name: str
    """Name of that class."""
    probability: float
    """0..1."""
    top: tuple[Prediction, ...]
    """The ``top_k`` most probable classes, best first; ``top[0]`` is the one above."""
    model: str
    version: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """How alike two images are."""

    score: float
    """-1..1; 1 for equal images."""
    method: SimilarityMethod
    """The one that was used, where this client knows it; else the one asked for."""
    same_class_probability: float | None
    """0..1, calibrated on held-out pairs; ``None`` where the model brings no calibration for the method."""
    model: str
    version: int


@dataclass(frozen=True, slots=True, eq=False)
class Embedding:
    """An image as a vector."""

    vector: NDArray[np.float32]
    """Shape (D,), unit length."""
    model: str
    version: int


@dataclass(frozen=True, slots=True)
class Model:
    """A model that can be asked."""

    name: str
    versions: tuple[int, ...]
    """Those that answer now, highest first."""
    default_version: int
    class_names: tuple[str, ...]
    is_default: bool


def classification(top: Sequence[pb.Prediction], model: str, version: int) -> Classification:
    """Take over what one image shows; ``top`` has one class at least."""
    predictions = tuple(Prediction(one.label, one.name, one.probability) for one in top)
    best = predictions[0]
    return Classification(best.label, best.name, best.probability, predictions, model, version)


def classifications(response: pb.ClassifyBatchResponse, start: int) -> list[Classification | ImageError]:
    """Take over what the images from place ``start`` on show, or why the gateway could not read them."""
    return [
        ImageError(result.error, index=index)
        if result.code
        else classification(result.top, response.model, response.model_version)
        for index, result in enumerate(response.results, start)
    ]


def comparison(response: pb.CompareResponse, asked: SimilarityMethod) -> Comparison:
    """Take over how alike two images are; ``asked`` is the method of the request."""
    probability = response.same_class_probability if response.HasField("same_class_probability") else None
    used: SimilarityMethod = next((name for name, number in METHODS.items() if number == response.method), asked)
    return Comparison(response.score, used, probability, response.model, response.model_version)


def embedding(response: pb.EmbedResponse) -> Embedding:
    """Take over an image's vector."""
    return Embedding(np.array(response.vector, np.float32), response.model, response.model_version)


def models(response: pb.ListModelsResponse) -> list[Model]:
    """Take over which models there are."""
    return [
        Model(
            one.name,
            tuple(one.versions),
            one.default_version,
            tuple(one.class_names),
            one.is_default,
        )
        for one in response.models
    ]

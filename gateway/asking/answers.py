"""What a gateway answers, as its caller sees it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gateway.asking.failures import ImageError
from gateway.asking.inputs import METHODS, SimilarityMethod
from protos.gateway.v1 import image_service_pb2 as pb
from rpc.budget import REQUEST_ID_KEY, TIMING_KEY, parse


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
class Timing:
    """Where the time of a call went at the gateway."""

    request_id: str
    """The call's id, as the gateway's log has it."""
    milliseconds: Mapping[str, float]
    """By stage: ``admission``, ``decode``, ``coalesce`` (waiting for a batch), ``upstream`` (at Triton), ``total``."""
    num_shared: int
    """Images in the batch that the call's last image left in; 0 where none did."""


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
    timing: Timing | None = field(default=None, compare=False, repr=False)
    """Of the call that brought it; None of a stream."""


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
    timing: Timing | None = field(default=None, compare=False, repr=False)
    """Of the call."""


@dataclass(frozen=True, slots=True, eq=False)
class Embedding:
    """An image as a vector."""

    vector: NDArray[np.float32]
    """Shape (D,), unit length."""
    model: str
    version: int
    timing: Timing | None = field(default=None, repr=False)
    """Of the call."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model that can be asked."""

    name: str
    versions: tuple[int, ...]
    """Those that answer now, highest first."""
    default_version: int
    class_names: tuple[str, ...]
    is_default: bool


def timing(metadata: Iterable[tuple[str, str | bytes]]) -> Timing | None:
    """Take over where a call's time went, from its trailing metadata; None of a gateway that does not tell."""
    told = dict(metadata)
    request_id, times = told.get(REQUEST_ID_KEY), told.get(TIMING_KEY)
    if not isinstance(request_id, str) or not isinstance(times, str):
        return None
    parts = dict(parse(times))
    num_shared = int(parts.pop("batch", 0))
    return Timing(request_id, parts, num_shared)


def classification(
    top: Sequence[pb.Prediction], model: str, version: int, timing: Timing | None = None
) -> Classification:
    """Take over what one image shows; ``top`` has one class at least."""
    predictions = tuple(Prediction(one.label, one.name, one.probability) for one in top)
    best = predictions[0]
    return Classification(best.label, best.name, best.probability, predictions, model, version, timing)


def streamed(response: pb.ClassifyStreamResponse) -> Classification | ImageError:
    """Take over what an image of a stream shows, or why it has no answer."""
    if response.result.code:
        return ImageError(response.result.error, index=response.id)
    return classification(response.result.top, response.model, response.model_version)


def classifications(
    response: pb.ClassifyBatchResponse, start: int, timing: Timing | None = None
) -> list[Classification | ImageError]:
    """Take over what the images from place ``start`` on show, or why the gateway could not read them."""
    return [
        ImageError(result.error, index=index)
        if result.code
        else classification(result.top, response.model, response.model_version, timing)
        for index, result in enumerate(response.results, start)
    ]


def comparison(response: pb.CompareResponse, asked: SimilarityMethod, timing: Timing | None) -> Comparison:
    """Take over how alike two images are; ``asked`` is the method of the request."""
    probability = response.same_class_probability if response.HasField("same_class_probability") else None
    used: SimilarityMethod = next((name for name, number in METHODS.items() if number == response.method), asked)
    return Comparison(response.score, used, probability, response.model, response.model_version, timing)


def embedding(response: pb.EmbedResponse, timing: Timing | None) -> Embedding:
    """Take over an image's vector."""
    return Embedding(np.array(response.vector, np.float32), response.model, response.model_version, timing)


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

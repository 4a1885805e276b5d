"""
What can be asked: requests as bytes made beforehand, and what their answers are worth.

A message's fields may lie in its bytes in any number of pieces, one after the other. So a batch is the pieces of its
images joined, and a pair those of its two sides; nothing is built for each call.
"""

import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal, Protocol, TypeVar, get_args

import numpy as np
from google.protobuf.message import DecodeError, Message
from tritonclient.grpc import service_pb2

from loadtest.errors import CallError, NoImagesError
from loadtest.images import Format, Sample
from loadtest.tally import BAD_ANSWER, Verdict
from protos.gateway.v1 import image_service_pb2 as pb

Kind = Literal["classify", "classify-batch", "compare", "triton"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# Names follow libtorch's rule: inputs by forward's argument, outputs by __index.
_INPUT, _INPUT_DIMS = "image", (1, 28, 28)
_PROBABILITIES = "probabilities__0"
_MAX_PAIRS = 10_000

AnyMessage = TypeVar("AnyMessage", bound=Message)


class Target(Protocol):
    """One RPC with requests for any number of calls."""

    method: str
    """Path of the RPC."""
    may_cancel: bool
    """
    Whether its calls may have a deadline and be cancelled: Triton 2.51 may crash when that ends a ModelInfer
    (server#7368, server#8034).
    """

    def request(self, number: int) -> bytes:
        """Return the request of the call with this number, the same one each time."""
        ...

    def judge(self, number: int, answer: bytes) -> Verdict:
        """
        Return what the answer to that call is worth.

        Raises:
            CallError: BAD_ANSWER: it does not answer the request.
        """
        ...

    def model_of(self, answer: bytes) -> str:
        """Return name and version of the model that answered."""
        ...


def make(
    kind: Kind, samples: Sequence[Sample], *, image_format: Format, model: str, batch_size: int, seed: int
) -> Target:
    """
    Return a target with its requests made.

    Args:
        kind: Which.
        samples: At least one; every call takes the next of them, over and over, in an order that the seed names.
        image_format: Of images sent to the gateway.
        model: Name; empty is the gateway's default, and not allowed for Triton.
        batch_size: Images a call, where the kind has batches; at least 1.
        seed: Of the order, or of the choice of pairs.

    Raises:
        NoImagesError: The images do not fit the kind.
    """
    samples = random.Random(seed).sample(samples, len(samples))
    match kind:
        case "classify":
            return Classify(samples, image_format=image_format, model=model)
        case "classify-batch":
            return ClassifyBatch(samples, image_format=image_format, model=model, batch_size=batch_size)
        case "compare":
            return Compare(samples, image_format=image_format, model=model, seed=seed)
        case "triton":
            return ModelInfer(samples, model=model, batch_size=batch_size)


class Classify:
    """``ImageService.Classify``, an image a call."""

    method = "/sluice.gateway.v1.ImageService/Classify"
    may_cancel = True

    def __init__(self, samples: Sequence[Sample], *, image_format: Format, model: str) -> None:
        self._samples = samples
        self._requests = [
            pb.ClassifyRequest(image=sample.message(image_format), model=model).SerializeToString()
            for sample in samples
        ]

    def request(self, number: int) -> bytes:
        """Return the next image."""
        return self._requests[number % len(self._requests)]

    def judge(self, number: int, answer: bytes) -> Verdict:
        """Compare the class with the known one."""
        response = _parsed(pb.ClassifyResponse, answer)
        sample = self._samples[number % len(self._samples)]
        return Verdict(images=1, judged=1, right=_is_right(response.prediction, sample))

    def model_of(self, answer: bytes) -> str:
        """Return name and version."""
        return _model(_parsed(pb.ClassifyResponse, answer))


class ClassifyBatch:
    """``ImageService.ClassifyBatch``."""

    method = "/sluice.gateway.v1.ImageService/ClassifyBatch"
    may_cancel = True

    def __init__(self, samples: Sequence[Sample], *, image_format: Format, model: str, batch_size: int) -> None:
        self._samples = samples
        self._batch_size = batch_size
        self._head = pb.ClassifyBatchRequest(model=model).SerializeToString()
        self._pieces = [
            pb.ClassifyBatchRequest(images=[sample.message(image_format)]).SerializeToString() for sample in samples
        ]

    def request(self, number: int) -> bytes:
        """Return the next images."""
        return b"".join((self._head, *_batch(self._pieces, number, self._batch_size)))

    def judge(self, number: int, answer: bytes) -> Verdict:
        """Compare each class with the known one; an image that failed alone is not judged."""
        results = _parsed(pb.ClassifyBatchResponse, answer).results
        if len(results) != self._batch_size:
            raise CallError(BAD_ANSWER, f"{len(results)} results for {self._batch_size} images")
        samples = _batch(self._samples, number, self._batch_size)
        judged = [
            _is_right(result.prediction, sample)
            for result, sample in zip(results, samples, strict=True)
            if not result.code
        ]
        return Verdict(images=len(results), judged=len(judged), right=sum(judged), refused=len(results) - len(judged))

    def model_of(self, answer: bytes) -> str:
        """Return name and version."""
        return _model(_parsed(pb.ClassifyBatchResponse, answer))


class Compare:
    """``ImageService.Compare`` of two images, in turns of one class and of two."""

    method = "/sluice.gateway.v1.ImageService/Compare"
    may_cancel = True

    def __init__(self, samples: Sequence[Sample], *, image_format: Format, model: str, seed: int) -> None:
        self._pairs = _pairs(samples, seed)
        self._head = pb.CompareRequest(model=model).SerializeToString()
        images = [sample.message(image_format) for sample in samples]
        self._first = [pb.CompareRequest(first=image).SerializeToString() for image in images]
        self._second = [pb.CompareRequest(second=image).SerializeToString() for image in images]

    def request(self, number: int) -> bytes:
        """Return the next pair."""
        first, second = self._pairs[number % len(self._pairs)]
        return self._head + self._first[first] + self._second[second]

    def judge(self, number: int, answer: bytes) -> Verdict:
        """Take the score for what the pair is."""
        score = _parsed(pb.CompareResponse, answer).score
        # Even pairs are of one class.
        if number % len(self._pairs) % 2 == 0:
            return Verdict(images=2, same_score=score)
        return Verdict(images=2, different_score=score)

    def model_of(self, answer: bytes) -> str:
        """Return name and version."""
        return _model(_parsed(pb.CompareResponse, answer))


class ModelInfer:
    """Triton's own ``ModelInfer``, past the gateway: uint8 [N, 1, 28, 28] in, probabilities out."""

    method = "/inference.GRPCInferenceService/ModelInfer"
    may_cancel = False

    def __init__(self, samples: Sequence[Sample], *, model: str, batch_size: int) -> None:
        self._labels = [_label(sample) for sample in samples]
        self._pixels = [_plain_pixels(sample) for sample in samples]
        self._batch_size = batch_size
        head = service_pb2.ModelInferRequest(model_name=model)
        head.inputs.add(name=_INPUT, datatype="UINT8", shape=(batch_size, *_INPUT_DIMS))
        # Named, or Triton computes and sends the embedding too.
        head.outputs.add(name=_PROBABILITIES)
        self._head: bytes = head.SerializeToString()

    def request(self, number: int) -> bytes:
        """Return the next images."""
        pixels = b"".join(_batch(self._pixels, number, self._batch_size))
        content: bytes = service_pb2.ModelInferRequest(raw_input_contents=[pixels]).SerializeToString()
        return self._head + content

    def judge(self, number: int, answer: bytes) -> Verdict:
        """Compare the most probable class with the known one."""
        response = _parsed(service_pb2.ModelInferResponse, answer)
        if len(response.raw_output_contents) != 1:
            raise CallError(BAD_ANSWER, f"{len(response.raw_output_contents)} outputs for one")
        values = np.frombuffer(response.raw_output_contents[0], "<f4")
        if not len(values) or len(values) % self._batch_size:
            raise CallError(BAD_ANSWER, f"{len(values)} probabilities for {self._batch_size} images")
        said = values.reshape(self._batch_size, -1).argmax(axis=1)
        right = int((said == _batch(self._labels, number, self._batch_size)).sum())
        return Verdict(images=self._batch_size, judged=self._batch_size, right=right)

    def model_of(self, answer: bytes) -> str:
        """Return name and version."""
        return _model(_parsed(service_pb2.ModelInferResponse, answer))


Item = TypeVar("Item")


def _batch(items: Sequence[Item], number: int, size: int) -> list[Item]:
    start = number * size
    return [items[index % len(items)] for index in range(start, start + size)]


def _is_right(prediction: pb.Prediction, sample: Sample) -> bool:
    return prediction.name == sample.name if sample.label is None else prediction.label == sample.label


def _parsed(kind: type[AnyMessage], answer: bytes) -> AnyMessage:
    try:
        return kind.FromString(answer)
    except DecodeError as error:
        raise CallError(BAD_ANSWER, f"not a {kind.DESCRIPTOR.name}") from error


def _model(response: Any) -> str:
    name = getattr(response, "model", "") or getattr(response, "model_name", "")
    return f"{name} version {response.model_version}"


def _label(sample: Sample) -> int:
    if sample.label is None:
        raise NoImagesError(
            f"--images: class {sample.name!r}; Triton itself knows only numbers: name the folders 0, 1, 2"
        )
    return sample.label


def _plain_pixels(sample: Sample) -> bytes:
    if sample.pixels.shape != _INPUT_DIMS[1:]:
        raise NoImagesError(
            f"--images: an image of shape {sample.pixels.shape}; Triton itself takes grey ones of 28x28"
        )
    return sample.pixels.tobytes()


def _pairs(samples: Sequence[Sample], seed: int) -> list[tuple[int, int]]:
    """Draw pairs of places: those at even places in the list of one class, the others of two."""
    by_class: dict[str, list[int]] = defaultdict(list)
    for place, sample in enumerate(samples):
        by_class[sample.name].append(place)
    plural = [places for places in by_class.values() if len(places) > 1]
    if len(by_class) < 2 or not plural:
        raise NoImagesError("comparing needs images of two classes, and a class with two images")
    draw = random.Random(seed)
    pairs: list[tuple[int, int]] = []
    for _ in range(_MAX_PAIRS // 2):
        first, second = draw.sample(draw.choice(plural), 2)
        pairs.append((first, second))
        one, other = draw.sample(list(by_class.values()), 2)
        pairs.append((draw.choice(one), draw.choice(other)))
    return pairs

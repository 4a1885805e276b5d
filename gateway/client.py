"""
The async client of ImageService.

::

    async with ImageClient("localhost:50051") as client:
        answer = await client.classify(Path("seven.png"))
        print(answer.label, answer.probability)
"""

import asyncio
import json
import os
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias, TypedDict

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc
from numpy.typing import NDArray

from protos.gateway.v1 import image_service_pb2 as pb
from protos.gateway.v1 import image_service_pb2_grpc
from rpc.address import is_loopback

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

__all__ = [
    "Classification",
    "ClientError",
    "Comparison",
    "DeadlineError",
    "Embedding",
    "Framing",
    "ImageClient",
    "ImageError",
    "ImageInput",
    "InvalidInputError",
    "Model",
    "ModelNotFoundError",
    "ModelUnavailableError",
    "OverloadedError",
    "Polarity",
    "Prediction",
    "ServerError",
    "ServerUnreachableError",
    "SimilarityMethod",
]

Polarity = Literal["unspecified", "light_on_dark", "dark_on_light"]
Framing = Literal["unspecified", "center", "stretch"]
SimilarityMethod = Literal["unspecified", "embedding_cosine", "pixel_cosine", "ssim"]
ImageInput: TypeAlias = "str | os.PathLike[str] | bytes | NDArray[np.uint8] | PillowImage"
"""
A path to an image file, a file's bytes, pixels as uint8 of shape (H, W), (H, W, 3) or (H, W, 4), or a Pillow image.
"""

_POLARITIES = {
    "unspecified": pb.POLARITY_UNSPECIFIED,
    "light_on_dark": pb.POLARITY_LIGHT_ON_DARK,
    "dark_on_light": pb.POLARITY_DARK_ON_LIGHT,
}
_FRAMINGS = {
    "unspecified": pb.FRAMING_UNSPECIFIED,
    "center": pb.FRAMING_CENTER,
    "stretch": pb.FRAMING_STRETCH,
}

_METHODS: dict[SimilarityMethod, pb.SimilarityMethod.ValueType] = {
    "unspecified": pb.SIMILARITY_METHOD_UNSPECIFIED,
    "embedding_cosine": pb.SIMILARITY_METHOD_EMBEDDING_COSINE,
    "pixel_cosine": pb.SIMILARITY_METHOD_PIXEL_COSINE,
    "ssim": pb.SIMILARITY_METHOD_SSIM,
}

_SERVICE = pb.DESCRIPTOR.services_by_name["ImageService"].full_name
_MAX_ATTEMPTS = 4
_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [{"service": _SERVICE}],
            "retryPolicy": {
                "maxAttempts": _MAX_ATTEMPTS,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                # A grpc.aio server that begins to stop ends calls it has not begun with CANCELLED.
                "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
            },
        }
    ],
    # While most calls fail, retries stop.
    "retryThrottling": {"maxTokens": 10, "tokenRatio": 0.1},
}
_CHANNEL_OPTIONS = (
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    # The default lets a client wait minutes after its server is back.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
)
# Trailing metadata of the gateway's own errors; what fails on the way there has none.
_REASON_KEY = "sluice-reason"
_PUSHBACK_KEY = "grpc-retry-pushback-ms"
# Of a refusal that does not say when to try again: grpc's own limit on concurrent calls.
_PUSHBACK_SECONDS = 1.0
# How grpc's words for a message above the limit end, which it gives the status of an overload.
_TOO_LARGE = "larger than max"

# One call of classify_batch; more images leave in several calls, one after the other.
_CALL_IMAGES = 256
_CALL_BYTES = 8 << 20
_REOPEN_SECONDS = 0.1


class ClientError(Exception):
    """Base of what a call can fail with; the gRPC error is its ``__cause__``."""


class ServerUnreachableError(ClientError):
    """No gateway answers at the address."""


class ModelUnavailableError(ClientError):
    """The gateway answers, but has no model to answer with now; later it may."""


class ModelNotFoundError(ClientError):
    """No such model, or no such version of it; the message says which there are."""


class InvalidInputError(ClientError, ValueError):
    """The image or an option is not usable; the message names the field and what is allowed."""


class ImageError(InvalidInputError):
    """
    What is wrong with one image of a batch.

    Attributes:
        index: Its place among the images given.
    """

    def __init__(self, message: str, *, index: int) -> None:
        super().__init__(message)
        self.index = index


class _TooLargeError(InvalidInputError):
    """The request is above the gateway's message limit; with fewer images it may be below."""


class OverloadedError(ClientError):
    """
    The gateway refused the call because too much is in flight.

    Attributes:
        retry_after_seconds: When another try has a chance.
    """

    def __init__(self, message: str, *, retry_after_seconds: float) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class DeadlineError(ClientError, TimeoutError):
    """No answer in time."""


class ServerError(ClientError):
    """The gateway or its model failed; the gateway's log tells why."""


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


class _Asked(TypedDict):
    """The fields by which every request names its model."""

    model: str
    model_version: int


class ImageClient:
    """
    One channel to a gateway; use it from one event loop, for any number of calls at the same time.

    Calls that nobody took, or that found no model to answer, are tried up to four times, with a growing pause,
    unless most calls fail.
    Cancelling a call cancels it at the gateway.

    Args:
        address: ``host:port``.
        model: Asked where a call names none; empty is the gateway's default.
        version: Asked where a call names none; 0 is the gateway's choice.
        timeout_seconds: Of a call that brings none of its own, retries included.
    """

    def __init__(
        self,
        address: str = "localhost:50051",
        *,
        model: str = "",
        version: int = 0,
        timeout_seconds: float = 10.0,
    ) -> None:
        self.address = address
        self._model = model
        self._version = version
        self._timeout_seconds = timeout_seconds
        self._open_channel: grpc.aio.Channel | None = None

    async def __aenter__(self) -> Self:
        # Without it, http_proxy in the environment takes even the calls to this machine.
        proxy = ("grpc.enable_http_proxy", int(not is_loopback(self.address)))
        self._open_channel = grpc.aio.insecure_channel(self.address, options=(*_CHANNEL_OPTIONS, proxy))
        self._stub = image_service_pb2_grpc.ImageServiceStub(self._open_channel)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancel what is in flight and close the channel."""
        if self._open_channel is not None:
            await self._open_channel.close()
            self._open_channel = None

    async def classify(
        self,
        image: ImageInput,
        *,
        model: str | None = None,
        version: int | None = None,
        top_k: int = 1,
        polarity: Polarity = "unspecified",
        framing: Framing = "unspecified",
        timeout_seconds: float | None = None,
    ) -> Classification:
        """
        Classify one image.

        Args:
            image: See :data:`ImageInput`.
            model: ``None`` is the client's.
            version: ``None`` is the client's.
            top_k: How many classes to list in ``top``, 1 up to the number of classes.
            polarity: How ink and ground are told apart; unspecified leaves it to the model's card.
            framing: How the digit is placed in 28x28; unspecified leaves it to the model's card.
            timeout_seconds: ``None`` is the client's.

        Raises:
            InvalidInputError: The image or an option is not usable.
            ModelNotFoundError: No such model or version.
            ModelUnavailableError: No model can answer now.
            ServerUnreachableError: Nobody answers at the address.
            OverloadedError: Refused; carries when to try again.
            DeadlineError: No answer in time.
            ServerError: The gateway or its model failed.
            OSError: The file cannot be read, e.g. FileNotFoundError.
        """
        stub = self._connected()
        request = pb.ClassifyRequest(
            image=await _message(image, polarity, framing),
            **self._asked(model, version),
            top_k=_checked("top_k", top_k),
        )
        response = await self._call(stub.Classify, request, timeout_seconds)
        return _classification(response.top, response.model, response.model_version)

    async def classify_batch(
        self,
        images: Iterable[ImageInput],
        *,
        model: str | None = None,
        version: int | None = None,
        top_k: int = 1,
        polarity: Polarity = "unspecified",
        framing: Framing = "unspecified",
        timeout_seconds: float | None = None,
    ) -> list[Classification | ImageError]:
        """
        Classify any number of images; one the gateway cannot read becomes an :class:`ImageError` in its place.

        They leave in calls of up to 256 images or 8 MiB, one after the other; ``timeout_seconds`` is for each. What
        is above the gateway's message limit is parted further; an image above it alone cannot be read.
        Arguments and errors are those of :meth:`classify`.

        Returns:
            As many answers as images, in their order.
        """
        self._connected()
        options = pb.ClassifyBatchRequest(
            **self._asked(model, version),
            top_k=_checked("top_k", top_k),
        )
        answers: list[Classification | ImageError] = []
        async for messages in _calls(images, polarity, framing):
            answers += await self._classify_part(messages, len(answers), options, timeout_seconds)
        return answers

    async def compare(
        self,
        first: ImageInput,
        second: ImageInput,
        *,
        method: SimilarityMethod = "unspecified",
        model: str | None = None,
        version: int | None = None,
        polarity: Polarity = "unspecified",
        framing: Framing = "unspecified",
        timeout_seconds: float | None = None,
    ) -> Comparison:
        """
        Score how alike two images are; their order does not matter. Errors are those of :meth:`classify`.

        Args:
            first: See :data:`ImageInput`.
            second: See :data:`ImageInput`.
            method: Unspecified is the gateway's choice: the cosine of the model's embeddings. The cosine of the
                pixels and SSIM look at the framed 28x28 images and need no inference.
            model: ``None`` is the client's.
            version: ``None`` is the client's.
            polarity: Of both images; unspecified leaves it to the model's card.
            framing: Of both images; unspecified leaves it to the model's card.
            timeout_seconds: ``None`` is the client's.
        """
        stub = self._connected()
        if method not in _METHODS:
            raise InvalidInputError(f"method: {method!r}; allowed are {', '.join(_METHODS)}")
        request = pb.CompareRequest(
            first=await _message(first, polarity, framing),
            second=await _message(second, polarity, framing),
            method=_METHODS[method],
            **self._asked(model, version),
        )
        response = await self._call(stub.Compare, request, timeout_seconds)
        probability = response.same_class_probability if response.HasField("same_class_probability") else None
        used: SimilarityMethod = next((name for name, number in _METHODS.items() if number == response.method), method)
        return Comparison(response.score, used, probability, response.model, response.model_version)

    async def embed(
        self,
        image: ImageInput,
        *,
        model: str | None = None,
        version: int | None = None,
        polarity: Polarity = "unspecified",
        framing: Framing = "unspecified",
        timeout_seconds: float | None = None,
    ) -> Embedding:
        """Return the image as the model's vector of unit length; arguments and errors are those of :meth:`classify`."""
        stub = self._connected()
        request = pb.EmbedRequest(
            image=await _message(image, polarity, framing),
            **self._asked(model, version),
        )
        response = await self._call(stub.Embed, request, timeout_seconds)
        return Embedding(np.array(response.vector, np.float32), response.model, response.model_version)

    async def models(self, *, timeout_seconds: float | None = None) -> list[Model]:
        """
        List the models and versions that can be asked for; errors are those of :meth:`classify`.

        Args:
            timeout_seconds: ``None`` is the client's.
        """
        stub = self._connected()
        response = await self._call(stub.ListModels, pb.ListModelsRequest(), timeout_seconds)
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

    async def wait_ready(self, *, timeout_seconds: float | None = None) -> None:
        """
        Wait until an inference works, also for a gateway that does not listen yet.

        Args:
            timeout_seconds: ``None`` is the client's.

        Raises:
            ModelUnavailableError: In time the gateway was reached, but was not ready.
            ServerUnreachableError: In time nobody answered at the address.
            OverloadedError: The gateway tells its readiness to as many as it may.
        """
        self._connected()
        seconds = self._timeout_seconds if timeout_seconds is None else timeout_seconds
        was_reached = False
        try:
            async with asyncio.timeout(seconds), aclosing(self._health()) as statuses:
                async for is_serving in statuses:
                    if is_serving:
                        return
                    was_reached = True
        except TimeoutError:
            if was_reached:
                raise ModelUnavailableError(
                    f"the gateway at {self.address} answers, but no inference worked within {seconds:g} s; "
                    "is Triton running, and is a model trained (`sluice train`)?"
                ) from None
            raise self._unreachable(f"no connection within {seconds:g} s") from None

    async def _health(self) -> AsyncGenerator[bool, None]:
        """Yield the gateway's status and its changes, across restarts, without end."""
        if self._open_channel is None:
            return
        watch = health_pb2_grpc.HealthStub(self._open_channel).Watch
        while True:
            call = watch(health_pb2.HealthCheckRequest(service=_SERVICE), wait_for_ready=True)
            try:
                async for response in call:
                    yield response.status == health_pb2.HealthCheckResponse.SERVING
            except grpc.aio.AioRpcError as error:
                if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
                    raise self._error(error) from error
            finally:
                call.cancel()
            # The gateway ended it, because it drains or died; wait_for_ready covers the time until it is back.
            await asyncio.sleep(_REOPEN_SECONDS)

    async def _classify_part(
        self, messages: Sequence[pb.Image], start: int, options: pb.ClassifyBatchRequest, timeout_seconds: float | None
    ) -> list[Classification | ImageError]:
        """Classify the images from place ``start`` on in one call, or in halves where they are too large for one."""
        request = pb.ClassifyBatchRequest(images=messages)
        request.MergeFrom(options)
        try:
            response = await self._call(self._connected().ClassifyBatch, request, timeout_seconds)
        except _TooLargeError as error:
            if len(messages) == 1:
                return [ImageError(f"images[{start}]: {error}", index=start)]
            half = len(messages) // 2
            first = await self._classify_part(messages[:half], start, options, timeout_seconds)
            return first + await self._classify_part(messages[half:], start + half, options, timeout_seconds)
        return [
            ImageError(result.error, index=index)
            if result.code
            else _classification(result.top, response.model, response.model_version)
            for index, result in enumerate(response.results, start)
        ]

    async def _call(self, method: Any, request: Any, timeout_seconds: float | None) -> Any:
        seconds = self._timeout_seconds if timeout_seconds is None else timeout_seconds
        call = method(request, timeout=seconds)
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise self._error(error, seconds) from error
        finally:
            call.cancel()

    def _asked(self, model: str | None, version: int | None) -> _Asked:
        return {
            "model": self._model if model is None else model,
            "model_version": _checked("version", self._version if version is None else version),
        }

    def _connected(self) -> Any:
        if self._open_channel is None:
            raise RuntimeError("the client is not open; use it as `async with ImageClient(...) as client:`")
        return self._stub

    def _error(self, error: grpc.aio.AioRpcError, seconds: float = 0.0) -> ClientError:
        """Return what a gRPC error means to a person, and what to do about it."""
        metadata = dict(error.trailing_metadata() or ())
        details = error.details() or error.code().name
        match error.code():
            case grpc.StatusCode.INVALID_ARGUMENT:
                return InvalidInputError(details)
            case grpc.StatusCode.NOT_FOUND:
                return ModelNotFoundError(details)
            case grpc.StatusCode.UNAVAILABLE if _REASON_KEY in metadata:
                return ModelUnavailableError(details)
            case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.CANCELLED:
                return self._unreachable(details)
            case grpc.StatusCode.RESOURCE_EXHAUSTED if _PUSHBACK_KEY in metadata:
                pushback = float(metadata[_PUSHBACK_KEY]) / 1000
                return OverloadedError(details, retry_after_seconds=pushback)
            case grpc.StatusCode.RESOURCE_EXHAUSTED if _TOO_LARGE in details:
                return _TooLargeError(f"the gateway at {self.address} refused the request's size: {details}")
            case grpc.StatusCode.RESOURCE_EXHAUSTED:
                return OverloadedError(
                    f"the gateway at {self.address} takes no more calls now: {details}",
                    retry_after_seconds=_PUSHBACK_SECONDS,
                )
            case grpc.StatusCode.DEADLINE_EXCEEDED:
                return DeadlineError(f"no answer from {self.address} within {seconds:g} s; raise timeout_seconds")
            case grpc.StatusCode.UNIMPLEMENTED:
                return ServerError(f"{self.address} is no Sluice gateway, or an older one: {details}")
        return ServerError(f"the gateway at {self.address} failed: {details}")

    def _unreachable(self, details: str) -> ServerUnreachableError:
        return ServerUnreachableError(
            f"no gateway answers at {self.address}: {details}; is it running (`sluice up`), and is that its address?"
        )


async def _calls(images: Iterable[ImageInput], polarity: Polarity, framing: Framing) -> AsyncIterator[list[pb.Image]]:
    messages: list[pb.Image] = []
    num_bytes = 0
    for image in images:
        message = await _message(image, polarity, framing)
        size = message.ByteSize()
        if messages and (len(messages) == _CALL_IMAGES or num_bytes + size > _CALL_BYTES):
            yield messages
            messages, num_bytes = [], 0
        messages.append(message)
        num_bytes += size
    if messages:
        yield messages


async def _message(image: ImageInput, polarity: Polarity, framing: Framing) -> pb.Image:
    if polarity not in _POLARITIES:
        raise InvalidInputError(f"polarity: {polarity!r}; allowed are {', '.join(_POLARITIES)}")
    if framing not in _FRAMINGS:
        raise InvalidInputError(f"framing: {framing!r}; allowed are {', '.join(_FRAMINGS)}")
    message = pb.Image(polarity=_POLARITIES[polarity], framing=_FRAMINGS[framing])
    if isinstance(image, (str, os.PathLike)):
        message.encoded = await asyncio.to_thread(Path(image).read_bytes)
    elif isinstance(image, (bytes, bytearray, memoryview)):
        message.encoded = bytes(image)
    elif isinstance(image, np.ndarray):
        message.raw.CopyFrom(_raw(image))
    elif hasattr(image, "getexif"):
        await asyncio.to_thread(_add_pillow, message, image)
    else:
        raise InvalidInputError(
            f"image: {type(image).__name__}; allowed are a path, bytes of an image file, a uint8 array, a Pillow image"
        )
    return message


def _raw(pixels: NDArray[Any]) -> pb.RawImage:
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or channels not in (1, 3, 4):
        raise InvalidInputError(
            f"image: an array of {pixels.dtype} with shape {pixels.shape}; allowed is uint8 with shape (H, W), "
            "(H, W, 3) or (H, W, 4)"
        )
    height, width = pixels.shape[:2]
    return pb.RawImage(height=height, width=width, channels=channels, pixels=pixels.tobytes())


def _add_pillow(message: pb.Image, image: "PillowImage") -> None:
    """More than 8 bits go as a TIFF, which keeps them; the rest as pixels, turned as EXIF says."""
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        file = BytesIO()
        image.save(file, "TIFF")
        message.encoded = file.getvalue()
        return
    if image.has_transparency_data:
        image = image.convert(image.mode.upper()) if image.mode in ("La", "RGBa") else image
        mode = "RGBA"
    else:
        mode = "L" if image.mode in ("1", "L") else "RGB"
    message.raw.CopyFrom(_raw(np.asarray(image if image.mode == mode else image.convert(mode))))


def _checked(name: str, value: int) -> int:
    """Protobuf's own complaint about a value out of its range names no field."""
    if not 0 <= value < 2**31:
        raise InvalidInputError(f"{name}: {value}; allowed is 0 or more")
    return value


def _classification(top: Sequence[pb.Prediction], model: str, version: int) -> Classification:
    predictions = tuple(Prediction(one.label, one.name, one.probability) for one in top)
    best = predictions[0]
    return Classification(best.label, best.name, best.probability, predictions, model, version)

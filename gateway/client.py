"""
The async client of ImageService.

::

    async with ImageClient("localhost:50051") as client:
        answer = await client.classify(Path("seven.png"))
        print(answer.label, answer.probability)
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self, TypedDict

import grpc

from gateway.asking import answers
from gateway.asking.answers import Classification, Comparison, Embedding, Model, Prediction, Timing
from gateway.asking.channel import open_channel, readiness
from gateway.asking.conversation import Conversation
from gateway.asking.failures import (
    ClientError,
    DeadlineError,
    ImageError,
    InvalidInputError,
    ModelNotFoundError,
    ModelUnavailableError,
    OverloadedError,
    PermissionDeniedError,
    SecureConnectionError,
    ServerError,
    ServerUnreachableError,
    TooLargeError,
    UnauthenticatedError,
    error_of,
    insecure,
    unreachable,
)
from gateway.asking.inputs import (
    Framing,
    ImageInput,
    Polarity,
    SimilarityMethod,
    calls_of,
    checked,
    message_of,
    method_of,
    requests_of,
)
from protos.gateway.v1 import image_service_pb2 as pb
from protos.gateway.v1 import image_service_pb2_grpc
from rpc.access import key_metadata
from rpc.diagnosis import Diagnosis
from rpc.tls import ClientTls

__all__ = [
    "Classification",
    "ClientError",
    "ClientTls",
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
    "PermissionDeniedError",
    "Polarity",
    "Prediction",
    "SecureConnectionError",
    "ServerError",
    "ServerUnreachableError",
    "SimilarityMethod",
    "Timing",
    "UnauthenticatedError",
]


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
        tls: How the gateway is known, and this client to it; ``ClientTls()`` trusts the system's authorities, and
            None is plaintext.
        api_key: Shown with each call, over TLS or to this machine alone.

    Raises:
        SettingsError: The key would leave this machine readable; a TLS file cannot be used, said on opening.
    """

    def __init__(
        self,
        address: str = "localhost:50051",
        *,
        model: str = "",
        version: int = 0,
        timeout_seconds: float = 10.0,
        tls: ClientTls | None = None,
        api_key: str | None = None,
    ) -> None:
        self.address = address
        self._model = model
        self._version = version
        self._timeout_seconds = timeout_seconds
        self._tls = tls
        self._metadata = key_metadata(api_key, address, tls)
        self._diagnosis = Diagnosis(address, tls)
        self._open_channel: grpc.aio.Channel | None = None

    async def __aenter__(self) -> Self:
        self._open_channel = open_channel(self.address, self._tls)
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
            ServerUnreachableError: Nobody answers at the address, or, as SecureConnectionError, TLS fails.
            UnauthenticatedError: The gateway wants an API key, or another one.
            PermissionDeniedError: The API key lacks the call's scope.
            OverloadedError: Refused; carries when to try again.
            DeadlineError: No answer in time.
            ServerError: The gateway or its model failed.
            OSError: The file cannot be read, e.g. FileNotFoundError.
        """
        stub = self._connected()
        request = pb.ClassifyRequest(
            image=await message_of(image, polarity, framing),
            **self._asked(model, version),
            top_k=checked("top_k", top_k),
        )
        response, timing = await self._call(stub.Classify, request, timeout_seconds)
        return answers.classification(response.top, response.model, response.model_version, timing)

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
            top_k=checked("top_k", top_k),
        )
        classified: list[Classification | ImageError] = []
        async for messages in calls_of(images, polarity, framing):
            classified += await self._classify_part(messages, len(classified), options, timeout_seconds)
        return classified

    async def classify_many(
        self,
        images: Iterable[ImageInput] | AsyncIterable[ImageInput],
        *,
        model: str | None = None,
        version: int | None = None,
        top_k: int = 1,
        polarity: Polarity = "unspecified",
        framing: Framing = "unspecified",
        timeout_seconds: float | None = None,
        window: int = 256,
    ) -> AsyncGenerator[Classification | ImageError]:
        """
        Classify images without end, over one stream; yields their answers in their order.

        At most ``window`` images are read that were not yielded yet: the gateway's pace is the source's, and yours is
        the gateway's. An image that cannot be read, here or there, becomes an :class:`ImageError` in its place. A
        stream that breaks is opened again, and what had no answer is asked again. Leave it early with
        ``contextlib.aclosing``, or by cancelling.

        Arguments and errors are those of :meth:`classify`, but that files which cannot be read raise nothing;
        ``timeout_seconds`` is the longest wait for an answer that is due.

        Args:
            images: A path, file, array or Pillow image each; read in a thread where it is no async iterable.
            model: ``None`` is the client's.
            version: ``None`` is the client's.
            top_k: How many classes to list in ``top``.
            polarity: Of all images.
            framing: Of all images.
            timeout_seconds: ``None`` is the client's.
            window: At least 1; the gateway has one of its own, 256 by default.
        """
        stub = self._connected()
        seconds = self._timeout_seconds if timeout_seconds is None else timeout_seconds
        options = pb.ClassifyRequest(**self._asked(model, version), top_k=checked("top_k", top_k))
        conversation = Conversation(
            lambda: stub.ClassifyStream(metadata=self._metadata),
            requests_of(images, options, polarity, framing),
            window=max(checked("window", window), 1),
            timeout_seconds=seconds,
        )
        try:
            async with aclosing(conversation.answers()) as told:
                async for answer in told:
                    yield answer if isinstance(answer, ImageError) else answers.streamed(answer)
        except grpc.aio.AioRpcError as error:
            raise await self._meant(error, seconds) from error
        except TimeoutError:
            raise DeadlineError(f"no answer from {self.address} within {seconds:g} s; raise timeout_seconds") from None

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
        method_number = method_of(method)
        request = pb.CompareRequest(
            first=await message_of(first, polarity, framing),
            second=await message_of(second, polarity, framing),
            method=method_number,
            **self._asked(model, version),
        )
        response, timing = await self._call(stub.Compare, request, timeout_seconds)
        return answers.comparison(response, method, timing)

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
            image=await message_of(image, polarity, framing),
            **self._asked(model, version),
        )
        response, timing = await self._call(stub.Embed, request, timeout_seconds)
        return answers.embedding(response, timing)

    async def models(self, *, timeout_seconds: float | None = None) -> list[Model]:
        """
        List the models and versions that can be asked for; errors are those of :meth:`classify`.

        Args:
            timeout_seconds: ``None`` is the client's.
        """
        stub = self._connected()
        response, _ = await self._call(stub.ListModels, pb.ListModelsRequest(), timeout_seconds)
        return answers.models(response)

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
        channel = self._opened()
        seconds = self._timeout_seconds if timeout_seconds is None else timeout_seconds
        was_reached = False
        try:
            async with asyncio.timeout(seconds), aclosing(readiness(channel, self.address)) as statuses:
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
            raise await self._unreachable(f"no connection within {seconds:g} s") from None

    async def _classify_part(
        self, messages: Sequence[pb.Image], start: int, options: pb.ClassifyBatchRequest, timeout_seconds: float | None
    ) -> list[Classification | ImageError]:
        """Classify the images from place ``start`` on in one call, or in halves where they are too large for one."""
        request = pb.ClassifyBatchRequest(images=messages)
        request.MergeFrom(options)
        try:
            response, timing = await self._call(self._connected().ClassifyBatch, request, timeout_seconds)
        except TooLargeError as error:
            if len(messages) == 1:
                return [ImageError(f"images[{start}]: {error}", index=start)]
            half = len(messages) // 2
            first = await self._classify_part(messages[:half], start, options, timeout_seconds)
            return first + await self._classify_part(messages[half:], start + half, options, timeout_seconds)
        return answers.classifications(response, start, timing)

    async def _call(self, method: Any, request: Any, timeout_seconds: float | None) -> tuple[Any, Timing | None]:
        seconds = self._timeout_seconds if timeout_seconds is None else timeout_seconds
        call = method(request, timeout=seconds, metadata=self._metadata)
        try:
            return await call, answers.timing(await call.trailing_metadata() or ())
        except grpc.aio.AioRpcError as error:
            raise await self._meant(error, seconds) from error
        finally:
            call.cancel()

    async def _meant(self, error: grpc.aio.AioRpcError, seconds: float) -> ClientError:
        meant = error_of(self.address, error, seconds=seconds)
        if isinstance(meant, ServerUnreachableError) and error.code() is grpc.StatusCode.UNAVAILABLE:
            return await self._unreachable(error.details() or error.code().name)
        return meant

    async def _unreachable(self, details: str) -> ServerUnreachableError:
        """Look whether TLS is the cause: gRPC says as much of a handshake that failed as of a machine that is off."""
        problem = await self._diagnosis.problem()
        return unreachable(self.address, details) if problem is None else insecure(self.address, problem)

    def _asked(self, model: str | None, version: int | None) -> _Asked:
        return {
            "model": self._model if model is None else model,
            "model_version": checked("version", self._version if version is None else version),
        }

    def _connected(self) -> Any:
        self._opened()
        return self._stub

    def _opened(self) -> grpc.aio.Channel:
        if self._open_channel is None:
            raise RuntimeError("the client is not open; use it as `async with ImageClient(...) as client:`")
        return self._open_channel

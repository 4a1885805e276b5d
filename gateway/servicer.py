"""Each RPC of ImageService: check the request, call inward, answer; and the gRPC status of every error."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from functools import partial, wraps
from itertools import chain
from typing import Any, NoReturn, TypeVar

import grpc
import numpy as np

from gateway.admission import Admission, Slot
from gateway.coalesce import OF_ONE_IMAGE, Lane, Rows
from gateway.conversation import converse
from gateway.decoders import Decoders
from gateway.errors import (
    GatewayError,
    InvalidImageError,
    InvalidRequestError,
    OverloadedError,
    ReplacedError,
    TooLateError,
    UnknownModelError,
    UnknownVersionError,
    UpstreamContractError,
    UpstreamError,
    UpstreamFailedError,
    UpstreamTimeoutError,
    UpstreamUnavailableError,
)
from gateway.images import Limits, Picture, open_encoded, open_raw
from gateway.lanes import Lanes
from gateway.models import Card, Catalog, ServedVersion
from gateway.similarity import PIXEL_METHODS, Method, cosine
from gateway.triton import EMBEDDING, PROBABILITIES, Output
from imaging.decoding import Pixels
from imaging.framing import Framing, Manner, Polarity
from imaging.structure import may_inflate
from protos.gateway.v1 import image_service_pb2 as pb
from protos.gateway.v1 import image_service_pb2_grpc
from rpc import budget
from rpc.access import identity
from rpc.budget import REQUEST_ID_KEY
from rpc.retry import retry_metadata

Context = grpc.aio.ServicerContext[Any, Any]
InferenceRequest = pb.ClassifyRequest | pb.ClassifyBatchRequest | pb.EmbedRequest | pb.CompareRequest
Answer = pb.ClassifyResponse | pb.ClassifyBatchResponse | pb.EmbedResponse | pb.CompareResponse
Request = TypeVar("Request")
Response = TypeVar("Response")

REASON_KEY = "sluice-reason"
"""Trailing metadata that names the error's class, so that a client need not read its text."""

_STATUS: dict[type[GatewayError], grpc.StatusCode] = {
    InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    UnknownModelError: grpc.StatusCode.NOT_FOUND,
    OverloadedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    TooLateError: grpc.StatusCode.DEADLINE_EXCEEDED,
    UpstreamUnavailableError: grpc.StatusCode.UNAVAILABLE,
    UpstreamTimeoutError: grpc.StatusCode.DEADLINE_EXCEEDED,
    UpstreamFailedError: grpc.StatusCode.INTERNAL,
    UpstreamContractError: grpc.StatusCode.INTERNAL,
}

_POLARITIES: dict[int, Polarity] = {
    pb.POLARITY_LIGHT_ON_DARK: "light_on_dark",
    pb.POLARITY_DARK_ON_LIGHT: "dark_on_light",
}
_FRAMINGS: dict[int, Framing] = {pb.FRAMING_CENTER: "center", pb.FRAMING_STRETCH: "stretch"}
_METHODS: dict[int, Method] = {
    pb.SIMILARITY_METHOD_EMBEDDING_COSINE: "embedding_cosine",
    pb.SIMILARITY_METHOD_PIXEL_COSINE: "pixel_cosine",
    pb.SIMILARITY_METHOD_SSIM: "ssim",
}
_DEFAULT_METHOD = pb.SIMILARITY_METHOD_EMBEDDING_COSINE

# Below both, decoding takes less than the hop to a thread and back, about 0.1 ms.
_INLINE_BYTES = 64 * 1024
_INLINE_PIXELS = 128 * 128
# So long the event loop is held up by the images of a batch.
_SLICE_SECONDS = 0.0005
# Large images of a batch that share one hop.
_CHUNK = 32
# How long a turn of them takes before others have theirs, or longer by what one image takes.
_TURN_SECONDS = 0.01
# Longest that an image of a stream waits to be let in; those behind it are not read.
_ROOM_SECONDS = 10.0


def _answering(
    method: Callable[[Any, Request, Context], Awaitable[Response]],
) -> Callable[[Any, Request, Context], Awaitable[Response]]:
    @wraps(method)
    async def answered(self: Any, request: Request, context: Context) -> Response:
        try:
            try:
                response = await method(self, request, context)
            except ReplacedError:
                response = await self._ask_again(partial(method, self, request, context))
        except GatewayError as error:
            await _abort(context, error)
        if isinstance(response, Answer):
            self._on_answer(response.model, response.model_version)
        return response

    return answered


class ImageServicer(image_service_pb2_grpc.ImageServiceServicer):
    """
    ImageService on one event loop.

    Args:
        catalog: What can be asked for.
        admission: How much at once.
        lanes: Where inferences go.
        require: Raises where a version is known not to answer, by its model's name and its number.
        decoders: Run what takes longer than the event loop should be held up.
        limits: Of one image.
        max_batch_images: Of one ClassifyBatch.
        stream_window: Images of one ClassifyStream that are read and were not answered yet.
        on_upstream_error: Called when an inference failed, so that readiness is looked at again.
        on_answer: Told the model and the version of each answer, those in streams too.
    """

    def __init__(
        self,
        *,
        catalog: Catalog,
        admission: Admission,
        lanes: Lanes,
        require: Callable[[str, int], None],
        decoders: Decoders,
        limits: Limits,
        max_batch_images: int,
        stream_window: int,
        on_upstream_error: Callable[[], None],
        on_answer: Callable[[str, int], None],
    ) -> None:
        self._catalog = catalog
        self._admission = admission
        self._lanes = lanes
        self._require = require
        self._decoders = decoders
        self._limits = limits
        self._max_batch_images = max_batch_images
        self._stream_window = stream_window
        self._on_upstream_error = on_upstream_error
        self._on_answer = on_answer

    async def turn_away(self, context: Context) -> None:
        """End a call for classes whose request was not read yet, where whatever it may hold would be refused."""
        caller = identity(context)
        try:
            self._admission.require(
                1,
                identity=caller,
                remaining_seconds=context.time_remaining(),
                expected_seconds=self._lanes.least_expected_seconds(PROBABILITIES, caller),
            )
        except OverloadedError as error:
            await _abort(context, error)

    @_answering
    async def Classify(self, request: pb.ClassifyRequest, context: Context) -> pb.ClassifyResponse:
        """Classify one image."""
        return await self._classify(request, context)

    @_answering
    async def ClassifyBatch(self, request: pb.ClassifyBatchRequest, context: Context) -> pb.ClassifyBatchResponse:
        """Classify many images; one that cannot be read, or at which the model fails, fails alone."""
        if not 1 <= len(request.images) <= self._max_batch_images:
            raise InvalidRequestError(
                "images", f"{len(request.images)} images; allowed are 1..{self._max_batch_images}"
            )
        model = await self._catalog.find(request.model, request.model_version)
        num_top = _num_top(request, model)
        lane = self._lane(model, PROBABILITIES)
        num_bytes = request.ByteSize()
        with self._enter(len(request.images), num_bytes, context, lane) as slot:
            started = time.perf_counter()
            read = await self._read_all(request.images, model.card, slot.identity)
            budget.current().spend("decode", time.perf_counter() - started)
            good = [one for one in read if not isinstance(one, InvalidImageError)]
            rows = iter(await self._ask(model, PROBABILITIES, good, slot, request, context) if good else ())
        answers = [one if isinstance(one, InvalidImageError) else next(rows) for one in read]
        results = [
            _failure(one, index) if isinstance(one, GatewayError) else _success(_top(one, num_top, model))
            for index, one in enumerate(answers)
        ]
        return pb.ClassifyBatchResponse(results=results, model=model.name, model_version=model.version)

    @_answering
    async def Embed(self, request: pb.EmbedRequest, context: Context) -> pb.EmbedResponse:
        """Return the image as a vector of unit length."""
        _require(request, "image")
        model = await self._catalog.find(request.model, request.model_version)
        if not model.embedding_width:
            raise InvalidRequestError("model", _without_embedding(model))
        lane = self._lane(model, EMBEDDING)
        with self._enter(1, request.ByteSize(), context, lane) as slot:
            pixels = await self._read(request.image, model.card, slot.identity, field="image")
            (row,) = await self._ask(model, EMBEDDING, (pixels,), slot, request, context)
        if isinstance(row, GatewayError):
            raise row
        return pb.EmbedResponse(vector=row.tolist(), model=model.name, model_version=model.version)

    @_answering
    async def Compare(self, request: pb.CompareRequest, context: Context) -> pb.CompareResponse:
        """Score how alike two images are; where that takes the model, both are asked at once."""
        _require(request, "first", "second")
        model = await self._catalog.find(request.model, request.model_version)
        number, method = _method(request, model)
        lane = self._lane(model, EMBEDDING) if method == "embedding_cosine" else None
        with self._enter(2, request.ByteSize(), context, lane) as slot:
            first = await self._read(request.first, model.card, slot.identity, field="first")
            second = await self._read(request.second, model.card, slot.identity, field="second")
            if lane is not None:
                rows = await self._ask(model, EMBEDDING, (first, second), slot, request, context)
                score = _alike(first, second, rows)
            else:
                score = PIXEL_METHODS[method](first, second)
        return pb.CompareResponse(score=score, method=number, model=model.name, model_version=model.version)

    @_answering
    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        """List what answers now, as Triton says at this moment."""
        await self._catalog.refresh()
        return pb.ListModelsResponse(
            models=[
                pb.Model(
                    name=model.name,
                    versions=[one.version for one in model.versions],
                    default_version=model.default.version,
                    class_names=model.default.class_names,
                    is_default=model.is_default,
                )
                for model in self._catalog.listing()
            ]
        )

    async def ClassifyStream(
        self, request_iterator: AsyncIterator[pb.ClassifyStreamRequest], context: Context
    ) -> AsyncIterator[pb.ClassifyStreamResponse]:
        """Classify images as they come; what is wrong with one is told in its place."""
        take = partial(self._take_streamed, context)
        async with aclosing(converse(request_iterator, take, window=self._stream_window)) as answers:
            async for response in answers:
                yield response

    async def _take_streamed(
        self, context: Context, request: pb.ClassifyStreamRequest
    ) -> Awaitable[pb.ClassifyStreamResponse]:
        """Take in one image as soon as there is room: a stream is slowed down where a call is sent away."""
        try:
            slot = await self._admission.enter_in_turn(
                1, num_bytes=request.ByteSize(), identity=identity(context), timeout_seconds=_ROOM_SECONDS
            )
        except OverloadedError as error:
            refused = asyncio.get_running_loop().create_future()
            refused.set_result(_failure_streamed(error, request))
            return refused
        answering = asyncio.ensure_future(self._classify_streamed(slot, context, request))
        # Not by the task itself: one that is cancelled before it begins would never do it.
        answering.add_done_callback(lambda _: slot.release())
        return answering

    async def _classify_streamed(
        self, slot: Slot, context: Context, request: pb.ClassifyStreamRequest
    ) -> pb.ClassifyStreamResponse:
        try:
            try:
                response = await self._classify(request.request, context, slot)
            except ReplacedError:
                response = await self._ask_again(partial(self._classify, request.request, context, slot))
        except GatewayError as error:
            return _failure_streamed(error, request)
        self._on_answer(response.model, response.model_version)
        return pb.ClassifyStreamResponse(
            id=request.id, result=pb.ClassifyResult(prediction=response.prediction, top=response.top),
            model=response.model, model_version=response.model_version,
        )  # fmt: skip

    async def _classify(
        self, request: pb.ClassifyRequest, context: Context, held: Slot | None = None
    ) -> pb.ClassifyResponse:
        """Classify one image, in a place of its own where none is held for it."""
        _require(request, "image")
        model = await self._catalog.find(request.model, request.model_version)
        num_top = _num_top(request, model)
        lane = self._lane(model, PROBABILITIES)
        with held.hold() if held is not None else self._enter(1, request.ByteSize(), context, lane) as slot:
            pixels = await self._read(request.image, model.card, slot.identity, field="image")
            (row,) = await self._ask(model, PROBABILITIES, (pixels,), slot, request, context)
        if isinstance(row, GatewayError):
            raise row
        top = _top(row, num_top, model)
        return pb.ClassifyResponse(prediction=top[0], top=top, model=model.name, model_version=model.version)

    async def _ask_again(self, ask: Callable[[], Awaitable[Response]]) -> Response:
        """
        Ask for what is there now: the version chosen for the caller went away, and the next best answers.

        Twice, as that may go as well.
        """
        await self._catalog.refresh()
        try:
            return await ask()
        except ReplacedError:
            await self._catalog.refresh()
        return await ask()

    def _lane(self, model: ServedVersion, output: Output) -> Lane:
        self._require(model.name, model.version)
        return self._lanes.of(model, output)

    def _enter(self, num_images: int, num_bytes: int, context: Context, lane: Lane | None) -> Slot:
        started = time.perf_counter()
        caller = identity(context)
        slot = self._admission.enter(
            num_images,
            num_bytes=num_bytes,
            identity=caller,
            remaining_seconds=context.time_remaining(),
            expected_seconds=lane.expected_seconds(num_images, caller) if lane is not None else 0.0,
        )
        budget.current().spend("admission", time.perf_counter() - started)
        return slot

    async def _ask(
        self,
        model: ServedVersion,
        output: Output,
        images: Sequence[Pixels],
        slot: Slot,
        request: InferenceRequest,
        context: Context,
    ) -> list[Rows | GatewayError]:
        """
        Return the model's row for each image, or why it has none.

        A caller that goes leaves its images behind: those that are at Triton keep their place in admission.

        Raises:
            GatewayError: There is an answer to none of them.
        """
        # Not the lane of before the images were decoded: the version may have gone or died meanwhile.
        lane = self._lane(model, output)
        remaining = context.time_remaining()
        loop = asyncio.get_running_loop()
        deadline = None if remaining is None else loop.time() + remaining
        slot.hold()
        pixels = [image.tobytes() for image in images]
        ask = lane.ask(pixels, slot, identity=slot.identity, deadline=deadline)
        try:
            answers = await ask.future
        except asyncio.CancelledError:
            lane.leave(ask)
            raise
        except UpstreamError:
            self._on_upstream_error()
            raise
        if ask.sent_at:
            spent = budget.current()
            spent.spend("coalesce", ask.sent_at - ask.queued_at)
            spent.spend("upstream", loop.time() - ask.sent_at)
            spent.count("batch", ask.num_shared)
        errors = [answer for answer in answers if isinstance(answer, GatewayError)]
        if errors:
            if not all(isinstance(error, TooLateError) for error in errors):
                self._on_upstream_error()
            self._raise_for_all(errors, len(answers), request)
        return answers

    def _raise_for_all(self, errors: Sequence[GatewayError], num_images: int, request: InferenceRequest) -> None:
        for error in errors:
            if isinstance(error, UnknownVersionError) and not request.model_version:
                # The caller did not choose the version that just went away.
                raise ReplacedError("the model is being replaced; try again") from error
            if len(errors) == num_images or not isinstance(error, OF_ONE_IMAGE):
                raise error

    async def _read(self, image: pb.Image, card: Card, caller: str, *, field: str) -> Pixels:
        """Read the image that the request holds in ``field``."""
        started = time.perf_counter()
        try:
            return await self._read_where_it_pays(image, card, caller)
        except InvalidImageError as error:
            raise error.within(field) from error
        finally:
            budget.current().spend("decode", time.perf_counter() - started)

    async def _read_where_it_pays(self, image: pb.Image, card: Card, caller: str) -> Pixels:
        manner = _manner(image, card)
        if _is_large(image):
            return await self._decoders.run(lambda: self._open(image).frame(manner), caller)
        picture = self._open(image)
        if picture.num_pixels > _INLINE_PIXELS:
            return await self._decoders.run(partial(picture.frame, manner), caller)
        return picture.frame(manner)

    async def _read_all(self, images: Sequence[pb.Image], card: Card, caller: str) -> list[Pixels | InvalidImageError]:
        """
        Read the images of a batch: small ones here, then large ones in threads.

        A thread that decodes small images would hold the interpreter most of the time, and the event loop with it, for
        milliseconds on end; here others have their turn every half millisecond.
        """
        read: list[Pixels | InvalidImageError | None] = [None] * len(images)
        large = list[int]()
        until = time.perf_counter() + _SLICE_SECONDS
        for index, image in enumerate(images):
            if _is_large(image):
                large.append(index)
            else:
                read[index] = self._read_small_or_refuse(image, card)
                if read[index] is None:
                    large.append(index)
            if time.perf_counter() > until:
                await asyncio.sleep(0)
                until = time.perf_counter() + _SLICE_SECONDS
        starts = range(0, len(large), _CHUNK)
        parts = [large[start : start + _CHUNK] for start in starts]
        done = await asyncio.gather(*(self._read_in_turns([images[at] for at in part], card, caller) for part in parts))
        for index, one in zip(large, chain.from_iterable(done), strict=True):
            read[index] = one
        return [one for one in read if one is not None]

    async def _read_in_turns(
        self, images: Sequence[pb.Image], card: Card, caller: str
    ) -> list[Pixels | InvalidImageError]:
        def read(part: Sequence[pb.Image]) -> list[Pixels | InvalidImageError]:
            until = time.perf_counter() + _TURN_SECONDS
            done = list[Pixels | InvalidImageError]()
            for image in part:
                done.append(self._read_or_refuse(image, card))
                if time.perf_counter() > until:
                    break
            return done

        done = list[Pixels | InvalidImageError]()
        while len(done) < len(images):
            done += await self._decoders.run(partial(read, images[len(done) :]), caller)
        return done

    def _read_small_or_refuse(self, image: pb.Image, card: Card) -> Pixels | InvalidImageError | None:
        """Return None where there are more pixels in it than its few bytes suggest."""
        try:
            manner = _manner(image, card)
            picture = self._open(image)
            return None if picture.num_pixels > _INLINE_PIXELS else picture.frame(manner)
        except InvalidImageError as error:
            return _let_go(error)

    def _read_or_refuse(self, image: pb.Image, card: Card) -> Pixels | InvalidImageError:
        try:
            manner = _manner(image, card)
            return self._open(image).frame(manner)
        except InvalidImageError as error:
            return _let_go(error)

    def _open(self, image: pb.Image) -> Picture:
        match image.WhichOneof("source"):
            case "encoded":
                return open_encoded(image.encoded, self._limits)
            case "raw":
                raw = image.raw
                return open_raw(
                    raw.pixels,
                    height=raw.height,
                    width=raw.width,
                    channels=raw.channels,
                    limits=self._limits,
                )
        raise InvalidImageError("", "missing; give encoded or raw")


def _is_large(image: pb.Image) -> bool:
    """Tell whether an image is read in a thread, header and all: even a header may hide a long walk."""
    return image.ByteSize() > _INLINE_BYTES or may_inflate(image.encoded)


def _let_go(error: InvalidImageError) -> InvalidImageError:
    """Return it without its traceback, whose frames would keep the image until the garbage collector comes."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


async def _abort(context: Context, error: GatewayError) -> NoReturn:
    code, words = _status(error), str(error)
    # What is given here replaces what the call would have told else.
    metadata = ((REASON_KEY, type(error).__name__), (REQUEST_ID_KEY, budget.current().request_id))
    if isinstance(error, OverloadedError):
        await context.abort(code, words, (*metadata, *retry_metadata(code, words, error.retry_after_seconds)))
    await context.abort(code, words, metadata)


def _status(error: GatewayError) -> grpc.StatusCode:
    return next(_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS)


def _manner(image: pb.Image, card: Card) -> Manner:
    return Manner(_polarity(image, card), _framing(image, card))


def _polarity(image: pb.Image, card: Card) -> Polarity:
    if image.polarity == pb.POLARITY_UNSPECIFIED:
        return card.polarity
    try:
        return _POLARITIES[image.polarity]
    except KeyError:
        raise InvalidImageError("polarity", _unknown(image.polarity, pb.Polarity)) from None


def _framing(image: pb.Image, card: Card) -> Framing:
    if image.framing == pb.FRAMING_UNSPECIFIED:
        return card.framing
    try:
        return _FRAMINGS[image.framing]
    except KeyError:
        raise InvalidImageError("framing", _unknown(image.framing, pb.Framing)) from None


def _unknown(value: int, enum: Any) -> str:
    return f"{value}; allowed are {', '.join(f'{number} ({name})' for name, number in enum.items())}"


def _require(request: InferenceRequest, *fields: str) -> None:
    for field in fields:
        if not request.HasField(field):  # type: ignore[arg-type]  # one of each message's own names
            raise InvalidRequestError(field, "missing; give encoded or raw")


def _method(request: pb.CompareRequest, model: ServedVersion) -> tuple[pb.SimilarityMethod.ValueType, Method]:
    number = request.method or _DEFAULT_METHOD
    method = _METHODS.get(number)
    if method is None:
        raise InvalidRequestError("method", _unknown(number, pb.SimilarityMethod))
    if method == "embedding_cosine" and not model.embedding_width:
        raise InvalidRequestError("method", f"{_without_embedding(model)}; allowed are PIXEL_COSINE and SSIM")
    return number, method


def _without_embedding(model: ServedVersion) -> str:
    return f"{model.name} version {model.version} gives no embedding ({EMBEDDING.name})"


def _num_top(request: pb.ClassifyRequest | pb.ClassifyBatchRequest, model: ServedVersion) -> int:
    num_classes = len(model.class_names)
    if request.top_k > num_classes:
        raise InvalidRequestError(
            "top_k", f"{request.top_k}; {model.name} has {num_classes} classes, allowed are 0..{num_classes}"
        )
    return request.top_k or 1


def _top(row: Rows, num_top: int, model: ServedVersion) -> list[pb.Prediction]:
    """Return the most probable classes, best first; of equals the lower index first."""
    # Plain numbers: for ten classes they take a fifth of the time, and protobuf looks twice at NumPy's.
    probabilities = row.tolist()
    if num_top == 1:
        chosen = [probabilities.index(max(probabilities))]
    else:
        chosen = np.argsort(-row, kind="stable")[:num_top].tolist()
    return [
        pb.Prediction(label=label, name=model.class_names[label], probability=probabilities[label]) for label in chosen
    ]


def _alike(first: Pixels, second: Pixels, rows: Sequence[Rows | GatewayError]) -> float:
    for row in rows:
        if isinstance(row, GatewayError):
            raise row
    # Rows of equal images may differ in their last bit.
    return 1.0 if np.array_equal(first, second) else cosine(rows[0], rows[1])  # type: ignore[arg-type]  # no errors


def _success(top: list[pb.Prediction]) -> pb.ClassifyResult:
    return pb.ClassifyResult(prediction=top[0], top=top)


def _failure_streamed(error: GatewayError, request: pb.ClassifyStreamRequest) -> pb.ClassifyStreamResponse:
    return pb.ClassifyStreamResponse(
        id=request.id, result=pb.ClassifyResult(code=_status(error).value[0], error=str(error))
    )


def _failure(error: GatewayError, index: int) -> pb.ClassifyResult:
    told = error.within(f"images[{index}]") if isinstance(error, InvalidImageError) else f"images[{index}]: {error}"
    return pb.ClassifyResult(code=_status(error).value[0], error=str(told))

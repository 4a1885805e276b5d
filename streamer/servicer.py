"""Each RPC: check the request, call inward, answer; and the one table from our errors to gRPC status."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
import numpy as np
import structlog
from google.protobuf.duration_pb2 import Duration

from protos import mnist_pb2
from protos.streamer.v1 import sample_service_pb2 as pb
from streamer import batches, slicing, wire
from streamer.batches import AssembledBatch
from streamer.checksum import REQUEST_CHECKSUM, request_checksum
from streamer.errors import (
    DamagedRequestError,
    DataError,
    FingerprintMismatchError,
    GoingAwayError,
    IdleReaderError,
    InvalidPlanError,
    PositionError,
    StorageError,
    StreamerError,
    TooManyStreamsError,
    TransformError,
    TransformPoolError,
    UnknownDatasetError,
)
from streamer.flow import Credit
from streamer.metrics import Sending, StreamerMetrics
from streamer.occupancy import Occupancy
from streamer.order import Order, Share, check_plan, shares
from streamer.plan import Plan, Remainder
from streamer.session import Grants, hear_out, opening
from streamer.settings import StreamerSettings
from streamer.slicing import Slice
from streamer.sources.split import Dataset, MemorySplit, Split
from streamer.transforms.pool import TransformPool
from streamer.transforms.transform import Transform, parse

log = structlog.get_logger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]

_STATUS: Mapping[type[StreamerError], grpc.StatusCode] = {
    UnknownDatasetError: grpc.StatusCode.NOT_FOUND,
    InvalidPlanError: grpc.StatusCode.INVALID_ARGUMENT,
    PositionError: grpc.StatusCode.OUT_OF_RANGE,
    FingerprintMismatchError: grpc.StatusCode.FAILED_PRECONDITION,
    TooManyStreamsError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    IdleReaderError: grpc.StatusCode.ABORTED,
    GoingAwayError: grpc.StatusCode.UNAVAILABLE,
    DamagedRequestError: grpc.StatusCode.DATA_LOSS,
    # Of a sample that was asked for well.
    DataError: grpc.StatusCode.DATA_LOSS,
    StorageError: grpc.StatusCode.UNAVAILABLE,
    TransformError: grpc.StatusCode.INTERNAL,
    TransformPoolError: grpc.StatusCode.UNAVAILABLE,
}

_REMAINDERS = {
    pb.REMAINDER_UNSPECIFIED: Remainder.KEEP,
    pb.REMAINDER_KEEP: Remainder.KEEP,
    pb.REMAINDER_DROP: Remainder.DROP,
}

_DATA_TYPES = {
    np.dtype("<u1"): pb.DATA_TYPE_UINT8,
    np.dtype("<f2"): pb.DATA_TYPE_FLOAT16,
    np.dtype("<f4"): pb.DATA_TYPE_FLOAT32,
}

_Message = tuple[int, bytes]
"""How many samples, and what goes out for them, already in wire format."""

# Samples looked up at once for a stream of single ones, and held for a reader that stops; finding them is little
# beside sending them one by one.
_BLOCK_SAMPLES = 256
# Batches made before they are wanted, where that takes more than the event loop: they are what hides a slow disk.
_NUM_AHEAD = 2
# Slices kept for the next stream of them, up to 4 MiB each.
_MAX_SLICES = 16


@dataclass(frozen=True, eq=False, slots=True)
class _Wanted:
    """What a request for batches asks for, checked."""

    plan: Plan
    split: Split
    transform: Transform
    shares: Iterator[Share]


class StreamerServicer:
    """
    Answers MnistService and SampleService.

    Holds no state about readers but which streams are open.

    Args:
        settings: Limits.
        datasets: What there is, by name.
        metrics: Told what goes out.
        pool: Returns the pool for transforms, started with the first call.
        occupancy: Of this process among those that serve together; None: it serves by itself.
    """

    def __init__(
        self,
        settings: StreamerSettings,
        datasets: Mapping[str, Dataset],
        metrics: StreamerMetrics,
        pool: Callable[[], Awaitable[TransformPool]],
        occupancy: Occupancy | None = None,
    ) -> None:
        self._settings = settings
        self._datasets = datasets
        self._metrics = metrics
        metrics.add_datasets(datasets)
        self._pool = pool
        self._occupancy = occupancy or Occupancy.alone()
        # The one used last is the last.
        self._slices: OrderedDict[tuple[Split, Slice], Split] = OrderedDict()
        self._draining = asyncio.Event()
        # Of streams that may be waiting for credit.
        self._grants: set[Grants] = set()

    @property
    def active_streams(self) -> int:
        """Streams open right now."""
        return self._occupancy.own

    def drain(self) -> None:
        """Let every stream of batches end with a closing message before its next batch."""
        self._draining.set()
        for grants in self._grants:
            grants.drain()

    # The method names below are the contract's.

    async def ListDatasets(self, request: pb.ListDatasetsRequest, context: Context) -> pb.ListDatasetsResponse:
        """Describe what is served."""
        return pb.ListDatasetsResponse(datasets=[_describe(dataset) for dataset in self._datasets.values()])

    def GetTrainingSamples(self, request: mnist_pb2.DataRequest, context: Context) -> AsyncIterator[bytes]:
        """Stream samples one by one."""
        dataset = request.dataset or "mnist"
        return self._stream(dataset, lambda _: self._samples(request), context)

    def StreamBatches(self, request: pb.StreamBatchesRequest, context: Context) -> AsyncIterator[bytes]:
        """Stream one rank's batches as fast as HTTP/2 takes them."""
        return self._stream(
            request.plan.dataset, lambda sending: self._batches(request, sending), context, request=request
        )

    async def PullBatches(
        self, requests: AsyncIterator[pb.PullBatchesRequest], context: Context
    ) -> AsyncIterator[bytes]:
        """Stream one rank's batches as fast as the reader grants them."""
        try:
            request = await opening(requests, idle_seconds=self._settings.idle_seconds, draining=self._draining)
        except StreamerError as error:
            await _refuse(context, error)
        messages = self._stream(
            request.plan.dataset,
            lambda sending: self._pulled(request, requests, sending),
            context,
            request=request,
            before_refusal=lambda: hear_out(requests),
        )
        async with aclosing(messages) as each:
            async for message in each:
                yield message

    async def _stream(
        self,
        dataset: str,
        messages: Callable[[Sending], AsyncGenerator[_Message, None]],
        context: Context,
        *,
        request: pb.StreamBatchesRequest | None = None,
        before_refusal: Callable[[], Awaitable[None]] | None = None,
    ) -> AsyncGenerator[bytes, None]:
        try:
            if request is not None:
                _check_arrival(request, context)
            with self._place(), self._metrics.sending(dataset) as sending:
                async with aclosing(messages(sending)) as each:
                    async for num_samples, message in each:
                        sending.offer()
                        yield message
                        sending.count(num_samples, len(message))
        except StreamerError as error:
            if before_refusal is not None:
                await before_refusal()
            await _refuse(context, error)

    @contextmanager
    def _place(self) -> Iterator[None]:
        if self._occupancy.total >= self._settings.max_streams:
            raise TooManyStreamsError(self._settings.max_streams)
        self._occupancy.add(1)
        try:
            yield
        finally:
            self._occupancy.add(-1)

    async def _batches(self, request: pb.StreamBatchesRequest, sending: Sending) -> AsyncGenerator[_Message, None]:
        wanted = await self._check(request)
        writing, offered_seconds = _Writing(wanted), 0.0
        async with aclosing(await self._assembled(wanted)) as assembled:
            async for batch in assembled:
                if self._draining.is_set():
                    yield 0, writing.farewell(batch.share.position)
                    return
                sending.made(batch.read_seconds, batch.transform_seconds)
                message = writing.message(batch, offered_seconds)
                offered = time.perf_counter()
                yield len(batch.indices), message
                offered_seconds = time.perf_counter() - offered

    async def _pulled(
        self, request: pb.StreamBatchesRequest, requests: AsyncIterator[pb.PullBatchesRequest], sending: Sending
    ) -> AsyncGenerator[_Message, None]:
        wanted = await self._check(request)
        writing, credit = _Writing(wanted), Credit(self._settings.max_credit_bytes)
        sending.credit = credit
        async with (
            aclosing(await self._assembled(wanted)) as assembled,
            Grants(requests, credit, idle_seconds=self._settings.idle_seconds) as grants,
        ):
            with self._told_of_draining(grants):
                try:
                    async for batch in assembled:
                        if not grants.let_send:
                            sending.ask()
                            await grants.wait()
                            sending.go_on()
                        if grants.is_draining:
                            if not credit.was_granted:
                                raise GoingAwayError
                            yield 0, writing.farewell(batch.share.position)
                            break
                        if not credit.lets_send:
                            return  # half-closed, and all is spent
                        credit.spend(batch.payload_bytes)
                        sending.made(batch.read_seconds, batch.transform_seconds)
                        yield len(batch.indices), writing.message(batch)
                except StreamerError:
                    await grants.hear_out()
                    raise
                # A grant must not meet a call that has ended: see PullBatches in the contract.
                await (grants.wait_closed() if writing.has_begun else grants.hear_out())

    @contextmanager
    def _told_of_draining(self, grants: Grants) -> Iterator[None]:
        self._grants.add(grants)
        if self._draining.is_set():
            grants.drain()
        try:
            yield
        finally:
            self._grants.discard(grants)

    async def _assembled(self, wanted: _Wanted) -> AsyncGenerator[AssembledBatch, None]:
        split, plan, transform = wanted.split, wanted.plan, wanted.transform
        if transform.is_identity and isinstance(split, MemorySplit):
            # At once, and a task of its own would take as long.
            return batches.gather(split, plan, wanted.shares)
        pool = None if transform.is_identity else await self._pool()
        return batches.ahead(batches.assemble(split, plan, wanted.shares, transform, pool), _NUM_AHEAD)

    async def _check(self, request: pb.StreamBatchesRequest) -> _Wanted:
        plan = _plan_of(request.plan)
        split = await self._split(plan.dataset, plan.split, "plan.split")
        transform = parse(plan.transform, image_shape=split.image_shape)
        limit = batches.max_samples(split, transform, self._settings.max_message_bytes)
        if not limit:
            raise InvalidPlanError(
                "plan.transform",
                f"an image of {transform.sample_bytes} bytes does not fit into a message; "
                f"{self._settings.max_message_bytes} are allowed",
            )
        check_plan(plan, max_batch_samples=min(limit, self._settings.max_batch_samples))
        if plan.fingerprint and plan.fingerprint != split.fingerprint:
            raise FingerprintMismatchError(
                f"plan.fingerprint: this replica serves {split.fingerprint.hex()}, not {plan.fingerprint[:32].hex()}; "
                "a position means nothing in other data: start the run anew, or ask a replica with its data"
            )
        start, end = request.start_position, request.end_position
        return _Wanted(plan, split, transform, shares(plan, split.num_samples, start_position=start, end_position=end))

    async def _samples(self, request: mnist_pb2.DataRequest) -> AsyncGenerator[_Message, None]:
        split = await self._split(request.dataset or "mnist", request.split or "train", "split")
        length = (request.epochs or 1) * split.num_samples
        if request.start > length:
            raise PositionError("start", request.start, length)
        position, stop = request.start, min(length, request.start + request.limit) if request.limit else length
        seed = request.seed if request.HasField("seed") else None
        while position < stop:
            # Each epoch in its own order; a block never crosses from one into the next.
            epoch, first = divmod(position, split.num_samples)
            last = min(split.num_samples, first + _BLOCK_SAMPLES, first + stop - position)
            order = Order(split.num_samples, fingerprint=split.fingerprint, seed=seed, epoch=epoch)
            indices = order.indices(np.arange(first, last))
            images, labels = await split.read(indices)
            for image, label, index in zip(images, labels.tolist(), indices.tolist(), strict=True):
                sample = mnist_pb2.Sample(image=image.tobytes(), label=label, index=index)
                yield 1, sample.SerializeToString()
            position += last - first

    async def _split(self, dataset: str, split: str, field: str) -> Split:
        if dataset not in self._datasets:
            raise UnknownDatasetError(dataset, self._datasets)
        base, part = slicing.find(split, self._datasets[dataset].splits, field=field)
        if part is None:
            return base
        key = base, part
        if key not in self._slices:
            sliced = await asyncio.to_thread(base.sliced, part)
            # Of two that were made at once one will do.
            self._slices.setdefault(key, sliced)
        self._slices.move_to_end(key)
        if len(self._slices) > _MAX_SLICES:
            self._slices.popitem(last=False)
        return self._slices[key]


async def _refuse(context: Context, error: StreamerError) -> NoReturn:
    if error.public != str(error):
        log.warning("stream fails", problem=str(error))
    await context.abort(next(_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS), error.public)


def _check_arrival(request: pb.StreamBatchesRequest, context: Context) -> None:
    """Refuse a request that is not what its reader sent, where that sent a checksum of it."""
    metadata = context.invocation_metadata() or ()
    sent = next((value for key, value in metadata if key == REQUEST_CHECKSUM), None)
    if sent is None:
        return
    found = request_checksum(request.SerializeToString(deterministic=True))
    if sent != found:
        raise DamagedRequestError(sent=str(sent), found=found)


def _plan_of(message: pb.Plan) -> Plan:
    if not message.dataset:
        raise InvalidPlanError("plan.dataset", "required; ListDatasets gives the names")
    if message.remainder not in _REMAINDERS:
        raise InvalidPlanError("plan.remainder", f"{message.remainder}; 0, 1 and 2 are allowed")
    return Plan(
        dataset=message.dataset,
        split=message.split or "train",
        seed=message.seed if message.HasField("seed") else None,
        epoch=message.epoch,
        world_size=message.world_size or 1,
        rank=message.rank,
        batch_size=message.batch_size,
        remainder=_REMAINDERS[message.remainder],
        transform=message.transform,
        fingerprint=message.fingerprint,
    )


def _describe(dataset: Dataset) -> pb.Dataset:
    splits = [
        pb.Split(
            name=split.name,
            num_samples=split.num_samples,
            image_shape=split.image_shape,
            num_classes=split.num_classes,
            fingerprint=split.fingerprint,
            label_bytes=split.label_bytes,
        )
        for split in dataset.splits.values()
    ]
    return pb.Dataset(name=dataset.name, splits=splits, class_names=dataset.class_names)


class _Writing:
    """
    Writes the batches of one stream in wire format.

    One message object serves all of them: making it anew takes longer than filling it.

    Attributes:
        has_begun: Whether there was a message; the first one tells shape and type of the images.
    """

    def __init__(self, wanted: _Wanted) -> None:
        self.has_begun = False
        self._plan = wanted.plan
        self._fields = pb.Batch(image_shape=wanted.transform.image_shape, data_type=_DATA_TYPES[wanted.transform.dtype])

    def message(self, batch: AssembledBatch, offered_seconds: float = 0.0) -> bytes:
        """
        Return a batch as it goes out.

        Args:
            batch: Read before the next one is asked for.
            offered_seconds: How long the message before it waited to be taken.
        """
        share, fields = batch.share, self._fields
        fields.position = share.position
        fields.next_position = share.next_position
        fields.num_samples = len(batch.indices)
        fields.labels = batch.labels.tobytes()
        fields.crc32c = batch.crc32c
        fields.end_of_epoch = share.end_of_epoch
        timings = fields.timings
        _set(timings.read, batch.read_seconds)
        _set(timings.transform, batch.transform_seconds)
        _set(timings.wait, max(offered_seconds, time.perf_counter() - batch.ready_at))
        # Of the batch before, too, where that was not packed.
        fields.indices[:] = () if batch.packed_indices is not None else batch.indices.tolist()
        message = wire.encode(fields, batch.packed_indices, batch.images.data)
        if not self.has_begun:
            self.has_begun = True
            fields.ClearField("image_shape")
            fields.ClearField("data_type")
        return message

    def farewell(self, position: int) -> bytes:
        """Return the last word of a replica that goes away: go on at ``position`` elsewhere."""
        self._fields.draining = True
        return self.message(batches.closing(self._plan, position))


def _set(duration: Duration, seconds: float) -> None:
    duration.seconds, duration.nanos = divmod(int(seconds * 1e9), 1_000_000_000)

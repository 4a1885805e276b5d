"""Each RPC: check the request, call inward, answer; and the one table from our errors to gRPC status."""

import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import grpc
import numpy as np
from google.protobuf.duration_pb2 import Duration

from protos import mnist_pb2
from protos.streamer.v1 import sample_service_pb2 as pb
from streamer import batches
from streamer.batches import AssembledBatch
from streamer.errors import (
    FingerprintMismatchError,
    InvalidPlanError,
    PlanError,
    PositionError,
    TooManyStreamsError,
    UnknownDatasetError,
)
from streamer.metrics import StreamerMetrics
from streamer.order import Order, check_plan, shares
from streamer.plan import Plan, Remainder
from streamer.settings import StreamerSettings
from streamer.source import Dataset, Split

Context = grpc.aio.ServicerContext[Any, Any]

_STATUS: Mapping[type[PlanError], grpc.StatusCode] = {
    UnknownDatasetError: grpc.StatusCode.NOT_FOUND,
    InvalidPlanError: grpc.StatusCode.INVALID_ARGUMENT,
    PositionError: grpc.StatusCode.OUT_OF_RANGE,
    FingerprintMismatchError: grpc.StatusCode.FAILED_PRECONDITION,
    TooManyStreamsError: grpc.StatusCode.RESOURCE_EXHAUSTED,
}

_REMAINDERS = {
    pb.REMAINDER_UNSPECIFIED: Remainder.KEEP,
    pb.REMAINDER_KEEP: Remainder.KEEP,
    pb.REMAINDER_DROP: Remainder.DROP,
}

_Message = tuple[int, bytes]
"""How many samples, and what goes out for them, already in wire format."""

# Samples looked up at once for a stream of single ones.
_BLOCK_SAMPLES = 4096


class StreamerServicer:
    """
    Answers MnistService and SampleService from data sets in memory.

    Holds no state about readers but how many streams are open.
    """

    def __init__(self, settings: StreamerSettings, datasets: Mapping[str, Dataset], metrics: StreamerMetrics) -> None:
        self._settings = settings
        self._datasets = datasets
        self._metrics = metrics
        metrics.add_datasets(datasets)
        self._active_streams = 0
        self._draining = False

    @property
    def active_streams(self) -> int:
        """Streams open right now."""
        return self._active_streams

    def drain(self) -> None:
        """Let every stream of batches end with a closing message before its next batch."""
        self._draining = True

    # The method names below are the contract's.

    async def ListDatasets(self, request: pb.ListDatasetsRequest, context: Context) -> pb.ListDatasetsResponse:
        """Describe what is served."""
        return pb.ListDatasetsResponse(datasets=[_describe(dataset) for dataset in self._datasets.values()])

    def StreamBatches(self, request: pb.StreamBatchesRequest, context: Context) -> AsyncIterator[bytes]:
        """Stream one rank's batches."""
        return self._stream(request.plan.dataset, self._batches(request), context)

    async def PullBatches(
        self, requests: AsyncIterator[pb.PullBatchesRequest], context: Context
    ) -> AsyncIterator[bytes]:
        """Refuse: this version grants no byte credits."""
        await context.abort(
            grpc.StatusCode.UNIMPLEMENTED,
            "PullBatches: byte credits come with a later version; StreamBatches serves the same batches",
        )
        yield b""

    def GetTrainingSamples(self, request: mnist_pb2.DataRequest, context: Context) -> AsyncIterator[bytes]:
        """Stream samples one by one."""
        return self._stream(request.dataset or "mnist", self._samples(request), context)

    async def _stream(self, dataset: str, messages: Iterator[_Message], context: Context) -> AsyncIterator[bytes]:
        try:
            with self._place(), self._metrics.sending(dataset) as sending:
                for num_samples, message in messages:
                    sending.offer()
                    yield message
                    sending.count(num_samples, len(message))
        except PlanError as error:
            await _refuse(context, error)

    @contextmanager
    def _place(self) -> Iterator[None]:
        if self._active_streams >= self._settings.max_streams:
            raise TooManyStreamsError(self._settings.max_streams)
        self._active_streams += 1
        try:
            yield
        finally:
            self._active_streams -= 1

    def _batches(self, request: pb.StreamBatchesRequest) -> Iterator[_Message]:
        plan = _plan_of(request.plan)
        split = self._split(plan.dataset, plan.split, "plan.split")
        self._check(plan, split)
        ahead = batches.assemble(
            split,
            plan,
            shares(
                plan,
                split.num_samples,
                start_position=request.start_position,
                end_position=request.end_position,
            ),
        )
        batch, is_first = next(ahead, None), True
        while batch is not None:
            if self._draining:
                yield 0, _encode(batches.closing(plan, split, batch.share.position), split, is_first, draining=True)
                return
            message = len(batch.indices), _encode(batch, split, is_first)
            # One ahead: it is ready while HTTP/2 waits for the reader to take this one.
            batch, is_first = next(ahead, None), False
            yield message

    def _check(self, plan: Plan, split: Split) -> None:
        limit = batches.max_samples(split, self._settings.max_message_bytes)
        check_plan(plan, max_batch_samples=min(limit, self._settings.max_batch_samples))
        if plan.transform:
            raise InvalidPlanError("plan.transform", f"{plan.transform[:64]!r} is not known; known are none yet")
        if plan.fingerprint and plan.fingerprint != split.fingerprint:
            raise FingerprintMismatchError(
                f"plan.fingerprint: this replica serves {split.fingerprint.hex()}, not {plan.fingerprint[:32].hex()}; "
                "a position means nothing in other data: start the run anew, or ask a replica with its data"
            )

    def _samples(self, request: mnist_pb2.DataRequest) -> Iterator[_Message]:
        split = self._split(request.dataset or "mnist", request.split or "train", "split")
        length = (request.epochs or 1) * split.num_samples
        if request.start > length:
            raise PositionError("start", request.start, length)
        stop = min(length, request.start + request.limit) if request.limit else length
        seed = request.seed if request.HasField("seed") else None
        yield from _samples(split, seed, request.start, stop)

    def _split(self, dataset: str, split: str, field: str) -> Split:
        if dataset not in self._datasets:
            raise UnknownDatasetError(dataset, self._datasets)
        splits = self._datasets[dataset].splits
        if split not in splits:
            raise InvalidPlanError(field, f"{split[:64]!r} is no split; allowed are {' and '.join(splits)}")
        return splits[split]


async def _refuse(context: Context, error: PlanError) -> NoReturn:
    await context.abort(_STATUS[type(error)], str(error))


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
            label_bytes=split.labels.itemsize,
        )
        for split in dataset.splits.values()
    ]
    return pb.Dataset(name=dataset.name, splits=splits, class_names=dataset.class_names)


def _samples(split: Split, seed: int | None, start: int, stop: int) -> Iterator[_Message]:
    """Each epoch in its own order; blocks never cross from one epoch into the next."""
    while start < stop:
        epoch, first = divmod(start, split.num_samples)
        last = min(split.num_samples, first + _BLOCK_SAMPLES, first + stop - start)
        order = Order(split.num_samples, fingerprint=split.fingerprint, seed=seed, epoch=epoch)
        indices = order.indices(np.arange(first, last))
        labels = split.labels[indices].tolist()
        for index, label in zip(indices.tolist(), labels, strict=True):
            sample = mnist_pb2.Sample(image=split.images[index].tobytes(), label=label, index=index)
            yield 1, sample.SerializeToString()
        start += last - first


def _encode(batch: AssembledBatch, split: Split, is_first: bool, *, draining: bool = False) -> bytes:
    """
    Write a Batch in wire format.

    Encoded messages can be joined end to end (https://protobuf.dev/programming-guides/encoding/#last-one-wins), so
    the pixels are copied once, from the array to the message, where protobuf would copy them three times.
    """
    share = batch.share
    fields = pb.Batch(
        position=share.position,
        next_position=share.next_position,
        num_samples=len(batch.indices),
        labels=batch.labels.tobytes(),
        indices=batch.indices.tolist(),
        crc32c=batch.crc32c,
        end_of_epoch=share.end_of_epoch,
        timings=pb.Timings(
            read=_duration(batch.read_seconds),
            transform=Duration(),
            wait=_duration(time.perf_counter() - batch.ready_at),
        ),
        draining=draining,
    )
    if is_first:
        fields.image_shape.extend(split.image_shape)
        fields.data_type = pb.DATA_TYPE_UINT8
    if not len(batch.indices):
        return fields.SerializeToString()
    return b"".join((fields.SerializeToString(), _images_prefix(batch.images.nbytes), batch.images.data))


def _images_prefix(num_bytes: int) -> bytes:
    """Field number and length before the bytes of ``Batch.images``."""
    prefix = bytearray(((pb.Batch.IMAGES_FIELD_NUMBER << 3) | 2,))
    while num_bytes > 0x7F:
        prefix.append((num_bytes & 0x7F) | 0x80)
        num_bytes >>= 7
    prefix.append(num_bytes)
    return bytes(prefix)


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(int(seconds * 1e9))
    return duration

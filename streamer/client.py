"""
The async client of the streamer, and a bridge from it to a plain ``for`` loop.

::

    async with SampleClient("localhost:50052") as client:
        async for batch in client.batches(Plan(dataset="mnist", seed=7, epoch=0)):
            train_on(batch.images, batch.labels)
"""

import asyncio
import itertools
import math
import queue
import random
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, NoReturn, Self

import grpc
import numpy as np
import structlog
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2, health_pb2_grpc
from numpy.typing import NDArray

from protos.streamer.v1 import sample_service_pb2 as pb
from protos.streamer.v1.sample_service_pb2_grpc import SampleServiceStub
from rpc.address import is_loopback
from streamer import wire
from streamer.checksum import batch_checksum
from streamer.errors import (
    DataChangedError,
    ReaderError,
    RefusedError,
    SampleCorruptError,
    UnreachableError,
)
from streamer.plan import Plan, Remainder

__all__ = [
    "Batch",
    "BatchReader",
    "DatasetInfo",
    "Plan",
    "Remainder",
    "Retry",
    "SampleClient",
    "SplitInfo",
]

log = structlog.get_logger(__name__)

_UNARY_SECONDS = 10.0
_DTYPES: Mapping[int, np.dtype[Any]] = {
    pb.DATA_TYPE_UINT8: np.dtype("<u1"),
    pb.DATA_TYPE_FLOAT16: np.dtype("<f2"),
    pb.DATA_TYPE_FLOAT32: np.dtype("<f4"),
}
_STREAM_BATCHES = f"/{pb.DESCRIPTOR.services_by_name['SampleService'].full_name}/StreamBatches"

# What another attempt may cure: the replica went away, ended the call as it stopped or because nobody read, or hangs.
_BROKEN = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.ABORTED,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitInfo:
    """What a streamer says about a split."""

    name: str
    num_samples: int
    image_shape: tuple[int, ...]
    """Height, width, and channels when more than one."""
    num_classes: int
    fingerprint: bytes
    """Equal wherever the same samples lie in the same order."""
    label_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetInfo:
    """What a streamer says about a data set."""

    name: str
    splits: Mapping[str, SplitInfo]
    class_names: tuple[str, ...]
    """By label; empty when the classes are plain numbers."""


@dataclass(frozen=True, eq=False, slots=True)
class Batch:
    """A batch that arrived whole: checksum, position and shape are checked."""

    images: NDArray[Any]
    """Shape (N, height, width), and channels when more than one; uint8 unless transformed; read-only."""
    labels: NDArray[np.int64]
    """Shape (N,)."""
    indices: NDArray[np.int64]
    """Of the samples in the split's file; shape (N,)."""
    position: int
    """Global position of the global batch this is a share of."""
    next_position: int
    """Where to resume from once this batch is consumed."""
    end_of_epoch: bool
    """Nothing follows in this epoch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Retry:
    """How long to go on about a stream that breaks; every batch that arrives starts the count anew."""

    max_attempts: int = 20
    """Openings of a stream without a batch in between; 1 is no second try."""
    first_batch_seconds: float = 10.0
    """From the start to the first batch."""
    next_batch_seconds: float = 60.0
    """From one batch to the next, however often the stream breaks in between."""
    stall_seconds: float = 20.0
    """A stream that is silent for so long counts as broken."""
    first_delay_seconds: float = 0.1
    """Before the second attempt; doubled for each one after it and drawn from its upper half at random."""
    max_delay_seconds: float = 5.0
    """No delay is longer."""

    def delay_seconds(self, attempt: int) -> float:
        """Return how long to wait before an attempt; the first one is 1."""
        longest = min(self.max_delay_seconds, self.first_delay_seconds * 2.0 ** min(attempt - 2, 30))
        return longest * random.uniform(0.5, 1.0)


@dataclass(frozen=True, slots=True)
class _Form:
    """What the samples of one stream look like."""

    image_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    label_bytes: int


class _BrokenError(Exception):
    """The stream ended early; another attempt may cure it."""


class SampleClient:
    """
    Reads samples from one streamer; use as ``async with``.

    Any number of streams may be open at once; they share one connection.

    Args:
        address: ``host:port``.
        retry: What to do about streams that break.
        max_message_bytes: Largest message accepted; at least what the streamer sends (32 MiB by default).
    """

    def __init__(self, address: str, *, retry: Retry | None = None, max_message_bytes: int = 32 * 1024**2) -> None:
        self._address = address
        self._retry = retry or Retry()
        self._max_message_bytes = max_message_bytes
        self._channel: grpc.aio.Channel | None = None

    async def __aenter__(self) -> Self:
        options = _options(self._address, self._max_message_bytes)
        self._channel = grpc.aio.insecure_channel(self._address, options=options)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()

    async def wait_ready(self, timeout_seconds: float) -> None:
        """
        Wait until the streamer says that it serves, through ``grpc.health.v1``.

        Raises:
            UnreachableError: It does not within ``timeout_seconds``.
        """
        problem = "no answer"
        try:
            async with asyncio.timeout(timeout_seconds):
                for attempt in itertools.count(1):
                    try:
                        # The first attempt fails at once where nothing listens, and says why.
                        return await self._watch_until_serving(wait_for_connection=attempt > 1)
                    except _BrokenError as error:
                        problem = str(error)
                    await asyncio.sleep(self._retry.delay_seconds(attempt + 1))
        except TimeoutError as error:
            raise UnreachableError(self._address, f"not ready after {timeout_seconds:g} s ({problem})") from error

    async def datasets(self) -> list[DatasetInfo]:
        """
        List what the streamer serves.

        Raises:
            UnreachableError: Nothing answers within 10 s.
            RefusedError: The streamer answers with an error.
        """
        try:
            return await self._list_datasets()
        except _BrokenError as error:
            raise UnreachableError(self._address, str(error)) from error

    async def batches(
        self, plan: Plan, *, start_position: int = 0, end_position: int = 0
    ) -> AsyncGenerator[Batch, None]:
        """
        Read one rank's batches of an epoch, in order, from ``start_position`` on.

        A stream that breaks is opened again where it broke: no batch comes twice or not at all, and none that
        is damaged. The data is pinned at the start: a replica with other data is refused, not read.
        Closing the generator, cancelling its task, or leaving the loop ends the call. To be sure when, wrap it
        in ``contextlib.aclosing``.

        Args:
            plan: The order and this rank's share of it.
            start_position: The cursor: ``next_position`` of the last batch consumed.
            end_position: Only global batches that begin before it; 0 means to the end of the epoch.

        Raises:
            RefusedError: The plan or the position cannot be served; the message names the field.
            DataChangedError: The streamer has other data than the plan, or than at the start.
            UnreachableError: Nothing answers, for longer than :class:`Retry` allows.
            SampleCorruptError: The same batch arrived damaged at every attempt.
        """
        cursor, info = start_position, None
        attempts, deadline = 0, time.monotonic() + self._retry.first_batch_seconds
        while True:
            try:
                if info is None:
                    info = await self._split_info(plan)
                    plan = replace(plan, fingerprint=plan.fingerprint or info.fingerprint)
                async with aclosing(self._read_stream(plan, info, cursor, end_position)) as stream:
                    async for batch in stream:
                        attempts, cursor = 0, batch.next_position
                        if len(batch.labels):
                            yield batch
                        if batch.end_of_epoch:
                            return
                        deadline = time.monotonic() + self._retry.next_batch_seconds
                if end_position and cursor >= end_position:
                    return
                raise _BrokenError("the stream ended before the epoch did")
            except (_BrokenError, SampleCorruptError) as error:
                attempts += 1
                await self._wait_for_another_attempt(error, attempts, deadline, cursor)

    async def _wait_for_another_attempt(self, error: Exception, attempts: int, deadline: float, cursor: int) -> None:
        remaining = deadline - time.monotonic()
        if attempts >= self._retry.max_attempts or remaining <= 0:
            if isinstance(error, SampleCorruptError):
                raise error
            raise UnreachableError(self._address, f"{error} ({attempts} attempts)") from error
        delay = min(remaining, self._retry.delay_seconds(attempts + 1))
        log.warning("stream broke", address=self._address, cursor=cursor, problem=str(error), retry_in=round(delay, 2))
        await asyncio.sleep(delay)

    async def _list_datasets(self) -> list[DatasetInfo]:
        stub = SampleServiceStub(self._open_channel())
        try:
            answer = await stub.ListDatasets(pb.ListDatasetsRequest(), timeout=_UNARY_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise _translated(error, self._address) from error
        return [_dataset_info(dataset) for dataset in answer.datasets]

    async def _split_info(self, plan: Plan) -> SplitInfo:
        datasets = {dataset.name: dataset for dataset in await self._list_datasets()}
        if plan.dataset not in datasets:
            known = ", ".join(sorted(datasets)) or "none"
            raise RefusedError(self._address, "NOT_FOUND", f"dataset: no {plan.dataset!r}; known are {known}")
        splits = datasets[plan.dataset].splits
        if plan.split not in splits:
            known = ", ".join(sorted(splits))
            raise RefusedError(self._address, "INVALID_ARGUMENT", f"plan.split: no {plan.split!r}; known are {known}")
        return splits[plan.split]

    async def _read_stream(
        self, plan: Plan, info: SplitInfo, cursor: int, end_position: int
    ) -> AsyncGenerator[Batch, None]:
        """Read one call to its end, or to the message that says it goes no further here."""
        request = pb.StreamBatchesRequest(plan=_plan_message(plan), start_position=cursor, end_position=end_position)
        # Left as bytes: see wire.py.
        stream: Any = self._open_channel().unary_stream(_STREAM_BATCHES, pb.StreamBatchesRequest.SerializeToString)
        call = stream(request)
        # Told in the first message, as a transform may change them.
        shape, dtype = info.image_shape, _DTYPES[pb.DATA_TYPE_UINT8]
        try:
            while (data := await self._read(call)) is not None:
                try:
                    message, view = wire.decode(data)
                except DecodeError:
                    self._refuse(cursor, "not a message that can be read")
                if message.draining:
                    raise _BrokenError("the replica is going away")
                if message.image_shape:
                    shape = tuple(message.image_shape)
                if message.data_type:
                    dtype = self._dtype_of(message.data_type, cursor)
                images = np.frombuffer(view, np.uint8)
                yield self._checked(message, images, plan, cursor, _Form(shape, dtype, info.label_bytes))
                cursor = message.next_position
        finally:
            # An abandoned call is never cancelled by grpc.aio itself (grpc#43462).
            call.cancel()

    async def _read(self, call: Any) -> bytes | None:
        """Read the next message; None at the end of a stream that ended well."""
        seconds = self._retry.stall_seconds
        try:
            async with asyncio.timeout(seconds):
                message = await call.read()
        except TimeoutError as error:
            raise _BrokenError(f"no batch for {seconds:g} s") from error
        except grpc.aio.AioRpcError as error:
            raise _translated(error, self._address) from error
        return None if message is grpc.aio.EOF else message

    def _checked(self, message: pb.Batch, images: NDArray[np.uint8], plan: Plan, cursor: int, form: "_Form") -> Batch:
        labels = message.labels
        indices = np.fromiter(message.indices, np.uint64, len(message.indices))
        crc = batch_checksum(
            plan,
            position=message.position,
            next_position=message.next_position,
            indices=indices,
            images=images,
            labels=labels,
        )
        if crc != message.crc32c:
            self._refuse(cursor, f"CRC-32C is {crc:08x}, the message says {message.crc32c:08x}")
        if message.position != cursor or message.next_position < cursor:
            self._refuse(cursor, f"arrived as {message.position} to {message.next_position}")
        size = message.num_samples
        image_bytes = math.prod(form.image_shape) * form.dtype.itemsize
        if len(indices) != size or len(images) != size * image_bytes or len(labels) != size * form.label_bytes:
            self._refuse(cursor, f"{len(images)} bytes of images and {len(labels)} of labels for {size} samples")
        return Batch(
            images=images.view(form.dtype).reshape(size, *form.image_shape),
            labels=np.frombuffer(labels, f"<u{form.label_bytes}").astype(np.int64),
            indices=indices.astype(np.int64),
            position=message.position,
            next_position=message.next_position,
            end_of_epoch=message.end_of_epoch,
        )

    def _dtype_of(self, data_type: int, position: int) -> np.dtype[Any]:
        try:
            return _DTYPES[data_type]
        except KeyError:
            self._refuse(position, f"pixels of the unknown type {data_type}")

    def _refuse(self, position: int, problem: str) -> NoReturn:
        raise SampleCorruptError(self._address, position, problem)

    async def _watch_until_serving(self, *, wait_for_connection: bool) -> None:
        stub = health_pb2_grpc.HealthStub(self._open_channel())
        call = stub.Watch(health_pb2.HealthCheckRequest(), wait_for_ready=wait_for_connection)
        try:
            async for answer in call:
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            raise _BrokenError("health ended")
        except grpc.aio.AioRpcError as error:
            raise _BrokenError(_details(error)) from error
        finally:
            call.cancel()

    def _open_channel(self) -> grpc.aio.Channel:
        if self._channel is None:
            raise ReaderError("SampleClient is closed: use it inside `async with SampleClient(...) as client`")
        return self._channel


class BatchReader:
    """
    Reads one rank's batches of an epoch in a plain ``for`` loop, some of them ahead of it.

    A thread of its own runs the client; at most ``prefetch_batches`` wait in memory. Leaving the loop or the ``with``
    in any way, KeyboardInterrupt included, ends the call and the thread. One reader is one pass.

    ::

        with BatchReader("localhost:50052", Plan(dataset="mnist", seed=7)) as reader:
            for batch in reader:
                train_on(batch.images, batch.labels)

    Args:
        address: ``host:port`` of the streamer.
        plan: The order and this rank's share of it.
        start_position: The cursor to go on from.
        prefetch_batches: At least 1.
        retry: What to do about streams that break.
    """

    def __init__(
        self,
        address: str,
        plan: Plan,
        *,
        start_position: int = 0,
        prefetch_batches: int = 8,
        retry: Retry | None = None,
    ) -> None:
        if prefetch_batches < 1:
            raise ValueError(f"prefetch_batches: {prefetch_batches}; at least 1 is allowed")
        self._client = SampleClient(address, retry=retry)
        self._plan = plan
        self._start_position = start_position
        self._prefetch_batches = prefetch_batches
        self._arrived: queue.SimpleQueue[Batch | BaseException | None] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._room: asyncio.Semaphore | None = None
        self._started = threading.Event()
        self._thread: threading.Thread | None = None
        self._waited_seconds = 0.0

    @property
    def waited_seconds(self) -> float:
        """Time the loop has spent waiting for batches so far."""
        return self._waited_seconds

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[Batch]:
        """
        Read the batches, once.

        Raises:
            StreamerError: What :meth:`SampleClient.batches` raises.
        """
        if self._thread is not None:
            raise ReaderError("a BatchReader is read once: make another one for another pass")
        # Daemon: an interpreter that dies in the middle must not wait for it.
        self._thread = threading.Thread(target=self._run, name="sluice-batch-reader", daemon=True)
        self._thread.start()
        return self._take()

    def close(self) -> None:
        """End the call and the thread; harmless when done already."""
        if self._thread is None or not self._thread.is_alive():
            return
        self._started.wait()
        if self._task is not None:
            self._tell(self._task.cancel)
        self._thread.join()

    def _take(self) -> Iterator[Batch]:
        try:
            while True:
                started = time.perf_counter()
                item = self._arrived.get()
                self._waited_seconds += time.perf_counter() - started
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                assert self._room is not None
                self._tell(self._room.release)
                yield item
        finally:
            self.close()

    def _tell(self, what: Callable[[], object]) -> None:
        assert self._loop is not None
        # Closed already: the thread has read all there was.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(what)

    def _run(self) -> None:
        end: BaseException | None = None
        try:
            asyncio.run(self._pump())
        except asyncio.CancelledError:
            pass
        except BaseException as error:
            end = error
        finally:
            self._started.set()
            self._arrived.put(end)

    async def _pump(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._room = asyncio.Semaphore(self._prefetch_batches)
        self._started.set()
        async with self._client as client:
            stream = client.batches(self._plan, start_position=self._start_position)
            try:
                await self._room.acquire()
                async for batch in stream:
                    self._arrived.put(batch)
                    await self._room.acquire()
            finally:
                await stream.aclose()


def _translated(error: grpc.aio.AioRpcError, address: str) -> Exception:
    """Translate what a call ended with: to be tried again, or the streamer's refusal."""
    if error.code() in _BROKEN:
        return _BrokenError(_details(error))
    kind = DataChangedError if error.code() is grpc.StatusCode.FAILED_PRECONDITION else RefusedError
    return kind(address, error.code().name, _details(error))


def _details(error: grpc.aio.AioRpcError) -> str:
    return error.details() or error.code().name


def _dataset_info(message: pb.Dataset) -> DatasetInfo:
    splits = {
        split.name: SplitInfo(
            name=split.name,
            num_samples=split.num_samples,
            image_shape=tuple(split.image_shape),
            num_classes=split.num_classes,
            fingerprint=split.fingerprint,
            label_bytes=split.label_bytes,
        )
        for split in message.splits
    }
    return DatasetInfo(name=message.name, splits=splits, class_names=tuple(message.class_names))


def _plan_message(plan: Plan) -> pb.Plan:
    return pb.Plan(
        dataset=plan.dataset,
        split=plan.split,
        seed=plan.seed,
        epoch=plan.epoch,
        world_size=plan.world_size,
        rank=plan.rank,
        batch_size=plan.batch_size,
        remainder=pb.REMAINDER_DROP if plan.remainder is Remainder.DROP else pb.REMAINDER_KEEP,
        transform=plan.transform,
        fingerprint=plan.fingerprint,
    )


def _options(address: str, max_message_bytes: int) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        # A reader that stops holds less than 1 MB, where gRPC's own guess at the link lets 6 to 8 MB come; measured on
        # loopback at the same rate. Over a long link the window caps the rate at 512 KiB in each round trip.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", 512 * 1024),
        ("grpc.http2.max_frame_size", 256 * 1024),
        # A streamer whose machine is gone is noticed within 30 s.
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),
        # The pace of attempts is Retry's; gRPC's own would grow to two minutes.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 1_000),
        ("grpc.max_reconnect_backoff_ms", 1_000),
        # Clients in one process have a connection each: one core serves one connection.
        ("grpc.use_local_subchannel_pool", 1),
        # Without it, http_proxy in the environment takes even the calls to this machine.
        ("grpc.enable_http_proxy", int(not is_loopback(address))),
    ]

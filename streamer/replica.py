"""One streamer as a reader sees it: batches that are checked, and calls that end well, break, or are refused."""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn

import grpc
import numpy as np
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2, health_pb2_grpc
from numpy.typing import NDArray

from protos.streamer.v1 import sample_service_pb2 as pb
from protos.streamer.v1.sample_service_pb2_grpc import SampleServiceStub
from rpc.address import is_loopback
from streamer import wire
from streamer.checksum import REQUEST_CHECKSUM, batch_checksum, request_checksum
from streamer.errors import DataChangedError, PositionError, ReaderError, RefusedError, SampleCorruptError
from streamer.lookup import Found, look_up
from streamer.order import shares
from streamer.plan import Plan, Remainder
from streamer.stalls import Timings

_UNARY_SECONDS = 10.0
# A streamer ends a call as soon as its reader half-closes; nobody waits longer for that.
_GOODBYE_SECONDS = 1.0
_PULL_BATCHES = f"/{pb.DESCRIPTOR.services_by_name['SampleService'].full_name}/PullBatches"

_DTYPES: Mapping[int, np.dtype[Any]] = {
    pb.DATA_TYPE_UINT8: np.dtype("<u1"),
    pb.DATA_TYPE_FLOAT16: np.dtype("<f2"),
    pb.DATA_TYPE_FLOAT32: np.dtype("<f4"),
}

# What another attempt may cure: the replica went away, ended the call as it stopped or because nobody read, or hangs.
_BROKEN = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.ABORTED,
)
# How grpc reports a status that crossed with a grant on its way: the status itself is lost, and asking again tells it.
_CROSSED = "Internal error from Core"


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
    decode_seconds: float = field(default=0.0, repr=False)
    """Spent on this batch here, decoding and checking it."""
    _timings: pb.Timings | None = field(default=None, repr=False)

    @property
    def timings(self) -> Timings:
        """Where its time went, on the streamer and here."""
        told = self._timings
        if told is None:
            return Timings(decode_seconds=self.decode_seconds)
        return Timings(
            read_seconds=_seconds(told.read),
            transform_seconds=_seconds(told.transform),
            held_seconds=_seconds(told.wait),
            decode_seconds=self.decode_seconds,
        )


class BrokenError(Exception):
    """A call ended early; another attempt, here or elsewhere, may cure it."""


@dataclass(frozen=True, slots=True)
class _Form:
    """What the samples of one stream look like."""

    image_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    label_bytes: int
    image_bytes: int = field(init=False)
    label_type: np.dtype[Any] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_bytes", math.prod(self.image_shape) * self.dtype.itemsize)
        object.__setattr__(self, "label_type", np.dtype(f"<u{self.label_bytes}"))


class _Watch:
    """
    Cancels a call when a read of it, in one of its ``with`` blocks, takes too long.

    One timer, as one for each message costs more than checking the message.
    """

    def __init__(self, call: Any, seconds: float) -> None:
        self._call = call
        self._seconds = seconds
        self._ran_out = False
        self._since: float | None = None
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(seconds, self._look)

    def __enter__(self) -> None:
        self._since = self._loop.time()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self._since = None
        if self._ran_out and kind is not None:
            task = asyncio.current_task()
            # The caller's own cancellation goes before.
            if task is None or not task.cancelling():
                raise BrokenError(_silent_for(self._seconds)) from error

    def end(self) -> None:
        """Cancel nothing any more."""
        self._timer.cancel()

    def _look(self) -> None:
        waited = 0.0 if self._since is None else self._loop.time() - self._since
        if self._since is not None and waited >= self._seconds:
            self._ran_out = True
            self._call.cancel()
        else:
            self._timer = self._loop.call_later(self._seconds - waited, self._look)


class Replica:
    """
    A channel to one streamer, from :meth:`open` to :meth:`close`, in one event loop.

    Args:
        address: ``host:port``.
        max_message_bytes: Largest message accepted.
        window_bytes: Images and labels that may be on their way in each stream, beside one batch.
        stall_seconds: A stream that is silent for so long counts as broken.
    """

    def __init__(self, address: str, *, max_message_bytes: int, window_bytes: int, stall_seconds: float) -> None:
        self.address = address
        self._max_message_bytes = max_message_bytes
        self._window_bytes = window_bytes
        self._stall_seconds = stall_seconds
        self._channel: grpc.aio.Channel | None = None

    def open(self) -> None:
        """Make the channel; it connects when it is first used."""
        options = _options(self.address, self._max_message_bytes)
        self._channel = grpc.aio.insecure_channel(self.address, options=options)

    async def close(self) -> None:
        """Cancel what is under way."""
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()

    async def pause(self, seconds: float) -> None:
        """Wait before it is asked again; less where it was out of reach and is back sooner."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._returned()

    async def _returned(self) -> None:
        channel, was_away = self._open_channel(), False
        while True:
            state = channel.get_state(try_to_connect=True)
            if was_away and state is grpc.ChannelConnectivity.READY:
                return
            was_away = was_away or state is grpc.ChannelConnectivity.TRANSIENT_FAILURE
            await channel.wait_for_state_change(state)

    async def datasets(self) -> list[DatasetInfo]:
        """
        List what it serves.

        Raises:
            BrokenError: No answer.
            RefusedError: It answers with an error.
        """
        stub = SampleServiceStub(self._open_channel())
        try:
            answer = await stub.ListDatasets(pb.ListDatasetsRequest(), timeout=_UNARY_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise self._translated(error) from error
        # What grpc.aio makes of an answer that cannot be parsed.
        if answer is None:
            raise BrokenError("an answer that cannot be read")
        return [_dataset_info(dataset) for dataset in answer.datasets]

    async def split_info(self, plan: Plan) -> SplitInfo:
        """
        Return what it says of the plan's split; errors are those of :meth:`datasets`.

        Asked twice: this answer has no checksum, and an epoch is as long as it says.
        """
        channel = self._channel
        try:
            answers = await asyncio.gather(self.datasets(), self.datasets())
            info, again = (self._info(plan, answer) for answer in answers)
            if info != again:
                raise BrokenError("two answers that differ")
        except (BrokenError, RefusedError):
            self._renew(channel)
            raise
        return info

    def _info(self, plan: Plan, answer: list[DatasetInfo]) -> SplitInfo:
        datasets = {dataset.name: dataset for dataset in answer}
        if plan.dataset not in datasets:
            known = ", ".join(sorted(datasets)) or "none"
            raise RefusedError(self.address, "NOT_FOUND", f"dataset: no {plan.dataset!r}; known are {known}")
        splits = datasets[plan.dataset].splits
        if plan.split not in splits:
            known = ", ".join(sorted(splits))
            raise RefusedError(self.address, "INVALID_ARGUMENT", f"plan.split: no {plan.split!r}; known are {known}")
        return splits[plan.split]

    async def wait_serving(self, *, wait_for_connection: bool) -> None:
        """
        Wait until its health says that it serves.

        Raises:
            BrokenError: It cannot be reached, or went away.
        """
        stub = health_pb2_grpc.HealthStub(self._open_channel())
        call = stub.Watch(health_pb2.HealthCheckRequest(), wait_for_ready=wait_for_connection)
        try:
            async for answer in call:
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            raise BrokenError("health ended")
        except grpc.aio.AioRpcError as error:
            raise BrokenError(_details(error)) from error
        finally:
            call.cancel()

    async def read(
        self, plan: Plan, info: SplitInfo, start_position: int, end_position: int
    ) -> AsyncGenerator[Batch, None]:
        """
        Read batches by one call of PullBatches, to the end of the epoch or of the range; closing it ends the call.

        What is yielded counts as taken when the next one is asked for: only then more is granted.

        Args:
            plan: With the fingerprint that is expected.
            info: Of the plan's split.
            start_position: Of the first global batch.
            end_position: Only global batches that begin before it; 0 means to the end of the epoch.

        Raises:
            BrokenError: The call ended before that.
            SampleCorruptError: A batch is damaged or out of place.
            RefusedError: The plan or the position cannot be served.
        """
        # Answers are left as bytes: see wire.py.
        channel = self._open_channel()
        pull: Any = channel.stream_stream(_PULL_BATCHES, pb.PullBatchesRequest.SerializeToString)
        # Told in the first message, as a transform may change them.
        form = _Form(info.image_shape, _DTYPES[pb.DATA_TYPE_UINT8], info.label_bytes)
        opening = pb.StreamBatchesRequest(
            plan=_plan_message(plan), start_position=start_position, end_position=end_position
        )
        planned = _planned(plan, info, start_position, end_position)
        call, owed, cursor = pull(metadata=_checksum_of(opening)), 0, start_position
        watch = _Watch(call, self._stall_seconds)
        try:
            await self._send(call, pb.PullBatchesRequest(open=opening))
            await self._send(call, pb.PullBatchesRequest(grant_bytes=self._window_bytes))
            while True:
                found = next(planned, None)
                message, arrived_at = await self._receive(call, watch, cursor, found)
                form = self._form(message.fields, form, cursor)
                batch = self._checked(message, plan, cursor, form, arrived_at)
                self._hold_against(found, batch)
                if batch.end_of_epoch or 0 < end_position <= batch.next_position:
                    # Before the reader has its batch, so that nobody waits for the streamer's end of the call.
                    await _half_close(call)
                    yield batch
                    await _hear_end(call)
                    return
                yield batch
                cursor = batch.next_position
                owed += len(message.images) + len(message.fields.labels)
                if 2 * owed >= self._window_bytes:
                    await self._send(call, pb.PullBatchesRequest(grant_bytes=owed))
                    owed = 0
        except (BrokenError, SampleCorruptError, RefusedError):
            self._renew(channel)
            raise
        finally:
            watch.end()
            # An abandoned call is never cancelled by grpc.aio itself (grpc#43462).
            call.cancel()

    async def _send(self, call: Any, request: pb.PullBatchesRequest) -> None:
        # Not by a watch: to cancel the call wakes no write to a peer that takes connections and answers nothing.
        try:
            async with asyncio.timeout(self._stall_seconds):
                # A call that has ended takes nothing; why it has is what reading tells.
                with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                    await call.write(request)
        except TimeoutError as error:
            raise BrokenError(_silent_for(self._stall_seconds)) from error

    async def _receive(
        self, call: Any, watch: "_Watch", cursor: int, found: Found | None
    ) -> tuple[wire.Message, float]:
        try:
            with watch:
                data = await call.read()
        except grpc.aio.AioRpcError as error:
            raise self._translated(error) from error
        if data is grpc.aio.EOF:
            raise BrokenError("the stream ended before the epoch did")
        arrived_at = time.perf_counter()
        try:
            message = wire.decode(data, (found.packed, found.indices) if found and found.packed else None)
        except DecodeError:
            self._refuse(cursor, "not a message that can be read")
        if message.fields.draining:
            await _half_close(call)
            await _hear_end(call)
            raise BrokenError("the replica is going away")
        return message, arrived_at

    def _form(self, message: pb.Batch, form: _Form, position: int) -> _Form:
        if not message.image_shape and not message.data_type:
            return form
        if message.data_type and message.data_type not in _DTYPES:
            self._refuse(position, f"pixels of the unknown type {message.data_type}")
        dtype = _DTYPES[message.data_type] if message.data_type else form.dtype
        return _Form(tuple(message.image_shape) or form.image_shape, dtype, form.label_bytes)

    def _checked(self, message: wire.Message, plan: Plan, cursor: int, form: _Form, arrived_at: float) -> Batch:
        fields, indices, images = message
        labels, size = fields.labels, fields.num_samples
        position, next_position = fields.position, fields.next_position
        crc = batch_checksum(
            plan, position=position, next_position=next_position, indices=indices, images=images, labels=labels
        )
        if crc != fields.crc32c:
            self._refuse(cursor, f"CRC-32C is {crc:08x}, the message says {fields.crc32c:08x}")
        if position != cursor or next_position < cursor:
            self._refuse(cursor, f"arrived as {position} to {next_position}")
        if len(indices) != size or len(images) != size * form.image_bytes or len(labels) != size * form.label_bytes:
            self._refuse(cursor, f"{len(images)} bytes of images and {len(labels)} of labels for {size} samples")
        return Batch(
            images=images.view(form.dtype).reshape(size, *form.image_shape),
            labels=np.frombuffer(labels, form.label_type).astype(np.int64),
            indices=indices.view(np.int64),
            position=position,
            next_position=next_position,
            end_of_epoch=fields.end_of_epoch,
            decode_seconds=time.perf_counter() - arrived_at,
            _timings=fields.timings,
        )

    def _hold_against(self, found: Found | None, batch: Batch) -> None:
        """Refuse a batch that is not the plan's next: no checksum covers how long an epoch is, and how it is cut."""
        if found is None:
            self._refuse(batch.position, "nothing was to follow")
        share, size = found.share, len(found.indices)
        if (batch.next_position, len(batch.labels), batch.end_of_epoch) != (
            share.next_position,
            size,
            share.end_of_epoch,
        ):
            self._refuse(
                batch.position,
                f"{_extent(len(batch.labels), batch.next_position, batch.end_of_epoch)}, "
                f"where the plan has {_extent(size, share.next_position, share.end_of_epoch)}",
            )

    def _refuse(self, position: int, problem: str) -> NoReturn:
        raise SampleCorruptError(self.address, position, problem)

    def _translated(self, error: grpc.aio.AioRpcError) -> Exception:
        """Translate what a call ended with: to be tried again, or the streamer's refusal."""
        if error.code() in _BROKEN or _CROSSED in _details(error):
            return BrokenError(_details(error))
        kind = DataChangedError if error.code() is grpc.StatusCode.FAILED_PRECONDITION else RefusedError
        return kind(self.address, error.code().name, _details(error))

    def _renew(self, failed: grpc.aio.Channel | None) -> None:
        """
        Connect anew for what is asked from now on, as one damaged header can spoil all that follow on a connection.

        Calls under way keep theirs, and with the last of them it goes.
        """
        if failed is not None and failed is self._channel:
            self.open()

    def _open_channel(self) -> grpc.aio.Channel:
        if self._channel is None:
            raise ReaderError("SampleClient is closed: use it inside `async with SampleClient(...) as client`")
        return self._channel


async def _half_close(call: Any) -> None:
    with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        await call.done_writing()


async def _hear_end(call: Any) -> None:
    """Wait for the streamer's end after a half-close, so that it counts the call as one that ended well."""
    with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError):
        async with asyncio.timeout(_GOODBYE_SECONDS):
            await call.read()


def _silent_for(seconds: float) -> str:
    return f"no batch for {seconds:g} s"


def _seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9


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


def _planned(plan: Plan, info: SplitInfo, start_position: int, end_position: int) -> Iterator[Found]:
    """Yield what has to come; nothing where the start lies past the end, which the streamer refuses."""
    with suppress(PositionError):
        wanted = shares(plan, info.num_samples, start_position=start_position, end_position=end_position)
        yield from look_up(plan, wanted, num_samples=info.num_samples, fingerprint=info.fingerprint)


def _extent(size: int, next_position: int, end_of_epoch: bool) -> str:
    return f"{size} samples up to {next_position}" + (", the last ones" if end_of_epoch else "")


def _checksum_of(opening: pb.StreamBatchesRequest) -> tuple[tuple[str, str], ...]:
    return ((REQUEST_CHECKSUM, request_checksum(opening.SerializeToString(deterministic=True))),)


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

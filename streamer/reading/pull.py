"""One call of PullBatches, from the reader's side: grants go out, and what comes is held against the plan."""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn

import grpc
import numpy as np
from google.protobuf.message import DecodeError

from protos.streamer.v1 import sample_service_pb2 as pb
from streamer import wire
from streamer.checksum import REQUEST_CHECKSUM, batch_checksum, request_checksum
from streamer.errors import InvalidPlanError, PositionError, RefusedError, SampleCorruptError
from streamer.lookup import Found, look_up
from streamer.order import shares
from streamer.plan import Plan, Remainder
from streamer.reading.answers import Batch, BrokenError, SplitInfo, error_of
from streamer.transforms.transform import parse

# A streamer ends a call as soon as its reader half-closes; nobody waits longer for that.
_GOODBYE_SECONDS = 1.0
_PULL_BATCHES = f"/{pb.DESCRIPTOR.services_by_name['SampleService'].full_name}/PullBatches"

_DTYPES: Mapping[int, np.dtype[Any]] = {
    pb.DATA_TYPE_UINT8: np.dtype("<u1"),
    pb.DATA_TYPE_FLOAT16: np.dtype("<f2"),
    pb.DATA_TYPE_FLOAT32: np.dtype("<f4"),
}


class Pull:
    """
    Reads batches by one call, to the end of the epoch or of a range; used once.

    Args:
        channel: To the streamer.
        address: Of the streamer, for messages.
        plan: With the fingerprint that is expected.
        info: Of the plan's split.
        start_position: Of the first global batch.
        end_position: Only global batches that begin before it; 0 means to the end of the epoch.
        window_bytes: Images and labels that may be on their way, beside one batch.
        stall_seconds: A call that is silent for so long counts as broken.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        address: str,
        plan: Plan,
        info: SplitInfo,
        *,
        start_position: int,
        end_position: int,
        window_bytes: int,
        stall_seconds: float,
    ) -> None:
        self._address = address
        self._plan = plan
        self._end_position = end_position
        self._window_bytes = window_bytes
        self._stall_seconds = stall_seconds
        self._cursor = start_position
        self._owed = 0
        # Told in the first message, as a transform may change them.
        self._form = _Form(info.image_shape, _DTYPES[pb.DATA_TYPE_UINT8], info.label_bytes)
        self._planned_form = _planned_form(plan, info)
        self._planned = _planned(plan, info, start_position, end_position)
        self._opening = pb.StreamBatchesRequest(
            plan=_plan_message(plan), start_position=start_position, end_position=end_position
        )
        # Answers are left as bytes: see wire.py.
        self._pull: Any = channel.stream_stream(_PULL_BATCHES, pb.PullBatchesRequest.SerializeToString)
        self._call: Any
        self._watch: _Watch

    async def batches(self, *, on_failure: Callable[[], object]) -> AsyncGenerator[Batch, None]:
        """
        Yield the batches; closing this ends the call.

        What is yielded counts as taken when the next one is asked for: only then more is granted.

        Args:
            on_failure: Called before any of these errors is raised.

        Raises:
            BrokenError: The call ended before its time.
            SampleCorruptError: A batch is damaged or out of place.
            RefusedError: The plan or the position cannot be served.
        """
        self._call = self._pull(metadata=_checksum_of(self._opening))
        self._watch = _Watch(self._call, self._stall_seconds)
        try:
            await self._send(pb.PullBatchesRequest(open=self._opening))
            await self._send(pb.PullBatchesRequest(grant_bytes=self._window_bytes))
            while True:
                batch = await self._next()
                if batch.end_of_epoch or 0 < self._end_position <= batch.next_position:
                    # Before the reader has its batch, so that nobody waits for the streamer's end of the call.
                    await self._half_close()
                    yield batch
                    await self._hear_end()
                    return
                yield batch
                if 2 * self._owed >= self._window_bytes:
                    await self._send(pb.PullBatchesRequest(grant_bytes=self._owed))
                    self._owed = 0
        except (BrokenError, SampleCorruptError, RefusedError):
            on_failure()
            raise
        finally:
            self._watch.end()
            # An abandoned call is never cancelled by grpc.aio itself (grpc#43462).
            self._call.cancel()

    async def _next(self) -> Batch:
        planned = next(self._planned, None)
        try:
            with self._watch:
                data = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise error_of(self._address, error) from error
        if data is grpc.aio.EOF:
            raise BrokenError("the stream ended before the epoch did")
        arrived_at = time.perf_counter()
        try:
            message = wire.decode(data, (planned.packed, planned.indices) if planned and planned.packed else None)
        except DecodeError:
            self._refuse("not a message that can be read")
        if message.fields.draining:
            await self._half_close()
            await self._hear_end()
            raise BrokenError("the replica is going away")
        self._take_form(message.fields)
        batch = self._checked(message, arrived_at)
        self._hold_against(planned, batch)
        self._cursor = batch.next_position
        self._owed += batch.images.nbytes + len(message.fields.labels)
        return batch

    async def _send(self, request: pb.PullBatchesRequest) -> None:
        # Not by the watch: to cancel the call wakes no write to a peer that takes connections and answers nothing.
        try:
            async with asyncio.timeout(self._stall_seconds):
                # A call that has ended takes nothing; why it has is what reading tells.
                with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                    await self._call.write(request)
        except TimeoutError as error:
            raise BrokenError(_silent_for(self._stall_seconds)) from error

    async def _half_close(self) -> None:
        # grpc.aio passes its own InternalError on where the connection breaks in this moment, unlike in a write.
        with suppress(grpc.aio.AioRpcError, grpc.aio.InternalError, asyncio.InvalidStateError):
            await self._call.done_writing()

    async def _hear_end(self) -> None:
        """Wait for the streamer's end after a half-close, so that it counts the call as one that ended well."""
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError):
            async with asyncio.timeout(_GOODBYE_SECONDS):
                await self._call.read()

    def _take_form(self, fields: pb.Batch) -> None:
        if not fields.image_shape and not fields.data_type:
            return
        if fields.data_type and fields.data_type not in _DTYPES:
            self._refuse(f"pixels of the unknown type {fields.data_type}")
        form = self._form
        dtype = _DTYPES[fields.data_type] if fields.data_type else form.dtype
        told = _Form(tuple(fields.image_shape) or form.image_shape, dtype, form.label_bytes)
        planned = self._planned_form
        # No checksum covers it.
        if planned is not None and told != planned:
            self._refuse(
                f"images of {told.image_shape}, {told.dtype}; the plan has {planned.image_shape}, {planned.dtype}"
            )
        self._form = told

    def _checked(self, message: wire.Message, arrived_at: float) -> Batch:
        (fields, indices, images), form = message, self._form
        labels, size = fields.labels, fields.num_samples
        position, next_position = fields.position, fields.next_position
        crc = batch_checksum(
            self._plan, position=position, next_position=next_position, indices=indices, images=images, labels=labels
        )
        if crc != fields.crc32c:
            self._refuse(f"CRC-32C is {crc:08x}, the message says {fields.crc32c:08x}")
        if position != self._cursor or next_position < position:
            self._refuse(f"arrived as {position} to {next_position}")
        if len(indices) != size or len(images) != size * form.image_bytes or len(labels) != size * form.label_bytes:
            self._refuse(f"{len(images)} bytes of images and {len(labels)} of labels for {size} samples")
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

    def _hold_against(self, planned: Found | None, batch: Batch) -> None:
        """Refuse a batch that is not the plan's next: no checksum covers how long an epoch is, and how it is cut."""
        if planned is None:
            self._refuse("nothing was to follow")
        share, size = planned.share, len(planned.indices)
        if (batch.next_position, len(batch.labels), batch.end_of_epoch) != (
            share.next_position,
            size,
            share.end_of_epoch,
        ):
            self._refuse(
                f"{_extent(len(batch.labels), batch.next_position, batch.end_of_epoch)}, "
                f"where the plan has {_extent(size, share.next_position, share.end_of_epoch)}",
            )

    def _refuse(self, problem: str) -> NoReturn:
        raise SampleCorruptError(self._address, self._cursor, problem)


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


def _planned(plan: Plan, info: SplitInfo, start_position: int, end_position: int) -> Iterator[Found]:
    """Yield what has to come; nothing where the start lies past the end, which the streamer refuses."""
    with suppress(PositionError):
        wanted = shares(plan, info.num_samples, start_position=start_position, end_position=end_position)
        yield from look_up(plan, wanted, num_samples=info.num_samples, fingerprint=info.fingerprint)


def _planned_form(plan: Plan, info: SplitInfo) -> _Form | None:
    """Return what the plan's transform makes of the split's images; None where only the streamer knows it."""
    with suppress(InvalidPlanError):
        transform = parse(plan.transform, image_shape=info.image_shape)
        return _Form(transform.image_shape, transform.dtype, info.label_bytes)
    return None


def _extent(size: int, next_position: int, end_of_epoch: bool) -> str:
    return f"{size} samples up to {next_position}" + (", the last ones" if end_of_epoch else "")


def _silent_for(seconds: float) -> str:
    return f"no batch for {seconds:g} s"


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

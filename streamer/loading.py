"""
Streamed samples for PyTorch: a data set to loop over as it is, or with a ``DataLoader`` and its workers.

::

    dataset = StreamedDataset("a:50052,b:50052", Plan(dataset="mnist", seed=7, batch_size=256))
    loader = StreamedLoader(dataset, num_workers=2, pin_memory=True)
    for epoch in range(3):
        dataset.set_epoch(epoch)
        for batch in loader:
            train(batch.images, batch.labels)
            dataset.commit(batch)
        torch.save({"data": dataset.state(), ...}, path)

The only module of the streamer that needs torch.
"""

import os
import time
from collections.abc import AsyncGenerator, Generator, Iterator, Mapping
from contextlib import aclosing, closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from types import TracebackType
from typing import Any, Self, SupportsInt

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from streamer.client import Batch, SampleClient
from streamer.errors import DataChangedError, ReaderError, StreamerError
from streamer.ledger import Ledger
from streamer.plan import Plan
from streamer.reading import forking, orphans
from streamer.reading.bridge import Bridge
from streamer.reading.cursor import Cursor, from_state, to_state
from streamer.reading.division import Division, Leg
from streamer.reading.recording import Origin, Recording
from streamer.reading.replica import WINDOW_BYTES
from streamer.reading.retry import Retry
from streamer.reading.stalls import StallReport, Stalls, Timings

__all__ = ["Origin", "StallReport", "StreamedDataset", "StreamedLoader", "TensorBatch", "place_of"]

# Measured with one worker on two cores: 200 kB take 0.5 ms by value and 1.2 ms in shared memory, 2 MB the same.
_SMALL_BYTES = 1024**2

# Options of a DataLoader that a stream leaves nothing to do for.
_SETTLED = {
    "batch_size": "Plan(batch_size=...) says it, and batches come whole",
    "shuffle": "Plan(seed=...) says the order; None is that of the file",
    "sampler": "Plan(seed=...) says the order; None is that of the file",
    "batch_sampler": "Plan(seed=..., batch_size=...) says what makes a batch",
    "drop_last": "Plan(remainder=Remainder.DROP) does it",
    "collate_fn": "batches come whole; change them in the loop, or by Plan(transform=...) on the streamer",
}


@dataclass(frozen=True, eq=False, slots=True)
class TensorBatch:
    """A :class:`streamer.client.Batch` as tensors; positions are those of the rank's own plan."""

    images: torch.Tensor
    """Shape (N, height, width), and channels when more than one; uint8 unless transformed."""
    labels: torch.Tensor
    """int64, shape (N,)."""
    indices: NDArray[np.int64]
    """Of the samples in the split's file, or in the slice; shape (N,)."""
    position: int
    """Global position of the global batch this is a share of."""
    next_position: int
    """Where the next global batch begins."""
    end_of_epoch: bool
    """Nothing follows for this rank in this epoch."""
    origin: Origin = field(repr=False)
    """The pass that it is from."""
    timings: Timings = field(default=Timings(), repr=False)
    """Where its time went until it was here; the way out of a worker counts as decoding."""

    def pin_memory(self) -> "TensorBatch":
        """Copy images and labels to page-locked memory, from which a GPU reads while the CPU goes on."""
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "TensorBatch":
        """
        Copy images and labels to a device.

        Args:
            device: Such as ``cuda``.
            non_blocking: Do not wait for the copy; it overlaps with work only out of pinned memory.
        """
        images = self.images.to(device, non_blocking=non_blocking)
        return replace(self, images=images, labels=self.labels.to(device, non_blocking=non_blocking))

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (
            _sent(self.images),
            _sent(self.labels),
            self.indices,
            self.position,
            self.next_position,
            self.end_of_epoch,
            self.origin,
            self.timings,
            time.perf_counter(),
        )


def _sent(tensor: torch.Tensor) -> torch.Tensor | NDArray[Any]:
    """Return what to send of a tensor: shared memory takes torch longer than to copy what is small."""
    return tensor.numpy() if tensor.device.type == "cpu" and tensor.nbytes <= _SMALL_BYTES else tensor


def _received(images: Any, labels: Any, *others: Any) -> TensorBatch:
    *facts, sent_at = others
    batch = TensorBatch(_tensor(images), _tensor(labels), *facts)
    # Processes of one machine share this clock.
    seconds = batch.timings.decode_seconds + max(0.0, time.perf_counter() - sent_at)
    return replace(batch, timings=replace(batch.timings, decode_seconds=seconds))


class StreamedDataset(IterableDataset[TensorBatch]):
    """
    One rank's batches of an epoch, from one streamer or several.

    Loop over it as it is, over ``StreamedLoader(dataset, num_workers=2)``, or over a plain
    ``DataLoader(dataset, batch_size=None)``: whatever the number of workers, the same batches come in the same order.
    Rank and world size are those of ``torch.distributed`` where it is initialised, else of RANK and WORLD_SIZE in the
    environment as ``torchrun`` sets them, else the plan's; with ``distributed=False`` always the plan's.

    A pass begins at the cursor: where the last :meth:`commit` left it, or :meth:`set_epoch`, or :meth:`load_state`. So
    one that was left early goes on behind the last batch committed, and one of which nothing was committed comes again;
    one that had no batch for this rank is followed by the next epoch's.
    Leaving the loop in any way, KeyboardInterrupt included, ends calls and threads.

    Not thread-safe. With worker processes this one makes no connection.

    Args:
        address: ``host:port`` of the streamer, or several, separated by commas.
        plan: The order, and with neither ``torch.distributed`` nor ``torchrun`` the rank's share of it.
        distributed: Whether these two are asked; False for a process that reads by itself whatever surrounds it.
        ledger: A file of this process' own, or an open ledger, that proves what was trained on.
        step: Batches in the weights at the start, for the ledger, by a count that all ranks share and that
            :meth:`commit` goes on with; None where nobody counts. :meth:`load_state` sets it.
        prefetch_batches: Read ahead of the loop, by each worker; at least 1.
        window_bytes: Images and labels that may be on their way in each stream, beside one batch; at least 1. Each
            worker has one stream of its own from a single streamer, and two from each of several.
        retry: What to do about streams that break.
    """

    def __init__(
        self,
        address: str,
        plan: Plan,
        *,
        distributed: bool = True,
        ledger: Ledger | Path | str | None = None,
        step: SupportsInt | None = None,
        prefetch_batches: int = 8,
        window_bytes: int = WINDOW_BYTES,
        retry: Retry | None = None,
    ) -> None:
        if prefetch_batches < 1:
            raise ValueError(f"prefetch_batches: {prefetch_batches}; at least 1 is allowed")
        SampleClient(address, window_bytes=window_bytes)  # refuses what is no address, and what is no window
        forking.watch()
        step = _count(step)
        self._address = address
        self._plan = plan
        self._retry = retry
        self._prefetch_batches = prefetch_batches
        self._window_bytes = window_bytes
        self._recording = None if ledger is None else Recording(ledger, step=step)
        self._stalls = Stalls()
        self._num_workers = 0
        # What is committed, and where the next pass begins: not the same for a rank without a share of an epoch's last
        # global batch, which cannot know whether the others are through with that.
        self._cursor = self._begin = Cursor(epoch=plan.epoch, step=step)
        # Epochs before it are in the weights of the checkpoint that was loaded.
        self._first_epoch = 0
        self._is_behind = False
        self._is_placed = not distributed
        self._has_batches = False
        self._announcements = _Announcements()
        # Which of them this process knows of, and whether it is a worker that has begun a pass.
        self._announced = 0
        self._worker: int | None = None

    # Where to read

    def set_epoch(self, epoch: int) -> None:
        """
        Go to an epoch: to where its commits came, or to its beginning.

        After :meth:`load_state` the epochs before the state's have no batches any more, so that a loop over all epochs
        need not know that it goes on.

        Args:
            epoch: 0 to 2**32 - 1.
        """
        if not 0 <= epoch < 1 << 32:
            raise ValueError(f"epoch: {epoch}; 0 to {(1 << 32) - 1} are allowed")
        epoch = int(epoch)
        self._is_behind = epoch < self._first_epoch
        if not self._is_behind and epoch != self._begin.epoch:
            self._cursor = self._begin = Cursor(epoch=epoch, step=self._cursor.step)
        self._announced = self._announcements.make(self._begin, is_behind=self._is_behind)

    def commit(self, batch: TensorBatch, *, step: SupportsInt | None = None) -> None:
        """
        Move the cursor behind a batch: it is in the weights, and so is all before it. Call it after the optimizer step.

        With a ledger it also says that no restart will need the batch again. Where a restart begins at a checkpoint
        that is written now and then, use :meth:`committing` around that instead, and no ``commit``.

        Args:
            batch: The last one trained on.
            step: Batches in the weights now, by the trainer's count, for the ledger.

        Raises:
            LedgerError: The ledger cannot be written.
            ReaderError: The batch is not one of this data set.
        """
        step = _count(step)
        self._note(batch)
        if self._recording is not None:
            self._recording.commit(batch, batch.origin, step)
        self._advance(batch, step)

    @contextmanager
    def committing(self, batch: TensorBatch, *, step: SupportsInt | None = None) -> Iterator[None]:
        """
        Commit around the writing of a checkpoint, which happens inside and has :meth:`state` in it.

        An exception inside leaves the cursor where it was.

        With a ledger every batch has to be known. With workers only :class:`StreamedLoader` tells of them.
        Arguments and errors are those of :meth:`commit`.
        """
        step = _count(step)
        self._note(batch)
        before = self._cursor, self._begin
        self._advance(batch, step)
        try:
            if self._recording is None:
                yield
            else:
                with self._recording.committing(batch, batch.origin, step):
                    yield
        except BaseException:
            self._cursor, self._begin = before
            raise

    def state(self) -> dict[str, Any]:
        """
        Return the cursor with plan and fingerprint, for a checkpoint: small, and fit for JSON.

        Ranks that have made the same steps have the same one. After an epoch's last global batch it is the next one's
        beginning; for a rank that has no share of that, from its first commit in the next epoch.
        """
        return to_state(self._cursor, self._placed())

    def load_state(self, state: Mapping[str, Any]) -> None:
        """
        Go on where a state was taken; world size, rank and batch size may be others than then.

        Raises:
            StateError: It belongs to another plan or other data; the message names the field.
        """
        self._cursor, fingerprint = from_state(state, self._plan)
        self._begin = self._cursor
        self._plan = replace(self._plan, fingerprint=self._plan.fingerprint or fingerprint)
        self._first_epoch, self._is_behind = self._cursor.epoch, False
        self._announced = self._announcements.make(self._begin, is_behind=False)
        if self._recording is not None:
            self._recording.resume(self._cursor.step)

    # What is known of the reading

    def report(self, *, cpus: int | None = None) -> StallReport:
        """
        Say what the training has waited for so far, over all passes.

        Args:
            cpus: What the streamers have for transforms, if known: then the advice is a number of CPUs.

        Raises:
            ReaderError: All batches came from workers of a plain DataLoader, which does not tell of waits.
        """
        report = self._stalls.report(cpus=cpus, readers=max(1, self._num_workers))
        if self._has_batches and not report.total_seconds:
            raise ReaderError("nobody measured the waits: with workers, loop over StreamedLoader(dataset, ...)")
        return report

    def close(self) -> None:
        """Close the ledger that was opened for a path; harmless when done already."""
        if self._recording is not None:
            self._recording.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[TensorBatch]:
        """
        Read from the cursor to the end of the epoch.

        Raises:
            StreamerError: What :meth:`streamer.client.SampleClient.batches` raises; from a worker a ReaderError.
        """
        worker = get_worker_info()
        if worker is None:
            return self._watched(self._read(self._upcoming, 0, 1), num_workers=0)
        orphans.end_with_parent()
        # Now, not when the first batch is asked for: by then the cursor may have moved.
        try:
            begin: Cursor | ReaderError | None = self._next_pass()
        except ReaderError as error:
            begin = error
        return self._read_in_worker(begin, worker.id, worker.num_workers)

    def __getstate__(self) -> dict[str, Any]:
        # A worker cannot ask torch.distributed, and keeps no ledger.
        return {**self.__dict__, "_plan": self._placed(), "_is_placed": True, "_recording": None}

    def _placed(self) -> Plan:
        """Return the plan with the rank that this process has, wherever it is told."""
        if self._is_placed:
            return self._plan
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            place: tuple[int, int] | None = (torch.distributed.get_rank(), torch.distributed.get_world_size())
        else:
            place = place_of(os.environ)
        return self._plan if place is None else replace(self._plan, rank=place[0], world_size=place[1])

    @property
    def _upcoming(self) -> Cursor | None:
        """Where the next pass begins; None where its epoch is behind."""
        return None if self._is_behind else self._begin

    def _next_pass(self) -> Cursor | None:
        """Return where a worker begins; None where there is nothing to read."""
        if self._worker == os.getpid():
            announced = self._announced
            self._announced, self._begin, self._is_behind = self._announcements.latest()
            if self._announced == announced:
                raise ReaderError(
                    "with persistent_workers, call set_epoch before each pass: they are told of nothing else"
                )
        # The first pass is the one that was to come when this copy was made.
        self._worker = os.getpid()
        return self._upcoming

    def _read(self, cursor: Cursor | None, worker: int, num_workers: int) -> Generator[TensorBatch, None, None]:
        if cursor is None:
            return
        plan = replace(self._placed(), epoch=cursor.epoch)
        with Bridge(
            lambda: self._share(plan, cursor.position, worker, num_workers), ahead=self._prefetch_batches
        ) as batches:
            yield from batches

    async def _share(self, plan: Plan, start: int, worker: int, num_workers: int) -> AsyncGenerator[TensorBatch, None]:
        async with SampleClient(self._address, window_bytes=self._window_bytes, retry=self._retry) as client:
            info = await client.split(plan)
            plan = replace(plan, fingerprint=plan.fingerprint or info.fingerprint)
            division = Division(plan, info.num_samples, start)
            origin = Origin(plan=plan, num_samples=info.num_samples, start_position=start)
            for leg in division.legs(worker, num_workers):
                batches = client.batches(leg.plan, start_position=leg.start_position, end_position=leg.end_position)
                async with aclosing(batches):
                    async for batch in batches:
                        yield _tensors(batch, leg, division, origin)

    def _read_in_worker(
        self, begin: Cursor | ReaderError | None, worker: int, num_workers: int
    ) -> Generator[TensorBatch, None, None]:
        if isinstance(begin, ReaderError):
            raise begin
        try:
            with closing(self._read(begin, worker, num_workers)) as batches:
                for batch in batches:
                    self._pin(batch)
                    yield batch
        except StreamerError as error:
            # The DataLoader makes it again where the training runs, from its message alone.
            raise ReaderError(str(error)) from None

    def _watched(self, batches: Iterator[TensorBatch], *, num_workers: int) -> Generator[TensorBatch, None, None]:
        """Yield what comes to the process that trains, and note it."""
        self._num_workers = num_workers
        begin = self._upcoming

        def noted() -> Generator[TensorBatch, None, None]:
            is_empty = True
            for batch in batches:
                is_empty = False
                self._note(batch)
                yield batch
            if is_empty and begin is not None and begin == self._begin:
                self._pass_over(begin)

        return self._stalls.watch(noted(), attrgetter("timings"))

    def _note(self, batch: TensorBatch) -> None:
        self._has_batches = True
        self._pin(batch)
        if self._recording is not None:
            self._recording.receive(batch, batch.origin)

    def _pass_over(self, begin: Cursor) -> None:
        """Go on with the next epoch where a pass had nothing for this rank; what others have of it, is not known."""
        self._begin = Cursor(epoch=begin.epoch + 1, step=begin.step)
        if self._recording is not None:
            self._recording.skip()

    def _pin(self, batch: TensorBatch) -> None:
        """Hold all that comes to the data that the first batch was from."""
        plan = batch.origin.plan
        if (plan.dataset, plan.split) != (self._plan.dataset, self._plan.split):
            raise ReaderError(
                f"a batch of {plan.dataset} {plan.split}, where this reads {self._plan.dataset} {self._plan.split}"
            )
        if not self._plan.fingerprint:
            self._plan = replace(self._plan, fingerprint=plan.fingerprint)
        elif plan.fingerprint != self._plan.fingerprint:
            raise DataChangedError(self._address, "FAILED_PRECONDITION", "fingerprint: other data than before came")

    def _advance(self, batch: TensorBatch, step: int | None) -> None:
        origin = batch.origin
        here = Cursor(epoch=origin.plan.epoch, position=batch.next_position, step=step)
        following = Cursor(epoch=origin.plan.epoch + 1, step=step)
        division = Division(origin.plan, origin.num_samples, origin.start_position)
        self._begin = following if batch.end_of_epoch else here
        self._cursor = following if division.is_over(batch.next_position) else here


class StreamedLoader:
    """
    A ``DataLoader`` of whole batches that also tells its data set when they are awaited and received.

    Args:
        dataset: What is read.
        options: Of ``torch.utils.data.DataLoader``: ``num_workers``, ``pin_memory``, ``prefetch_factor``,
            ``persistent_workers``, ``multiprocessing_context`` and so on, but none about samples.

    Raises:
        ValueError: An option would change which samples make a batch, or the order of the batches.
    """

    def __init__(self, dataset: StreamedDataset, **options: Any) -> None:
        for name in options:
            if name in _SETTLED:
                raise ValueError(f"{name}: not allowed; {_SETTLED[name]}")
        if not options.get("in_order", True):
            raise ValueError(
                "in_order: False is not allowed; a commit says that all before the batch was trained on, too"
            )
        self.dataset = dataset
        self._loader: DataLoader[TensorBatch] = DataLoader(dataset, batch_size=None, **options)

    def __iter__(self) -> Iterator[TensorBatch]:
        """Read one pass; see :meth:`StreamedDataset.__iter__`."""
        batches = iter(self._loader)
        if self._loader.num_workers == 0:
            return batches
        return self.dataset._watched(batches, num_workers=self._loader.num_workers)


class _Announcements:
    """Tells workers that persist where the next pass begins, by memory they share."""

    def __init__(self) -> None:
        self._cell: torch.Tensor = torch.zeros(4, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def make(self, cursor: Cursor, *, is_behind: bool) -> int:
        """Announce a pass and return its number."""
        number = int(self._cell[0]) + 1
        self._cell[:] = torch.tensor([number, cursor.epoch, cursor.position, is_behind])
        return number

    def latest(self) -> tuple[int, Cursor, bool]:
        """Return the last one announced."""
        number, epoch, position, is_behind = self._cell.tolist()
        return number, Cursor(epoch=epoch, position=position), bool(is_behind)


def place_of(environment: Mapping[str, str]) -> tuple[int, int] | None:
    """
    Return the rank and the world size that a launcher such as ``torchrun`` has put there; None where none has.

    Args:
        environment: With RANK and WORLD_SIZE, or neither.

    Raises:
        ReaderError: They make no sense; the message names the variable.
    """
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return None
    rank, world_size = _told(environment, "RANK", least=0), _told(environment, "WORLD_SIZE", least=1)
    if rank >= world_size:
        raise ReaderError(
            f"RANK in the environment: {rank}; 0 to {world_size - 1} are allowed with WORLD_SIZE {world_size}"
        )
    return rank, world_size


def _told(environment: Mapping[str, str], variable: str, *, least: int) -> int:
    text = environment.get(variable)
    if text is None:
        raise ReaderError(f"{variable} in the environment: missing; RANK and WORLD_SIZE are needed both, or neither")
    if not text.isdecimal() or int(text) < least:
        raise ReaderError(f"{variable} in the environment: {text!r}; a whole number from {least} on is expected")
    return int(text)


def _count(step: SupportsInt | None) -> int | None:
    """Return a trainer's count, which may be NumPy's or a tensor, as what a state and a ledger keep."""
    return None if step is None else int(step)


def _tensors(batch: Batch, leg: Leg, division: Division, origin: Origin) -> TensorBatch:
    position, next_position = leg.place(batch.position, batch.next_position)
    return TensorBatch(
        images=_tensor(batch.images),
        labels=_tensor(batch.labels),
        indices=batch.indices,
        position=position,
        next_position=next_position,
        end_of_epoch=division.ends_at(next_position),
        origin=origin,
        timings=batch.timings,
    )


def _tensor(array: torch.Tensor | NDArray[Any]) -> torch.Tensor:
    """
    Return an array as a tensor, without a copy where that can be.

    Pixels lie in the message they came in, which is read-only to NumPy, and nobody else's: to change them in place
    harms nobody. DLPack takes them as they are, where ``torch.frombuffer`` warns.
    """
    if isinstance(array, torch.Tensor):
        return array
    if not array.flags.writeable and array.flags.aligned:
        # Before 2.1 NumPy does not give read-only arrays away.
        with suppress(BufferError):
            return torch.utils.dlpack.from_dlpack(array)
    return torch.from_numpy(array if array.flags.writeable else array.copy())

"""
A ledger: what a reader received and what its trainer made its own, in one short line each, as proof of delivery.

::

    with Ledger("rank-0.ledger") as ledger:
        delivery = ledger.begin(plan, num_samples=60_000, start_position=checkpoint.position)
        for batch in batches:
            delivery.record(batch)
            train_on(batch)
            delivery.commit(batch.next_position)

A file belongs to one process at a time and may go on over restarts, epochs and data sets. Lines are text, and each
begins with the CRC-32C of its rest: ``open`` once a process, ``begin`` with the plan, then ``batch``, ``saving`` and
``commit`` with the number of the ``begin`` they belong to. A batch takes about 70 bytes, an epoch of MNIST in batches
of 128 takes 32 kB. :func:`streamer.proof.verify` reads them.

A line is handed to the kernel at once, so that killing the process tears nothing but a line being written. A crash of
the machine may take the lines since the last fsync, which is done when a file is made and closed, and by
:meth:`Delivery.committing` before the checkpoint is.
"""

import fcntl
import json
import math
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self
from weakref import WeakSet

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from streamer.errors import StreamerError
from streamer.plan import Plan, Remainder

FORMAT = 1
"""Of the file; another one is refused."""

# A lock belongs to all that have the open file, and a fork would keep it beyond the death of who took it.
_ours: "WeakSet[Ledger]" = WeakSet()
_is_watching = False


class LedgerError(StreamerError):
    """A ledger cannot be written or read, or is told what makes no sense; the message names the file."""

    def __init__(self, place: Path | str, problem: str) -> None:
        self.place = str(place)
        super().__init__(f"{place}: {problem}")


class Delivered(Protocol):
    """A batch as it arrived, such as :class:`streamer.client.Batch`."""

    @property
    def position(self) -> int:
        """Global position of the global batch."""

    @property
    def next_position(self) -> int:
        """Where the next one begins."""

    @property
    def indices(self) -> NDArray[np.int64]:
        """Of the samples in the split's file; shape (N,)."""


class Ledger:
    """
    Appends to a ledger file; use as ``with``. Threads may share one, processes may not: what is forked has it closed.

    Args:
        path: Made when missing; its folder has to exist.

    Raises:
        LedgerError: The file cannot be opened, or another process has it open.
    """

    def __init__(self, path: Path | str) -> None:
        self._path = Path(path)
        self._begun = 0
        self._lock = threading.Lock()
        self._descriptor: int | None = None
        _watch_forks()
        _ours.add(self)
        try:
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            self._take()
        except OSError as error:
            self._give_up()
            raise self._unusable(error) from error
        self._append("open", json.dumps({"ledger": FORMAT, "pid": os.getpid()}))

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    def begin(self, plan: Plan, *, num_samples: int, start_position: int = 0, step: int | None = None) -> "Delivery":
        """
        Open an account of one rank's reading of an epoch; several may be open at once.

        Args:
            plan: As it is read, with its fingerprint.
            num_samples: Samples of the epoch.
            start_position: Where reading begins; after a restart that of the checkpoint loaded.
            step: Batches that had gone into the weights when this checkpoint was made, counted by the trainer, such
                as its optimizer's steps. With it commits are compared to steps, without it they are believed.

        Raises:
            LedgerError: The plan has no fingerprint, the position lies past the end, or the file cannot be written.
        """
        if not plan.fingerprint:
            raise LedgerError(self._path, "plan.fingerprint: required, as SplitInfo.fingerprint of the streamer says")
        if num_samples < 1:
            raise LedgerError(self._path, f"num_samples: {num_samples}; at least 1 is allowed")
        if not 0 <= start_position <= num_samples:
            raise LedgerError(self._path, f"start_position: {start_position}; 0 to {num_samples} are allowed")
        with self._lock:
            number, self._begun = self._begun, self._begun + 1
        # A trainer's counts may be NumPy's or a tensor.
        start = {"num_samples": int(num_samples), "start_position": int(start_position)}
        head = {**_plan_fields(plan), **start, "step": None if step is None else int(step), "at": time.time()}
        self._append("begin", f"{number} {json.dumps(head)}")
        return Delivery(self, number)

    def close(self) -> None:
        """Bring all lines to the disk and close the file; harmless when done already."""
        with self._lock:
            if self._descriptor is None:
                return
            try:
                os.fsync(self._descriptor)
            except OSError as error:
                raise self._unusable(error) from error
            finally:
                self._give_up()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, kind: str, fields: str, *, sync: bool = False) -> None:
        content = f" {kind} {fields}".encode()
        line = b"%08x%b\n" % (google_crc32c.value(content), content)
        with self._lock:
            if self._descriptor is None:
                raise LedgerError(self._path, "closed, or opened by the process that this one was forked from")
            try:
                # On a full disk the rest of a short write fails, and says why.
                while line := line[os.write(self._descriptor, line) :]:
                    pass
                if sync:
                    os.fsync(self._descriptor)
            except OSError as error:
                # What comes after a torn line could not be read.
                self._give_up()
                raise self._unusable(error) from error

    def _take(self) -> None:
        assert self._descriptor is not None
        fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        size = os.fstat(self._descriptor).st_size
        if size and os.pread(self._descriptor, 1, size - 1) != b"\n":
            # The process before this one was killed as it wrote.
            os.write(self._descriptor, b"\n")
        if not size:
            folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def _give_up(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            # Closing it leaves the lock to whoever got the open file by a fork that Python does not know of.
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def _let_go(self) -> None:
        """Close the file in a process that was just forked; the lock stays with the process that took it."""
        # Another thread may have held it at the fork, and there is no other thread here.
        self._lock = threading.Lock()
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def _unusable(self, error: OSError) -> LedgerError:
        is_taken = isinstance(error, BlockingIOError)
        problem = "another process writes to it; give each its own" if is_taken else error.strerror or str(error)
        return LedgerError(self._path, f"cannot be written: {problem}")


def _watch_forks() -> None:
    global _is_watching
    if not _is_watching:
        os.register_at_fork(after_in_child=_let_go)
        _is_watching = True


def _let_go() -> None:
    for ledger in list(_ours):
        ledger._let_go()


class Delivery:
    """One rank's reading of one epoch, from one start; made by :meth:`Ledger.begin`."""

    def __init__(self, ledger: Ledger, number: int) -> None:
        self._ledger = ledger
        self._number = number
        # Where batches end that were recorded and not committed.
        self._ends: deque[int] = deque()
        self._committed: int | None = None

    def record(self, batch: Delivered) -> None:
        """
        Note that a batch was received; some microseconds.

        Received and not committed, it is no delivery, and no repeat when it is read again.

        Raises:
            LedgerError: The file cannot be written.
        """
        indices = np.ascontiguousarray(batch.indices, "<i8")
        crc = google_crc32c.value(indices)
        position, end = batch.position, batch.next_position
        self._ledger._append("batch", f"{self._number} {position} {end} {len(indices)} {crc:08x}")
        self._ends.append(end)

    def commit(self, position: int, *, step: int | None = None) -> None:
        """
        Note that a restart needs nothing before ``position`` again: it was trained on, and that is safe.

        Call it after the optimizer step where each one is safe by itself, else after the checkpoint, where
        :meth:`committing` leaves no gap.

        Args:
            position: ``next_position`` of the last batch trained on.
            step: Batches in the weights now, counted as for :meth:`Ledger.begin`.

        Raises:
            LedgerError: No batch recorded here ends there, or the file cannot be written.
        """
        self._check(position)
        self._ledger._append("commit", _mark(self._number, position, step))
        while self._ends and self._ends[0] <= position:
            self._ends.popleft()
        self._committed = position

    @contextmanager
    def committing(self, position: int, *, step: int | None = None) -> Iterator[None]:
        """
        Commit around the writing of a checkpoint, which happens inside; takes an fsync.

        Whether a process that dies inside had written it, is settled by where its successor begins. An exception
        commits nothing.

        Args:
            position: As for :meth:`commit`, and as the checkpoint says.
            step: As for :meth:`commit`.

        Raises:
            LedgerError: As for :meth:`commit`.
        """
        self._check(position)
        self._ledger._append("saving", f"{_mark(self._number, position, step)} {time.time()}", sync=True)
        yield
        self.commit(position, step=step)

    def _check(self, position: int) -> None:
        if position not in self._ends and position != self._committed:
            expected = "commit Batch.next_position of a batch recorded before"
            raise LedgerError(self._ledger.path, f"position: {position} is not where a batch ended; {expected}")


@dataclass(frozen=True, slots=True)
class Mark:
    """A commit, or the intent to."""

    line: int
    position: int
    step: int | None
    at: float
    """Seconds since 1970; 0 for a commit."""
    num_committed: int
    """Batches of the delivery committed with it and before."""


@dataclass(eq=False, slots=True)
class Account:
    """What a ledger says of one delivery; the lists have one item for each batch received."""

    file: Path
    line: int
    """Where it begins in the file; the first is 1."""
    plan: Plan
    num_samples: int
    start_position: int
    step: int | None
    at: float
    """When it began, in seconds since 1970; later than all before it in the file."""
    positions: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    checksums: list[int] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    committed: list[int] = field(default_factory=list)
    """Which of them were committed, as numbers from 0, in that order."""
    commits: list[Mark] = field(default_factory=list)
    saving: Mark | None = None
    """The last one that no commit followed."""
    _open: list[int] = field(default_factory=list)

    def receive(self, line: int, position: int, end: int, size: int, checksum: int) -> None:
        """Take a line on a batch."""
        self._open.append(len(self.lines))
        self.positions.append(position)
        self.ends.append(end)
        self.sizes.append(size)
        self.checksums.append(checksum)
        self.lines.append(line)

    def commit(self, line: int, position: int, step: int | None) -> None:
        """Commit what was received so far and ends at or before ``position``."""
        self.committed += [number for number in self._open if self.ends[number] <= position]
        self._open = [number for number in self._open if self.ends[number] > position]
        self.commits.append(Mark(line, position, step, 0.0, len(self.committed)))
        if self.saving is not None and self.saving.position <= position:
            self.saving = None


@dataclass(eq=False, slots=True)
class Contents:
    """A ledger file as it was read."""

    path: Path
    accounts: list[Account] = field(default_factory=list)
    torn_lines: list[int] = field(default_factory=list)
    """Left by processes that died as they wrote."""
    latest: float = 0.0
    """Time of its last line that has one, in seconds since 1970."""

    def advance(self, at: float) -> float:
        """Return a line's time, made later than all before it: a clock that is set back does not turn them round."""
        self.latest = max(at, math.nextafter(self.latest, math.inf))
        return self.latest


def read(path: Path) -> Contents:
    """
    Read a ledger, also while it is being written.

    Raises:
        LedgerError: It is no ledger, of another format, or damaged; what a process left torn is not.
        OSError: The file cannot be read.
    """
    contents = Contents(path)
    opened: dict[int, Account] = {}
    torn: list[int] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            kind, fields = _parsed(line)
            if not kind:
                torn.append(number)
                if number == len(torn) == 2:
                    raise LedgerError(path, "not a ledger: its first lines match no checksum")
                continue
            # Only at its end does a process leave a torn line.
            if torn and kind != "open":
                raise LedgerError(f"{path}:{torn[-1]}", "damaged: the line does not match its checksum")
            contents.torn_lines.extend(torn)
            torn.clear()
            try:
                _take_line(contents, opened, number, kind, fields)
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise LedgerError(f"{path}:{number}", f"not a line of a ledger: {kind} {fields[:80]}") from error
    contents.torn_lines.extend(torn)
    return contents


def _parsed(line: bytes) -> tuple[str, str]:
    """Return a line's kind and fields; an empty kind where it is torn or damaged."""
    content = line[8:-1]
    if not line.endswith(b"\n") or line[:8] != b"%08x" % google_crc32c.value(content):
        return "", ""
    kind, _, fields = content[1:].decode().partition(" ")
    return kind, fields


def _take_line(contents: Contents, opened: dict[int, Account], line: int, kind: str, fields: str) -> None:
    if kind == "open":
        opened.clear()
        if json.loads(fields)["ledger"] != FORMAT:
            raise LedgerError(contents.path, f"of another format than {FORMAT}; use the sluice that wrote it")
        return
    name, _, rest = fields.partition(" ")
    if kind == "begin":
        head = json.loads(rest)
        account = _account(contents.path, line, head, contents.advance(head["at"]))
        opened[int(name)] = account
        contents.accounts.append(account)
        return
    account, words = opened[int(name)], rest.split()
    if kind == "batch":
        account.receive(line, int(words[0]), int(words[1]), int(words[2]), int(words[3], 16))
    elif kind == "commit":
        account.commit(line, int(words[0]), _step(words[1]))
    elif kind == "saving":
        account.saving = Mark(line, int(words[0]), _step(words[1]), contents.advance(float(words[2])), 0)
    else:
        raise ValueError(kind)


def _account(file: Path, line: int, head: dict[str, Any], at: float) -> Account:
    plan = Plan(
        dataset=head["dataset"],
        split=head["split"],
        seed=head["seed"],
        epoch=head["epoch"],
        world_size=head["world_size"],
        rank=head["rank"],
        batch_size=head["batch_size"],
        remainder=Remainder[head["remainder"]],
        transform=head["transform"],
        fingerprint=bytes.fromhex(head["fingerprint"]),
    )
    is_plan = 0 <= plan.rank < plan.world_size and plan.batch_size > 0
    if not is_plan or not 0 <= head["start_position"] <= head["num_samples"] or not head["num_samples"]:
        raise ValueError(head)
    return Account(file, line, plan, head["num_samples"], head["start_position"], head["step"], at)


def _plan_fields(plan: Plan) -> dict[str, Any]:
    return {
        "dataset": plan.dataset,
        "split": plan.split,
        "seed": plan.seed,
        "epoch": plan.epoch,
        "world_size": plan.world_size,
        "rank": plan.rank,
        "batch_size": plan.batch_size,
        "remainder": plan.remainder.name,
        "transform": plan.transform,
        "fingerprint": plan.fingerprint.hex(),
    }


def _mark(number: int, position: int, step: int | None) -> str:
    return f"{number} {int(position)} {'-' if step is None else int(step)}"


def _step(word: str) -> int | None:
    return None if word == "-" else int(word)

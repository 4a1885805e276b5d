"""
A small training job of real processes, which die where a test wants them to.

Every rank reads its share with a ledger of its own. A checkpoint holds weights, momentum, step and cursor, and how
often each sample went into them; it is one file, written within :meth:`streamer.ledger.Delivery.committing`.
"""

import asyncio
import ctypes
import io
import multiprocessing
import os
import resource
import signal
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from streamer.client import Batch, BatchReader, Plan, SampleClient
from streamer.errors import StreamerError
from streamer.ledger import Delivery, Ledger
from streamer.sources.atomic import write_file
from tests.faults.reading import NUM_SAMPLES, PATIENT, fingerprint_at, indices_in

_PIXELS = 784
_CLASSES = 10
_LEARNING_RATE = 0.05
_MOMENTUM = 0.9
# A trainer that is to be killed from outside goes on for so many steps.
_GRACE_STEPS = 20


@dataclass(frozen=True, kw_only=True)
class Job:
    """What all lives of a job have in common, and when this one dies."""

    addresses: str
    folder: Path
    """Of checkpoint and ledgers."""
    batch_size: int = 128
    checkpoint_steps: int = 10
    world_size: int = 1
    dies: tuple[str, int] | None = None
    """Moment and step at which the last rank kills itself: received, recorded, stepped, saving, saved, committed."""
    tells_at: int | None = None
    """Step at which rank 0 says so, and waits soon after, to be killed."""
    max_file_bytes: int | None = None
    """As a disk that is full beyond it."""
    num_ahead: int = 3
    """Batches received before they are trained on."""
    tells_steps: bool = True
    """Of commits, to the ledger."""
    commits_on_receipt: bool = False
    """The fault of committing what may never be trained on."""
    saves_cursor_of_receipt: bool = False
    """The fault of a checkpoint that leaves out what is still to be trained on."""


@dataclass(eq=False)
class State:
    """What goes into the checkpoint."""

    weights: torch.Tensor
    momentum: torch.Tensor
    trained: NDArray[np.uint8]
    """How often each sample went into the weights."""
    step: int
    position: int

    @classmethod
    def load(cls, folder: Path) -> "State":
        """Read the checkpoint, or begin."""
        path = folder / "checkpoint.pt"
        if not path.exists():
            zeros = torch.zeros(_CLASSES, _PIXELS)
            return cls(zeros, zeros.clone(), np.zeros(NUM_SAMPLES, np.uint8), 0, 0)
        fields = torch.load(path, weights_only=True)
        return cls(**{**fields, "trained": fields["trained"].numpy()})

    def save(self, folder: Path) -> None:
        buffer = io.BytesIO()
        torch.save({**vars(self), "trained": torch.from_numpy(self.trained)}, buffer)
        write_file(folder / "checkpoint.pt", buffer.getvalue())

    def learn(self, batch: Batch) -> None:
        """Take a step of a linear classifier, and count whom it saw by what the pixels say."""
        pixels = torch.from_numpy(batch.images.reshape(len(batch.images), _PIXELS).astype(np.float32)) / 255
        self.weights.requires_grad_(True)
        loss = torch.nn.functional.cross_entropy(pixels @ self.weights.T, torch.from_numpy(batch.labels))
        (gradient,) = torch.autograd.grad(loss, self.weights)
        self.weights.requires_grad_(False)
        self.momentum.mul_(_MOMENTUM).add_(gradient)
        self.weights.sub_(self.momentum, alpha=_LEARNING_RATE)
        self.trained[indices_in(batch)] += 1
        self.step += 1


class Trainers:
    """The processes of one life of a job; ``with`` kills what is left of them."""

    def __init__(self, job: Job) -> None:
        context = multiprocessing.get_context("forkserver")
        # Imported once for all lives.
        context.set_forkserver_preload(["torch", "streamer.client", "streamer.ledger"])
        self._told, telling = context.Pipe()
        trained = context.RawArray(ctypes.c_uint8, State.load(job.folder).trained.tobytes())
        # Kept: it is gone with the last reference in the process that made it.
        self._barrier = context.Barrier(job.world_size)
        self._ranks = [
            context.Process(target=_train, args=(job, rank, telling, self._barrier, trained), daemon=True)
            for rank in range(job.world_size)
        ]
        for each in self._ranks:
            each.start()
        telling.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._told.close()

    def wait_told(self) -> None:
        """Wait until rank 0 is where it says so."""
        assert self._told.recv() == "here"

    def wait_for_a_death(self) -> None:
        """Wait until one of them kills itself, and kill the others as a launcher does."""
        wait([each.sentinel for each in self._ranks])
        self.kill()
        assert {each.exitcode for each in self._ranks} == {-signal.SIGKILL}

    def finish(self) -> None:
        """Wait until all have come to the end of the epoch."""
        assert self.failures() == []

    def failures(self) -> list[str]:
        """Wait until all have ended, and return what ended them early."""
        problems = []
        with suppress(EOFError):
            while problem := self._told.recv():
                problems.append(problem)
        for each in self._ranks:
            each.join()
            assert each.exitcode == 0
        return problems

    def kill(self) -> None:
        """SIGKILL all."""
        for each in self._ranks:
            each.kill()
        for each in self._ranks:
            each.join()


def _train(job: Job, rank: int, telling: Connection, barrier: Barrier, trained: Any) -> None:
    """Be one rank in one life."""
    torch.set_num_threads(1)
    if job.max_file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job.max_file_bytes, job.max_file_bytes))
    state = State.load(job.folder)
    # Of all ranks together.
    state.trained = np.frombuffer(trained, np.uint8)
    try:
        _Rank(job, rank, telling, barrier, state).run()
    except StreamerError as error:
        telling.send(str(error))


class _Rank:
    def __init__(self, job: Job, rank: int, telling: Connection, barrier: Barrier, state: State) -> None:
        self._job = job
        self._rank = rank
        self._telling = telling
        self._barrier = barrier
        self._state = state

    def run(self) -> None:
        job, state = self._job, self._state
        plan = Plan(
            dataset="digits", seed=3, batch_size=job.batch_size, world_size=job.world_size, rank=self._rank,
            fingerprint=asyncio.run(_fingerprint(job.addresses)),
        )  # fmt: skip
        waiting = deque[Batch]()
        with Ledger(job.folder / f"rank-{self._rank}.ledger") as ledger:
            delivery = ledger.begin(plan, num_samples=NUM_SAMPLES, start_position=state.position, step=self._steps)
            with BatchReader(job.addresses, plan, start_position=state.position, retry=PATIENT) as reader:
                for batch in reader:
                    self._receive(batch, delivery)
                    waiting.append(batch)
                    if len(waiting) > job.num_ahead:
                        self._step(waiting.popleft(), delivery, received=batch.next_position)
                while waiting:
                    self._step(waiting.popleft(), delivery, received=NUM_SAMPLES, is_last=not waiting)

    @property
    def _steps(self) -> int | None:
        return self._state.step if self._job.tells_steps else None

    def _receive(self, batch: Batch, delivery: Delivery) -> None:
        self._pass("received")
        delivery.record(batch)
        self._pass("recorded")
        if self._job.commits_on_receipt:
            delivery.commit(batch.next_position, step=self._steps)

    def _step(self, batch: Batch, delivery: Delivery, *, received: int, is_last: bool = False) -> None:
        self._state.learn(batch)
        self._pass("stepped")
        if self._state.step == self._job.tells_at:
            self._telling.send("here")
        if self._job.tells_at and self._state.step == self._job.tells_at + _GRACE_STEPS:
            signal.pause()
        if is_last or self._state.step % self._job.checkpoint_steps == 0:
            self._state.position = received if self._job.saves_cursor_of_receipt else batch.next_position
            if self._job.commits_on_receipt:
                self._state.save(self._job.folder)
            else:
                self._checkpoint(delivery, batch.next_position)

    def _checkpoint(self, delivery: Delivery, position: int) -> None:
        with delivery.committing(position, step=self._steps):
            self._pass("saving")
            # All have said what they are about to do before it is done, and none goes on before it is.
            self._barrier.wait()
            if self._rank == 0:
                self._state.save(self._job.folder)
            self._barrier.wait()
            self._pass("saved")
        self._pass("committed")

    def _pass(self, moment: str) -> None:
        """Die where a test wants it."""
        if self._rank == self._job.world_size - 1 and (moment, self._state.step) == self._job.dies:
            os.kill(os.getpid(), signal.SIGKILL)


async def _fingerprint(addresses: str) -> bytes:
    async with SampleClient(addresses, retry=PATIENT) as client:
        return await fingerprint_at(client)

"""
A trainer that reads by a ``DataLoader`` with workers, in a process that dies where a test wants it to.

Its checkpoint holds the cursor and how often each sample was trained on, by what the pixels say; it is one file,
written within :meth:`streamer.loading.StreamedDataset.committing`.
"""

import io
import json
import multiprocessing
import os
import signal
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from streamer.client import Plan
from streamer.loading import StreamedDataset, StreamedLoader, TensorBatch
from streamer.sources.atomic import write_file
from tests.faults.reading import NUM_SAMPLES, PATIENT

NUM_EPOCHS = 2
PLAN = Plan(dataset="digits", seed=3, batch_size=256)

# A trainer that is to be killed from outside goes on for so many steps.
_GRACE_STEPS = 20


@dataclass(frozen=True, kw_only=True)
class LoadingJob:
    """What all lives of a job have in common, and when this one dies."""

    addresses: str
    folder: Path
    """Of checkpoint and ledger."""
    plan: Plan = PLAN
    num_workers: int = 2
    start_method: str = "fork"
    """Of the workers."""
    checkpoint_steps: int = 10
    tells_at: int | None = None
    """Step at which it says so, and waits soon after, to be killed."""
    kills_worker_at: int | None = None
    """Step at which it kills a worker of its own."""


@dataclass(eq=False)
class Checkpoint:
    """What the next life begins with."""

    trained: NDArray[np.uint8]
    """How often each sample was trained on, for each epoch."""
    state: dict[str, Any] | None = None
    step: int = 0

    @classmethod
    def load(cls, folder: Path) -> "Checkpoint":
        """Read it, or begin."""
        path = folder / "checkpoint.npz"
        if not path.exists():
            return cls(np.zeros((NUM_EPOCHS, NUM_SAMPLES), np.uint8))
        with np.load(path) as fields:
            return cls(fields["trained"], json.loads(str(fields["state"])), int(fields["step"]))

    def save(self, folder: Path) -> None:
        buffer = io.BytesIO()
        np.savez(buffer, trained=self.trained, state=json.dumps(self.state), step=self.step)
        write_file(folder / "checkpoint.npz", buffer.getvalue())


class LoadingTrainer:
    """The process of one life of a job, and its workers; ``with`` kills the process if it lives still."""

    def __init__(self, job: LoadingJob) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "streamer.loading"])
        self._told, telling = context.Pipe()
        # No daemon: those may not have workers.
        self._process = context.Process(target=_train, args=(job, telling))
        self._process.start()
        telling.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._told.close()

    def workers(self) -> list[int]:
        """Wait until it is where it says so, and return the process ids of its workers."""
        told: list[int] = self._told.recv()
        return told

    def failure(self) -> str:
        """Wait until it has ended, and return what ended it early."""
        problem: str = self._told.recv()
        self._process.join()
        assert self._process.exitcode == 0
        return problem

    def kill(self) -> None:
        """SIGKILL it, and wait until it is gone; its workers have to notice."""
        self._process.kill()
        self._process.join()


def _train(job: LoadingJob, telling: Connection) -> None:
    torch.set_num_threads(1)
    try:
        _Life(job, telling).run()
    except RuntimeError as error:
        telling.send(str(error))
    else:
        telling.send("")


class _Life:
    def __init__(self, job: LoadingJob, telling: Connection) -> None:
        self._job = job
        self._telling = telling
        self._checkpoint = Checkpoint.load(job.folder)
        step = self._checkpoint.step
        ledger = job.folder / "trainer.ledger"
        self._dataset = StreamedDataset(
            job.addresses, job.plan, distributed=False, ledger=ledger, step=step, retry=PATIENT
        )
        if self._checkpoint.state is not None:
            self._dataset.load_state(self._checkpoint.state)

    def run(self) -> None:
        job = self._job
        loader = StreamedLoader(self._dataset, num_workers=job.num_workers, multiprocessing_context=job.start_method)
        with self._dataset:
            for epoch in range(NUM_EPOCHS):
                self._dataset.set_epoch(epoch)
                for batch in loader:
                    self._step(epoch, batch)

    def _step(self, epoch: int, batch: TensorBatch) -> None:
        job, checkpoint = self._job, self._checkpoint
        marks = np.ascontiguousarray(batch.images.numpy().reshape(len(batch.images), -1)[:, :4])
        checkpoint.trained[epoch, marks.view("<u4").ravel()] += 1
        checkpoint.step += 1
        if checkpoint.step == job.tells_at:
            self._telling.send([each.pid for each in multiprocessing.active_children()])
        if job.tells_at and checkpoint.step == job.tells_at + _GRACE_STEPS:
            signal.pause()
        if checkpoint.step == job.kills_worker_at:
            victim, *_ = multiprocessing.active_children()
            assert victim.pid is not None
            os.kill(victim.pid, signal.SIGKILL)
        if checkpoint.step % job.checkpoint_steps == 0 or batch.end_of_epoch:
            with self._dataset.committing(batch, step=checkpoint.step):
                checkpoint.state = self._dataset.state()
                checkpoint.save(job.folder)

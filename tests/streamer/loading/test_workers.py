"""Worker processes of a DataLoader, forks, and Ctrl-C."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from streamer.client import BatchReader
from streamer.errors import StreamerError
from streamer.loading import StreamedDataset, StreamedLoader
from tests.streamer.loading.conftest import NOWHERE, PLAN, indices, loader, refused

pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"in_order": False}, "in_order: False is not allowed"),
        ({"batch_size": 4}, r"batch_size: not allowed; Plan\(batch_size"),
        ({"shuffle": True}, r"shuffle: not allowed; Plan\(seed"),
        ({"sampler": range(4)}, "sampler: not allowed"),
        ({"batch_sampler": [range(4)]}, "batch_sampler: not allowed"),
        ({"collate_fn": list}, "collate_fn: not allowed; batches come whole"),
    ],
)
def test_option_about_samples_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"^{words}"):
        StreamedLoader(StreamedDataset(NOWHERE, PLAN), **options)


def test_persistent_workers_follow_the_epoch(streamer: str) -> None:
    dataset = StreamedDataset(streamer, PLAN)
    batches = loader(dataset, 2, persistent_workers=True)
    seen = []
    for epoch in range(3):
        dataset.set_epoch(epoch)
        seen.append(indices(list(batches)))
    del batches

    alone = []
    for epoch in range(3):
        dataset.set_epoch(epoch)
        alone.append(indices(list(dataset)))
    assert seen == alone


def test_persistent_workers_that_nobody_tells_of_a_pass_say_so(streamer: str) -> None:
    dataset = StreamedDataset(streamer, PLAN)
    batches = loader(dataset, 1, persistent_workers=True)
    list(batches)
    with refused("call set_epoch before each pass"):
        list(batches)
    del batches


def test_error_in_a_worker_is_raised_in_the_loop(streamer: str) -> None:
    with refused("no 'cifar'; known are"):
        list(loader(StreamedDataset(streamer, replace(PLAN, dataset="cifar")), 1))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_leaving_the_loop_leaves_nothing(streamer: str, num_workers: int, error: type[BaseException] | None) -> None:
    def work() -> None:
        for _ in StreamedLoader(StreamedDataset(streamer, PLAN, prefetch_batches=1), num_workers=num_workers):
            if error is not None:
                raise error
            break

    with contextlib.nullcontext() if error is None else pytest.raises(error):
        work()
    # The fixture looks for what is left.


def test_fork_after_reading_is_done_just_works(streamer: str) -> None:
    with BatchReader(streamer, PLAN) as reader:
        assert len(list(reader)) == 14

    assert len(list(loader(StreamedDataset(streamer, PLAN), 1, multiprocessing_context="fork"))) == 14


def test_fork_after_reading_failed_just_works(streamer: str) -> None:
    with pytest.raises(StreamerError, match="cifar"), BatchReader(streamer, replace(PLAN, dataset="cifar")) as reader:
        list(reader)

    assert len(list(loader(StreamedDataset(streamer, PLAN), 1, multiprocessing_context="fork"))) == 14


def test_fork_in_the_middle_of_reading_is_named(streamer: str) -> None:
    with BatchReader(streamer, PLAN, prefetch_batches=1) as reader:
        batches = iter(reader)
        next(batches)
        try:
            with refused('multiprocessing_context="spawn"'):
                list(loader(StreamedDataset(streamer, PLAN), 1, multiprocessing_context="fork"))
        except RuntimeError as error:
            # A process forked while a thread is inside gRPC may die of that before it can say anything.
            if "exited unexpectedly" not in str(error):
                raise

        # What was going on goes on.
        assert len(list(batches)) == 13


async def test_fork_beside_a_channel_of_the_programs_own_is_named(streamer: str) -> None:
    async with grpc.aio.insecure_channel(streamer) as channel:
        await channel.channel_ready()
        with refused('multiprocessing_context="spawn"'):
            list(loader(StreamedDataset(streamer, PLAN), 1, multiprocessing_context="fork"))


# Ctrl-C

_INTERRUPTED = """
    import sys, time
    from streamer.client import Plan
    from streamer.loading import StreamedDataset, StreamedLoader

    address, num_workers, method = sys.argv[1:]
    dataset = StreamedDataset(address, Plan(dataset="mnist", seed=7, batch_size=1))
    if __name__ == "__main__":
        count = int(num_workers)
        for batch in StreamedLoader(dataset, num_workers=count, multiprocessing_context=method if count else None):
            print("reading", flush=True)
            # A signal that comes while Python lets go of its lock, just before a sleep, is noticed after that.
            while True:
                time.sleep(0.05)
"""


@pytest.mark.parametrize(("num_workers", "to_group"), [(0, False), (2, False), (2, True)])
def test_interrupt_ends_everything_at_once(streamer: str, tmp_path: Path, num_workers: int, to_group: bool) -> None:
    script = tmp_path / "job.py"
    script.write_text(textwrap.dedent(_INTERRUPTED))
    root = str(Path(__file__).parents[3])
    command = [sys.executable, str(script), streamer, str(num_workers), "fork"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": root},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "reading\n"
        # In a terminal Ctrl-C goes to the workers too.
        (os.killpg if to_group else os.kill)(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)

        assert process.returncode == -signal.SIGINT
        assert errors.rstrip().endswith("KeyboardInterrupt")
        # Its session is empty: no worker is left.
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)

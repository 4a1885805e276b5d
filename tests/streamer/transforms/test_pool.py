"""The pool with real processes: killed, stopped, cancelled, closed."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from streamer.errors import TransformError, TransformPoolError
from streamer.transforms import steps
from streamer.transforms.pool import TransformPool
from streamer.transforms.transform import Transform, parse

# Of the pool's own clock, with room for a machine that is busy.
MOMENT_SECONDS = 20.0

TROUBLE = """
import os, signal, threading, time
from dataclasses import dataclass
from streamer.transforms.steps import PixelStep, register

go_on = threading.Event()

@dataclass(frozen=True)
class Trouble(PixelStep):
    name = "trouble"
    cost_nanoseconds = 1000.0

    def apply(self, images, draws, place):
        for trouble in images[:, 0, 0]:
            if trouble == 13:
                raise RuntimeError("thirteen")
            if trouble == 14:
                os.kill(os.getpid(), signal.SIGKILL)
            if trouble == 15:
                time.sleep(60)
            if trouble == 16:
                go_on.wait()
        return images

register(Trouble)
"""


@pytest.fixture
def images() -> NDArray[np.uint8]:
    """A batch whose transform is worth handing over."""
    images = np.random.default_rng(5).integers(0, 256, (500, 28, 28), dtype=np.uint8)
    images[:, 0, 0] = 0
    return images


@pytest.fixture
def indices() -> NDArray[np.int64]:
    """Of that batch."""
    return np.arange(1000, 1500)


@pytest.fixture
def augment() -> Transform:
    """A costly one."""
    return parse("augment-v1(elastic=2,cutout=5)|normalise", image_shape=(28, 28))


@pytest.fixture
def trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Transform:
    """A step of a module outside of the package, which does what the first pixel says."""
    (tmp_path / "trouble_step.py").write_text(TROUBLE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(steps, "_known", dict(steps.known()))
    monkeypatch.delitem(sys.modules, "trouble_step", raising=False)
    __import__("trouble_step")
    return parse("trouble", image_shape=(28, 28))


@pytest.fixture
async def pool(trouble: Transform) -> AsyncIterator[TransformPool]:
    """Two processes that know that step."""
    async with TransformPool(2, modules=["trouble_step"]) as pool:
        yield pool


async def until_busy(pool: TransformPool, processes: int) -> None:
    while pool.busy < processes:  # noqa: ASYNC110  (a pool counts its processes at work, it does not announce them)
        await asyncio.sleep(0)


async def test_batch_is_what_the_transform_makes_of_it(
    pool: TransformPool, augment: Transform, images: NDArray[np.uint8], indices: NDArray[np.int64]
) -> None:
    for count in (500, 63, 1, 0):
        result = await pool.apply(augment, images[:count], indices[:count], seed=7, epoch=3)

        np.testing.assert_array_equal(result, augment.apply(images[:count], indices[:count], seed=7, epoch=3))


async def test_event_loop_goes_on_while_processes_work(pool: TransformPool, trouble: Transform) -> None:
    images = np.zeros((2, 28, 28), np.uint8)
    images[:, 0, 0] = 15
    working = asyncio.create_task(pool.apply(trouble, np.repeat(images, 400, axis=0), np.arange(800), seed=1, epoch=0))
    await until_busy(pool, 2)

    for _ in range(1000):
        await asyncio.sleep(0)
    assert not working.done()
    working.cancel()


async def test_failing_sample_is_named_and_others_go_on(
    pool: TransformPool, trouble: Transform, augment: Transform, images: NDArray[np.uint8], indices: NDArray[np.int64]
) -> None:
    bad = images.copy()
    bad[321, 0, 0] = 13

    failing = asyncio.create_task(pool.apply(trouble, bad, indices, seed=1, epoch=0))
    result = await pool.apply(augment, images, indices, seed=1, epoch=0)

    with pytest.raises(TransformError, match=r"^sample 1321: trouble failed: RuntimeError: thirteen$") as failed:
        await failing
    assert failed.value.index == 1321
    np.testing.assert_array_equal(result, augment.apply(images, indices, seed=1, epoch=0))
    assert pool.restarts == 0


async def test_work_is_done_again_when_processes_are_killed(
    pool: TransformPool, augment: Transform, images: NDArray[np.uint8], indices: NDArray[np.int64]
) -> None:
    expected = augment.apply(images, indices, seed=1, epoch=0)
    for moment in range(8):
        work = asyncio.create_task(pool.apply(augment, images, indices, seed=1, epoch=0))
        if moment % 2:  # in the middle of the work, else before it
            await until_busy(pool, 1)
        os.kill(pool.process_ids[moment % 2 - 1], signal.SIGKILL)

        np.testing.assert_array_equal(await work, expected)

    await pool.apply(augment, images, indices, seed=1, epoch=0)
    assert len(pool.process_ids) == 2
    assert pool.restarts >= 4


async def test_sample_that_kills_processes_fails_alone(
    pool: TransformPool, trouble: Transform, augment: Transform, images: NDArray[np.uint8], indices: NDArray[np.int64]
) -> None:
    images[499, 0, 0] = 14

    with pytest.raises(TransformPoolError, match="ended, 3 times; one of the samples 1250 to 1499"):
        await pool.apply(trouble, images, indices, seed=1, epoch=0)

    result = await pool.apply(augment, images, indices, seed=1, epoch=0)
    np.testing.assert_array_equal(result, augment.apply(images, indices, seed=1, epoch=0))


async def test_process_that_does_not_answer_is_given_up(trouble: Transform, images: NDArray[np.uint8]) -> None:
    images[0, 0, 0] = 15
    async with TransformPool(1, modules=["trouble_step"], timeout_seconds=0.1) as pool:
        with pytest.raises(TransformPoolError, match=r"did not answer for 0\.1 s, 3 times"):
            await pool.apply(trouble, images, np.arange(500), seed=1, epoch=0)

        assert pool.restarts == 2


async def test_callers_that_go_away_leave_the_pool_as_it_was(
    pool: TransformPool, augment: Transform, images: NDArray[np.uint8], indices: NDArray[np.int64]
) -> None:
    expected = augment.apply(images, indices, seed=1, epoch=0)
    process_ids = pool.process_ids
    for steps_before in range(40):
        calls = [asyncio.create_task(pool.apply(augment, images, indices, seed=2, epoch=0)) for _ in range(6)]
        for _ in range(steps_before % 20):
            await asyncio.sleep(0)
        for call in calls[1:]:
            call.cancel()
        if steps_before % 2:
            calls[0].cancel()

        np.testing.assert_array_equal(await pool.apply(augment, images, indices, seed=1, epoch=0), expected)
        await asyncio.gather(*calls, return_exceptions=True)

    assert (pool.waiting, pool.restarts, pool.process_ids) == (0, 0, process_ids)


async def test_batches_beyond_the_bound_wait(
    pool: TransformPool, augment: Transform, images: NDArray[np.uint8], indices: NDArray[np.int64]
) -> None:
    calls = [asyncio.create_task(pool.apply(augment, images, indices, seed=1, epoch=0)) for _ in range(10)]
    await asyncio.sleep(0)

    assert pool.waiting == 6  # of ten, with two for each of two processes begun
    await asyncio.gather(*calls)
    assert pool.waiting == 0


async def test_thread_whose_caller_went_away_keeps_its_place_until_it_ends(
    trouble: Transform, images: NDArray[np.uint8], indices: NDArray[np.int64]
) -> None:
    images[0, 0, 0] = 16
    async with TransformPool(0) as pool:
        gone = [asyncio.create_task(pool.apply(trouble, images, indices, seed=1, epoch=0)) for _ in range(2)]
        await asyncio.sleep(0)
        for call in gone:
            call.cancel()
        await asyncio.gather(*gone, return_exceptions=True)

        next_one = asyncio.create_task(pool.apply(trouble, images, indices, seed=1, epoch=0))
        await asyncio.sleep(0)
        waiting = pool.waiting
        sys.modules["trouble_step"].go_on.set()
        assert waiting == 1
        np.testing.assert_array_equal(await next_one, images)


async def test_close_ends_the_work_of_callers_and_all_processes(trouble: Transform, images: NDArray[np.uint8]) -> None:
    images[:, 0, 0] = 15
    pool = TransformPool(2, modules=["trouble_step"])
    await pool.start()
    process_ids = pool.process_ids
    calls = [asyncio.create_task(pool.apply(trouble, images, np.arange(500), seed=1, epoch=0)) for _ in range(6)]
    await until_busy(pool, 2)

    await pool.close()

    results = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), MOMENT_SECONDS)
    assert [type(result) for result in results] == [TransformPoolError] * 6
    for process_id in process_ids:
        with pytest.raises(ProcessLookupError):
            os.kill(process_id, 0)


async def test_large_samples_and_no_processes_go_to_a_thread(augment: Transform) -> None:
    large = np.random.default_rng(1).integers(0, 256, (3, 1200, 1500), dtype=np.uint8)
    noise = parse("noise(std=9)", image_shape=(1200, 1500))
    expected = noise.apply(large, np.arange(3), seed=1, epoch=0)

    async with TransformPool(0) as none, TransformPool(1, max_sample_bytes=1) as small:
        for pool in (none, small):
            result = await pool.apply(noise, large, np.arange(3), seed=1, epoch=0)
            np.testing.assert_array_equal(result, expected)
        # One byte in and one out of each of 1.8 million pixels fit into 4 MiB; one in and four out do not.
        floats = parse("normalise", image_shape=(1200, 1500))
        result = await small.apply(floats, large, np.arange(3), seed=1, epoch=0)
        assert result.dtype == np.float32
        assert small.restarts == 0


async def test_module_that_is_not_there_is_told_at_the_start() -> None:
    with pytest.raises(TransformPoolError, match="a process for transforms ended"):
        await TransformPool(1, modules=["no_such_module"]).start()


def test_processes_end_when_their_owner_is_killed() -> None:
    code = (
        "import asyncio\n"
        "from streamer.transforms.pool import TransformPool\n"
        "async def main():\n"
        "    async with TransformPool(2) as pool:\n"
        "        print(*pool.process_ids, flush=True)\n"
        "        await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    path = os.pathsep.join(sys.path)
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}
    ) as owner:
        assert owner.stdout is not None
        process_ids = [int(word) for word in owner.stdout.readline().split()]
        owner.kill()

    deadline = time.monotonic() + MOMENT_SECONDS
    while any(is_running(process_id) for process_id in process_ids):
        assert time.monotonic() < deadline
        time.sleep(0.01)  # they are no children of ours: nothing tells us
    assert len(process_ids) == 2


def is_running(process_id: int) -> bool:
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False

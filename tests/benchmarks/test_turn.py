import asyncio
import os
from pathlib import Path

import pytest

from benchmarks.turn import Program, TurnError, take_turn
from benchmarks.window import Turn


async def _turn(target: str, folder: Path, *, timeout_seconds: float = 60, **options: object) -> Turn:
    program = Program(target=f"tests.benchmarks.programs:{target}", options=options)
    return await take_turn(program, warm_seconds=0.01, seconds=0.05, timeout_seconds=timeout_seconds, temporary=folder)


async def test_turn_is_measured_in_another_process(tmp_path: Path) -> None:
    turn = await _turn("counts", tmp_path, items=3)

    assert turn.items % 3 == 0
    assert turn.items > 0
    assert turn.seconds >= 0.05
    assert turn.rate == turn.items / turn.seconds


async def test_failure_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(TurnError, match=r"^ValueError: no such thing$"):
        await _turn("fails", tmp_path)


async def test_death_is_told_with_its_status(tmp_path: Path) -> None:
    with pytest.raises(TurnError, match="status 3"):
        await _turn("dies", tmp_path)


async def test_turn_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    fifo = tmp_path / "held"
    os.mkfifo(fifo)
    closed = asyncio.create_task(asyncio.to_thread(fifo.read_bytes))

    with pytest.raises(TurnError, match="did not end within 3 s"):
        await _turn("hangs", tmp_path, timeout_seconds=3, fifo=str(fifo))
    await asyncio.wait_for(closed, 60)

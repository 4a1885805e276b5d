import asyncio
import os
from pathlib import Path

import pytest

from serving import command


async def test_run_returns_status_and_both_outputs(tmp_path: Path) -> None:
    outcome = await command.run(
        "sh", "-c", "pwd; echo $WORD >&2; exit 3", timeout_seconds=10, folder=tmp_path, environment={"WORD": "said"}
    )

    assert outcome == (3, f"{tmp_path}\nsaid\n")


async def test_program_is_gone_after_the_deadline(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError):
        await command.run("sh", "-c", f"echo $$ > {tmp_path}/pid; exec sleep 60", timeout_seconds=0.5)

    assert not is_alive((tmp_path / "pid").read_text())


async def test_program_is_gone_after_cancelling(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pid")
    script = f"echo $$ > {tmp_path}/pid; exec sleep 60"
    running = asyncio.create_task(command.run("sh", "-c", script, timeout_seconds=60))
    pid = await asyncio.to_thread((tmp_path / "pid").read_text)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running

    assert not is_alive(pid)


def is_alive(pid: str) -> bool:
    return Path("/proc", pid.strip()).exists()

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from serving import keeper

PREFIX = f"sluice_test_{secrets.token_hex(4)}_"


@contextmanager
def kept(tmp_path: Path, script: str, grace_seconds: float = 30) -> Iterator[subprocess.Popen[str]]:
    """A keeper with a shell script in the server's place, from the moment on that the script writes its first line."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", keeper.__file__, str(os.getpid()), PREFIX, str(grace_seconds), "sh", "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=10)


@pytest.fixture
def region() -> Iterator[Path]:
    path = keeper.SHARED_MEMORY / f"{PREFIX}region"
    path.touch()
    yield path
    path.unlink(missing_ok=True)


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def is_alive(pid: str) -> bool:
    return Path("/proc", pid).exists()


def test_exit_status_passes_through(tmp_path: Path) -> None:
    with kept(tmp_path, "exit 7") as process:
        assert process.wait(10) == 7


def test_status_of_a_killed_server_is_the_shells(tmp_path: Path) -> None:
    with kept(tmp_path, "kill -9 $$") as process:
        assert process.wait(10) == 128 + signal.SIGKILL


def test_term_lets_the_server_finish(tmp_path: Path) -> None:
    script = "trap 'echo finished; exit 0' TERM; echo up; while :; do sleep 0.01; done"
    with kept(tmp_path, script) as process:
        first_line(process)
        process.terminate()

        assert first_line(process) == "finished"
        assert process.wait(10) == 0


def test_deaf_server_is_killed_after_the_grace(tmp_path: Path) -> None:
    with kept(tmp_path, "trap '' TERM; echo up; while :; do sleep 0.01; done", grace_seconds=0.2) as process:
        first_line(process)
        process.terminate()

        assert process.wait(10) == 128 + signal.SIGKILL


def test_children_and_shared_memory_go_with_the_server(tmp_path: Path, region: Path) -> None:
    """What a Triton that was killed leaves: a stub in its process group, and that stub's region."""
    with kept(tmp_path, "sleep 300 > /dev/null & echo $!; kill -9 $$") as process:
        child = first_line(process)

        assert process.wait(10) == 128 + signal.SIGKILL
        assert not is_alive(child)
        assert not region.exists()


def test_server_dies_with_a_killed_keeper(tmp_path: Path) -> None:
    with kept(tmp_path, "echo $$; exec sleep 300") as process:
        watch = os.pidfd_open(int(first_line(process)))
        process.kill()

        # Our own child it is not, so its end can only be watched.
        assert keeper._first(10, watch) == {watch}
        os.close(watch)


def test_keeper_of_another_process_does_not_start(tmp_path: Path) -> None:
    command = [sys.executable, keeper.__file__, "1", PREFIX, "1", "touch", str(tmp_path / "started")]

    assert subprocess.run(command, check=False, timeout=10).returncode == 1
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("name", ["sluice_test_other_region", "unrelated"])
def test_sweep_touches_nothing_else(name: str) -> None:
    other = keeper.SHARED_MEMORY / f"{name}{secrets.token_hex(4)}"
    other.touch()
    try:
        keeper.sweep(PREFIX)

        assert other.exists()
    finally:
        other.unlink()

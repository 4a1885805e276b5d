import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving import orphans
from serving.keeper import SHARED_MEMORY


@pytest.fixture
def dead_owner() -> str:
    """A prefix whose owner has just ended."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    return orphans.new_prefix().replace(f"_{os.getpid()}_", f"_{ended.pid}_")


@pytest.fixture
def living_prefix() -> str:
    return orphans.new_prefix()


@pytest.fixture
def stub(tmp_path: Path) -> Iterator["Stubs"]:
    stubs = Stubs(tmp_path)
    yield stubs
    stubs.end()


class Stubs:
    """Processes that look like Triton's stubs, or only nearly so."""

    def __init__(self, folder: Path) -> None:
        self._program = folder / "triton_python_backend_stub"
        self._program.symlink_to("/bin/sleep")
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, prefix: str, program: str | None = None) -> subprocess.Popen[bytes]:
        # sh keeps the further arguments in its command line, where a stub has its region's name.
        line = [program or str(self._program), "-c", "echo up; read line", f"{prefix}region"]
        process = subprocess.Popen(line, executable="/bin/sh", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._processes.append(process)
        # For an instant after exec a process has no command line at all.
        assert process.stdout is not None
        process.stdout.readline()
        return process

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()


def finish(process: subprocess.Popen[bytes]) -> int:
    """Let a stub that was spared end by itself, with status 0."""
    process.communicate(b"a line\n", timeout=10)
    return process.returncode


async def test_clear_ends_stubs_and_regions_of_dead_owners(stub: Stubs, dead_owner: str) -> None:
    region = SHARED_MEMORY / f"{dead_owner}region"
    region.touch()
    process = stub.start(dead_owner)

    await orphans.clear(grace_seconds=1)

    assert process.wait(10) == -9
    assert not region.exists()


async def test_clear_spares_what_a_living_owner_has(stub: Stubs, living_prefix: str) -> None:
    region = SHARED_MEMORY / f"{living_prefix}region"
    region.touch()
    process = stub.start(living_prefix)
    try:
        await orphans.clear(grace_seconds=1)

        assert finish(process) == 0
        assert region.exists()
    finally:
        region.unlink()


async def test_clear_spares_other_programs_and_other_namespaces(stub: Stubs, dead_owner: str) -> None:
    _, namespace, rest = dead_owner.split("_", 2)
    spared = [stub.start(dead_owner, program="less"), stub.start(f"sluice_{namespace}0_{rest}")]

    await orphans.clear(grace_seconds=1)

    assert [finish(process) for process in spared] == [0, 0]


def test_kill_ends_only_this_prefix(stub: Stubs, living_prefix: str) -> None:
    ours, other = stub.start(living_prefix), stub.start(orphans.new_prefix())

    orphans.kill(living_prefix)

    assert ours.wait(10) == -9
    assert finish(other) == 0

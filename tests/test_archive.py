"""`make dist`: what is handed over works on its own."""

import os
import subprocess
import tarfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="make dist needs a clone, and this is none")


def run(*command: str | Path, folder: Path) -> str:
    """Run a command as a user in a fresh terminal would, who has activated nothing."""
    kept = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "VIRTUAL_ENV")}
    done = subprocess.run(command, cwd=folder, env=kept, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    run("make", "dist", f"DIST={tmp_path}", folder=ROOT)
    (packed,) = tmp_path.glob("*.tar.gz")
    return packed


def test_archive_holds_what_is_committed_in_one_folder(archive: Path) -> None:
    with tarfile.open(archive) as tar:
        files = [PurePosixPath(member.name) for member in tar if member.isfile()]
    committed = run("git", "ls-tree", "-r", "--name-only", "HEAD", folder=ROOT).splitlines()

    assert {file.parts[0] for file in files} == {archive.name.removesuffix(".tar.gz")}
    assert sorted(str(file.relative_to(file.parts[0])) for file in files) == sorted(committed)


@pytest.mark.slow
@pytest.mark.triton
@pytest.mark.timeout(1800)
def test_unpacked_archive_passes_its_own_tests(archive: Path, tmp_path: Path) -> None:
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    unpacked = tmp_path / archive.name.removesuffix(".tar.gz")

    assert " passed" in run("make", "test", folder=unpacked).splitlines()[-1]

import asyncio
import os
import sys
import time
import zipfile
from pathlib import Path

import pytest

from serving import installation
from serving.errors import InstallationError
from serving.installation import install, staged

STUB = "python/triton_python_backend_stub"
RUNS = "#!/bin/sh\nexit 1\n"
LACKS_LIBRARY = "#!/bin/sh\necho error while loading shared libraries: libfoo.so.1: no such file; exit 127\n"


class FakePip:
    """Stands in for ``python -m pip``: a script that brings a tiny wheel, or does what a test tells it to."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder = folder
        self.brings()
        monkeypatch.setattr(sys, "executable", str(folder / "python"))

    def brings(self, stub: str = RUNS) -> None:
        """Bring a wheel whose programs are shell scripts."""
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        server = "pytriton/tritonserver"
        with zipfile.ZipFile(self._folder / "nvidia_pytriton.whl", "w") as wheel:
            wheel.writestr("pytriton/client/client.py", "not needed")
            wheel.writestr("nvidia_pytriton.libs/libtritonserver-0.so", "library")
            wheel.writestr(f"{server}/bin/tritonserver", RUNS)
            wheel.writestr(f"{server}/backends/python/triton_python_backend_utils.py", "")
            wheel.writestr(f"{server}/python_backend_stubs/{python}/triton_python_backend_stub", stub)
            wheel.writestr(f"{server}/python_backend_stubs/3.8/triton_python_backend_stub", "not needed")
        self.does(
            f'echo >> {self._folder}/calls; while [ "$1" != --dest ]; do shift; done; cp {self._folder}/*.whl "$2"'
        )

    def does(self, body: str) -> None:
        (self._folder / "python").write_text(f"#!/bin/sh\n{body}\n")
        (self._folder / "python").chmod(0o755)

    @property
    def calls(self) -> int:
        return len((self._folder / "calls").read_text().splitlines())


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePip:
    return FakePip(tmp_path, monkeypatch)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def ignore(line: str) -> None:
    pass


def left_by_staging(cache: Path) -> list[Path]:
    return list(cache.rglob(".staging-*"))


async def test_install_takes_what_serving_needs_and_no_more(pip: FakePip, cache: Path) -> None:
    found = await install(cache, ignore)

    folder = staged(cache)
    assert folder is not None
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files >= {"bin/tritonserver", "lib/libtritonserver-0.so", STUB, "manifest.json"}
    assert not any("client" in file or "3.8" in file for file in files)
    assert os.access(found.binary, os.X_OK)
    assert not left_by_staging(cache)


async def test_second_install_downloads_and_says_nothing(pip: FakePip, cache: Path) -> None:
    lines: list[str] = []

    first = await install(cache, lines.append)
    told = len(lines)
    second = await install(cache, lines.append)

    assert first == second
    assert "55 MB" in lines[0]
    assert len(lines) == told
    assert pip.calls == 1


async def test_cancelled_download_is_not_an_installation(pip: FakePip, cache: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "started")
    pip.does(f"echo > {tmp_path}/started; exec sleep 60")
    installing = asyncio.create_task(install(cache, ignore))
    await asyncio.to_thread((tmp_path / "started").read_text)
    installing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await installing

    assert staged(cache) is None
    assert not left_by_staging(cache)
    pip.brings()
    await install(cache, ignore)
    assert staged(cache) is not None


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_text("half")])
async def test_broken_installation_is_made_anew(pip: FakePip, cache: Path, harm: object) -> None:
    found = await install(cache, ignore)
    assert callable(harm)
    harm(found.binary)

    assert staged(cache) is None
    assert (await install(cache, ignore)).binary.read_text() == RUNS
    assert pip.calls == 2


async def test_two_installs_at_once_share_one_folder(pip: FakePip, cache: Path) -> None:
    installing = [asyncio.create_task(install(cache, ignore)) for _ in range(2)]
    await asyncio.wait(installing, return_when=asyncio.FIRST_COMPLETED)
    folder = staged(cache)
    assert folder is not None
    first_in_place = folder.stat().st_ino

    first, second = await asyncio.gather(*installing)

    assert first == second
    assert folder.stat().st_ino == first_in_place, "nobody's running server is moved from under it"
    assert not left_by_staging(cache)


async def test_what_a_killed_install_left_is_removed_a_day_later(pip: FakePip, cache: Path) -> None:
    old, young = cache / "triton" / ".staging-old", cache / "triton" / ".staging-young"
    for folder in (old, young):
        folder.mkdir(parents=True)
    os.utime(old, (time.time() - 90_000,) * 2)

    await install(cache, ignore)

    assert not old.exists()
    assert young.exists()


async def test_download_failure_carries_pips_reason(pip: FakePip, cache: Path) -> None:
    pip.does("echo ERROR: No matching distribution found; exit 1")

    with pytest.raises(InstallationError, match=r"No matching distribution found\. Check the network"):
        await install(cache, ignore)
    assert staged(cache) is None


async def test_missing_pip_is_named_with_its_remedy(pip: FakePip, cache: Path) -> None:
    pip.does("echo $0: No module named pip; exit 1")

    with pytest.raises(InstallationError, match="-m ensurepip"):
        await install(cache, ignore)


async def test_another_wheel_of_the_same_name_is_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the real pip, which compares the digest."""
    with zipfile.ZipFile(tmp_path / "nvidia_pytriton-0.7.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(
            "nvidia_pytriton-0.7.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: nvidia-pytriton\nVersion: 0.7.0\n"
        )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))

    with pytest.raises(InstallationError, match="pip could not download it"):
        await install(cache, ignore)
    assert staged(cache) is None


async def test_program_that_lacks_a_library_is_not_installed(pip: FakePip, cache: Path) -> None:
    pip.brings(stub=LACKS_LIBRARY)

    with pytest.raises(InstallationError, match=r"libfoo\.so\.1"):
        await install(cache, ignore)
    assert staged(cache) is None


async def test_unwritable_cache_is_named(pip: FakePip, tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(InstallationError, match=f"{tmp_path}/file/cache: cannot install"):
        await install(tmp_path / "file" / "cache", ignore)


async def test_backend_follows_its_source(
    pip: FakePip, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = await install(cache, ignore)
    for name in ("model.py", "preparation.py"):
        (tmp_path / name).write_text("changed = True\n")
    monkeypatch.setattr(installation, "BACKEND", tmp_path)

    after = await install(cache, ignore)

    for name in ("model.py", "preparation.py"):
        assert (after.backends / "pytorch" / name).read_text() == "changed = True\n"
    assert (after.backends / STUB).is_file()
    assert before.backends.is_dir(), "a server that runs with the old one keeps it"
    assert pip.calls == 1

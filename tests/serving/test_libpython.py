import os
import sys
import sysconfig
from pathlib import Path

import pytest

from serving import libpython
from serving.errors import InstallationError


@pytest.fixture
def bare_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without the library and without apt; returns the folder that its programs lie in."""
    monkeypatch.setattr(sysconfig, "get_config_var", lambda _: str(tmp_path / "nowhere"))
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path / "nowhere"))
    monkeypatch.setattr(libpython, "_STANDARD", ())
    programs = tmp_path / "bin"
    programs.mkdir()
    add_program(programs, "ldconfig", "true")
    monkeypatch.setenv("PATH", str(programs))
    return programs


def add_program(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{body}\n")
    (folder / name).chmod(0o755)


def test_find_prefers_the_interpreters_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_config_var", lambda _: str(tmp_path))
    (tmp_path / libpython.NAME).touch()

    assert libpython.find(tmp_path / "cache") == tmp_path / libpython.NAME


def test_find_asks_the_linker(bare_machine: Path, tmp_path: Path) -> None:
    library = tmp_path / libpython.NAME
    library.touch()
    add_program(bare_machine, "ldconfig", f'echo "\t{libpython.NAME} (libc6,x86-64) => {library}"')

    assert libpython.find(tmp_path / "cache") == library


async def test_fetch_takes_the_library_out_of_the_package(bare_machine: Path, tmp_path: Path) -> None:
    add_program(
        bare_machine, "apt-get", f'[ "$*" = "download {libpython.PACKAGE}" ] && touch {libpython.PACKAGE}_1_amd64.deb'
    )
    add_program(bare_machine, "dpkg", f'mkdir -p "$3/usr/lib" && echo library > "$3/usr/lib/{libpython.NAME}"')
    cache = tmp_path / "cache"

    library = await libpython.fetch(cache, lambda _: None)

    assert library.read_text() == "library\n"
    assert libpython.find(cache) == library
    assert os.listdir(library.parent) == [libpython.NAME]


async def test_fetch_names_the_command_that_helps_without_apt(bare_machine: Path, tmp_path: Path) -> None:
    with pytest.raises(InstallationError, match=libpython.REMEDY):
        await libpython.fetch(tmp_path / "cache", lambda _: None)

    assert libpython.find(tmp_path / "cache") is None


async def test_failed_package_leaves_nothing(bare_machine: Path, tmp_path: Path) -> None:
    add_program(bare_machine, "apt-get", "touch half.deb; exit 100")

    with pytest.raises(InstallationError, match=libpython.REMEDY):
        await libpython.fetch(tmp_path / "cache", lambda _: None)

    assert os.listdir(tmp_path / "cache" / "libpython") == []

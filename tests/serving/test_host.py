import os
import platform
import shutil
import sys
from pathlib import Path

import pytest

from serving import host, libpython
from serving.errors import UnsupportedHostError


def finding(name: str, cache: Path) -> host.Finding:
    return next(found for found in host.examine(cache) if found.name == name)


def test_examine_changes_nothing(tmp_path: Path) -> None:
    cache = tmp_path / "cache"

    names = [found.name for found in host.examine(cache)]

    assert names == ["platform", "glibc", "Python", "libpython", "torch", "shared memory", "GPU"]
    assert not cache.exists()


def test_every_unmet_need_has_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(os, "confstr", lambda _: "glibc 2.31")
    monkeypatch.setattr(sys, "version_info", (3, 14, 0, "final", 0))
    monkeypatch.setattr(libpython, "find", lambda _: None)

    unmet = [found for found in host.examine(tmp_path) if not found.ok]

    assert {found.name for found in unmet} >= {"platform", "glibc", "Python", "libpython"}
    assert all(found.remedy for found in unmet)


def test_require_names_platform_found_and_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Darwin")

    with pytest.raises(UnsupportedHostError, match=r"Darwin x86_64.*Linux on x86_64"):
        host.require()


def test_require_refuses_older_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "confstr", lambda _: "glibc 2.34")

    with pytest.raises(UnsupportedHostError, match=r"glibc is 2\.34"):
        host.require()


def test_glibc_is_absent_on_musl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: str) -> str:
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(os, "confstr", unknown)

    assert finding("glibc", tmp_path).detail == "absent"


def test_missing_gpu_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)

    found = finding("GPU", tmp_path)

    assert found.ok
    assert found.remedy is None


def test_gpu_is_named_when_the_driver_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA Example'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    assert finding("GPU", tmp_path).detail == "NVIDIA Example"

import os
import sys
from pathlib import Path

import pytest

from rpc.cores import num_cores

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux'")


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine of eight."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))


def cores(folder: Path, groups: str, **limits: str) -> int:
    """Return the cores of a process in these groups, whose files hold these limits."""
    mount = folder / "mount"
    for file, limit in limits.items():
        path = mount / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{limit}\n")
    (folder / "cgroup").write_text(groups)
    return num_cores(folder / "cgroup", mount)


V1 = "9:name=systemd:/\n4:cpu,cpuacct:/docker/1a\n3:cpuset:/docker/1a\n0::/docker/1a\n"


@pytest.mark.parametrize(
    ("limit", "expected"), [("max 100000", 8), ("200000 100000", 2), ("150000 100000", 2), ("5000 100000", 1)]
)
def test_container_has_what_its_quota_pays_for(limit: str, expected: int, tmp_path: Path) -> None:
    assert cores(tmp_path, "0::/\n", **{"cpu.max": limit}) == expected


def test_quota_above_what_the_scheduler_gives_gives_no_more(tmp_path: Path) -> None:
    assert cores(tmp_path, "0::/\n", **{"cpu.max": "6400000 100000"}) == 8


def test_least_of_the_groups_around_counts(tmp_path: Path) -> None:
    limits = {"a/b/c/cpu.max": "max 100000", "a/b/cpu.max": "300000 100000", "a/cpu.max": "500000 100000"}
    assert cores(tmp_path, "0::/a/b/c\n", **limits) == 3


@pytest.mark.parametrize("folder", ["cpu/docker/1a", "cpu"], ids=["as on the host", "as in the container"])
@pytest.mark.parametrize(("quota", "expected"), [("-1", 8), ("250000", 3)])
def test_version_1_has_a_tree_for_each_controller(folder: str, quota: str, expected: int, tmp_path: Path) -> None:
    limits = {f"{folder}/cpu.cfs_quota_us": quota, f"{folder}/cpu.cfs_period_us": "100000"}
    assert cores(tmp_path, V1, **limits, **{"cpuset/cpu.max": "1 100000"}) == expected


def test_without_groups_it_is_what_the_scheduler_gives(tmp_path: Path) -> None:
    assert num_cores(tmp_path / "none", tmp_path) == 8


def test_this_machine_has_some() -> None:
    assert 1 <= num_cores() <= 8

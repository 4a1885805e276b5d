import os
import subprocess
import sys
from pathlib import Path

import pytest

from streamer.occupancy import Occupancy, give_back, reserve

ROOT = Path(__file__).resolve().parents[2]


def test_process_alone_counts_its_own() -> None:
    alone = Occupancy.alone()
    alone.add(1)
    alone.add(1)
    alone.add(-1)
    assert (alone.own, alone.total) == (1, 1)


@pytest.mark.skipif(sys.platform != "linux", reason="needs memfd_create")
def test_processes_see_the_sum_and_a_successor_begins_at_nothing() -> None:
    descriptor = reserve(2)
    program = (
        f"import os; from streamer.occupancy import Occupancy; other = Occupancy.among({descriptor}, 1, 2); "
        "other.add(3); print(other.total, flush=True); os.kill(os.getpid(), 9)"
    )
    here = Occupancy.among(descriptor, 0, 2)
    here.add(2)
    said = subprocess.run([sys.executable, "-c", program], cwd=ROOT, pass_fds=(descriptor,), capture_output=True)

    assert said.stdout.strip() == b"5"
    assert (here.own, here.total) == (2, 5), "the other one's are still there"
    successor = Occupancy.among(descriptor, 1, 2)
    assert (successor.own, here.total) == (0, 2)
    os.close(descriptor)


@pytest.mark.skipif(sys.platform != "linux", reason="needs memfd_create")
def test_places_of_a_dead_process_are_given_back_and_no_others() -> None:
    descriptor = reserve(3)
    first, second, third = (Occupancy.among(descriptor, number, 3) for number in range(3))
    for occupancy, count in ((first, 1), (second, 20), (third, 300)):
        occupancy.add(count)
    give_back(descriptor, 1)
    assert first.total == 301
    os.close(descriptor)

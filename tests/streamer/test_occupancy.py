import os
import subprocess
import sys
from pathlib import Path

import pytest

from streamer.occupancy import Occupancy, reserve

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

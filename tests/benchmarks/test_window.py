import os
import subprocess
import sys

from benchmarks.window import Window, cpu_seconds

_BURN = "import time\nwhile time.process_time() < 0.3: pass\nprint('done', flush=True)\ninput()"


def test_items_of_the_warm_up_do_not_count() -> None:
    window = Window(warm_seconds=0, seconds=0)

    over = [window.add(items) for items in (1, 2, 4)]

    assert over == [False, False, True]
    assert window.turn.items == 4
    assert window.turn.seconds > 0


def test_cpu_time_of_children_counts_while_they_run() -> None:
    before = cpu_seconds([os.getpid()])
    with subprocess.Popen([sys.executable, "-c", _BURN], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        during = cpu_seconds([os.getpid()])
        child.kill()

    assert during - before >= 0.25


def test_process_that_has_ended_costs_nothing() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()

    assert cpu_seconds([ended.pid]) == 0

import os
import threading

import pytest

from rpc import precedence

pytestmark = pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="this system has no batch policy")


def test_threads_that_wake_do_not_interrupt_the_one_that_took_precedence() -> None:
    # Policies stay with the threads of a process: this one's others are not to keep theirs.
    done = threading.Event()
    waiting = threading.Thread(target=done.wait, args=(10,))
    waiting.start()
    assert waiting.native_id is not None
    before = {int(name): os.sched_getscheduler(int(name)) for name in os.listdir("/proc/self/task")}
    try:
        precedence.take()

        assert os.sched_getscheduler(waiting.native_id) == os.SCHED_BATCH
        assert os.sched_getscheduler(threading.get_native_id()) == os.SCHED_OTHER
    finally:
        for thread, policy in before.items():
            os.sched_setscheduler(thread, policy, os.sched_param(0))
        done.set()
        waiting.join()

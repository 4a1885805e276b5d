"""
gRPC and fork: a process that was forked while grpc.aio ran has a gRPC that hangs or crashes, as its threads are gone.

Where it has been used and is done, a fork does no harm.
"""

import gc
import os
import threading

from streamer.errors import ReaderError

# How grpc.aio's own thread is named, which runs while there is a channel.
_POLLER = "(_poll_wrapper)"
# One that goes on costs each fork so much.
_ENDING_SECONDS = 0.5

_is_watching = False
_runs_at_fork = False
_is_dead = False


def watch() -> None:
    """From now on notice at each fork whether it leaves the new process a gRPC that works."""
    global _is_watching
    if not _is_watching:
        os.register_at_fork(before=_before, after_in_child=_after_in_child)
        _is_watching = True


def check() -> None:
    """
    Refuse to use gRPC where it would hang.

    Raises:
        ReaderError: This process was forked while grpc.aio ran.
    """
    if _is_dead:
        raise ReaderError(
            "this process was forked from one that was using grpc.aio, and gRPC does not work in it: start workers "
            'with multiprocessing_context="spawn", or close what reads first'
        )


def _before() -> None:
    global _runs_at_fork
    pollers = _pollers()
    if pollers:
        # An error that is done with may still hold a channel.
        gc.collect()
        # grpc.aio takes its thread for ended a moment before it is.
        for each in pollers:
            each.join(_ENDING_SECONDS)
    _runs_at_fork = bool(_pollers())


def _after_in_child() -> None:
    global _is_dead
    _is_dead = _is_dead or _runs_at_fork


def _pollers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.endswith(_POLLER)]

"""Ray for a while: started on this machine for one search, or a cluster that is there already."""

import importlib
import logging
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from training.errors import SearchError

# Nothing but Ray's own messages goes through it: samples come from the streamer.
_OBJECT_STORE_BYTES = 100 * 2**20
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # What ran is written down at each change: a kill then loses no finished trial.
    "TUNE_GLOBAL_CHECKPOINT_S": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    # Our own record says the same, once.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
}


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """
    Start Ray on this machine, or join a cluster; nobody else can send work to the former.

    Args:
        address: Of a cluster, or ``auto`` for the one this machine belongs to; none: Ray on this machine alone.

    Raises:
        SearchError: Ray is not installed, or the cluster does not answer.
    """
    if address is not None and address.startswith("ray://"):
        raise SearchError(
            f"--address {address}: a search runs on a machine of the cluster; there, give HOST:PORT or auto"
        )
    ray = _imported(alone=address is None)
    # A failed trial is told in one line; its traceback is in its folder.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    options: dict[str, Any] = {}
    if address is None:
        options |= {"num_cpus": len(os.sched_getaffinity(0)), "object_store_memory": _OBJECT_STORE_BYTES}
        options["include_dashboard"] = False
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise SearchError(f"Ray{f' at {address}' if address else ''}: {str(error).splitlines()[0]}") from error
    try:
        yield
    finally:
        ray.shutdown()


def address_of_this_machine() -> str:
    """Return the address under which the cluster's other machines reach this one; inside of :func:`connected`."""
    return str(importlib.import_module("ray").util.get_node_ip_address())


def _imported(*, alone: bool) -> Any:
    """Return Ray, imported only when its environment is set: it reads the token as it is loaded."""
    os.environ.update(_ENVIRONMENT)
    if alone and "ray" not in sys.modules:
        # Ray listens on all networks of this machine and runs what it is sent.
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    try:
        importlib.import_module("optuna")
        return importlib.import_module("ray")
    except ImportError as error:
        raise SearchError(f"a search needs Ray and Optuna ({error}): pip install '.[tune]' in the sources") from error

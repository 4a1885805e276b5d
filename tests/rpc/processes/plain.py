"""A worker that serves nothing: it says that it is ready, counts what it is told to, and waits."""

import asyncio

from prometheus_client import Counter, Gauge

from rpc.processes.parent import Parent, work
from rpc.telemetry import Registry


class RefusedError(Exception):
    """What this worker may be told to fail with."""


async def _serve(order: dict[str, str | float], parent: Parent) -> None:
    registry = Registry("test")
    Counter("test_calls", "Calls.", registry=registry).inc(float(order["calls"]))
    Gauge("test_limit", "Limit.", registry=registry).set(float(order["limit"]))
    parent.listen(registry)
    if problem := order.get("problem"):
        raise RefusedError(problem)
    parent.ready("")
    await asyncio.Event().wait()


if __name__ == "__main__":
    work(_serve, RefusedError)

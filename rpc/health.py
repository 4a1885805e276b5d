"""grpc.health.v1 for one yes or no, told to any number of watchers."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

MAX_WATCHERS = 128
"""Watches open at once on one server; a server that bounds its calls leaves room for more than these."""

Context = grpc.aio.ServicerContext[Any, Any]


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # the base is untyped
    """
    Check and Watch.

    Unlike grpcio-health-checking's aio servicer, a watcher that does not read delays nobody, and one that leaves
    does not silence the others; while draining, watches end, so that they do not hold up the drain. As they never
    end otherwise, there are at most :data:`MAX_WATCHERS`.

    Args:
        services: Names that share the status; ``""`` stands for the server as a whole.
    """

    def __init__(self, services: Sequence[str]) -> None:
        self._services = frozenset(services)
        self._is_serving = False
        self._others: dict[str, bool] = {}
        self._is_draining = False
        self._changed = asyncio.Event()
        self._num_watchers = 0

    @property
    def is_serving(self) -> bool:
        """The status now."""
        return self._is_serving

    async def serving(self) -> None:
        """Wait until the status is SERVING."""
        while not self._is_serving:
            await self._changed.wait()

    def report(self, is_serving: bool) -> None:
        """Set the status; ignored while draining."""
        if not self._is_draining and is_serving != self._is_serving:
            self._is_serving = is_serving
            self._wake()

    def tell(self, service: str, is_serving: bool) -> None:
        """Set the status of another service, which has its own; ignored while draining."""
        if not self._is_draining and self._others.get(service) != is_serving:
            self._others[service] = is_serving
            self._wake()

    def forget(self, service: str) -> None:
        """Have another service be unknown again."""
        if self._others.pop(service, None) is not None:
            self._wake()

    def drain(self) -> None:
        """Report NOT_SERVING from now on and end the watches."""
        self._is_serving, self._is_draining = False, True
        self._others = dict.fromkeys(self._others, False)
        self._wake()

    async def Check(self, request: Any, context: Context) -> Any:
        """Return the status; NOT_FOUND for a service that is not here."""
        if request.service not in self._services and request.service not in self._others:
            # The others, which may be many or not for everybody to know, are not named.
            known = ", ".join(sorted(filter(None, self._services)))
            await context.abort(
                grpc.StatusCode.NOT_FOUND,
                f"service: no service {request.service[:64]!a}; here are {known}, or empty for the server",
            )
        return self._status(request.service)

    async def Watch(self, request: Any, context: Context) -> AsyncIterator[Any]:
        """Send the status now and at each change; RESOURCE_EXHAUSTED where too many watch already."""
        if self._num_watchers >= MAX_WATCHERS:
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"health has {MAX_WATCHERS} watchers and takes no more; end one, or ask with Check",
            )
        self._num_watchers += 1
        told = None
        try:
            while True:
                # Taken before the status is read: a change in between then wakes at once.
                changed = self._changed
                status = self._status(request.service)
                if status != told:
                    yield status
                    told = status
                elif self._is_draining:
                    return
                else:
                    await changed.wait()
        finally:
            self._num_watchers -= 1

    def _status(self, service: str) -> Any:
        status = health_pb2.HealthCheckResponse
        is_serving = self._is_serving if service in self._services else self._others.get(service)
        if is_serving is None:
            return status(status=status.SERVICE_UNKNOWN)
        return status(status=status.SERVING if is_serving else status.NOT_SERVING)

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

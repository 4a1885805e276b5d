"""
One of the processes that serve as one gateway: ``python -m gateway.worker SOCKET``.

:mod:`gateway.workers` starts it.
"""

from typing import Any

from gateway.errors import GatewayError
from gateway.server import GatewayServer, run
from gateway.settings import GatewaySettings
from rpc import log, loop
from rpc.processes.parent import Parent, work
from rpc.settings import SettingsError


async def _serve(order: dict[str, Any], parent: Parent) -> None:
    settings = GatewaySettings(**order)
    log.configure(settings.log_level)
    gateway = GatewayServer(settings, is_worker=True)
    parent.listen(gateway.metrics.registry)
    async with gateway:
        await run(gateway, grace_seconds=settings.drain_seconds, on_ready=parent.ready)


if __name__ == "__main__":
    work(_serve, GatewayError, SettingsError, run=loop.run)

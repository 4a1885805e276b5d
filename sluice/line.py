"""The whole line on this machine: Triton, streamer and gateway as supervised services."""

import asyncio
from collections.abc import Callable, Mapping

from gateway.client import ClientError, ImageClient
from gateway.settings import GatewaySettings
from rpc.settings import load
from serving.installation import install
from serving.settings import TritonSettings
from serving.triton import servable_models
from sluice.access import own_tls
from sluice.ports import places
from sluice.settings import UpSettings
from sluice.streaming import look_into
from sluice.supervisor import Service, ServiceError, Supervisor
from streamer.settings import StreamerSettings

# Longer than any part takes by itself: a first use installs Triton and may fetch data.
_READY_SECONDS = 600.0
_SERVING_SECONDS = 60.0
# What a service may need to end beyond the time it gives the calls in flight.
_STOP_MARGIN_SECONDS = 10.0


async def run(settings: UpSettings, *, report: Callable[[str], None]) -> None:
    """
    Run the line until this is cancelled, then stop all of it; cancelled again, kill what is left.

    Args:
        settings: Ports and folders that differ from the services' own settings.
        report: Told one line for each service with its address, and what happens later.

    Raises:
        ServiceError: A service did not get ready; the others were stopped.
    """
    try:
        async with Supervisor(settings.logs, report) as supervisor:
            try:
                await _start(supervisor, settings, report)
                await asyncio.Event().wait()
            finally:
                report("stopping")
    finally:
        report("stopped")


def triton_service(settings: UpSettings) -> Service:
    """Return Triton as a service of the line."""
    ports = {
        "--grpc-port": settings.triton_grpc_port,
        "--http-port": settings.triton_http_port,
        "--metrics-port": settings.triton_metrics_port,
    }
    return Service(
        name="triton",
        arguments=["triton", *_given(ports)],
        ready_seconds=_READY_SECONDS,
        stop_seconds=load(TritonSettings).stop_grace_seconds + _STOP_MARGIN_SECONDS,
    )


def streamer_service(settings: UpSettings) -> Service:
    """Return the streamer as a service of the line."""
    options = {
        "--port": settings.streamer_port,
        "--metrics-port": settings.streamer_metrics_port,
        "--workers": settings.streamer_workers,
        "--data": settings.data,
    }
    return Service(
        name="streamer",
        arguments=["streamer", *_given(options)],
        ready_seconds=_READY_SECONDS,
        stop_seconds=load(StreamerSettings).drain_seconds + _STOP_MARGIN_SECONDS,
    )


def gateway_service(settings: UpSettings, triton: str) -> Service:
    """Return the gateway in front of the Triton at that address as a service of the line."""
    options = {
        "--port": settings.gateway_port,
        "--metrics-port": settings.gateway_metrics_port,
        "--workers": settings.gateway_workers,
        "--triton": triton,
    }
    return Service(
        name="gateway",
        arguments=["gateway", *_given(options)],
        stop_seconds=load(GatewaySettings).drain_seconds + _STOP_MARGIN_SECONDS,
    )


async def _start(supervisor: Supervisor, settings: UpSettings, report: Callable[[str], None]) -> None:
    _require_free_ports(settings)
    triton_settings = load(TritonSettings)
    sources = load(StreamerSettings, data=settings.data)
    # Both happen here, where their progress is seen; the services then find them in the cache.
    for name, place in sources.places.items():
        await look_into(name, place, sources, report)
    await install(triton_settings.cache, report)
    triton_settings.model_repository.mkdir(parents=True, exist_ok=True)  # the first training fills it
    report(f"logs      {settings.logs}/")
    report(f"metrics   {_metrics(settings)}")
    triton = await supervisor.start(triton_service(settings))
    report(f"triton    {triton}")
    report(f"streamer  {await supervisor.start(streamer_service(settings))}")
    gateway = await supervisor.start(gateway_service(settings, triton))
    report(f"gateway   {gateway}")
    if not servable_models(triton_settings.model_repository):
        report("no model yet: `sluice train` in another terminal makes one; Ctrl-C stops")
        return
    async with ImageClient(gateway, tls=own_tls()) as client:
        try:
            await client.wait_ready(timeout_seconds=_SERVING_SECONDS)
        except ClientError as error:
            report(f"the gateway does not serve a model: {error}")
            return
    report("ready: `sluice classify FILE...` asks it; Ctrl-C stops")


def _require_free_ports(settings: UpSettings) -> None:
    """Name every port that is taken before anything starts."""
    taken = [
        f"{place.name}: cannot listen on {place.address}; {place.option} or {place.variable} changes it"
        for place in places(settings)
        if not place.is_free()
    ]
    if taken:
        raise ServiceError("\n".join(["ports are taken, by another `sluice up` perhaps:", *taken]))


def _metrics(settings: UpSettings) -> str:
    ours = ("gateway metrics", "streamer metrics")
    return ", ".join(f"http://{place.address}/metrics" for place in places(settings) if place.name in ours)


def _given(options: Mapping[str, object]) -> list[str]:
    return [word for name, value in options.items() if value is not None for word in (name, str(value))]

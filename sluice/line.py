"""The whole line on this machine: Triton, streamer and gateway as supervised services."""

import asyncio
import contextlib
import re
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from gateway.client import ClientError, ImageClient
from rpc.settings import load
from serving.errors import ServingError
from serving.installation import install
from serving.settings import TritonSettings
from serving.triton import EmbeddedTriton
from sluice.settings import UpSettings
from sluice.supervisor import Service, Supervisor
from streamer.datasets import find
from streamer.settings import StreamerSettings

# Longer than any part takes by itself: a first use installs Triton and may fetch data.
_READY_SECONDS = 600.0
_SERVING_SECONDS = 60.0
_VERSION = re.compile(r"[1-9][0-9]*")


async def run_until_interrupted(settings: UpSettings, *, report: Callable[[str], None]) -> None:
    """
    Run the line until SIGINT or SIGTERM, then stop all of it.

    Args:
        settings: Ports and folders that differ from the services' own settings.
        report: Told one line for each service with its address, and what happens later.

    Raises:
        ServiceError: A service did not get ready; the others were stopped.
    """
    stopping = asyncio.Event()
    with _signals(stopping.set):
        async with Supervisor(settings.logs, report) as supervisor:
            starting = asyncio.create_task(_start(supervisor, settings, report))
            interrupted = asyncio.create_task(stopping.wait())
            try:
                await asyncio.wait({starting, interrupted}, return_when=asyncio.FIRST_COMPLETED)
                if starting.done():
                    starting.result()
                    await interrupted
            finally:
                for task in (starting, interrupted):
                    task.cancel()
                await asyncio.gather(starting, interrupted, return_exceptions=True)
                report("stopping")
    report("stopped")


async def run_triton(
    settings: TritonSettings, *, on_ready: Callable[[str], None], report: Callable[[str], None]
) -> None:
    """
    Run the embedded Triton until SIGINT or SIGTERM, or until it ends by itself.

    Args:
        settings: Addresses, folders and limits.
        on_ready: Told the gRPC address once models can be loaded and asked.
        report: Told about an installation, in lines.

    Raises:
        serving.errors.ServingError: It cannot be had or started here, or it died.
    """
    stopping = asyncio.Event()
    with _signals(stopping.set):
        installation = await install(settings.cache, report)
        async with EmbeddedTriton(settings, installation) as triton:
            on_ready(triton.address)
            died = asyncio.create_task(triton.wait())
            interrupted = asyncio.create_task(stopping.wait())
            try:
                await asyncio.wait({died, interrupted}, return_when=asyncio.FIRST_COMPLETED)
                if died.done():
                    raise ServingError(f"Triton ended with status {died.result()}; {settings.log_file} may say why")
            finally:
                for task in (died, interrupted):
                    task.cancel()
                await asyncio.gather(died, interrupted, return_exceptions=True)


def triton_service(settings: UpSettings) -> Service:
    """Return Triton as a service of the line."""
    ports = {
        "--grpc-port": settings.triton_grpc_port,
        "--http-port": settings.triton_http_port,
        "--metrics-port": settings.triton_metrics_port,
        "--log-file": settings.logs / "tritonserver.log",
    }
    return Service(name="triton", arguments=["triton", *_given(ports)], ready_seconds=_READY_SECONDS)


def streamer_service(settings: UpSettings) -> Service:
    """Return the streamer as a service of the line."""
    options = {"--port": settings.streamer_port, "--data": settings.data}
    return Service(name="streamer", arguments=["streamer", *_given(options)], ready_seconds=_READY_SECONDS)


def gateway_service(settings: UpSettings, triton: str) -> Service:
    """Return the gateway in front of the Triton at that address as a service of the line."""
    options = {"--port": settings.gateway_port, "--triton": triton}
    return Service(name="gateway", arguments=["gateway", *_given(options)])


def has_version(repository: Path) -> bool:
    """Tell whether any model of the repository has a version."""
    return any(_VERSION.fullmatch(entry.name) for entry in repository.glob("*/*") if entry.is_dir())


async def _start(supervisor: Supervisor, settings: UpSettings, report: Callable[[str], None]) -> None:
    triton_settings = load(TritonSettings)
    sources = load(StreamerSettings, data=settings.data)
    # Both happen here, where their progress is seen; the services then find them in the cache.
    await find("mnist", data=sources.data, cache=sources.cache, report=report)
    await install(triton_settings.cache, report)
    triton_settings.model_repository.mkdir(parents=True, exist_ok=True)  # the first training fills it
    triton = await supervisor.start(triton_service(settings))
    report(f"triton    {triton}")
    report(f"streamer  {await supervisor.start(streamer_service(settings))}")
    gateway = await supervisor.start(gateway_service(settings, triton))
    report(f"gateway   {gateway}")
    if not has_version(triton_settings.model_repository):
        report("no model yet: `sluice train` in another terminal makes one; Ctrl-C stops")
        return
    async with ImageClient(gateway) as client:
        try:
            await client.wait_ready(timeout_seconds=_SERVING_SECONDS)
        except ClientError as error:
            report(f"the gateway does not serve a model: {error}")
            return
    report("ready: `sluice classify FILE...` asks it; Ctrl-C stops")


def _given(options: Mapping[str, object]) -> list[str]:
    return [word for name, value in options.items() if value is not None for word in (name, str(value))]


@contextlib.contextmanager
def _signals(react: Callable[[], None]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, react)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)

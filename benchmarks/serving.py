"""What the benchmarks of the gateway ask: the embedded Triton with a copy of a model, and a gateway in front of it."""

import os
import shutil
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks import digits
from benchmarks.versions import MODEL, Version
from gateway.client import ImageClient
from rpc.settings import load
from serving.control import TritonControl
from serving.installation import install
from serving.settings import TritonSettings
from serving.triton import EmbeddedTriton
from sluice.line import gateway_service
from sluice.ports import settings_with_free_ports
from sluice.settings import UpSettings
from sluice.supervisor import Supervisor
from streamer.settings import StreamerSettings
from streamer.sources.datasets import cached
from streamer.sources.idx import parse_images, unpack

SETTINGS: Mapping[str, str] = {
    # h2load sends one image again and again: asked once for all of them, it would measure nothing.
    "SLUICE_GATEWAY_SINGLE_FLIGHT": "false",
    # One log line an RPC is the default; at thousands a second it would be part of what is measured.
    "SLUICE_GATEWAY_LOG_LEVEL": "warning",
}
"""By which the measured gateway differs from the one anybody starts."""

_NUM_MADE_UP = 1000
_READY_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """A running Triton."""

    control: TritonControl
    address: str
    repository: Path
    """Temporary; has the model as :data:`benchmarks.versions.MODEL`, version 1."""
    version: Version
    threads: int
    """Intra-op threads of each model instance, where a model does not say otherwise."""
    ports: UpSettings
    folder: Path
    """Temporary."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Front:
    """A running gateway."""

    address: str
    process_id: int


@asynccontextmanager
async def triton_with(version: Version, folder: Path, report: Callable[[str], None]) -> AsyncIterator[Served]:
    """
    Run the embedded Triton with a copy of a version until this is left.

    Args:
        version: What it serves.
        folder: For everything that is written.
        report: Told of an installation.

    Raises:
        serving.errors.ServingError: It cannot be had or started here.
    """
    repository = folder / "repository"
    (repository / MODEL).mkdir(parents=True)
    (repository / MODEL / "config.pbtxt").write_text(version.config)
    shutil.copytree(version.folder, repository / MODEL / "1")
    ports = settings_with_free_ports()
    settings = load(
        TritonSettings,
        grpc_port=ports.triton_grpc_port,
        http_port=ports.triton_http_port,
        metrics_port=ports.triton_metrics_port,
        log_file=folder / "triton.log",
        model_repository=repository,
    )
    installation = await install(settings.cache, report)
    # The connection goes last: an inference that is cut off may end Triton.
    async with EmbeddedTriton(settings, installation) as triton, TritonControl(triton.address) as control:
        yield Served(
            control=control,
            address=triton.address,
            repository=repository,
            version=version,
            threads=settings.intra_op_threads,
            ports=ports,
            folder=folder,
        )


@asynccontextmanager
async def gateway_before(served: Served, report: Callable[[str], None]) -> AsyncIterator[Front]:
    """
    Run ``sluice gateway`` before that Triton, with :data:`SETTINGS`, until this is left.

    Raises:
        sluice.supervisor.ServiceError: It did not get ready.
        gateway.client.ClientError: It finds no model that answers.
    """
    os.environ.update(SETTINGS, SLUICE_MODEL_REPOSITORY=str(served.repository))
    async with Supervisor(served.folder / "logs", report) as supervisor:
        address = await supervisor.start(gateway_service(served.ports, served.address))
        async with ImageClient(address) as client:
            await client.wait_ready(timeout_seconds=_READY_SECONDS)
        yield Front(address=address, process_id=supervisor.pid("gateway"))


def images() -> tuple[NDArray[np.uint8], str]:
    """Return MNIST's test images, uint8 [N, 28, 28], where they are at hand, else some made up; and what they are."""
    settings = load(StreamerSettings)
    found = cached("mnist", data=settings.data, cache=settings.cache)
    if found is None:
        return digits.digits(_NUM_MADE_UP), "digits made up, of MNIST's size"
    path = found.splits["test"].images
    size = " (the small set)" if found.is_small else ""
    return parse_images(unpack(path.read_bytes(), file=str(path)), file=str(path)), f"test images of MNIST{size}"

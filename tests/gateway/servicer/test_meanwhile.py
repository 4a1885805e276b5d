"""What changes while a call is under way."""

import asyncio
import threading
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import grpc
import numpy as np
import pytest

from gateway.admission import Admission
from gateway.decoders import Decoders
from gateway.errors import UpstreamUnavailableError
from gateway.images import Limits
from gateway.models import Catalog
from gateway.servicer import ImageServicer
from gateway.triton import ReadyVersion
from protos.gateway.v1 import image_service_pb2 as pb
from tests.gateway.coalescing.line import settled
from tests.gateway.servicer.calls import picture
from tests.gateway.test_lanes import Rig
from tests.gateway.test_models import ScriptedSource

SMALL = pb.ClassifyRequest(image=picture(np.zeros((28, 28), np.uint8)))
# Is decoded in a thread.
LARGE = pb.ClassifyRequest(image=picture(np.zeros((200, 200), np.uint8)))


class Aborted(Exception):
    """How a call ended."""


class Call:
    """What gRPC knows of a call."""

    def __init__(self, remaining_seconds: float | None) -> None:
        self.remaining_seconds = remaining_seconds

    def time_remaining(self) -> float | None:
        return self.remaining_seconds

    def auth_context(self) -> Mapping[str, Any]:
        return {}

    def peer(self) -> str:
        return "ipv4:10.0.0.1:5000"

    async def abort(self, code: grpc.StatusCode, details: str, metadata: Any = ()) -> NoReturn:
        raise Aborted(code)


class Gateway(Rig):
    """A servicer around the lanes, without a network."""

    def __init__(self, repository: Path, decoders: Decoders) -> None:
        super().__init__()
        self.num_errors = 0
        self.is_dead = False
        self.catalog = Catalog(
            ScriptedSource([ReadyVersion("m", 1, 2, 8)]), repository=repository, default_model="m",
            on_refresh=self.lanes.keep,
        )  # fmt: skip
        self.servicer = ImageServicer(
            catalog=self.catalog, admission=Admission(8, 1 << 20), lanes=self.lanes, require=self.require,
            decoders=decoders, limits=Limits(1 << 20, 1 << 20), max_batch_images=8, stream_window=8,
            on_upstream_error=self.count, on_answer=lambda model, version: None,
        )  # fmt: skip

    def require(self, model: str, version: int) -> None:
        if self.is_dead:
            raise UpstreamUnavailableError("it died")

    def count(self) -> None:
        self.num_errors += 1

    async def classify(
        self, request: pb.ClassifyRequest, remaining_seconds: float | None = None
    ) -> pb.ClassifyResponse:
        call: Any = Call(remaining_seconds)
        return await self.servicer.Classify(request, call)


@pytest.fixture
async def decoders() -> AsyncIterator[Decoders]:
    opened = Decoders(1)
    yield opened
    opened.close()


@pytest.fixture
async def gateway(tmp_path: Path, decoders: Decoders) -> Gateway:
    opened = Gateway(tmp_path, decoders)
    await opened.catalog.refresh()
    return opened


async def test_image_that_its_caller_left_no_time_for_is_no_failure_of_tritons(gateway: Gateway) -> None:
    with pytest.raises(Aborted, match="DEADLINE_EXCEEDED"):
        await gateway.classify(SMALL, remaining_seconds=0)

    assert (gateway.model.sizes, gateway.num_errors) == ([], 0)


async def test_call_is_seen_in_its_lane_when_the_version_goes_while_it_is_decoded(
    gateway: Gateway, decoders: Decoders
) -> None:
    gateway.model.gate.clear()
    held = threading.Event()
    busy = asyncio.create_task(decoders.run(held.wait, "another"))
    await settled()
    call = asyncio.create_task(gateway.classify(LARGE))
    await settled()
    gateway.lanes.keep([])
    held.set()
    await busy
    await gateway.model.asked.wait()

    assert sum(lane.num_in_flight for lane in gateway.lanes) == 1
    gateway.model.gate.set()
    await call


async def test_call_is_refused_when_the_version_dies_while_it_is_decoded(gateway: Gateway, decoders: Decoders) -> None:
    held = threading.Event()
    busy = asyncio.create_task(decoders.run(held.wait, "another"))
    await settled()
    call = asyncio.create_task(gateway.classify(LARGE))
    await settled()
    gateway.is_dead = True
    held.set()
    await busy
    with pytest.raises(Aborted, match="UNAVAILABLE"):
        await call

    assert gateway.model.sizes == []

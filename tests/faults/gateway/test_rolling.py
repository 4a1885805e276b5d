"""Twenty versions of a model that are published, routed to and retired while 64 callers go on asking."""

import asyncio
import time
import warnings
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gateway.client import ImageClient
from protos.gateway.v1 import image_service_pb2 as pb
from protos.gateway.v1.image_service_pb2_grpc import ImageServiceStub
from rpc.settings import cache_folder
from serving.control import TritonControl
from serving.installation import install
from serving.triton import EmbeddedTriton
from sluice.release import PublishOptions, publish
from sluice.route import RouteOptions, run
from tests.faults.gateway.callers import noise, request_of
from tests.faults.gateway.conftest import Measured
from tests.faults.gateway.process import Gateway
from tests.serving.conftest import on_free_ports
from training.release import manifest
from training.release.export import answers
from training.release.golden import Golden
from training.release.publish import Card, DatasetCard

pytestmark = [pytest.mark.triton, pytest.mark.slow, pytest.mark.timeout(3600)]

NUM_VERSIONS = 20
CALLERS = 64
# Every eighth of them names the version it wants.
NAMING = 8
# As in config.pbtxt.
KEPT = 3
ENOUGH_ANSWERS = 200
PATIENCE_SECONDS = 300.0


class Telling(nn.Module):
    """Tells its version: the unit by the class, the ten by how sure it is."""

    row: Tensor
    unit: Tensor

    def __init__(self, version: int) -> None:
        super().__init__()
        row = torch.full((1, 10), (0.5 - version // 10 * 0.1) / 9)
        row[0, version % 10] = 0.5 + version // 10 * 0.1
        self.register_buffer("row", row)
        self.register_buffer("unit", nn.functional.normalize(torch.ones(1, 500)))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return self.row.repeat(image.size(0), 1), self.unit.repeat(image.size(0), 1)


def told_by(answer: pb.ClassifyResponse) -> int:
    """Return the version that really answered."""
    return answer.prediction.label + 10 * round((answer.prediction.probability - 0.5) / 0.1)


def export(folder: Path, version: int) -> Path:
    """Write what `sluice export` would."""
    folder.mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        module: torch.jit.ScriptModule = torch.jit.script(Telling(version))
    module.save(str(folder / "model.pt"))
    images = np.zeros((2, 1, 28, 28), np.uint8)
    Golden(images, *answers(module, images, torch.device("cpu"))).save(folder / "golden.safetensors")
    card = Card(
        model="mnist",
        version=0,
        created="2026-01-01T00:00:00+00:00",
        class_names=list("0123456789"),
        digest=f"sha256:{manifest.sha256(folder / 'model.pt')}",
        metrics={},
        dataset=DatasetCard(name="mnist", num_train=1, fingerprint=""),
    )
    (folder / "card.json").write_text(card.model_dump_json(by_alias=True))
    manifest.write(folder, model="mnist", version=0)
    return folder


class Served(Gateway):
    """A gateway whose model knows no digits."""

    async def check(self) -> None:
        async with ImageClient(self.address) as client:
            await client.wait_ready(timeout_seconds=PATIENCE_SECONDS)


@dataclass
class Callers:
    """
    Ask without a pause and without a retry, and hold every answer against what was asked.

    Attributes:
        allowed: Versions that may answer who names none.
        named: What who names a version asks for.
        phase: What goes on; times are kept by it.
        seconds: How long calls took, by phase.
        versions: How many answers each version gave.
        wrong: What should not have been.
    """

    address: str
    allowed: set[int]
    named: int
    phase: str = "steady"
    seconds: dict[str, list[float]] = field(default_factory=dict)
    versions: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    _answered: asyncio.Condition = field(default_factory=asyncio.Condition)

    @asynccontextmanager
    async def asking(self) -> AsyncIterator[None]:
        """Go on for as long as the block lasts."""
        # What gRPC sends again by itself would be no proof.
        async with grpc.aio.insecure_channel(self.address, options=[("grpc.enable_retries", 0)]) as channel:
            stub: Any = ImageServiceStub(channel)
            calls = [asyncio.create_task(self._ask(stub, number)) for number in range(CALLERS)]
            try:
                yield
            finally:
                for call in calls:
                    call.cancel()
                await asyncio.wait(calls)
        for call in calls:
            assert call.cancelled(), call

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Keep the times of calls that meet the block by another name."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    async def until_answered_by(self, version: int, count: int) -> None:
        """Wait for so many more answers of a version."""
        wanted = self.versions[version] + count
        async with asyncio.timeout(PATIENCE_SECONDS), self._answered:
            await self._answered.wait_for(lambda: self.versions[version] >= wanted or self.wrong)
        assert not self.wrong, self.wrong[:5]

    async def _ask(self, stub: Any, number: int) -> None:
        request = request_of(noise(number))
        while True:
            request.model_version = 0 if number % NAMING else self.named
            await self._once(stub, request)
            async with self._answered:
                self._answered.notify_all()

    async def _once(self, stub: Any, request: pb.ClassifyRequest) -> None:
        phase, allowed, started = self.phase, self.allowed, time.monotonic()
        try:
            answer = await stub.Classify(request)
        except grpc.aio.AioRpcError as error:
            self.wrong.append(f"{error.code().name}: {error.details()}")
            return
        # A call may begin in one phase and end in the next.
        for each in {phase, self.phase}:
            self.seconds.setdefault(each, []).append(time.monotonic() - started)
        self.versions[answer.model_version] += 1
        asked = {request.model_version} if request.model_version else allowed | self.allowed
        if answer.model_version not in asked or told_by(answer) != answer.model_version:
            self.wrong.append(f"asked of {asked}, says {answer.model_version}, is {told_by(answer)}")


@pytest.fixture
async def rolling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[str, str, Path]]:
    """Triton, a gateway in front of it, and a folder for exports; the first version is published."""
    models = tmp_path / "models"
    models.mkdir()
    monkeypatch.setenv("SLUICE_MODEL_REPOSITORY", str(models))
    settings = on_free_ports(model_repository=models, log_file=tmp_path / "triton.log", intra_op_threads=1)
    async with EmbeddedTriton(settings, await install(cache_folder(), print)) as triton:
        await published(tmp_path, triton.address, 1)
        gateway = Served(triton.address, tmp_path / "gateway.log", "--model-repository", str(models))
        try:
            await gateway.start()
            yield triton.address, gateway.address, tmp_path
        finally:
            gateway.close()


async def published(folder: Path, triton: str, version: int) -> None:
    source = await asyncio.to_thread(export, folder / "exports" / str(version), version)
    options = PublishOptions(source=source, triton=triton)
    said = await asyncio.to_thread(publish, options, report=lambda line: None)
    assert said.startswith(f"mnist version {version}: ")


async def routed(callers: Callers, triton: str, versions: set[int], **options: Any) -> None:
    """Set a route; from the answer on, the new one alone holds."""
    callers.allowed = callers.allowed | versions
    with callers.during("switching"):
        options_ = RouteOptions(model="mnist", server=callers.address, triton=triton, **options)
        await asyncio.to_thread(run, options_, report=lambda line: None)
    callers.allowed = versions


async def test_versions_come_and_go_without_a_lost_or_mixed_request(
    rolling: tuple[str, str, Path], measured: Measured
) -> None:
    """L11: 20 versions published, routed to and retired while 64 callers ask."""
    triton, address, folder = rolling
    row = measured(
        "L11",
        fault=f"{NUM_VERSIONS} versions published, canaried, routed to and retired while {CALLERS} callers ask",
        promised="0 failed, 0 answers from a version not asked for",
    )
    callers = Callers(address, allowed={1}, named=1)
    await asyncio.to_thread(run, RouteOptions(model="mnist", server=address, default=1), report=lambda line: None)
    async with callers.asking():
        await callers.until_answered_by(1, ENOUGH_ANSWERS)
        for version in range(2, NUM_VERSIONS + 1):
            with callers.during("loading"):
                await published(folder, triton, version)
            await routed(callers, triton, {version - 1, version}, default=version - 1, canary=[f"{version}=10%"])
            await callers.until_answered_by(version, ENOUGH_ANSWERS // 10)
            await routed(callers, triton, {version}, default=version)
            callers.named = version
            await callers.until_answered_by(version, ENOUGH_ANSWERS)

    assert callers.wrong == []
    assert set(callers.versions) == set(range(1, NUM_VERSIONS + 1))
    async with TritonControl(triton) as control:
        assert await control.versions("mnist") == list(range(NUM_VERSIONS + 1 - KEPT, NUM_VERSIONS + 1))
    await assert_retired(address, NUM_VERSIONS - KEPT)
    row.add("answers", callers.versions.total())
    for phase, seconds in sorted(callers.seconds.items(), reverse=True):
        row.add(f"p99 {phase}", f"{1000 * float(np.quantile(seconds, 0.99)):.0f} ms of {len(seconds)}")
    print(row.figures)


async def assert_retired(address: str, version: int) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = ImageServiceStub(channel)
        request = request_of(noise(0))
        request.model_version = version
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Classify(request)
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND

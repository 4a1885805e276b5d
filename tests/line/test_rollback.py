"""A version that is published, taken back and brought back while callers go on asking."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import numpy as np
import pytest

from protos.gateway.v1 import image_service_pb2 as pb
from protos.gateway.v1 import image_service_pb2_grpc
from tests.line.processes import Line, Split

pytestmark = [pytest.mark.triton, pytest.mark.slow, pytest.mark.timeout(400)]

CALLERS = 3


class Callers:
    """Ask without a pause and without a retry, and remember what came."""

    def __init__(self, address: str, pixels: bytes) -> None:
        self.versions: Counter[int] = Counter()
        self.failures: list[str] = []
        self._address = address
        self._request = pb.ClassifyRequest(image=pb.Image(raw=pb.RawImage(pixels=pixels, height=28, width=28)))
        self._answered = asyncio.Condition()

    @asynccontextmanager
    async def asking(self) -> AsyncIterator[None]:
        # What gRPC sends again by itself would be no proof.
        async with grpc.aio.insecure_channel(self._address, options=[("grpc.enable_retries", 0)]) as channel:
            stub = image_service_pb2_grpc.ImageServiceStub(channel)
            calls = [asyncio.create_task(self._ask(stub)) for _ in range(CALLERS)]
            try:
                yield
            finally:
                for call in calls:
                    call.cancel()
                await asyncio.wait(calls)

    async def _ask(self, stub: Any) -> None:
        while True:
            try:
                answer = await stub.Classify(self._request)
                self.versions[answer.model_version] += 1
            except grpc.aio.AioRpcError as error:
                self.failures.append(f"{error.code().name}: {error.details()}")
            async with self._answered:
                self._answered.notify_all()

    async def until_answered_by(self, version: int) -> None:
        """Wait for 100 more answers of a version."""
        wanted = self.versions[version] + 100
        async with asyncio.timeout(60), self._answered:
            await self._answered.wait_for(lambda: self.versions[version] >= wanted or self.failures)


def said(line: Line, *arguments: str) -> str:
    done = line.sluice(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


async def test_rollback_and_back_lose_no_request(line: Line, digits: Split) -> None:
    run = sorted((line.folder / "runs").iterdir())[-1]
    triton = ("--triton", line.address("triton-grpc"))
    models = line.folder / "models" / "mnist"
    before = max(int(entry.name) for entry in models.iterdir() if entry.name.isdecimal())
    callers = Callers(line.address("gateway"), digits.images[0].tobytes())
    async with callers.asking():
        await callers.until_answered_by(before)
        options = ("--force", "--streamer", line.address("streamer"), *triton)
        published = await asyncio.to_thread(said, line, "publish", str(run), *options)
        new = before + 1
        await callers.until_answered_by(new)
        back = await asyncio.to_thread(said, line, "rollback", "mnist", *triton)
        await callers.until_answered_by(before)
        forth = await asyncio.to_thread(said, line, "rollback", "mnist", "--to", str(new), *triton)
        await callers.until_answered_by(new)

    assert callers.failures == []
    assert set(callers.versions) == {before, new}
    assert f"mnist version {new}" in published
    assert f"mnist version {before} answers" in back
    assert f"withdrawn: {new}" in back
    assert f"mnist version {new} answers" in forth
    card = json.loads((models / str(new) / "card.json").read_text())
    assert np.isclose(sum(card["metrics"][f"support/{digit}"] for digit in range(10)), len(digits.labels))

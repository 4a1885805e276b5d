"""
What health says while a real Triton, or the process that its model runs in, is dead, hangs or lies.

The Triton runs as under ``sluice up``: a supervisor starts it again when it dies, and it heals its models itself.
"""

import asyncio
import itertools
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from numpy.typing import NDArray

from rpc.settings import cache_folder
from serving.installation import install
from sluice.supervisor import Service, Supervisor
from tests.faults.gateway.callers import NOT_SERVING, SERVING, Callers, HealthRecord, tally
from tests.faults.gateway.conftest import Measured
from tests.faults.gateway.process import Gateway, until
from tests.faults.report import Row
from tests.gateway.fake_triton import FakeTriton, confident
from tests.serving.conftest import add_model, add_version, free_ports

pytestmark = [pytest.mark.slow, pytest.mark.triton, pytest.mark.asyncio(loop_scope="module")]

PROMISED = "NOT_SERVING within 2 s, SERVING within 10 s of the cause's end, wrongly SERVING for 2 s at most"


# For a server that starts, loads its model and answers, on a machine ten times slower than most.
MENDED_SECONDS = 100.0


class Reports:
    """What a supervisor reports, and when."""

    def __init__(self) -> None:
        self._told: list[tuple[float, str]] = []
        self._came = asyncio.Event()

    def add(self, text: str) -> None:
        self._told.append((time.monotonic(), text))
        self._came.set()

    async def of(self, words: str, since: float) -> float:
        """Wait for a report with these words after a moment, and return when it came, by the monotonic clock."""
        async with asyncio.timeout(MENDED_SECONDS):
            while not (moments := [at for at, text in self._told if at > since and words in text]):
                self._came.clear()
                await self._came.wait()
        return moments[0]


@dataclass
class Line:
    """A supervised Triton with one model, and a gateway in front of it."""

    supervisor: Supervisor
    gateway: Gateway
    module: Any
    log: Path
    reports: Reports
    """The supervisor's."""

    def label_of(self, pixels: NDArray[np.uint8]) -> int:
        """Return what the model takes 28x28 pixels for."""
        with torch.inference_mode():
            probabilities, _ = self.module(torch.from_numpy(pixels)[None, None])
        return int(probabilities.argmax())

    def process(self, program: str) -> int:
        """Return the id of the server, or of its model's stub."""
        owner = f"_{self.supervisor.pid('triton')}_"
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                name, *arguments = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
                if os.path.basename(name) == program and any(owner in one for one in arguments):
                    return int(entry.name)
        raise AssertionError(f"no {program} runs")

    def moment(self, event: str, since: float) -> float | None:
        """Return when, by the monotonic clock, Triton's keeper logged an event after a moment; ``None``: not yet."""
        offset = time.time() - time.monotonic()
        for line in self.log.read_text().splitlines():
            if f'"event": "{event}"' in line:
                at = datetime.fromisoformat(line.partition('"timestamp": "')[2][:27]).timestamp() - offset
                if at > since:
                    return at
        return None


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def line(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Line]:
    folder = tmp_path_factory.mktemp("line")
    await install(cache_folder(), print)
    add_model(folder / "models", "mnist")
    module = add_version(folder / "models", "mnist", 1)
    reports = Reports()
    ports = {f"--{name.replace('_', '-')}": str(port) for name, port in free_ports().items()}
    options = {**ports, "--model-repository": str(folder / "models"), "--log-file": str(folder / "server.log")}
    triton = Service(name="triton", arguments=["triton", *itertools.chain(*options.items())], ready_seconds=100)
    async with Supervisor(folder / "logs", reports.add) as supervisor:
        address = await supervisor.start(triton)
        gateway = Gateway(address, folder / "gateway.log", "--model-repository", str(folder / "models"))
        try:
            await gateway.listen()
            yield Line(supervisor, gateway, module, folder / "logs" / "triton.log", reports)
        finally:
            gateway.close()


async def endure(
    line: Line, row: Row, break_it: Callable[[], None], mend: Callable[[float], Any], *, num_callers: int = 4
) -> None:
    """
    Break something, and note what health and callers were told until all is well again.

    Args:
        line: In good health.
        row: Where it is noted.
        break_it: Does so.
        mend: Awaited with the moment of the break; returns when the cause has ended.
        num_callers: Who ask meanwhile.
    """
    gateway = line.gateway
    async with (
        HealthRecord(gateway.address) as health,
        Callers(gateway.address, num_callers, deadline_seconds=2, expected=line.label_of) as callers,
    ):
        await health.becomes(SERVING, since=0)
        await callers.answered(50)
        broken = time.monotonic()
        break_it()
        noticed = await health.becomes(NOT_SERVING, since=broken)
        mended = await mend(broken)
        serving = broken + noticed + await health.becomes(SERVING, since=broken + noticed)
        await callers.succeed(since=serving)
        await callers.answered(20)
        # Before it told so itself, it cannot have been well.
        wrongly = health.seconds(SERVING, broken, min(mended, serving))

    codes = callers.codes(broken)
    row.add("NOT_SERVING after", f"{noticed:.2f} s")
    row.add("the cause ended after", f"{mended - broken:.2f} s")
    row.add("SERVING", f"{max(0.0, serving - mended):.2f} s after that")
    row.add("wrongly SERVING for", f"{wrongly:.2f} s")
    row.add("calls", tally(codes))
    assert callers.num_wrong == 0
    assert set(codes) <= {"OK", "UNAVAILABLE", "DEADLINE_EXCEEDED", "INTERNAL"}
    assert max(call.seconds for call in callers.calls) < 20
    assert noticed < 30
    assert serving - mended < 60
    assert wrongly < 30


@pytest.mark.parametrize(("name", "blow"), [("U15", signal.SIGKILL), ("U16", signal.SIGSTOP)])
async def test_struck_stub(line: Line, measured: Measured, name: str, blow: signal.Signals) -> None:
    row = measured(name, fault=f"the model's process gets {blow.name}; Triton goes on saying ready", promised=PROMISED)
    stub = line.process("triton_python_backend_stub")

    async def reloaded(broken: float) -> float:
        return await until(lambda: line.moment("model reloaded", broken), within_seconds=MENDED_SECONDS)

    server = line.process("tritonserver")
    await endure(line, row, lambda: os.kill(stub, blow), reloaded)
    assert line.process("tritonserver") == server


async def test_killed_triton(line: Line, measured: Measured) -> None:
    row = measured("U17", fault="Triton's server gets SIGKILL; its supervisor starts it again", promised=PROMISED)
    server = line.process("tritonserver")

    await endure(
        line, row, lambda: os.kill(server, signal.SIGKILL), lambda broken: line.reports.of("is back on", broken)
    )


async def test_stopped_triton(line: Line, measured: Measured) -> None:
    row = measured("U18", fault="Triton's server gets SIGSTOP, and SIGCONT 8 s later", promised=PROMISED)
    server = line.process("tritonserver")

    async def continued(broken: float) -> float:
        await asyncio.sleep(max(0.0, broken + 8 - time.monotonic()))  # so long is the fault
        os.kill(server, signal.SIGCONT)
        return time.monotonic()

    await endure(line, row, lambda: os.kill(server, signal.SIGSTOP), continued)
    assert line.process("tritonserver") == server


async def test_poisoned_model(triton: FakeTriton, gateway: Gateway, measured: Measured) -> None:
    row = measured("U19", fault="the model answers NaN to every image for 4 s", promised=PROMISED)
    async with (
        HealthRecord(gateway.address) as health,
        Callers(gateway.address, 4, deadline_seconds=2) as callers,
    ):
        await health.becomes(SERVING, since=0)
        await callers.answered(50)
        triton.answer = lambda images: confident(images) * np.nan
        broken = time.monotonic()
        noticed = await health.becomes(NOT_SERVING, since=broken)
        await asyncio.sleep(max(0.0, broken + 4 - time.monotonic()))  # so long is the fault
        triton.answer = confident
        mended = time.monotonic()
        serving = await health.becomes(SERVING, since=mended)
        await callers.answered(20)

    codes = callers.codes(broken)
    row.add("NOT_SERVING after", f"{noticed:.2f} s")
    row.add("SERVING", f"{serving:.2f} s after its end")
    row.add("wrongly SERVING for", f"{health.seconds(SERVING, broken, mended):.2f} s")
    row.add("calls", tally(codes))
    assert callers.num_wrong == 0
    assert set(codes) <= {"OK", "UNAVAILABLE", "INTERNAL"}
    assert noticed < 20
    assert serving < 30

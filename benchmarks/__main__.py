"""``python -m benchmarks``: measures streamer and gateway, prints a table and writes it to ``benchmarks/results/``."""

import asyncio
import os
import sys

import numpy as np
from numpy.typing import NDArray

from benchmarks import classifying, report, streamer
from benchmarks.interleaved import Spread, compare
from benchmarks.stage import BATCH_SIZE
from gateway.client import ImageClient
from rpc.settings import load
from serving.control import TritonControl
from serving.settings import TritonSettings
from serving.triton import servable_models
from sluice.line import gateway_service, streamer_service, triton_service
from sluice.ports import settings_with_free_ports
from sluice.supervisor import Supervisor
from streamer.client import Plan, SampleClient

ROUNDS = 5
SECONDS = 3.0
_SUITES = ("pull", "seed")
_PACKAGES = ("grpcio", "protobuf", "torch")


async def main() -> None:
    """Measure the streamer, then the gateway on a line of its own."""
    if not servable_models(load(TritonSettings).model_repository):
        raise SystemExit("no model to measure: `make demo` or `sluice train` makes one")
    measured = await streamer.measure(_SUITES, streamer.FULL, report=lambda line: print(line, file=sys.stderr))
    text = "\n".join(
        [
            "# The line, measured",
            "",
            report.surroundings("make bench", _PACKAGES),
            "Contenders take turns in one run; clients and servers share the cores. Of the streamer, in batches of "
            f"{BATCH_SIZE}; `make bench-streamer` tells more:",
            "",
            report.outcome_table(measured.outcome, streamer.names_of(_SUITES)),
            "",
            f"Of the gateway, {ROUNDS} turns of {SECONDS:g} s; items are images:",
            "",
            report.rates_table(await _gateway()),
            "",
        ]
    )
    report.publish(text, report.RESULTS / "line.md")


async def _gateway() -> dict[str, Spread]:
    settings = settings_with_free_ports()
    # One log line an RPC is the default; at a thousand a second it would be part of what is measured.
    os.environ.update(SLUICE_GATEWAY_LOG_LEVEL="warning")
    async with Supervisor(settings.logs, print) as supervisor:
        images = await _test_images(await supervisor.start(streamer_service(settings)))
        triton = await supervisor.start(triton_service(settings))
        gateway = await supervisor.start(gateway_service(settings, triton))
        async with ImageClient(gateway) as client, TritonControl(triton) as control:
            await client.wait_ready(timeout_seconds=120)
            return await compare(classifying.contenders(client, control, images), rounds=ROUNDS, seconds=SECONDS)


async def _test_images(streamer: str) -> NDArray[np.uint8]:
    async with SampleClient(streamer) as client:
        plan = Plan(dataset="mnist", split="test", batch_size=500)
        return np.concatenate([batch.images async for batch in client.batches(plan)])


if __name__ == "__main__":
    asyncio.run(main())

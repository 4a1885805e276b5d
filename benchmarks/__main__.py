"""``python -m benchmarks``: measures streamer and gateway, prints a table and writes it to ``benchmarks/results/``."""

import asyncio
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np

from benchmarks import classifying, streaming
from benchmarks.interleaved import Rate, compare
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
RESULTS = Path(__file__).parent / "results"


async def main() -> None:
    """Run both comparisons on a line of their own."""
    if not servable_models(load(TritonSettings).model_repository):
        raise SystemExit("no model to measure: `make demo` or `sluice train` makes one")
    settings = settings_with_free_ports()
    # One log line an RPC is the default; at thousands a second it would be what is measured.
    os.environ.update(SLUICE_GATEWAY_LOG_LEVEL="warning", SLUICE_STREAMER_LOG_LEVEL="warning")
    async with Supervisor(settings.logs, print) as supervisor:
        streamer = await supervisor.start(streamer_service(settings))
        with streaming.bare_server() as bare:
            rates = await compare(streaming.contenders(streamer, bare), rounds=ROUNDS, seconds=SECONDS)
        images = await _test_images(streamer)
        triton = await supervisor.start(triton_service(settings))
        gateway = await supervisor.start(gateway_service(settings, triton))
        async with ImageClient(gateway) as client, TritonControl(triton) as control:
            await client.wait_ready(timeout_seconds=120)
            rates |= await compare(classifying.contenders(client, control, images), rounds=ROUNDS, seconds=SECONDS)
    report = _report(rates)
    print(report)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "line.md").write_text(report)


async def _test_images(streamer: str) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    async with SampleClient(streamer) as client:
        plan = Plan(dataset="mnist", split="test", batch_size=500)
        return np.concatenate([batch.images async for batch in client.batches(plan)])


def _report(rates: dict[str, Rate]) -> str:
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    versions = ", ".join(f"{name} {version(name)}" for name in ("grpcio", "torch", "protobuf"))
    lines = [
        "# The line, measured",
        "",
        f"`make bench` at {commit.stdout.strip() or 'no commit'}, {datetime.now(UTC):%Y-%m-%d}: "
        f"{len(os.sched_getaffinity(0))} cores ({platform.machine()}), Python {platform.python_version()}, {versions}.",
        f"Contenders take turns in one run, {ROUNDS} turns of {SECONDS:g} s each; client and servers share the cores.",
        "",
        "| | items/s, median | lowest | highest |",
        "| --- | ---: | ---: | ---: |",
    ]
    rows = [
        f"| {name} | {rate.median:,.0f} | {rate.lowest:,.0f} | {rate.highest:,.0f} |" for name, rate in rates.items()
    ]
    return "\n".join([*lines, *rows, ""])


if __name__ == "__main__":
    asyncio.run(main())

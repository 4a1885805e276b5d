"""`sluice loadtest` as its user meets it."""

import asyncio
import json
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from gateway.server import GatewayServer
from loadtest.arrivals import ClosedLoop, OpenLoop
from rpc.settings import SettingsError
from sluice.loadtest import LoadTestOptions, plan_of
from tests.loadtest.conftest import NewestTriton
from tests.loadtest.plans import NOWHERE

ROOT = Path(__file__).parents[2]


async def start(*arguments: object) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "sluice", "loadtest", *map(str, arguments),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip


async def ended(process: asyncio.subprocess.Process) -> tuple[int | None, str, str]:
    """Return status, standard output and standard error."""
    output, errors = await process.communicate()
    return process.returncode, output.decode(), errors.decode()


def options_for(gateway: GatewayServer, images: Path, *more: object) -> list[object]:
    return ["--server", gateway.address, "--images", images, "--triton", NOWHERE,
            "--triton-metrics", NOWHERE, "--warm-up", 0, *more]  # fmt: skip


async def test_test_ends_with_a_page_and_a_json_file(
    gateway: GatewayServer, image_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "result.json"
    options = options_for(gateway, image_folder, "--duration", 0.5, "--rate", 40, "--json", file)
    status, page, errors = await ended(await start(*options))

    assert (status, errors) == (0, "")
    assert "100.00% (20 of 20 right)" in page
    assert json.loads(file.read_text())["statusCodeDistribution"] == {"OK": 20}


async def test_json_alone_is_on_standard_output_when_asked_for(gateway: GatewayServer, image_folder: Path) -> None:
    options = options_for(gateway, image_folder, "--duration", 0.3, "--json", "-")
    status, output, errors = await ended(await start(*options))

    assert status == 0
    assert json.loads(output)["options"]["concurrency"] == 8
    assert "closed loop, 8 callers" in errors


async def test_interrupted_test_reports_and_exits_130(
    gateway: GatewayServer, triton: NewestTriton, image_folder: Path
) -> None:
    process = await start(*options_for(gateway, image_folder, "--duration", 60, "--concurrency", 1))
    num_before = len(triton.received)
    # The first calls connect; every one after them is measured.
    while len(triton.received) < num_before + 40:
        triton.arrived.clear()
        await triton.arrived.wait()
    process.send_signal(signal.SIGINT)
    status, page, errors = await ended(process)

    assert (status, errors) == (130, "")
    assert "interrupted: measured for" in page
    assert "OK " in page


async def test_test_without_any_answer_exits_1(gateway: GatewayServer, image_folder: Path) -> None:
    options = options_for(gateway, image_folder, "--duration", 0.3, "--timeout", 1e-6)
    status, page, _ = await ended(await start(*options))

    assert status == 1
    assert "DEADLINE_EXCEEDED" in page


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        pytest.param(["--rate", 0], 2, "--rate 0: allowed is above 0, up to 1,000,000", id="option"),
        pytest.param(["--json", "nowhere/result.json"], 2, "--json nowhere/result.json", id="no place for the result"),
        pytest.param(["--images", "nowhere"], 1, "nowhere: no such folder", id="no folder"),
        pytest.param(["--images", "."], 1, "one subfolder of images for each class", id="no images"),
        pytest.param(["--streamer", NOWHERE], 1, "--images FOLDER", id="no streamer"),
        pytest.param(["--streamer", NOWHERE, "--images", "."], 2, "give one of them", id="both"),
    ],
)
async def test_mistake_is_one_line_and_a_status(arguments: list[object], status: int, words: str) -> None:
    done = await ended(await start("--server", NOWHERE, *arguments))

    assert done[0] == status
    assert words in done[2]
    assert done[2].count("\n") == 1


async def test_absent_gateway_is_one_line(image_folder: Path) -> None:
    status, page, errors = await ended(await start("--server", NOWHERE, "--images", image_folder))

    assert (status, page) == (1, "")
    assert f"{NOWHERE} does not answer" in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"rate": 10.0, "concurrency": 2}, "--rate and --concurrency exclude each other"),
        ({"rate": -1.0}, "--rate -1"),
        ({"rate": math.nan}, "--rate nan"),
        ({"rate": math.inf}, "--rate inf"),
        ({"concurrency": 0}, "--concurrency 0: allowed is 1 to 100,000"),
        ({"duration": 0.0}, "--duration 0"),
        ({"warm_up": -1.0}, "--warm-up -1: allowed is 0 to 86,400"),
        ({"timeout": 0.0}, "--timeout 0"),
        ({"timeout": 4000.0}, "--timeout 4000"),
        ({"rate": 1.0, "max_outstanding": 0}, "--max-outstanding 0"),
        ({"max_outstanding": 5}, "--max-outstanding 5 has no effect"),
        ({"target": "embed"}, "--target embed: allowed are classify, classify-batch, compare, triton"),
        ({"image_format": "jpeg"}, "--format jpeg: allowed are png, raw"),
        ({"batch_size": 4}, "--batch-size 4 has no effect"),
        ({"target": "classify-batch", "batch_size": 0}, "--batch-size 0: allowed is 1 to"),
        ({"target": "triton", "image_format": "raw"}, "--format raw has no effect"),
        ({"target": "triton", "server": "a:1"}, "--server a:1 has no effect"),
    ],
)
def test_option_that_cannot_be_used_is_named(given: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError) as refused:
        plan_of(LoadTestOptions(**given))

    assert words in str(refused.value)


def test_what_is_not_given_comes_from_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_GATEWAY_PORT", "1234")
    monkeypatch.setenv("SLUICE_TRITON_GRPC_PORT", "1235")
    monkeypatch.setenv("SLUICE_TRITON_METRICS_PORT", "1236")
    plan = plan_of(LoadTestOptions())
    direct = plan_of(LoadTestOptions(target="triton", rate=5))

    assert (plan.address, plan.triton, plan.triton_metrics) == ("127.0.0.1:1234", "127.0.0.1:1235", "127.0.0.1:1236")
    assert (plan.pace, plan.model, plan.batch_size) == (ClosedLoop(callers=8), "", 1)
    assert (direct.address, direct.model) == ("127.0.0.1:1235", "mnist")
    assert direct.pace == OpenLoop(rate=5, max_outstanding=10_000)
    assert plan_of(LoadTestOptions(target="classify-batch")).batch_size == 64

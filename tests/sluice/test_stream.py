"""``sluice stream`` against a real streamer, and its verdict on ledgers as a shell sees it."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from rpc.settings import SettingsError
from sluice.commands import app
from sluice.stream import BenchOptions, bench, list_datasets
from streamer.client import Plan, SampleClient
from streamer.errors import RefusedError, UnreachableError
from streamer.ledger import Ledger
from streamer.server import StreamerServer
from streamer.settings import StreamerSettings
from streamer.sources.split import Dataset, MemorySplit

ROOT = Path(__file__).parents[2]


def split(name: str, size: int) -> MemorySplit:
    images = np.random.default_rng(size).integers(0, 256, (size, 28, 28), np.uint8)
    return MemorySplit(name, images, np.zeros(size, np.uint8), num_classes=10)


@pytest.fixture
async def server() -> AsyncIterator[StreamerServer]:
    dataset = Dataset("mnist", ("zero", "one"), {"train": split("train", 1000), "test": split("test", 10)})
    async with StreamerServer(StreamerSettings(port=0, metrics_port=0), [dataset]) as server:
        yield server


async def write_ledger(server: StreamerServer, path: Path, *, stop: int = 0) -> None:
    async with SampleClient(server.address) as client:
        (dataset,) = await client.datasets()
        info = dataset.splits["train"]
        plan = replace(Plan(dataset="mnist", seed=1, batch_size=100), fingerprint=info.fingerprint)
        with Ledger(path) as ledger:
            delivery = ledger.begin(plan, num_samples=info.num_samples)
            async for batch in client.batches(plan, end_position=stop):
                delivery.record(batch)
                delivery.commit(batch.next_position)


async def test_verify_of_a_whole_epoch_says_so(server: StreamerServer, tmp_path: Path) -> None:
    await write_ledger(server, tmp_path / "ledger")
    result = CliRunner().invoke(app, ["stream", "verify", "ledger"])

    assert result.exit_code == 0
    assert [line.split() for line in result.output.splitlines()[:4]] == [
        ["lost", "0"], ["repeated", "0"], ["unexpected", "0"], ["recovered", "0"],
    ]  # fmt: skip
    assert result.output.endswith("1,000 samples committed in 1 epoch, 1 ledger\n")


async def test_verify_fails_and_names_what_is_lost(server: StreamerServer, tmp_path: Path) -> None:
    await write_ledger(server, tmp_path / "ledger", stop=900)
    result = CliRunner().invoke(app, ["stream", "verify", "ledger"])

    assert result.exit_code == 1
    assert "mnist train epoch 0, position 900: 100 lost (indices " in result.output


async def test_verify_as_json_has_all_of_it(server: StreamerServer, tmp_path: Path) -> None:
    await write_ledger(server, tmp_path / "ledger", stop=900)
    (tmp_path / "ledger").write_bytes((tmp_path / "ledger").read_bytes()[:-1])
    result = CliRunner().invoke(app, ["stream", "verify", "--json", "ledger"])

    assert result.exit_code == 1
    said = json.loads(result.output)
    assert [said[key] for key in ("clean", "lost", "repeated", "unexpected", "recovered")] == [False, 200, 0, 0, 0]
    assert said["torn_lines"] == ["ledger:20"]
    assert {finding["position"] for finding in said["findings"]} == {800, 900}


@pytest.mark.parametrize(("name", "words"), [("none", "No such file"), ("text", "text: not a ledger")])
async def test_verify_of_what_is_no_ledger_is_one_line(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "text").write_text("one\ntwo\n")
    status, _, complaint = await sluice("stream", "verify", str(tmp_path / name))

    assert status == 1
    assert words in complaint
    assert complaint.count("\n") == 1


async def sluice(*arguments: str) -> tuple[int | None, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "sluice", *arguments,
        cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    said, complaint = await process.communicate()
    return process.returncode, said.decode(), complaint.decode()


async def test_ls_lists_every_split(server: StreamerServer) -> None:
    status, said, _ = await sluice("stream", "ls", "--streamer", server.address)

    assert status == 0
    first, second = said.splitlines()
    assert first.split() == ["mnist", "train", "1,000", "images", "28x28", "10", "classes", first[-12:]]
    assert second.split()[:3] == ["mnist", "test", "10"]


async def test_ls_as_json_has_the_whole_fingerprint(server: StreamerServer) -> None:
    _, said, _ = await sluice("stream", "ls", "--json", "--streamer", server.address)

    (dataset,) = json.loads(said)
    assert dataset["class_names"] == ["zero", "one"]
    assert dataset["splits"][0] == {
        "name": "train",
        "num_samples": 1000,
        "image_shape": [28, 28],
        "num_classes": 10,
        "label_bytes": 1,
        "fingerprint": split("train", 1000).fingerprint.hex(),
    }


async def test_bench_measures_over_epochs(server: StreamerServer) -> None:
    arguments = ("--streamer", server.address, "--batch-size", "300", "--seconds", "0.05", "--json")
    _, output, _ = await sluice("stream", "bench", *arguments)

    said = json.loads(output)
    assert len(said["turns"]) == 5
    assert said["samples_per_second"] == sorted(said["turns"])[2] > 0
    # Median of the products, and pixels are bytes.
    assert said["megabytes_per_second"] == pytest.approx(said["samples_per_second"] * 784 / 1e6)
    assert 0 <= said["waited"] <= 1


async def test_bench_says_medians_and_range(server: StreamerServer) -> None:
    status, said, _ = await sluice(
        "stream", "bench", "--streamer", server.address, "--seconds", "0.05", "--transform", "noise(std=8)"
    )

    assert status == 0, said
    assert "mnist train in batches of 256, noise(std=8): medians of 5 turns of 0.05 s" in said
    assert [line.split()[0] for line in said.splitlines()[1:]] == ["samples/s", "MB/s", "waited"]


async def test_bench_of_what_is_not_served_is_refused(server: StreamerServer) -> None:
    with pytest.raises(RefusedError, match="no 'cifar'; known are mnist"):
        await bench(BenchOptions(streamer=server.address, dataset="cifar"), as_json=False)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), 3601.0])
async def test_bench_of_no_length_is_refused(seconds: float) -> None:
    with pytest.raises(SettingsError, match="--seconds"):
        await bench(BenchOptions(seconds=seconds), as_json=False)


async def test_address_that_is_none_is_refused() -> None:
    with pytest.raises(SettingsError, match="--streamer ,: expected HOST:PORT"):
        await list_datasets(",", as_json=False)


async def test_streamer_that_is_not_there_is_named() -> None:
    with pytest.raises(UnreachableError, match=r"127\.0\.0\.1:1"):
        await list_datasets("127.0.0.1:1", as_json=False)

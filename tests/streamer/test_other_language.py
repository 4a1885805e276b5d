"""A client in another language, which has the contract from the .proto alone: Node."""

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from protos import mnist_pb2, mnist_pb2_grpc
from streamer.client import Plan, SampleClient
from streamer.server import StreamerServer
from tests import node

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).parent / "node"
PLAN = Plan(dataset="mnist", seed=12345678901234567890, epoch=3, batch_size=96)


@pytest.fixture(scope="module")
def interpreter() -> str:
    return node.interpreter()


@pytest.fixture(scope="module")
def program(interpreter: str) -> Path:
    """Return the program, in a folder with the packages it needs."""
    return node.prepared(PROGRAM) / "read.js"


async def read_in_node(
    interpreter: str, program: Path, server: StreamerServer, plan: dict[str, Any]
) -> tuple[int, str, str]:
    """Run the program and return its status and what it printed."""
    arguments = (server.address, str(ROOT), json.dumps({"plan": plan}))
    process = await asyncio.create_subprocess_exec(
        interpreter, str(program), *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, errors = await process.communicate()
    return process.returncode or 0, output.decode(), errors.decode()


async def test_epoch_read_in_node_is_that_of_the_python_client(
    interpreter: str, program: Path, server: StreamerServer
) -> None:
    digest, sizes = hashlib.sha256(), []
    async with SampleClient(server.address) as client:
        async for batch in client.batches(PLAN):
            # As they are on the wire; the client gives labels in a wider type.
            wire = batch.indices.astype("<u8"), batch.images, batch.labels.astype(np.uint8)
            digest.update(b"".join(each.tobytes() for each in wire))
            sizes.append(len(batch.labels))
    single = hashlib.sha256()
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub: Any = mnist_pb2_grpc.MnistServiceStub(channel)
        async for sample in stub.GetTrainingSamples(mnist_pb2.DataRequest(dataset="mnist")):
            single.update(sample.image + f"{sample.index} {sample.label};".encode())

    plan = {"dataset": "mnist", "seed": str(PLAN.seed), "epoch": PLAN.epoch, "batch_size": PLAN.batch_size}
    status, output, errors = await read_in_node(interpreter, program, server, plan)
    assert (status, errors) == (0, "")
    assert json.loads(output) == {
        "samples": sum(sizes),
        "batches": len(sizes),
        "sha256": digest.hexdigest(),
        "single": 1000,
        "single_sha256": single.hexdigest(),
    }
    assert np.sum(sizes) == 1000


async def test_refusal_reaches_node_as_it_is(interpreter: str, program: Path, server: StreamerServer) -> None:
    status, _, errors = await read_in_node(interpreter, program, server, {"dataset": "nowhere", "batch_size": 10})

    assert status == 1
    assert "5 NOT_FOUND: dataset: there is no 'nowhere'; known are mnist" in errors


def test_documentation_shows_the_program_that_is_tested() -> None:
    text = (PROGRAM / "read.js").read_text()
    shown = text.partition("shows what follows.\n")[2].partition("// Up to here.")[0]

    assert f"```js\n{shown}```\n" in (ROOT / "docs" / "streaming.md").read_text()

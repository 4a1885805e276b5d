"""The client for scripts, against a gateway in a process of its own: gRPC wants one event loop in each."""

import asyncio
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gateway.blocking import BlockingImageClient
from gateway.server import GatewayServer
from imaging.decoding import Pixels
from tests.gateway.fake_triton import FakeTriton, label_of

SCRIPT = """
import sys
from gateway.blocking import BlockingImageClient
from gateway.client import ImageError, ModelNotFoundError

address, file = sys.argv[1:]
with BlockingImageClient(address) as client:
    client.wait_ready()
    print(client.classify(file).label, client.classify(file).timing is not None)
    print([answer.label for answer in client.classify_batch([file] * 3)])
    print([answer.label for answer in client.classify_many(path for path in [file] * 5)])
    for answer in client.classify_many([file] * 100):
        break
    print(client.compare(file, file).score, client.embed(file).vector.shape, client.models()[0].name)
    try:
        client.classify(file, model="none")
    except ModelNotFoundError as error:
        print(error)
"""


async def test_script_without_asyncio_asks_everything(
    gateway: GatewayServer, triton: FakeTriton, digit: Pixels, tmp_path: Path
) -> None:
    Image.fromarray(digit).save(tmp_path / "seven.png")
    asked = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SCRIPT, gateway.address, str(tmp_path / "seven.png"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    out, err = await asyncio.wait_for(asked.communicate(), 60)
    label = label_of(digit)

    assert (asked.returncode, err.decode()) == (0, "")
    assert out.decode().splitlines() == [
        f"{label} True",
        str([label] * 3),
        str([label] * 5),
        "1.0 (500,) mnist",
        "model: no model 'none'; loaded are mnist",
    ]


def test_client_that_is_not_open_says_so() -> None:
    with pytest.raises(RuntimeError, match="with BlockingImageClient"):
        BlockingImageClient("localhost:1").classify(np.zeros((28, 28), np.uint8))

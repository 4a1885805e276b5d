"""`sluice health`, as containers are checked with it, against real servers."""

import asyncio
import socket
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from gateway.server import GatewayServer
from gateway.settings import GatewaySettings
from sluice.health import before_the_first_model, main
from streamer.server import StreamerServer
from streamer.settings import StreamerSettings
from streamer.sources.datasets import find
from streamer.sources.memory import load
from tests.gateway.fake_triton import FakeTriton


@pytest.fixture
async def triton() -> AsyncIterator[FakeTriton]:
    async with FakeTriton() as server:
        yield server


@pytest.fixture
async def gateway(triton: FakeTriton, tmp_path: Path) -> AsyncIterator[GatewayServer]:
    """Has tried its first inference."""
    settings = GatewaySettings(
        port=0, metrics_port=0, triton=triton.address, model_repository=tmp_path, probe_interval_seconds=0.05,
        probe_timeout_seconds=2, drain_seconds=1,
    )  # fmt: skip
    async with GatewayServer(settings) as server:
        yield server


async def health(*words: str) -> int:
    return await asyncio.to_thread(main, words)


async def until_serving(address: str) -> None:
    async with asyncio.timeout(10):
        while await health("gateway", "--address", address) != 0:
            pass  # each turn is a request


async def test_gateway_is_well_while_an_inference_works(
    gateway: GatewayServer, triton: FakeTriton, capsys: pytest.CaptureFixture[str]
) -> None:
    await until_serving(gateway.address)
    triton.failure = (grpc.StatusCode.INTERNAL, "the model's process is gone")
    async with asyncio.timeout(10):
        while await health("gateway", "--address", gateway.address, "--allow-no-model") == 0:
            pass  # each turn is a request

    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"gateway {gateway.address}: not serving: it is ending, or no inference works; its log says which"


@pytest.mark.parametrize(("words", "status"), [(["--allow-no-model"], 0), ([], 1)], ids=["allowed", "not allowed"])
async def test_gateway_without_a_model_says_what_to_run(
    gateway: GatewayServer, triton: FakeTriton, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: list[str], status: int,
) -> None:  # fmt: skip
    triton.models = {}
    monkeypatch.setenv("SLUICE_MODEL_REPOSITORY", str(tmp_path))
    async with asyncio.timeout(10):
        while await health("gateway", "--address", gateway.address) == 0:
            pass  # each turn is a request
    capsys.readouterr()

    assert await health("gateway", "--address", gateway.address, *words) == status
    assert "docker compose run --rm train" in capsys.readouterr().out


async def test_gateway_without_triton_is_not_well_even_where_no_model_is_allowed(
    gateway: GatewayServer, triton: FakeTriton, capsys: pytest.CaptureFixture[str]
) -> None:
    await triton.stop()
    async with asyncio.timeout(10):
        while await health("gateway", "--address", gateway.address) == 0:
            pass  # each turn is a request
    capsys.readouterr()

    assert await health("gateway", "--address", gateway.address, "--allow-no-model") == 1
    assert "inference server" in capsys.readouterr().out


def test_model_that_triton_did_not_load_is_not_taken_for_none(tmp_path: Path) -> None:
    (tmp_path / "mnist" / ".staged-1").mkdir(parents=True)
    assert before_the_first_model(tmp_path).is_well

    (tmp_path / "mnist" / "1").mkdir()
    assert not before_the_first_model(tmp_path).is_well
    assert "mnist/1" in before_the_first_model(tmp_path).reason


async def test_streamer_is_well_until_it_drains(tiny_mnist: Path, tmp_path: Path) -> None:
    files = await find("mnist", data=tiny_mnist, cache=tmp_path, report=print)
    async with StreamerServer(StreamerSettings(port=0, metrics_port=0), [await load(files)]) as server:
        assert await health("streamer", "--address", server.address) == 0
        server.drain()
        assert await health("streamer", "--address", server.address) == 1


@pytest.mark.parametrize(("answer", "status"), [(b"200 OK", 0), (b"400 Bad Request", 1)], ids=["live", "not live"])
async def test_triton_is_well_while_live(answer: bytes, status: int) -> None:
    asked: list[bytes] = []

    async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readline())
        writer.write(b"HTTP/1.1 " + answer + b"\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(reply, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()

        assert await health("triton", "--address", f"{host}:{port}") == status
    assert asked == [b"GET /v2/health/live HTTP/1.1\r\n"]


@pytest.mark.parametrize("service", ["gateway", "streamer", "triton"])
async def test_service_that_does_not_answer_is_given_up_in_time(
    service: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It takes the connection and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = "{}:{}".format(*server.getsockname())
        started = time.monotonic()
        status = await health(service, "--address", address, "--timeout", "0.3")
        seconds = time.monotonic() - started

    assert status == 1
    assert seconds < 3
    assert capsys.readouterr().out.startswith(f"{service} {address}: no answer: ")


@pytest.mark.parametrize(
    ("service", "host", "port"),
    [
        ("gateway", "SLUICE_GATEWAY_HOST", "SLUICE_GATEWAY_PORT"),
        ("streamer", "SLUICE_STREAMER_HOST", "SLUICE_STREAMER_PORT"),
        ("triton", "SLUICE_TRITON_HOST", "SLUICE_TRITON_HTTP_PORT"),
    ],
)
def test_address_comes_from_the_settings_and_is_one_to_connect_to(
    service: str, host: str, port: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(host, "0.0.0.0")
    monkeypatch.setenv(port, "9")
    main([service])

    assert capsys.readouterr().out.startswith(f"{service} 127.0.0.1:9: ")


@pytest.mark.parametrize(
    ("words", "imported"), [(["gateway"], "pydantic"), (["triton"], "grpc")], ids=["gateway", "triton"]
)
async def test_check_imports_nothing_but_what_it_asks_with(words: list[str], imported: str) -> None:
    """Several checks a minute in each container: 0.1 s of CPU each, not the 0.3 s of the whole command line."""
    program = "import sys; from sluice.__main__ import main\ntry: main()\nexcept SystemExit: pass\nprint(*sys.modules)"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program, "health", *words, "--address", "127.0.0.1:9"),
        cwd=Path(__file__).parents[2], stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    output, _ = await process.communicate()
    line, modules = output.decode().splitlines()

    assert line.startswith(f"{words[0]} 127.0.0.1:9: no answer")
    assert imported not in modules.split()

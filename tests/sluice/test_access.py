"""The commands at a gateway with TLS and keys, which runs in this process."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trustme
from PIL import Image

from gateway.server import GatewayServer
from gateway.settings import GatewaySettings
from rpc.keys import add_key
from rpc.settings import SettingsError
from rpc.tls import ClientTls
from sluice import health
from sluice.access import Access
from sluice.doctor import examine
from tests.certificates import server_files, write_ca
from tests.digits import seven
from tests.gateway.fake_triton import FakeTriton, label_of

ROOT = Path(__file__).parents[2]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """What the gateway is set with."""
    files = server_files(tmp_path / "server", trustme.CA(), "gateway.example.com")
    return {
        "SLUICE_GATEWAY_TLS_CERT": str(files.cert),
        "SLUICE_GATEWAY_TLS_KEY": str(files.key),
        "SLUICE_GATEWAY_KEYS_FILE": str(tmp_path / "keys.json"),
    }


@pytest.fixture
def key(tmp_path: Path) -> str:
    return add_key(tmp_path / "keys.json", "camera", ["classify", "compare"])


@pytest.fixture
async def gateway(environment: dict[str, str], key: str, tmp_path: Path) -> AsyncIterator[GatewayServer]:
    async with FakeTriton() as triton:
        settings = GatewaySettings(
            port=0, metrics_port=0, triton=triton.address, model_repository=tmp_path, probe_interval_seconds=0.05,
            drain_seconds=1, tls_cert=Path(environment["SLUICE_GATEWAY_TLS_CERT"]),
            tls_key=Path(environment["SLUICE_GATEWAY_TLS_KEY"]), keys_file=tmp_path / "keys.json",
        )  # fmt: skip
        async with GatewayServer(settings) as server:
            yield server


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """In a folder of its class."""
    path = tmp_path / "images" / "7" / "seven.png"
    path.parent.mkdir(parents=True)
    Image.fromarray(seven()).save(path)
    return path


async def sluice(*words: str, **environment: str) -> tuple[int | None, str, str]:
    """Run a command in a process of its own; return status, output and errors."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "sluice", *words),
        cwd=ROOT, env={"PATH": os.environ["PATH"], "HOME": str(Path.home()), **environment},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    output, errors = await process.communicate()
    return process.returncode, output.decode(), errors.decode()


async def serving(gateway: GatewayServer, ca: str) -> list[str]:
    """Wait until it serves, and return how it is asked by its own certificate."""
    asked = ["--address", gateway.address, "--tls-ca", ca, "--tls-server-name", "gateway.example.com"]
    async with asyncio.timeout(20):
        while await asyncio.to_thread(health.main, ["gateway", *asked]) != 0:
            pass  # each turn is a request
    return asked


async def test_classify_gets_in_with_authority_and_key(
    gateway: GatewayServer, environment: dict[str, str], key: str, picture: Path, tmp_path: Path
) -> None:
    ca = environment["SLUICE_GATEWAY_TLS_CERT"]
    (tmp_path / "key").write_text(f"{key}\n")
    await serving(gateway, ca)
    command = ["classify", "--server", gateway.address, "--tls-server-name", "gateway.example.com", str(picture)]

    status, output, errors = await sluice(*command, "--tls-ca", ca, "--api-key-file", str(tmp_path / "key"))
    assert (status, errors) == (0, "")
    assert f": {label_of(seven())} (" in output
    status, output, _ = await sluice(*command, SLUICE_TLS_CA=ca, SLUICE_API_KEY=key)
    assert status == 0


async def test_loadtest_gets_in_too(
    gateway: GatewayServer, environment: dict[str, str], key: str, picture: Path
) -> None:
    asked = await serving(gateway, environment["SLUICE_GATEWAY_TLS_CERT"])
    options = ["--duration", "0.2", "--warm-up", "0", "--images", str(picture.parents[1]), "--json", "-"]

    status, output, errors = await sluice("loadtest", "--server", *asked[1:], *options, SLUICE_API_KEY=key)
    assert (status, list(json.loads(output)["statusCodeDistribution"])) == (0, ["OK"]), errors


async def test_command_on_the_gateways_own_machine_needs_no_options(
    gateway: GatewayServer, environment: dict[str, str], key: str, picture: Path
) -> None:
    await serving(gateway, environment["SLUICE_GATEWAY_TLS_CERT"])
    port = gateway.address.rpartition(":")[2]

    status, output, errors = await sluice(
        "compare", str(picture), str(picture), **environment, SLUICE_GATEWAY_PORT=port, SLUICE_API_KEY=key
    )
    assert (status, errors) == (0, "")
    assert output.startswith("1.0000")


async def test_mistake_is_one_line_with_its_cause(gateway: GatewayServer, picture: Path, tmp_path: Path) -> None:
    """The account that gRPC gives of the handshake is not beside it."""
    other = write_ca(tmp_path / "other.pem", trustme.CA())
    status, _, errors = await sluice("classify", "--server", gateway.address, "--tls-ca", str(other), str(picture))

    assert status == 1
    assert errors.splitlines() == [
        f"error: no secure connection to {gateway.address}: the server's certificate is from a CA that is not in "
        f"{other}: give its file (`--tls-ca FILE`)"
    ]


async def test_health_in_the_gateways_container_asks_by_its_own_certificate(
    gateway: GatewayServer, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    await serving(gateway, environment["SLUICE_GATEWAY_TLS_CERT"])
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    assert await asyncio.to_thread(health.main, ["gateway", "--address", gateway.address]) == 0


async def test_health_without_tls_says_what_is_missing(
    gateway: GatewayServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await asyncio.to_thread(health.main, ["gateway", "--address", gateway.address]) == 1
    assert "no answer: it speaks TLS" in capsys.readouterr().out


def test_what_is_not_said_of_the_own_gateway_comes_from_its_settings(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    own = Path(environment["SLUICE_GATEWAY_TLS_CERT"])
    cert, key = Path("mine.pem"), Path("mine-key.pem")
    access = Access(tls_cert=cert, tls_key=key)

    assert access.client_tls(is_own=True) == ClientTls(ca=own, cert=cert, key=key, server_name="gateway.example.com")
    assert access.client_tls(is_own=False) == ClientTls(cert=cert, key=key)
    assert Access(tls=True).client_tls(is_own=True) == ClientTls()


def test_key_comes_from_the_file_before_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Access().api_key() is None
    monkeypatch.setenv("SLUICE_API_KEY", "slk_environment")
    (tmp_path / "key").write_text("slk_file\n")

    assert Access().api_key() == "slk_environment"
    assert Access(api_key_file=tmp_path / "key").api_key() == "slk_file"
    with pytest.raises(SettingsError, match=r"--api-key-file \S+absent: cannot be read: No such file"):
        Access(api_key_file=tmp_path / "absent").api_key()


def test_doctor_looks_at_certificate_and_keys(
    environment: dict[str, str], key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLUICE_GATEWAY_TLS_KEY", environment["SLUICE_GATEWAY_TLS_CERT"])
    findings = {finding.name: finding for finding in examine()}

    assert not findings["TLS certificate"].ok
    assert "it holds no private key in PEM" in findings["TLS certificate"].detail
    assert findings["API keys"].detail.startswith("1 in ")

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gateway.client import ClientError, ImageClient
from gateway.errors import RouteError
from gateway.routing import path_of
from gateway.server import GatewayServer
from gateway.settings import GatewaySettings
from rpc.settings import SettingsError
from sluice.commands import app
from sluice.release import RollbackOptions, rollback, tell_route
from sluice.route import RouteOptions, run
from tests.gateway.fake_triton import FakeTriton
from tests.serving.conftest import free_ports
from training.errors import PublishError
from training.release.versions import roll_back


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three versions of mnist, and neither Triton nor gateway where the settings put them."""
    models = tmp_path / "models"
    for version in (1, 2, 3):
        (models / "mnist" / str(version)).mkdir(parents=True)
    (models / "mnist" / ".withdrawn-4").mkdir()
    monkeypatch.setenv("SLUICE_MODEL_REPOSITORY", str(models))
    monkeypatch.setenv("SLUICE_TRITON_GRPC_PORT", str(free_ports()["grpc_port"]))
    monkeypatch.setenv("SLUICE_GATEWAY_PORT", str(free_ports()["grpc_port"]))
    monkeypatch.setattr("sluice.release._LOOK_SECONDS", 0.05)
    return models


@pytest.fixture
async def server(repository: Path) -> AsyncIterator[str]:
    """Address of a gateway that reads it, in front of a Triton with all versions ready."""
    async with FakeTriton({"mnist": [1, 2, 3]}) as triton:
        settings = GatewaySettings(port=0, metrics_port=0, triton=triton.address, model_repository=repository)
        async with GatewayServer(settings) as gateway, ImageClient(gateway.address) as client:
            await client.wait_ready()
            yield gateway.address


async def route(*said: str, **options: Any) -> list[str]:
    return await asyncio.to_thread(run, RouteOptions(**options), report=list(said).append)


async def test_gateway_has_followed_when_the_command_ends(server: str) -> None:
    said = await route(server=server, model="mnist", default=2, canary=["3=12.5%"])
    assert said == [f"mnist: 2 is the default, canary 3=12.5%; 2 answers at {server}"]
    assert await route(server=server) == [
        "MODEL  READY    DEFAULT  CANARY",
        "mnist  3, 2, 1  2        3=12.5%",
    ]

    assert await route(server=server, model="mnist", canary=["1=0.5"]) == [
        f"mnist: 2 is the default, canary 1=50%; 2 answers at {server}"
    ]
    assert await route(server=server, model="mnist", clear=True) == [
        f"mnist: the highest version that is ready answers; 3 answers at {server}"
    ]


async def test_what_is_not_as_the_route_says_is_told(server: str, repository: Path) -> None:
    complaints: list[str] = []
    path_of(repository, "mnist").write_text('{"default": 7}')
    await asyncio.to_thread(run, RouteOptions(server=server), report=complaints.append)
    path_of(repository, "mnist").write_text("{")
    await asyncio.to_thread(run, RouteOptions(server=server, model="mnist"), report=complaints.append)

    assert complaints[0] == "mnist: version 7 is not ready; 3, the highest, answers"
    assert "mnist.route.json: Invalid JSON" in complaints[1]


async def test_route_is_set_where_no_gateway_answers(repository: Path) -> None:
    (said,) = await route(model="mnist", default=2)

    assert said.startswith("mnist: 2 is the default; no gateway answers at 127.0.0.1:")
    assert path_of(repository, "mnist").read_text() == '{"default":2,"canary":{}}\n'
    assert sorted(os.listdir(repository)) == ["mnist", "mnist.route.json"]
    with pytest.raises(ClientError):
        await route(server="127.0.0.1:1")


async def test_canary_that_a_new_default_ends_is_told(repository: Path) -> None:
    await route(model="mnist", default=1, canary=["2=10%"])
    told: list[str] = []
    await asyncio.to_thread(run, RouteOptions(model="mnist", default=3), report=told.append)

    assert told[-1] == "mnist: canary 2=10% is over; --default takes --canary again to go on with it"


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"default": 1}, SettingsError, "MODEL: missing"),
        ({"model": "mnist", "clear": True, "default": 1}, SettingsError, "--clear: takes the whole route away"),
        ({"model": "mnist", "canary": ["1=5%"]}, SettingsError, "--canary: needs --default too"),
        ({"model": "mnist", "default": 1, "canary": ["2"]}, SettingsError, "--canary 2: has to be VERSION=SHARE"),
        ({"model": "mnist", "default": 1, "canary": ["2=5%", "2=9%"]}, SettingsError, "--canary 2: given twice"),
        ({"model": "mnist", "default": 1, "canary": ["2=100%"]}, RouteError, "canary.2: .* less than 1"),
        ({"model": "mnist", "default": 1, "canary": ["1=5%"]}, RouteError, "canary: version 1 is the default already"),
        ({"model": "mnist", "default": 9}, RouteError, "mnist: no version 9; published are 1, 2, 3"),
        ({"model": "mnist", "default": 4}, RouteError, "`sluice rollback mnist --to 4` brings it back"),
        ({"model": "absent", "clear": True}, RouteError, "models: no model absent"),
        ({"model": "absent", "default": 4}, RouteError, "absent: no version 4; published are none"),
    ],
)
async def test_route_that_makes_no_sense_changes_nothing(
    repository: Path, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        await route(**options)
    assert not path_of(repository, "mnist").exists()


def test_rollback_that_would_withdraw_what_callers_are_routed_to_is_refused(repository: Path) -> None:
    path_of(repository, "mnist").write_text('{"default": 1, "canary": {"3": 0.1}}')
    with pytest.raises(PublishError, match=r"version 3, which .* `sluice route mnist --default 2` sends them to 2"):
        rollback(RollbackOptions(model="mnist"), report=lambda line: None)
    path_of(repository, "mnist").write_text('{"default": 1}')
    said = rollback(RollbackOptions(model="mnist"), report=lambda line: None)

    assert said.startswith("mnist version 2 is the newest; callers go to 1, as mnist is routed; withdrawn: 3")


def test_publishing_says_that_callers_stay_where_they_are_routed(repository: Path) -> None:
    told: list[str] = []
    tell_route(repository / "mnist", 3, told.append, is_loaded=True)
    path_of(repository, "mnist").write_text('{"default": 1}')
    tell_route(repository / "mnist", 3, told.append, is_loaded=True)

    assert told == ["version 3 is published and loaded; mnist is routed to 1: `sluice route mnist --default 3`"]


def test_damaged_route_does_not_keep_a_rollback_back(repository: Path) -> None:
    for content in ("{", "[]", "3", '{"default": null}', '{"default": 3, "canary": 5}'):
        path_of(repository, "mnist").write_text(content)
        roll_back(repository / "mnist").undo()


def test_help_of_the_command_tells_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        app(["route", "--help"], prog_name="sluice")
    assert {"--default", "--canary", "--clear", "--server", "--tls"} <= set(capsys.readouterr().out.split())

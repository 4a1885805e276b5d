"""TLS, API keys and caps of a whole gateway."""

from __future__ import annotations  # grpc's classes are generic in their stubs alone

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from numpy.typing import NDArray
from structlog.testing import capture_logs

from gateway.client import (
    ClientTls,
    ImageClient,
    ModelNotFoundError,
    PermissionDeniedError,
    SecureConnectionError,
    UnauthenticatedError,
)
from gateway.scopes import NEEDS, SCOPES
from gateway.server import GatewayServer
from gateway.settings import GatewaySettings
from rpc.access import Need, key_metadata
from rpc.keys import add_key
from rpc.settings import SettingsError, load
from rpc.tls import open_channel, to_own_server
from tests.certificates import server_files
from tests.gateway.fake_triton import FakeTriton, label_of


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, str]:
    """One key for each scope, by its name."""
    return {scope: add_key(tmp_path / "keys.json", scope, [scope]) for scope in SCOPES}


@pytest.fixture
def secured(settings: GatewaySettings, keys: dict[str, str], tmp_path: Path) -> GatewaySettings:
    files = server_files(tmp_path / "server", trustme.CA())
    return settings.model_copy(
        update={"tls_cert": files.cert, "tls_key": files.key, "keys_file": tmp_path / "keys.json"}
    )


@pytest.fixture
def trusting(secured: GatewaySettings) -> ClientTls:
    assert secured.tls is not None
    return to_own_server(secured.tls)


@pytest.fixture
async def guarded(secured: GatewaySettings) -> AsyncIterator[GatewayServer]:
    async with GatewayServer(secured) as server:
        yield server


async def test_key_opens_what_its_scope_says_over_tls(
    guarded: GatewayServer, trusting: ClientTls, keys: dict[str, str], digit: NDArray[np.uint8]
) -> None:
    async with ImageClient(guarded.address, tls=trusting, api_key=keys["classify"]) as client:
        await client.wait_ready()
        assert (await client.classify(digit)).label == label_of(digit)
        assert len(await client.classify_batch([digit, digit])) == 2
        with pytest.raises(PermissionDeniedError, match="the API key 'classify' lacks the scope 'embed'"):
            await client.embed(digit)
        with pytest.raises(PermissionDeniedError, match="lacks the scope 'models'"):
            await client.models()
        with pytest.raises(PermissionDeniedError, match="lacks the scope 'compare'"):
            await client.compare(digit, digit)


async def test_client_without_a_key_or_with_a_wrong_one_is_told_where_it_goes(
    guarded: GatewayServer, trusting: ClientTls, digit: NDArray[np.uint8]
) -> None:
    async with ImageClient(guarded.address, tls=trusting) as client:
        with pytest.raises(UnauthenticatedError, match=r"an API key is needed.*SLUICE_API_KEY"):
            await client.classify(digit)
    async with ImageClient(guarded.address, tls=trusting, api_key="slk_wrong") as client:
        for _ in range(40):
            with pytest.raises(UnauthenticatedError, match="no API key") as refused:
                await client.classify(digit)
        assert "too many calls without a right API key" in str(refused.value)


async def test_names_of_models_are_for_those_who_may_list_them(
    secured: GatewaySettings, trusting: ClientTls, tmp_path: Path, digit: NDArray[np.uint8]
) -> None:
    both = add_key(tmp_path / "keys.json", "both", ["classify", "models"])
    one = add_key(tmp_path / "keys.json", "one", ["classify"])
    async with GatewayServer(secured) as gateway:
        async with ImageClient(gateway.address, tls=trusting, api_key=both) as client:
            await client.wait_ready()
            with pytest.raises(ModelNotFoundError, match="loaded are mnist"):
                await client.classify(digit, model="other")
        async with ImageClient(gateway.address, tls=trusting, api_key=one) as client:
            with pytest.raises(ModelNotFoundError) as refused:
                await client.classify(digit, model="other")

    assert "mnist" not in str(refused.value)


async def test_health_is_free_and_reflection_takes_any_key(
    guarded: GatewayServer, trusting: ClientTls, keys: dict[str, str]
) -> None:
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    async with open_channel(guarded.address, trusting) as channel:
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        reflect = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        listed = [answer async for answer in reflect(iter([request]), metadata=_metadata(keys["triton"]))]
        assert listed[0].list_services_response.service
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            _ = [answer async for answer in reflect(iter([request]))]

    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


def _metadata(key: str) -> tuple[tuple[str, str], ...]:
    return key_metadata(key, "127.0.0.1:1", None)


async def test_every_method_is_open_to_a_scope_or_to_all(guarded: GatewayServer) -> None:
    """One that is added without a scope is closed, and fails here."""
    from gateway.server import SERVICE
    from protos.gateway.v1 import image_service_pb2

    methods = [method.name for method in image_service_pb2.DESCRIPTOR.services_by_name["ImageService"].methods]

    assert {f"/{SERVICE}/{name}" for name in methods} <= NEEDS.keys()
    assert {need for need in NEEDS.values() if not isinstance(need, Need)} == set(SCOPES)


async def test_plaintext_at_a_tls_port_says_so(guarded: GatewayServer, digit: NDArray[np.uint8]) -> None:
    async with ImageClient(guarded.address) as client:
        with pytest.raises(SecureConnectionError, match=r"no secure connection to \S+: it speaks TLS"):
            await client.classify(digit)
        with pytest.raises(SecureConnectionError, match="it speaks TLS"):
            await client.wait_ready(timeout_seconds=0.1)


# Plaintext


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
async def test_plaintext_beyond_loopback_is_refused_at_start_unless_asked_for(
    settings: GatewaySettings, host: str
) -> None:
    wide = settings.model_copy(update={"host": host})
    with pytest.raises(SettingsError, match=f"host = {host}: beyond loopback the gateway needs tls_cert and tls_key"):
        await GatewayServer(wide).__aenter__()


async def test_plaintext_that_was_asked_for_warns_of_keys(
    settings: GatewaySettings, keys: dict[str, str], tmp_path: Path
) -> None:
    wide = settings.model_copy(update={"host": "0.0.0.0", "insecure": True})
    async with GatewayServer(wide):
        pass
    with capture_logs() as logs:
        async with GatewayServer(wide.model_copy(update={"keys_file": tmp_path / "keys.json"})):
            pass

    assert any("API keys can be read on their way" in entry["event"] for entry in logs)


def test_half_of_tls_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="tls_key missing: TLS needs tls_cert and tls_key"):
        load(GatewaySettings, tls_cert=tmp_path / "cert.pem")
    with pytest.raises(SettingsError, match="tls_cert and tls_key missing"):
        load(GatewaySettings, tls_client_ca=tmp_path / "ca.pem")


async def test_files_that_are_not_there_are_named_at_start(settings: GatewaySettings, tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    with pytest.raises(SettingsError, match=f"tls_cert = {absent}: there is no such file"):
        await GatewayServer(settings.model_copy(update={"tls_cert": absent, "tls_key": absent})).__aenter__()
    with pytest.raises(SettingsError, match=f"keys_file = {absent}: there is no such file; `sluice keys add`"):
        await GatewayServer(settings.model_copy(update={"keys_file": absent})).__aenter__()


# Caps


async def _check(channel: grpc.aio.Channel, **options: Any) -> grpc.StatusCode:
    call = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20, **options)
    code: grpc.StatusCode = await call.code()
    return code


async def test_connections_are_bounded_and_come_back(settings: GatewaySettings) -> None:
    async with GatewayServer(settings.model_copy(update={"max_connections": 2})) as gateway, AsyncExitStack() as stack:
        channels = [
            await stack.enter_async_context(
                open_channel(gateway.address, None, [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)])
            )
            for _ in range(3)
        ]
        codes = [await _check(channel) for channel in channels]
        await channels[0].close()
        async with asyncio.timeout(20):
            while await _check(channels[2]) is not grpc.StatusCode.OK:
                pass  # each turn is an attempt to connect

    assert codes == [grpc.StatusCode.OK, grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE]


async def test_calls_on_one_connection_are_bounded(settings: GatewaySettings, triton: FakeTriton) -> None:
    """One more waits at its caller, and begins when another has ended."""
    few = settings.model_copy(update={"max_connection_calls": 2})
    async with GatewayServer(few) as gateway, grpc.aio.insecure_channel(gateway.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch
        watches = [watch(health_pb2.HealthCheckRequest()) for _ in range(2)]
        for each in watches:
            await each.read()
        third = asyncio.create_task(_check(channel))
        assert not (await asyncio.wait({third}, timeout=0.2))[0]
        watches[0].cancel()

        assert await third is grpc.StatusCode.OK
        watches[1].cancel()


@pytest.mark.parametrize(
    ("num_bytes", "code"), [(6000, grpc.StatusCode.OK), (9000, grpc.StatusCode.RESOURCE_EXHAUSTED)]
)
async def test_metadata_is_bounded(settings: GatewaySettings, num_bytes: int, code: grpc.StatusCode) -> None:
    narrow = settings.model_copy(update={"max_metadata_bytes": 8192})
    async with GatewayServer(narrow) as gateway, grpc.aio.insecure_channel(gateway.address) as channel:
        assert await _check(channel, metadata=(("x-padding", "x" * num_bytes),)) is code


async def test_peer_that_does_not_shake_hands_is_let_go(guarded: GatewayServer, secured: GatewaySettings) -> None:
    hasty = secured.model_copy(update={"handshake_seconds": 0.2})
    async with GatewayServer(hasty) as gateway, asyncio.timeout(20):
        host, _, port = gateway.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        assert await reader.read() == b""
        writer.close()


@pytest.mark.parametrize("setting", ["connection_idle_seconds", "connection_age_seconds"])
async def test_idle_and_old_connections_are_closed(settings: GatewaySettings, setting: str) -> None:
    hasty = settings.model_copy(update={setting: 0.3, "connection_grace_seconds": 0.1})
    async with GatewayServer(hasty) as gateway, open_channel(gateway.address, None) as channel, asyncio.timeout(20):
        assert await _check(channel) is grpc.StatusCode.OK
        state = channel.get_state()
        while state is grpc.ChannelConnectivity.READY:
            await channel.wait_for_state_change(state)
            state = channel.get_state()
        assert await _check(channel) is grpc.StatusCode.OK

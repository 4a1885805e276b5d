"""Who may call, at a real server with the guard."""

from __future__ import annotations  # grpc's classes are generic in their stubs alone

from collections.abc import AsyncIterator
from contextvars import copy_context
from pathlib import Path

import grpc
import pytest
import trustme
from structlog.testing import capture_logs

from rpc import access
from rpc.access import Access, Need, Refusal, has_scope, identity, key_metadata
from rpc.interceptor import Guard
from rpc.keys import Keyring, add_key, remove_key
from rpc.settings import SettingsError
from rpc.tls import ClientTls, open_channel, server_credentials
from tests.certificates import server_files, write

NEEDS: dict[str, str | Need] = {"/Test/Who": "who", "/Test/Free": Need.NOTHING, "/Any/": Need.ANY_KEY}


async def _who(_request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
    return identity(context).encode()


async def _who_each(
    requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]
) -> AsyncIterator[bytes]:
    async for request in requests:
        yield await _who(request, context)


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, str]:
    return {name: add_key(tmp_path / "keys.json", name, [name]) for name in ("who", "other")}


@pytest.fixture
async def channel(keys: dict[str, str], tmp_path: Path) -> AsyncIterator[grpc.aio.Channel]:
    server = grpc.aio.server(interceptors=[Guard(access=Access(Keyring(tmp_path / "keys.json"), NEEDS))])
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        name: grpc.unary_unary_rpc_method_handler(_who) for name in ("Who", "Free", "Unlisted")
    }
    handlers["Each"] = grpc.stream_stream_rpc_method_handler(_who_each)
    for service in ("Test", "Any"):
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as opened:
        yield opened
    await server.stop(0)


async def ask(channel: grpc.aio.Channel, method: str, key: str | None, data: bytes = b"") -> str:
    """Return who the server says it is, or the status."""
    metadata = () if key is None else (("authorization", f"Bearer {key}"),)
    try:
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(method)
        return (await call(data, metadata=metadata, timeout=20)).decode()
    except grpc.aio.AioRpcError as error:
        return f"{error.code().name}: {error.details()}"


async def test_right_key_is_known_to_the_handler_and_the_log(channel: grpc.aio.Channel, keys: dict[str, str]) -> None:
    with capture_logs() as logs:
        assert await ask(channel, "/Test/Who", keys["who"]) == "key:who"
    assert [entry.get("key") for entry in logs if entry["event"] == "rpc"] in (["who"], [])


async def test_key_of_one_call_is_not_that_of_the_next(channel: grpc.aio.Channel, keys: dict[str, str]) -> None:
    await ask(channel, "/Test/Who", keys["who"])
    assert await ask(channel, "/Any/Who", keys["other"]) == "key:other"
    assert await ask(channel, "/Test/Free", None) == "address:127.0.0.1"


async def test_missing_and_wrong_keys_are_unauthenticated(channel: grpc.aio.Channel, keys: dict[str, str]) -> None:
    assert (await ask(channel, "/Test/Who", None)).startswith("UNAUTHENTICATED: an API key is needed")
    assert (await ask(channel, "/Test/Who", "hello")).startswith("UNAUTHENTICATED: what was given is no API key")
    assert (await ask(channel, "/Any/Who", keys["who"][:-2] + "00")).startswith("UNAUTHENTICATED: the API key is not")


async def test_right_key_without_the_scope_names_it(channel: grpc.aio.Channel, keys: dict[str, str]) -> None:
    said = await ask(channel, "/Test/Who", keys["other"])
    assert said == "PERMISSION_DENIED: the API key 'other' lacks the scope 'who'"


async def test_method_that_nobody_listed_is_closed(channel: grpc.aio.Channel, keys: dict[str, str]) -> None:
    assert (await ask(channel, "/Test/Unlisted", keys["who"])).startswith("PERMISSION_DENIED")
    assert (await ask(channel, "/Any/Unlisted", keys["who"])) == "key:who"
    assert (await ask(channel, "/Test/Unknown", None)).startswith("UNIMPLEMENTED")


async def test_refused_call_is_answered_before_its_request_is_read(channel: grpc.aio.Channel) -> None:
    """Its request never comes."""
    method: grpc.aio.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary("/Test/Who")
    call = method(timeout=20)
    assert await call.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_stream_whose_key_is_removed_ends_at_its_next_request(
    channel: grpc.aio.Channel, keys: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The file is looked at with every request.
    monkeypatch.setattr("rpc.keys._LOOK_SECONDS", 0.0)
    method: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream("/Any/Each")
    call = method(metadata=(("authorization", f"Bearer {keys['other']}"),))
    await call.write(b"")
    assert await call.read() == b"key:other"
    remove_key(tmp_path / "keys.json", "other")
    await call.write(b"")

    assert await call.code() is grpc.StatusCode.UNAUTHENTICATED
    assert await call.details() == "the API key is not known here"


def test_scope_is_known_to_the_handler(keys: dict[str, str], tmp_path: Path) -> None:
    entry = Access(Keyring(tmp_path / "keys.json"), NEEDS)

    def shown(key: str) -> bool:
        assert entry.check("/Any/Who", [("authorization", f"Bearer {key}")]) is None
        return has_scope("who")

    assert has_scope("who")  # nobody asks for keys
    assert [copy_context().run(shown, key) for key in keys.values()] == [True, False]


async def test_too_many_failed_tries_are_limited_and_a_right_key_is_not(
    channel: grpc.aio.Channel, keys: dict[str, str]
) -> None:
    with capture_logs() as logs:
        said = [await ask(channel, "/Test/Who", "hello") for _ in range(200)]
        assert await ask(channel, "/Test/Who", keys["who"]) == "key:who"

    codes = [each.partition(":")[0] for each in said]
    assert codes[:20] == ["UNAUTHENTICATED"] * 20
    # One a second comes back, on however slow a machine.
    assert codes.count("RESOURCE_EXHAUSTED") > 100
    num_lines = sum(entry.get("code") == "UNAUTHENTICATED" for entry in logs)
    assert num_lines <= codes.count("UNAUTHENTICATED")
    assert not any(entry.get("code") == "RESOURCE_EXHAUSTED" for entry in logs)


class _Caller:
    """A caller from somewhere else, as far as counting failed tries needs one."""

    def __init__(self, peer: str) -> None:
        self._peer = peer

    def peer(self) -> str:
        return self._peer


def test_failed_tries_are_counted_by_address_in_bounded_memory(keys: dict[str, str], tmp_path: Path) -> None:
    entry = Access(Keyring(tmp_path / "keys.json"), NEEDS)
    refusal = Refusal(code=grpc.StatusCode.UNAUTHENTICATED, details="")

    def is_flooded(peer: str) -> bool:
        return entry.is_flooded(refusal, _Caller(peer))  # type: ignore[arg-type]  # all it looks at

    assert [is_flooded(f"ipv4:10.0.0.1:{port}") for port in range(30)].count(True) >= 9
    assert not is_flooded("ipv4:10.0.0.2:1")
    # All addresses of one network of 64 bits are one host's.
    assert [is_flooded(f"ipv6:%5B2001:db8::{number:x}%5D:1") for number in range(30)].count(True) >= 9
    assert not is_flooded("ipv6:%5B2001:db8:0:1::1%5D:1")
    for number in range(20_000):
        is_flooded(f"ipv4:10.1.{number >> 8}.{number & 255}:1")
    assert len(entry._failures._buckets) == access._MAX_ADDRESSES


def test_client_sends_a_key_over_tls_or_to_itself_alone() -> None:
    expected = (("authorization", "Bearer slk_1"),)
    assert key_metadata(" slk_1\n", "127.0.0.1:1", None) == expected
    assert key_metadata("slk_1", "example.com:1", ClientTls()) == expected
    with pytest.raises(SettingsError, match=r"could be read on its way to example\.com:1") as refused:
        key_metadata("slk_1", "example.com:1", None)
    assert "slk_1" not in str(refused.value)
    for wrong in ("", "one\ntwo", "sesame\u0301"):
        with pytest.raises(SettingsError, match="the API key is empty, or more than a line"):
            key_metadata(wrong, "127.0.0.1:1", None)


async def test_caller_without_a_key_is_known_by_its_certificate(tmp_path: Path) -> None:
    ca = trustme.CA()
    server = grpc.aio.server()
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {"Who": grpc.unary_unary_rpc_method_handler(_who)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("Test", handlers),))
    files = server_files(tmp_path / "server", ca, client_ca=ca)
    port = server.add_secure_port("127.0.0.1:0", server_credentials(files))
    await server.start()
    cert, key = write(tmp_path / "client", ca.issue_cert("camera@example.com", common_name="camera"))
    tls = ClientTls(ca=files.client_ca, cert=cert, key=key)
    async with open_channel(f"127.0.0.1:{port}", tls) as channel:
        who = await ask(channel, "/Test/Who", None)
    await server.stop(0)

    assert who.startswith("certificate:CN=camera,")

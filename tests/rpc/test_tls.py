"""Credentials from files, on real servers."""

from __future__ import annotations  # grpc's classes are generic in their stubs alone

import asyncio
import os
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from structlog.testing import capture_logs

from rpc.settings import SettingsError
from rpc.tls import ClientTls, ServerTls, client_credentials, expiry, open_channel, server_credentials, to_own_server
from tests.certificates import chain, days_ago, server_files, write, write_ca


@pytest.fixture
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def trusting(ca: trustme.CA, tmp_path: Path) -> ClientTls:
    return ClientTls(ca=write_ca(tmp_path / "ca.pem", ca))


async def _who(_request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
    """Answer with the caller's common name."""
    return b"".join(context.auth_context().get("x509_common_name", ()))


async def _each(requests: AsyncIterator[bytes], _context: object) -> AsyncIterator[bytes]:
    async for request in requests:
        yield request


@asynccontextmanager
async def serving(credentials: grpc.ServerCredentials | None) -> AsyncIterator[str]:
    """Serve ``/Test/Who`` and ``/Test/Each`` at the address given."""
    server = grpc.aio.server()
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        "Who": grpc.unary_unary_rpc_method_handler(_who),
        "Each": grpc.stream_stream_rpc_method_handler(_each),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("Test", handlers),))
    bind = server.add_insecure_port if credentials is None else lambda at: server.add_secure_port(at, credentials)
    port = bind("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def ask(address: str, tls: ClientTls | None) -> bytes:
    """Ask over a connection of its own."""
    async with open_channel(address, tls, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        who: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/Test/Who")
        return await who(b"", timeout=20)


async def serial(address: str) -> int:
    """Return the number of the certificate that a new handshake is given."""
    host, _, port = address.rpartition(":")
    pem = await asyncio.to_thread(ssl.get_server_certificate, (host, int(port)))
    return x509.load_pem_x509_certificate(pem.encode()).serial_number


def serial_of(issued: trustme.LeafCert) -> int:
    return x509.load_pem_x509_certificate(chain(issued)).serial_number


async def test_client_that_trusts_the_authority_is_served(ca: trustme.CA, trusting: ClientTls, tmp_path: Path) -> None:
    async with serving(server_credentials(server_files(tmp_path / "server", ca))) as address:
        assert await ask(address, trusting) == b""


async def test_server_that_asks_for_a_certificate_knows_its_callers(
    ca: trustme.CA, trusting: ClientTls, tmp_path: Path
) -> None:
    cert, key = write(tmp_path / "client", ca.issue_cert("me@example.com", common_name="camera"))
    known = ClientTls(ca=trusting.ca, cert=cert, key=key)
    async with serving(server_credentials(server_files(tmp_path / "server", ca, client_ca=ca))) as address:
        assert await ask(address, known) == b"camera"
        with pytest.raises(grpc.aio.AioRpcError):
            await ask(address, trusting)


@pytest.mark.parametrize("names", [("gateway.example.com",), ("*.example.com",), ("127.0.0.1",)])
@pytest.mark.parametrize("asks", [False, True], ids=["no client certificate", "client certificate"])
async def test_server_can_be_asked_on_its_own_machine_whatever_its_name(
    ca: trustme.CA, tmp_path: Path, names: tuple[str, ...], asks: bool
) -> None:
    files = server_files(tmp_path / "server", ca, *names, client_ca=ca if asks else None)
    async with serving(server_credentials(files)) as address:
        await ask(address, to_own_server(files))


# Rotation


async def test_next_handshake_uses_new_files_and_open_streams_go_on(
    ca: trustme.CA, trusting: ClientTls, tmp_path: Path
) -> None:
    files = server_files(tmp_path / "server", ca)
    async with serving(server_credentials(files)) as address, open_channel(address, trusting) as channel:
        stream: grpc.aio.StreamStreamCall[bytes, bytes] = channel.stream_stream("/Test/Each")()
        await stream.write(b"before")
        assert await stream.read() == b"before"
        before = await serial(address)

        new = ca.issue_cert("localhost", "127.0.0.1")
        write(tmp_path / "server", new)

        assert await serial(address) == serial_of(new) != before
        await stream.write(b"after")
        assert await stream.read() == b"after"
        stream.cancel()


@pytest.mark.parametrize("broken", ["half", "other key", "gone", "expired"])
async def test_new_files_that_cannot_be_used_leave_the_old_ones_and_one_line(
    ca: trustme.CA, tmp_path: Path, broken: str
) -> None:
    files = server_files(tmp_path / "server", ca)
    new = ca.issue_cert("localhost", not_after=days_ago(1) if broken == "expired" else None)
    async with serving(server_credentials(files)) as address:
        before = await serial(address)
        with capture_logs() as logs:
            if broken == "half":
                files.cert.write_bytes(chain(new)[:300])
            elif broken == "other key":
                files.key.write_bytes(new.private_key_pem.bytes())
            elif broken == "gone":
                files.key.unlink()
            else:
                write(tmp_path / "server", new)
            assert [await serial(address) for _ in range(3)] == [before] * 3
        whole = ca.issue_cert("localhost")
        write(tmp_path / "server", whole)

        assert await serial(address) == serial_of(whole)
    assert [entry["event"] for entry in logs] == ["new tls files not used, the old ones go on"]


async def test_new_client_authorities_count_from_the_next_handshake(
    ca: trustme.CA, trusting: ClientTls, tmp_path: Path
) -> None:
    other = trustme.CA()
    files = server_files(tmp_path / "server", ca, client_ca=other)
    assert files.client_ca is not None
    cert, key = write(tmp_path / "client", ca.issue_cert("me@example.com"))
    async with serving(server_credentials(files)) as address:
        with pytest.raises(grpc.aio.AioRpcError):
            await ask(address, ClientTls(ca=trusting.ca, cert=cert, key=key))
        write_ca(files.client_ca, ca)
        await ask(address, ClientTls(ca=trusting.ca, cert=cert, key=key))


# Files that cannot be used


def spoilt(files: ServerTls, ca: trustme.CA, how: str) -> ServerTls:
    """Spoil one of a server's files."""
    other = ca.issue_cert("localhost")
    match how:
        case "missing":
            files.cert.unlink()
        case "no certificate":
            files.cert.write_text("hello")
        case "no key":
            files.key.write_text("hello")
        case "other key":
            files.key.write_bytes(other.private_key_pem.bytes())
        case "encrypted key":
            key = serialization.load_pem_private_key(files.key.read_bytes(), None)
            secret = serialization.BestAvailableEncryption(b"secret")
            form = serialization.PrivateFormat.PKCS8
            files.key.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, secret))
        case "expired":
            write(files.cert.parent, ca.issue_cert("localhost", not_after=days_ago(2)))
        case "early":
            write(files.cert.parent, ca.issue_cert("localhost", not_before=days_ago(-2)))
        case "no authorities":
            return ServerTls(cert=files.cert, key=files.key, client_ca=files.key)
    return files


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("missing", r"tls_cert = \S+cert.pem: there is no such file"),
        ("no certificate", r"tls_cert = \S+cert.pem: it holds no certificates in PEM"),
        ("no key", r"tls_key = \S+key.pem: it holds no private key in PEM"),
        ("other key", r"tls_key = \S+key.pem: it is not the key of the certificate in \S+cert.pem"),
        ("encrypted key", r"tls_key = \S+key.pem: it is encrypted; a key without a passphrase is needed"),
        ("expired", rf"tls_cert = \S+cert.pem: the certificate expired on {days_ago(2):%Y-%m-%d} \d\d:\d\d UTC"),
        ("early", rf"tls_cert = \S+cert.pem: the certificate is not valid before {days_ago(-2):%Y-%m-%d}"),
        ("no authorities", r"tls_client_ca = \S+key.pem: it holds no certificates in PEM"),
    ],
)
def test_bad_file_is_named_with_its_setting_and_cause(ca: trustme.CA, tmp_path: Path, how: str, said: str) -> None:
    files = spoilt(server_files(tmp_path / "server", ca), ca, how)
    with pytest.raises(SettingsError, match=said):
        server_credentials(files)
    with pytest.raises(SettingsError, match=said):
        expiry(files)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_file_of_somebody_else_cannot_be_read(ca: trustme.CA, tmp_path: Path) -> None:
    files = server_files(tmp_path / "server", ca)
    files.key.chmod(0)
    with pytest.raises(SettingsError, match=r"tls_key = .*cannot be read: Permission denied"):
        server_credentials(files)


def test_client_files_are_looked_at_too(ca: trustme.CA, tmp_path: Path) -> None:
    cert, key = write(tmp_path / "client", ca.issue_cert("me@example.com"))
    client_credentials(ClientTls(cert=cert, key=key))
    with pytest.raises(SettingsError, match=r"tls_ca = .*: it holds no certificates in PEM"):
        client_credentials(ClientTls(ca=key))
    with pytest.raises(SettingsError, match="tls_key: needed beside tls_cert"):
        client_credentials(ClientTls(cert=cert))


def test_certificate_that_expires_soon_is_told_of(ca: trustme.CA, tmp_path: Path) -> None:
    cert, key = write(tmp_path / "server", ca.issue_cert("localhost", not_after=days_ago(-3)))
    with capture_logs() as logs:
        server_credentials(ServerTls(cert=cert, key=key))

    assert [entry["event"] for entry in logs] == ["the certificate expires soon"]

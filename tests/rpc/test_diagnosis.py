"""Why a TLS connection does not come about, on real servers that refuse it."""

from __future__ import annotations  # grpc's classes are generic in their stubs alone

import asyncio
import re
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
import trustme

from rpc.diagnosis import Diagnosis, tls_problem
from rpc.tls import ClientTls, server_credentials
from tests.certificates import credentials, days_ago, server_files, write, write_ca
from tests.tcp import Listener, TcpProxy


@pytest.fixture
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def trusting(ca: trustme.CA, tmp_path: Path) -> ClientTls:
    return ClientTls(ca=write_ca(tmp_path / "ca.pem", ca))


@asynccontextmanager
async def listening(how: grpc.ServerCredentials | None) -> AsyncIterator[str]:
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0") if how is None else server.add_secure_port("127.0.0.1:0", how)
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


class _Silent(Listener):
    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()


async def test_nothing_is_wrong_where_tls_works(ca: trustme.CA, trusting: ClientTls, tmp_path: Path) -> None:
    async with listening(server_credentials(server_files(tmp_path / "server", ca))) as address:
        assert await tls_problem(address, trusting) is None
    async with listening(None) as address:
        assert await tls_problem(address, None) is None
    assert await tls_problem(address, trusting) is None
    assert await tls_problem(address, None) is None


async def test_expired_and_early_certificates_are_told_with_their_dates(ca: trustme.CA, trusting: ClientTls) -> None:
    async with listening(credentials(ca.issue_cert("127.0.0.1", not_after=days_ago(3)))) as address:
        said = await tls_problem(address, trusting)
    assert said is not None
    assert re.fullmatch(rf"the server's certificate expired on {days_ago(3):%Y-%m-%d} \d\d:\d\d UTC", said)

    async with listening(credentials(ca.issue_cert("127.0.0.1", not_before=days_ago(-3)))) as address:
        said = await tls_problem(address, trusting)
    assert said is not None
    assert re.match(rf"the server's certificate is not valid before {days_ago(-3):%Y-%m-%d}.*clocks", said)


async def test_unknown_authority_asks_for_its_file(ca: trustme.CA, trusting: ClientTls) -> None:
    async with listening(credentials(trustme.CA().issue_cert("127.0.0.1"))) as address:
        assert await tls_problem(address, trusting) == (
            f"the server's certificate is from a CA that is not in {trusting.ca}: give its file (`--tls-ca FILE`)"
        )
        assert "not in the system's list" in str(await tls_problem(address, ClientTls()))


async def test_wrong_name_says_the_right_ones(ca: trustme.CA, trusting: ClientTls) -> None:
    async with listening(credentials(ca.issue_cert("gateway.example.com", "10.1.2.3"))) as address:
        said = await tls_problem(address, trusting)
        right = ClientTls(ca=trusting.ca, server_name="gateway.example.com")
        assert await tls_problem(address, right) is None

    assert str(said).startswith("the server's certificate is for gateway.example.com, 10.1.2.3, not for 127.0.0.1; ")


async def test_plaintext_where_tls_is_and_the_other_way_round(ca: trustme.CA, trusting: ClientTls) -> None:
    async with listening(None) as address:
        assert "is this a TLS port?" in str(await tls_problem(address, trusting))
    async with listening(credentials(ca.issue_cert("127.0.0.1"))) as address:
        assert "it speaks TLS, and this client was told of none" in str(await tls_problem(address, None))


async def test_client_certificate_that_is_missing_or_foreign(
    ca: trustme.CA, trusting: ClientTls, tmp_path: Path
) -> None:
    cert, key = write(tmp_path / "client", trustme.CA().issue_cert("me@example.com"))
    foreign = ClientTls(ca=trusting.ca, cert=cert, key=key)
    async with listening(server_credentials(server_files(tmp_path / "server", ca, client_ca=ca))) as address:
        assert "the server asks for a client certificate" in str(await tls_problem(address, trusting))
        assert f"does not take the client certificate in {cert}" in str(await tls_problem(address, foreign))


async def test_server_of_tls_1_1_alone_is_told_of(ca: trustme.CA, trusting: ClientTls) -> None:
    """It may also drop out of the handshake, which is told as such."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("127.0.0.1").configure_cert(context)
    context.set_ciphers("ECDHE-RSA-AES128-SHA:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    async with await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0, ssl=context) as server:
        host, port = server.sockets[0].getsockname()

        assert "the TLS handshake" in str(await tls_problem(f"{host}:{port}", trusting))


async def test_server_that_says_nothing_is_given_up_in_time(trusting: ClientTls) -> None:
    async with _Silent() as server, asyncio.timeout(20):
        assert await tls_problem(server.address, trusting, timeout_seconds=0.1) is None


async def test_calls_that_fail_together_look_once(ca: trustme.CA, trusting: ClientTls) -> None:
    async with (
        listening(credentials(trustme.CA().issue_cert("127.0.0.1"))) as address,
        TcpProxy(address) as proxy,
    ):
        diagnosis = Diagnosis(proxy.address, trusting)
        found = await asyncio.gather(*(diagnosis.problem() for _ in range(20)))

    assert len(set(found)) == 1
    # One for the handshake, one to look at the certificate.
    assert proxy.num_connections == 2


@pytest.mark.parametrize("address", ["unix:/tmp/socket", "dns:///example.com:1", "example.com"])
async def test_address_that_is_no_host_and_port_is_left_alone(address: str) -> None:
    assert await tls_problem(address, None) is None

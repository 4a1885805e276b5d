"""Faults of TLS: who comes with the wrong certificate, or none, and certificates that change."""

from __future__ import annotations  # grpc's classes are generic in their stubs alone

import asyncio
import ssl
import time
from pathlib import Path

import grpc
import pytest
import trustme
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gateway.client import ClientTls, ImageClient, SecureConnectionError
from rpc.settings import SettingsError
from rpc.tls import ServerTls, open_channel, server_credentials
from tests.certificates import chain, credentials, days_ago, write, write_ca
from tests.digits import seven
from tests.faults.gateway.conftest import Measured
from tests.faults.gateway.secured import Party, SecuredGateway, party, running
from tests.gateway.fake_triton import FakeTriton

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def cause(address: str, tls: ClientTls | None) -> str:
    """Return what a client says that cannot connect; gRPC's status under it is UNAVAILABLE."""
    async with ImageClient(address, tls=tls) as client:
        with pytest.raises(SecureConnectionError) as failed:
            await client.classify(seven())
    assert isinstance(failed.value.__cause__, grpc.aio.AioRpcError)
    assert failed.value.__cause__.code() is grpc.StatusCode.UNAVAILABLE
    return str(failed.value)


async def test_wrong_certificates(triton: FakeTriton, tmp_path: Path, measured: Measured) -> None:
    """A1. Wrong authority, wrong name, plaintext at a TLS port, client certificate missing or foreign, TLS 1.1."""
    row = measured(
        "A1",
        fault="wrong CA, wrong name, plaintext at a TLS port, client certificate missing or foreign, TLS 1.1",
        promised="UNAVAILABLE at the client, which names the cause; no handler runs; the log says so in a line",
    )
    us = party(tmp_path)
    stranger = write(tmp_path / "stranger", trustme.CA().issue_cert("me@example.com"))
    clients = write_ca(tmp_path / "clients.pem", us.ca)
    async with running(triton.address, us, "--tls-client-ca", str(clients)) as gateway:
        before = gateway.rpcs()
        causes = {
            "is from a CA that is not in": ClientTls(ca=write_ca(tmp_path / "other.pem", trustme.CA())),
            "is for localhost, 127.0.0.1, not for gateway.example": ClientTls(
                ca=us.tls.ca, server_name="gateway.example"
            ),
            "the server asks for a client certificate": ClientTls(ca=us.tls.ca),
            "does not take the client certificate": ClientTls(ca=us.tls.ca, cert=stranger[0], key=stranger[1]),
            "it speaks TLS": None,
        }
        for words, tls in causes.items():
            assert words in await cause(gateway.address, tls)
        assert await refuses_tls_1_1(gateway.address)

        assert gateway.rpcs() == before
        refused = [line["event"] for line in gateway.lines() if "Handshake failed" in str(line.get("event"))]
        assert any("PEER_DID_NOT_RETURN_A_CERTIFICATE" in line for line in refused)
        assert not any("Traceback" in str(line.get("event")) for line in gateway.lines())
        await gateway.check()
    row.add("causes named", f"{len(causes)} of {len(causes)}")
    row.add("handlers", 0)


async def refuses_tls_1_1(address: str) -> bool:
    """Tell whether a handshake of TLS 1.1 fails."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    host, _, port = address.rpartition(":")
    try:
        _, writer = await asyncio.open_connection(host, int(port), ssl=context)
    except OSError:
        return True
    writer.close()
    return False


@pytest.mark.parametrize(
    ("fault", "days", "words"),
    [
        ("expired", (10.0, 2.0), "expired on {:%Y-%m-%d}"),
        ("not yet valid", (-2.0, -10.0), "not valid before {:%Y-%m-%d}"),
    ],
    ids=["A1b", "A1c"],
)
async def test_certificate_out_of_its_time(
    tmp_path: Path, measured: Measured, fault: str, days: tuple[float, float], words: str
) -> None:
    """A1. A certificate that has expired, or is not valid yet."""
    row = measured(
        "A1b" if fault == "expired" else "A1c",
        fault=f"the server's certificate is {fault}",
        promised="a gateway does not start with it; a client of a server that has it names the date",
    )
    us = party(tmp_path)
    wrong = us.ca.issue_cert("localhost", "127.0.0.1", not_before=days_ago(days[0]), not_after=days_ago(days[1]))
    told = words.format(days_ago(2.0 if fault == "expired" else -2.0))
    cert, key = write(tmp_path / "wrong", wrong)
    with pytest.raises(SettingsError, match=told):
        server_credentials(ServerTls(cert=cert, key=key))

    counting = _Counting()
    server = grpc.aio.server(interceptors=[counting])
    address = f"127.0.0.1:{server.add_secure_port('127.0.0.1:0', credentials(wrong))}"
    await server.start()
    try:
        assert told in await cause(address, us.tls)
    finally:
        await server.stop(None)
    assert counting.num_calls == 0
    row.add("date named", "yes")


class _Counting(grpc.aio.ServerInterceptor):
    num_calls = 0

    async def intercept_service(self, continuation: object, handler_call_details: object) -> None:
        self.num_calls += 1


async def test_rotation_in_service(triton: FakeTriton, tmp_path: Path, measured: Measured) -> None:
    """A5. Certificate and key are replaced while streams are open and others call, ten times; once by half a file."""
    row = measured(
        "A5",
        fault="certificate and key replaced ten times in service, and once by half a file",
        promised="new handshakes use the new pair within 5 s; no stream ends, no call fails; half a file is not used",
    )
    us, slowest = party(tmp_path), 0.0
    async with running(triton.address, us) as gateway, open_channel(gateway.address, us.tls) as channel:
        watches = [health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest()) for _ in range(5)]
        for watch in watches:
            await watch.read()
        calling = asyncio.create_task(_ask_until_cancelled(gateway, us))
        for _ in range(10):
            new = us.ca.issue_cert("localhost", "127.0.0.1")
            write(tmp_path / "server", new)
            replaced = time.monotonic()
            while await serial(gateway.address) != x509.load_pem_x509_certificate(chain(new)).serial_number:
                assert time.monotonic() - replaced < 5
            slowest = max(slowest, time.monotonic() - replaced)
        # Another handshake may have come between a certificate and its key.
        num_before = _num_refused(gateway)
        (tmp_path / "server" / "cert.pem").write_bytes(chain(us.ca.issue_cert("localhost"))[:400])
        assert await serial(gateway.address) == x509.load_pem_x509_certificate(chain(new)).serial_number

        assert not any(watch.done() for watch in watches)
        assert not calling.done()
        calling.cancel()
        (num_calls,) = await asyncio.gather(calling)
        # One line, however many handshakes there were.
        assert _num_refused(gateway) == num_before + 1
        for watch in watches:
            watch.cancel()
    assert num_calls > 0
    row.add("slowest", f"{slowest * 1000:.0f} ms")
    row.add("streams ended", f"0 of {len(watches)}")
    row.add("calls failed", f"0 of {num_calls}")


def _num_refused(gateway: SecuredGateway) -> int:
    return [line.get("event") for line in gateway.lines()].count("new tls files not used, the old ones go on")


async def _ask_until_cancelled(gateway: SecuredGateway, us: Party) -> int:
    """Classify on a connection of each call's own; return how many were answered."""
    num_calls = 0
    try:
        while True:
            async with ImageClient(gateway.address, tls=us.tls, api_key=us.key) as client:
                await client.classify(seven())
            num_calls += 1
    except asyncio.CancelledError:
        return num_calls


async def serial(address: str) -> int:
    """Return the number of the certificate that a new handshake is given."""
    host, _, port = address.rpartition(":")
    pem = await asyncio.to_thread(ssl.get_server_certificate, (host, int(port)))
    return x509.load_pem_x509_certificate(pem.encode()).serial_number

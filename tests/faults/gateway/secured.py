"""A gateway with TLS and API keys as a process of its own, and those who call it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trustme

from gateway.client import ClientTls, ImageClient
from rpc.keys import add_key
from tests.certificates import server_files, write, write_ca
from tests.digits import seven
from tests.faults.gateway.process import PATIENCE_SECONDS, Gateway
from tests.gateway.fake_triton import label_of


@dataclass(frozen=True, kw_only=True)
class Party:
    """
    What those who meet at a gateway hold.

    Attributes:
        ca: Who issued everybody's certificate.
        folder: Holds the files: ``server``, ``client``, ``ca.pem``, ``keys.json``.
        tls: Of a caller who may.
        key: With the scope ``classify``.
    """

    ca: trustme.CA
    folder: Path
    tls: ClientTls
    key: str

    @property
    def secrets(self) -> list[str]:
        """What nobody else is to see."""
        pems = [path.read_text().splitlines() for path in self.folder.glob("*/key.pem")]
        return [self.key, self.key.split("_")[2], *(line for pem in pems for line in pem[1:-1])]


def party(folder: Path) -> Party:
    """Issue certificates and a key, and write their files."""
    ca = trustme.CA()
    server_files(folder / "server", ca)
    cert, key = write(folder / "client", ca.issue_cert("camera@example.com", common_name="camera"))
    tls = ClientTls(ca=write_ca(folder / "ca.pem", ca), cert=cert, key=key)
    return Party(ca=ca, folder=folder, tls=tls, key=add_key(folder / "keys.json", "camera", ["classify"]))


class SecuredGateway(Gateway):
    """
    ``sluice gateway`` that is called over TLS, with a key.

    Args:
        triton: ``host:port`` of its Triton.
        log: Where what it prints goes.
        party: Whose files it uses.
        options: Further ones of the command.
    """

    def __init__(self, triton: str, log: Path, party: Party, *options: str) -> None:
        server = party.folder / "server"
        files = ("--tls-cert", str(server / "cert.pem"), "--tls-key", str(server / "key.pem"))
        keys = ("--keys-file", str(party.folder / "keys.json"), "--model-repository", str(party.folder))
        super().__init__(triton, log, *files, *keys, *options)
        self._party = party

    async def check(self) -> None:
        """Fail unless it reports that it serves, and answers what is right."""
        image = seven()
        async with ImageClient(
            self.address, tls=self._party.tls, api_key=self._party.key, timeout_seconds=PATIENCE_SECONDS
        ) as client:
            await client.wait_ready()
            answer = await client.classify(image)
        assert answer.label == label_of(image)

    def rpcs(self) -> list[str]:
        """Return the methods that were called so far, by what it logged."""
        return [line["method"] for line in self.lines() if line.get("event") == "rpc"]


@asynccontextmanager
async def running(triton: str, party: Party, *options: str) -> AsyncIterator[SecuredGateway]:
    """Start one, and kill it at the end."""
    gateway = SecuredGateway(triton, party.folder / "gateway.log", party, *options)
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await gateway.start()
        yield gateway
    finally:
        gateway.close()

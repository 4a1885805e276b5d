"""Certificates for tests, and the files that hold them."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import trustme

from rpc.tls import ServerTls

NAME = "localhost"


def write(folder: Path, issued: trustme.LeafCert) -> tuple[Path, Path]:
    """Write a certificate's chain and key, as one step each, and return where they are."""
    folder.mkdir(exist_ok=True)
    cert, key = folder / "cert.pem", folder / "key.pem"
    for path, content in ((cert, chain(issued)), (key, issued.private_key_pem.bytes())):
        fresh = path.with_suffix(".new")
        fresh.write_bytes(content)
        fresh.replace(path)
    return cert, key


def write_ca(path: Path, ca: trustme.CA) -> Path:
    """Write an authority's own certificate, and return where it is."""
    path.write_bytes(ca.cert_pem.bytes())
    return path


def server_files(folder: Path, ca: trustme.CA, *names: str, client_ca: trustme.CA | None = None) -> ServerTls:
    """Write what a server needs that is called by these names, ``localhost`` by default."""
    cert, key = write(folder, ca.issue_cert(*(names or (NAME, "127.0.0.1"))))
    return ServerTls(cert=cert, key=key, client_ca=write_ca(folder / "clients.pem", client_ca) if client_ca else None)


def chain(issued: trustme.LeafCert) -> bytes:
    """Return a certificate and what leads to its root, as PEM."""
    return b"".join(each.bytes() for each in issued.cert_chain_pems)


def credentials(issued: trustme.LeafCert) -> grpc.ServerCredentials:
    """Return a server's credentials with nothing of it looked at: an expired one is what a test may want."""
    return grpc.ssl_server_credentials([(issued.private_key_pem.bytes(), chain(issued))])


def days_ago(days: float) -> datetime:
    """Return a moment as trustme takes it."""
    return datetime.now(UTC).replace(tzinfo=None) - timedelta(days=days)

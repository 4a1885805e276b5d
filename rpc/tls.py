"""TLS of a gRPC process, both ways: credentials made from files, and a server's that follow their files."""

import ssl
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import structlog
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes

from rpc.settings import SettingsError

log = structlog.get_logger(__name__)

_SOON = timedelta(days=14)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerTls:
    """A server's files, all PEM."""

    cert: Path
    """Its certificate, and after it those that lead to the root."""
    key: Path
    """Private key of that certificate, without a passphrase."""
    client_ca: Path | None = None
    """Authorities of the callers' certificates; with it a caller without one is refused, None asks for none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientTls:
    """How a client knows its server, and is known by it; with nothing given the system's authorities are trusted."""

    ca: Path | None = None
    """PEM file of the authorities to trust; the server's certificate itself will do."""
    cert: Path | None = None
    """The client's certificate, for servers that ask for one; needs :attr:`key`."""
    key: Path | None = None
    """Private key of that certificate, without a passphrase."""
    server_name: str | None = None
    """Name that the server's certificate has to be for, where it is not the one in the address."""


def server_credentials(tls: ServerTls) -> grpc.ServerCredentials:
    """
    Return credentials that follow their files.

    The files are looked at for each new connection, so that the next handshake after a change uses what is there;
    connections that are open stay as they are. While the files cannot be used together, half-written ones for
    instance, the last good ones serve on, and the log says so once.

    Raises:
        SettingsError: A file cannot be used; names setting, file and cause.
    """
    files = _Files(tls)
    return grpc.dynamic_ssl_server_credentials(
        files.first,
        files.changed,  # type: ignore[arg-type]  # None is allowed and means no change
        require_client_authentication=tls.client_ca is not None,
    )


def open_channel(
    address: str, tls: ClientTls | None, options: Sequence[tuple[str, int | str]] = ()
) -> grpc.aio.Channel:
    """
    Return a channel to ``address``; who opens it closes it.

    Args:
        address: ``host:port``.
        tls: None is plaintext.
        options: Further ones of the channel.

    Raises:
        SettingsError: A file cannot be used; names setting, file and cause.
    """
    if tls is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, client_credentials(tls), options=(*options, *channel_options(tls)))


def client_credentials(tls: ClientTls) -> grpc.ChannelCredentials:
    """
    Return credentials for a channel of another kind, which also takes :func:`channel_options`.

    Raises:
        SettingsError: A file cannot be used; names setting, file and cause.
    """
    chain, key = None, None
    if tls.cert is not None and tls.key is not None:
        chain, key, _ = _pair(tls.cert, tls.key)
    elif tls.cert is not None or tls.key is not None:
        missing, given = ("tls_key", "tls_cert") if tls.key is None else ("tls_cert", "tls_key")
        raise SettingsError(f"{missing}: needed beside {given}")
    return grpc.ssl_channel_credentials(_roots(tls.ca), key, chain)


def channel_options(tls: ClientTls) -> list[tuple[str, str]]:
    """Return what a channel needs beside its credentials."""
    return [] if tls.server_name is None else [("grpc.ssl_target_name_override", tls.server_name)]


def to_own_server(tls: ServerTls) -> ClientTls:
    """
    Return how to ask a server with these files on this machine, whatever name it is reached by.

    Its own certificate is the one that is trusted; a server that asks for one is shown it too, which works where its
    issuer is among ``client_ca``.

    Raises:
        SettingsError: The certificate cannot be used.
    """
    pair = (tls.cert, tls.key) if tls.client_ca is not None else (None, None)
    (leaf, *_others) = _certificates("tls_cert", tls.cert, _read("tls_cert", tls.cert))
    name = next(iter(names_of(leaf)), None)
    # A certificate for any name of a domain is for this one.
    return ClientTls(ca=tls.cert, cert=pair[0], key=pair[1], server_name=name and name.replace("*", "sluice"))


def expiry(tls: ServerTls) -> datetime:
    """
    Return when the server's certificate expires, after a look at all its files.

    Raises:
        SettingsError: A file cannot be used; names setting, file and cause.
    """
    _configuration(tls)
    return _certificates("tls_cert", tls.cert, _read("tls_cert", tls.cert))[0].not_valid_after_utc


def names_of(certificate: x509.Certificate) -> list[str]:
    """Return the host names and addresses that a certificate is for."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [
        *names.get_values_for_type(x509.DNSName),
        *(str(address) for address in names.get_values_for_type(x509.IPAddress)),
    ]


class _Files:
    """What a server's files hold, read again when they have changed; gRPC asks from threads of its own."""

    def __init__(self, tls: ServerTls) -> None:
        self._tls = tls
        self._paths = [path for path in (tls.cert, tls.key, tls.client_ca) if path is not None]
        self._lock = threading.Lock()
        # Before they are read: what changes meanwhile is read again.
        self._stamp = _stamp(self._paths)
        self.first = _configuration(tls)

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """Return what to use from now on, None where nothing new can be used."""
        with self._lock:
            stamp = _stamp(self._paths)
            if stamp == self._stamp:
                return None
            self._stamp = stamp
            try:
                configuration = _configuration(self._tls)
            except SettingsError as error:
                log.warning("new tls files not used, the old ones go on", error=str(error))
                return None
            log.info("tls files read again")
            return configuration


def _stamp(paths: Sequence[Path]) -> list[tuple[int, ...] | None]:
    """Return what differs once a file was written, replaced, or is reached by another link."""
    stamps: list[tuple[int, ...] | None] = []
    for path in paths:
        try:
            stat = path.stat()
        except OSError:
            stamps.append(None)
        else:
            stamps.append((stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    return stamps


def _configuration(tls: ServerTls) -> grpc.ServerCertificateConfiguration:
    chain, key, expires = _pair(tls.cert, tls.key)
    roots = None
    if tls.client_ca is not None:
        roots = _read("tls_client_ca", tls.client_ca)
        _certificates("tls_client_ca", tls.client_ca, roots)
    if expires - datetime.now(UTC) < _SOON:
        log.warning("the certificate expires soon", file=str(tls.cert), expires=_said(expires))
    return grpc.ssl_server_certificate_configuration([(key, chain)], root_certificates=roots)


def _pair(cert: Path, key: Path) -> tuple[bytes, bytes, datetime]:
    """Return certificate chain and key as PEM, and when the first certificate expires."""
    chain_pem, key_pem = _read("tls_cert", cert), _read("tls_key", key)
    leaf = _certificates("tls_cert", cert, chain_pem)[0]
    if _public_key(key, key_pem) != _encoded(leaf.public_key()):
        raise SettingsError(f"tls_key = {key}: it is not the key of the certificate in {cert}")
    now = datetime.now(UTC)
    if leaf.not_valid_after_utc < now:
        raise SettingsError(f"tls_cert = {cert}: the certificate expired on {_said(leaf.not_valid_after_utc)}")
    if leaf.not_valid_before_utc > now:
        raise SettingsError(
            f"tls_cert = {cert}: the certificate is not valid before {_said(leaf.not_valid_before_utc)}"
        )
    return chain_pem, key_pem, leaf.not_valid_after_utc


def _read(setting: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise SettingsError(f"{setting} = {path}: there is no such file") from None
    except OSError as error:
        raise SettingsError(f"{setting} = {path}: cannot be read: {error.strerror}") from error


def _certificates(setting: str, path: Path, pem: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise SettingsError(f"{setting} = {path}: it holds no certificates in PEM") from error


def _public_key(path: Path, pem: bytes) -> bytes:
    try:
        return _encoded(serialization.load_pem_private_key(pem, password=None).public_key())
    except TypeError as error:
        raise SettingsError(f"tls_key = {path}: it is encrypted; a key without a passphrase is needed") from error
    except ValueError as error:
        raise SettingsError(f"tls_key = {path}: it holds no private key in PEM") from error


def _encoded(key: PublicKeyTypes) -> bytes:
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _roots(ca: Path | None) -> bytes | None:
    if ca is not None:
        pem = _read("tls_ca", ca)
        _certificates("tls_ca", ca, pem)
        return pem
    # None is the list that comes with gRPC, which knows no authority that was added to this system.
    system = ssl.get_default_verify_paths().cafile
    return Path(system).read_bytes() if system is not None else None


def _said(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"

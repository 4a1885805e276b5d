"""Why no TLS connection comes about: gRPC only says that there is none, so one handshake is made to see."""

import asyncio
import ssl
from contextlib import suppress
from datetime import UTC, datetime

from cryptography import x509

from rpc.tls import ClientTls, names_of

# OpenSSL's numbers, X509_V_ERR_..., which are the same in every version.
_NOT_YET_VALID, _EXPIRED = 9, 10
_UNKNOWN_ISSUER = {2, 18, 19, 20, 21}
_WRONG_NAME = {62, 64}
_FRESH_SECONDS = 2.0


class Diagnosis:
    """
    What is wrong with a client's connection, looked at once for all calls that fail at about the same time.

    Args:
        address: ``host:port``.
        tls: As the client has it; None is a client without TLS.
    """

    def __init__(self, address: str, tls: ClientTls | None) -> None:
        self._address = address
        self._tls = tls
        self._lock = asyncio.Lock()
        self._found: str | None = None
        self._until = 0.0

    async def problem(self) -> str | None:
        """Return what :func:`tls_problem` does, a moment ago or now."""
        loop = asyncio.get_running_loop()
        async with self._lock:
            if loop.time() >= self._until:
                self._found = await tls_problem(self._address, self._tls)
                self._until = loop.time() + _FRESH_SECONDS
            return self._found


async def tls_problem(address: str, tls: ClientTls | None, *, timeout_seconds: float = 2.0) -> str | None:
    """
    Return what keeps a client from a TLS server, and what to do about it; None where TLS is not what is in the way.

    Args:
        address: ``host:port``.
        tls: As the client has it; None is a client without TLS.
        timeout_seconds: For all of it.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if not port.isdigit() or ":/" in host:
        # A scheme of gRPC's, such as unix or xds.
        return None
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_seconds):
            if tls is None:
                return await _of_plaintext(host, int(port))
            return await _of_tls(host, int(port), tls)
    return None


async def _of_plaintext(host: str, port: int) -> str | None:
    try:
        await _shake_hands(host, port, _unchecking(), host)
    except OSError:
        return None
    return "it speaks TLS, and this client was told of none (`--tls`, or `--tls-ca FILE` with the file of its CA)"


async def _of_tls(host: str, port: int, tls: ClientTls) -> str | None:
    name = tls.server_name or host
    try:
        is_open = await _shake_hands(host, port, _checking(tls), name)
    except ssl.SSLCertVerificationError as error:
        return await _of_certificate(host, port, name, tls, error)
    except ssl.SSLError as error:
        if error.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"):
            return "is this a TLS port? It speaks no TLS; leave the TLS options out, or give another port"
        return f"the TLS handshake fails ({error.reason})"
    except ConnectionRefusedError:
        return None
    except ConnectionError:
        return "it ends the connection during the TLS handshake; is this a TLS port?"
    except OSError:
        return None
    if is_open:
        return None
    # A TLS 1.3 server looks at the client's certificate last, and gRPC's ends the connection without a word.
    if tls.cert is None:
        return "the server asks for a client certificate (`--tls-cert FILE --tls-key FILE`)"
    return f"the server does not take the client certificate in {tls.cert}: is it expired, or from another CA?"


async def _of_certificate(
    host: str, port: int, name: str, tls: ClientTls, error: ssl.SSLCertVerificationError
) -> str | None:
    with suppress(OSError, ValueError):
        certificate = await _certificate(host, port, name)
        if error.verify_code == _EXPIRED and certificate.not_valid_after_utc < datetime.now(UTC):
            return f"the server's certificate expired on {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
        if error.verify_code == _NOT_YET_VALID and certificate.not_valid_before_utc > datetime.now(UTC):
            return (
                f"the server's certificate is not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC; "
                "are both clocks right?"
            )
        if error.verify_code in _WRONG_NAME:
            names = ", ".join(names_of(certificate)) or "no name at all"
            return (
                f"the server's certificate is for {names}, not for {name}; ask it by such a name "
                "(or `--tls-server-name NAME`)"
            )
    if error.verify_code in _UNKNOWN_ISSUER:
        trusted = "the system's list" if tls.ca is None else str(tls.ca)
        return f"the server's certificate is from a CA that is not in {trusted}: give its file (`--tls-ca FILE`)"
    return f"the server's certificate is not trusted: {error.verify_message}"


async def _shake_hands(host: str, port: int, context: ssl.SSLContext, name: str) -> bool:
    """Make one handshake; return whether the server sends something then, as it does in HTTP/2."""
    reader, writer = await asyncio.open_connection(host, port, ssl=context, server_hostname=name)
    try:
        return bool(await reader.read(1))
    except OSError:
        return False
    finally:
        writer.transport.abort()


async def _certificate(host: str, port: int, name: str) -> x509.Certificate:
    _, writer = await asyncio.open_connection(host, port, ssl=_unchecking(), server_hostname=name)
    try:
        der: bytes = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        return x509.load_der_x509_certificate(der)
    finally:
        writer.transport.abort()


def _checking(tls: ClientTls) -> ssl.SSLContext:
    """Return a context that takes what gRPC takes."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.set_alpn_protocols(["h2"])
    if tls.ca is None:
        context.load_default_certs()
    else:
        context.load_verify_locations(tls.ca)
    if tls.cert is not None:
        context.load_cert_chain(tls.cert, tls.key)
    return context


def _unchecking() -> ssl.SSLContext:
    """Return a context that takes any certificate: it is looked at, and nothing is sent."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    return context

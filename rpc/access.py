"""Who calls, and whether they may: an API key's scope for each method, before a request is read."""

from __future__ import annotations  # grpc's classes are generic in their stubs alone

import enum
import ipaddress
import time
from collections import OrderedDict
from collections.abc import Container, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc

from rpc.address import is_loopback
from rpc.keys import KeyRefusedError, Keyring
from rpc.settings import SettingsError

if TYPE_CHECKING:
    from rpc.tls import ClientTls

    Context = grpc.aio.ServicerContext[Any, Any]

AUTHORIZATION = "authorization"
"""Metadata that holds a key, as ``Bearer slk_...``."""
REASON_KEY = "sluice-reason"
"""Trailing metadata that names the kind of refusal."""

_BEARER = "bearer "
# Failed tries that an address has at once, and how soon it has another.
_BURST, _PER_SECOND = 20, 1.0
_MAX_ADDRESSES = 4096
# An IPv6 host has as many addresses as it likes, all of them in one such network.
_IPV6_NETWORK = 64

# Each call has a context of its own, which its interceptor and its handler share.
_key_name: ContextVar[str] = ContextVar("key_name", default="")
_scopes: ContextVar[Container[str] | None] = ContextVar("scopes", default=None)
_identity: ContextVar[str] = ContextVar("identity", default="")


def key_metadata(api_key: str | None, address: str, tls: ClientTls | None) -> tuple[tuple[str, str], ...]:
    """
    Return the metadata by which a client's calls show an API key; None shows none.

    On each call rather than as gRPC's call credentials, which send the same bytes and ask for them in another thread
    for each call: that takes twice as long as the call.

    Raises:
        SettingsError: It would leave this machine readable, or is no line of text.
    """
    if api_key is None:
        return ()
    key = api_key.strip()
    if not key or not key.isascii() or not key.isprintable():
        raise SettingsError("the API key is empty, or more than a line; give the line that `sluice keys add` said")
    if tls is None and not is_loopback(address):
        raise SettingsError(f"the API key could be read on its way to {address}: use TLS (`--tls`, `--tls-ca FILE`)")
    return ((AUTHORIZATION, f"Bearer {key}"),)


class Need(enum.Enum):
    """What a method asks of its caller, other than a scope."""

    NOTHING = enum.auto()
    ANY_KEY = enum.auto()


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """Why a call is not let in; the words may be shown to the caller."""

    code: grpc.StatusCode
    details: str

    @property
    def is_failed_try(self) -> bool:
        """Whether the caller showed no right key."""
        return self.code is grpc.StatusCode.UNAUTHENTICATED


class Access:
    """
    Lets in who shows a key with the method's scope, in metadata ``authorization: Bearer slk_...``.

    A right key is let in at any time. Failed tries are counted for each address; beyond a few at once they are
    answered RESOURCE_EXHAUSTED, and leave no line in the log. Locking the address out altogether would be a way to
    shut out everybody behind it, and would keep nobody from guessing what cannot be guessed.

    Args:
        keyring: The keys; None lets in everybody.
        needs: Scope, or :class:`Need`, by ``/package.Service/Method``, or by ``/package.Service/`` for the rest of a
            service. A method that is not in it is closed.
    """

    def __init__(self, keyring: Keyring | None, needs: Mapping[str, str | Need]) -> None:
        self._keyring = keyring
        self._needs = needs
        self._failures = _Failures()

    def check(self, method: str, metadata: Iterable[tuple[str, str | bytes]] | None) -> Refusal | None:
        """Return why the call is refused, None where it is not; :func:`identity` then knows the key."""
        if self._keyring is None:
            return None
        need = self._need(method)
        if need is Need.NOTHING:
            return None
        try:
            key = self._keyring.find(_bearer(metadata or ()))
        except KeyRefusedError as error:
            return Refusal(code=grpc.StatusCode.UNAUTHENTICATED, details=str(error))
        if need is Need.ANY_KEY or need in key.scopes:
            _key_name.set(key.name)
            _scopes.set(key.scopes)
            return None
        lacking = f"the scope {need!r}" if isinstance(need, str) else "any that opens this method"
        return Refusal(code=grpc.StatusCode.PERMISSION_DENIED, details=f"the API key {key.name!r} lacks {lacking}")

    def is_flooded(self, refusal: Refusal, context: Context) -> bool:
        """Count a failed try; return whether its address had too many."""
        return refusal.is_failed_try and not self._failures.spend(_network(_host(context.peer())))

    async def refuse(self, refusal: Refusal, context: Context, *, is_flooded: bool) -> None:
        """End the call, which raises."""
        if not is_flooded:
            await context.abort(refusal.code, refusal.details)
        await context.abort(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            f"too many calls without a right API key from this address; {refusal.details}",
            # Below 0: not to be tried again by itself.
            ((REASON_KEY, "UNAUTHENTICATED"), ("grpc-retry-pushback-ms", "-1")),
        )

    def _need(self, method: str) -> str | Need | None:
        need = self._needs.get(method)
        return self._needs.get(method[: method.rfind("/") + 1]) if need is None else need


def key_name() -> str:
    """Return the name of the caller's API key, from within a handler; empty where none was asked for."""
    return _key_name.get()


def has_scope(scope: str) -> bool:
    """Tell whether the caller's API key has a scope, from within a handler; True where none was asked for."""
    scopes = _scopes.get()
    return scopes is None or scope in scopes


def identity(context: Context, *, peer: str = "") -> str:
    """
    Return who calls, from within a handler: for shares and logs, the same over all connections of a caller.

    It is ``key:NAME`` of the API key, else ``certificate:SUBJECT`` of the client's certificate, else
    ``address:HOST``, without the port.

    Args:
        context: Of the call.
        peer: What gRPC calls the peer, given where it is known to show no certificate, which is asked for otherwise.
    """
    known = _identity.get()
    if not known:
        known = _found_identity(context, peer)
        _identity.set(known)
    return known


def _found_identity(context: Context, peer: str) -> str:
    name = _key_name.get()
    if name:
        return f"key:{name}"
    if peer:
        return f"address:{_host(peer)}"
    for subject in context.auth_context().get("x509_subject", ()):
        return f"certificate:{subject.decode(errors='replace')}"
    return f"address:{_host(context.peer())}"


def _bearer(metadata: Iterable[tuple[str, str | bytes]]) -> str | None:
    for name, value in metadata:
        if name == AUTHORIZATION and isinstance(value, str):
            # Schemes are written in any case.
            return value[len(_BEARER) :].strip() if value[: len(_BEARER)].lower() == _BEARER else value
    return None


def _host(peer: str) -> str:
    """Return the host of what gRPC calls a peer: ``ipv4:10.0.0.1:5000``, ``ipv6:%5B::1%5D:5000``, ``unix:``."""
    family, _, place = peer.partition(":")
    if family not in ("ipv4", "ipv6"):
        return peer
    return place.rpartition(":")[0].replace("%5B", "").replace("%5D", "").strip("[]")


def _network(host: str) -> str:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.version == 4:
        return host
    return str(ipaddress.ip_network((int(address), _IPV6_NETWORK), strict=False))


class _Failures:
    """Failed tries by address: a bucket of tokens for each of the last few thousand that failed."""

    def __init__(self) -> None:
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def spend(self, address: str) -> bool:
        """Count one; return whether the address may have it."""
        now = time.monotonic()
        tokens, since = self._buckets.pop(address, (float(_BURST), now))
        tokens = min(tokens + (now - since) * _PER_SECOND, _BURST)
        is_within = tokens >= 1
        self._buckets[address] = (tokens - is_within, now)
        if len(self._buckets) > _MAX_ADDRESSES:
            self._buckets.popitem(last=False)
        return is_within

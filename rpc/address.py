"""``host:port`` as gRPC takes it."""

import ipaddress


def joined(host: str, port: int) -> str:
    """Return ``host:port``, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(address: str) -> bool:
    """
    Tell whether ``address`` names this machine itself: localhost, 127.0.0.0/8 or ::1, with or without a port.

    Names are not looked up, and one with a scheme, such as ``dns:///localhost:50051``, is not loopback.
    """
    host = _host(address)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _host(address: str) -> str:
    if address.startswith("["):
        return address[1:].partition("]")[0]
    # More than one colon and no brackets: an IPv6 address alone.
    return address.partition(":")[0] if address.count(":") == 1 else address

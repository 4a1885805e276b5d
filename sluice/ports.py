"""Ports that the system gives, for a line that must not meet one that is already up."""

import socket
from contextlib import ExitStack

from rpc.settings import load
from sluice.settings import UpSettings

_FIELDS = ("gateway_port", "streamer_port", "triton_grpc_port", "triton_http_port", "triton_metrics_port")


def settings_with_free_ports() -> UpSettings:
    """Return settings in which every part of the line has a port that was free a moment ago."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in _FIELDS]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        ports = [each.getsockname()[1] for each in sockets]
    return load(UpSettings, **dict(zip(_FIELDS, ports, strict=True)))

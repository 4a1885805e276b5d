"""Where the parts of a line listen: which of these ports are free, and free ones to take instead."""

import socket
from contextlib import ExitStack
from dataclasses import dataclass

from gateway.settings import GatewaySettings
from rpc.address import joined
from rpc.settings import load, variable_of
from serving.settings import TritonSettings
from sluice.settings import UpSettings
from streamer.settings import StreamerSettings

_FIELDS = (
    "gateway_port",
    "gateway_metrics_port",
    "streamer_port",
    "streamer_metrics_port",
    "triton_grpc_port",
    "triton_http_port",
    "triton_metrics_port",
)


def settings_with_free_ports() -> UpSettings:
    """Return settings in which every part of the line has a port that was free a moment ago."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in _FIELDS]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        ports = [each.getsockname()[1] for each in sockets]
    return load(UpSettings, **dict(zip(_FIELDS, ports, strict=True)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where one part of the line listens."""

    name: str
    host: str
    port: int
    option: str
    """Of `sluice up`, that changes the port."""
    variable: str
    """Of the environment, that changes the port."""

    @property
    def address(self) -> str:
        """``host:port``."""
        return joined(self.host, self.port)

    def is_free(self) -> bool:
        """Tell whether something could listen there now."""
        with socket.socket(socket.AF_INET6 if ":" in self.host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self.host, self.port))
            except OSError:
                return False
        return True


def places(settings: UpSettings) -> list[Place]:
    """Return where each part of the line listens under these settings."""
    gateway, streamer, triton = load(GatewaySettings), load(StreamerSettings), load(TritonSettings)
    wanted = (
        ("gateway", gateway.host, gateway.port, "gateway_port"),
        ("gateway metrics", gateway.host, gateway.metrics_port, "gateway_metrics_port"),
        ("streamer", streamer.host, streamer.port, "streamer_port"),
        ("streamer metrics", streamer.host, streamer.metrics_port, "streamer_metrics_port"),
        ("Triton gRPC", triton.host, triton.grpc_port, "triton_grpc_port"),
        ("Triton HTTP", triton.host, triton.http_port, "triton_http_port"),
        ("Triton metrics", triton.host, triton.metrics_port, "triton_metrics_port"),
    )
    return [
        Place(
            name=name,
            host=host,
            port=getattr(settings, field) or port,
            option=f"--{field.replace('_', '-')}",
            variable=variable_of(UpSettings, field),
        )
        for name, host, port, field in wanted
    ]

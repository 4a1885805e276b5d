"""
``sluice health``: ask one service whether it is well; one line, and exit status 0 or 1.

Containers are checked with it every few seconds, so a check imports nothing but what it asks with.
"""

import argparse
import os
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import grpc

    from rpc.tls import ClientTls
    from sluice.access import Access

_OWN_TLS = "SLUICE_GATEWAY_TLS_CERT"
_TRAIN = "`sluice train` makes one, in containers `docker compose run --rm train`"
_PLACES = {
    "gateway": ("gateway.settings", "GatewaySettings", "port"),
    "streamer": ("streamer.settings", "StreamerSettings", "port"),
    "triton": ("serving.settings", "TritonSettings", "http_port"),
}
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Health:
    """What a check found out."""

    is_well: bool
    reason: str
    """Its answer, or why there is none; one line."""
    lacks_model: bool = False
    """Whether nothing is amiss but that Triton, which answers, has no model loaded."""


def main(words: Sequence[str]) -> int:
    """
    Check what ``words``, the rest of a command line, say, print one line, and return the exit status.

    Raises:
        SystemExit: With 2 where they say nothing sensible, with 0 after ``--help``.
        SettingsError: Without ``--address``, the service's settings cannot be used.
    """
    # Not typer, which needs pydantic and with it three times the time.
    options = _parser().parse_args(words)
    address = options.address or _configured(*_PLACES[options.service])
    if options.service == "triton":
        health = ask_triton(address, timeout_seconds=options.timeout)
    elif options.service == "streamer":
        health = ask_streamer(address, timeout_seconds=options.timeout)
    else:
        access = _access(options)
        # Without an address it is the one of the settings; with one, in a container, the environment tells of it.
        is_own = options.address is None or _OWN_TLS in os.environ
        health = ask_gateway(
            address,
            timeout_seconds=options.timeout,
            tls=access.client_tls(is_own=is_own),
            api_key=access.api_key(),
        )
        if options.allow_no_model and health.lacks_model:
            health = before_the_first_model(_repository())
    print(f"{options.service} {address}: {health.reason}")
    return 0 if health.is_well else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sluice health",
        description="Ask a service whether it is well: one line, and exit status 0 or 1. The gateway is while an "
        "inference works, the streamer while it takes readers, Triton while it is live, with a model or without.",
        allow_abbrev=False,
    )
    services = parser.add_subparsers(dest="service", required=True, metavar="gateway|streamer|triton")
    for service in _PLACES:
        one = services.add_parser(service, allow_abbrev=False)
        port = "HTTP port" if service == "triton" else "port"
        one.add_argument("--address", metavar="HOST:PORT", help=f"its {port}; by default where its settings put it")
        one.add_argument("--timeout", type=_seconds, default=5.0, metavar="SECONDS", help="for the answer [5]")
        if service == "gateway":
            one.add_argument(
                "--allow-no-model", action="store_true", help="well also as long as no model was ever published"
            )
            _add_access(one)
    return parser


def _add_access(parser: argparse.ArgumentParser) -> None:
    """Add what the other commands that ask a gateway have in sluice.options."""
    parser.add_argument("--tls", action="store_true", default=_is_set("SLUICE_TLS"), help="speak TLS")
    for name, what in {
        "tls-ca": "PEM file of the authorities to trust; means --tls",
        "tls-cert": "PEM file of the own certificate; means --tls",
        "tls-key": "PEM file of that certificate's key",
        "tls-server-name": "name in the gateway's certificate; means --tls",
        "api-key-file": "file of the API key that tells why it is not serving; SLUICE_API_KEY may hold it too",
    }.items():
        variable = f"SLUICE_{name.replace('-', '_').upper()}"
        is_name = name == "tls-server-name"
        parser.add_argument(
            f"--{name}", type=str if is_name else Path, default=os.environ.get(variable) or None,
            metavar="NAME" if is_name else "FILE", help=what,
        )  # fmt: skip


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on")


def _access(options: argparse.Namespace) -> "Access":
    from sluice.access import Access

    names = ("tls", "tls_ca", "tls_cert", "tls_key", "tls_server_name", "api_key_file")
    return Access(**{name: getattr(options, name) for name in names})


def _seconds(word: str) -> float:
    if not 0 < (seconds := float(word)) <= 60:
        raise argparse.ArgumentTypeError(f"{word} is not above 0 and up to 60")
    return seconds


def ask_gateway(
    address: str, *, timeout_seconds: float, tls: "ClientTls | None" = None, api_key: str | None = None
) -> Health:
    """
    Ask a gateway by grpc.health.v1, and where it is not serving, why.

    Args:
        address: ``host:port``.
        timeout_seconds: For all of it.
        tls: None is plaintext.
        api_key: For the reason; whether it serves is told to everybody.

    Raises:
        SettingsError: A TLS file or the key cannot be used.
    """
    import grpc

    deadline = time.monotonic() + timeout_seconds
    with _channel(address, tls) as channel:
        try:
            if _is_serving(channel, timeout_seconds):
                return Health(is_well=True, reason="serving")
        except grpc.RpcError as error:
            reason = _tls_problem(address, tls, deadline) or _details(error)
            return Health(is_well=False, reason=f"no answer: {reason}")
        try:
            has_model = _has_model(channel, max(deadline - time.monotonic(), 0.0), address, tls, api_key)
        except grpc.RpcError as error:
            return Health(is_well=False, reason=f"not serving: {_details(error)}")
    if has_model:
        return Health(is_well=False, reason="not serving: it is ending, or no inference works; its log says which")
    return Health(is_well=False, reason=f"not serving: no model is loaded; {_TRAIN}", lacks_model=True)


def before_the_first_model(repository: Path) -> Health:
    """Take a gateway without a model for well, unless ``repository`` holds a version that Triton should have loaded."""
    version = next(repository.glob("*/[1-9]*/"), None)
    if version is not None:
        return Health(is_well=False, reason=f"not serving: Triton has not loaded {version}; its log says why")
    return Health(is_well=True, reason=f"no model yet: {_TRAIN}")


def ask_streamer(address: str, *, timeout_seconds: float) -> Health:
    """Ask a streamer by grpc.health.v1; arguments as for :func:`ask_gateway`."""
    import grpc

    with _channel(address) as channel:
        try:
            is_serving = _is_serving(channel, timeout_seconds)
        except grpc.RpcError as error:
            return Health(is_well=False, reason=f"no answer: {_details(error)}")
    return Health(is_well=is_serving, reason="serving" if is_serving else "not serving: it is ending")


def ask_triton(address: str, *, timeout_seconds: float) -> Health:
    """
    Ask a Triton by HTTP whether it is live, which it also is while versions come and go.

    Args:
        address: ``host:port`` of its HTTP protocol.
        timeout_seconds: For each step, connecting and answering.
    """
    import http.client

    try:
        with closing(http.client.HTTPConnection(address, timeout=timeout_seconds)) as connection:
            connection.request("GET", "/v2/health/live")
            status = connection.getresponse().status
    except (OSError, UnicodeError, http.client.HTTPException) as error:
        return Health(is_well=False, reason=f"no answer: {str(error) or type(error).__name__}")
    return Health(is_well=status == 200, reason="live" if status == 200 else f"not live: HTTP status {status}")


def _configured(module: str, section: str, port: str) -> str:
    from rpc.address import joined
    from rpc.settings import load

    settings: Any = load(getattr(import_module(module), section))
    return joined(_LOOPBACK.get(settings.host, settings.host), getattr(settings, port))


def _repository() -> Path:
    from gateway.settings import GatewaySettings
    from rpc.settings import load

    return load(GatewaySettings).model_repository


def _channel(address: str, tls: "ClientTls | None" = None) -> "grpc.Channel":
    import grpc

    options = (("grpc.enable_http_proxy", 0),)
    if tls is None:
        return grpc.insecure_channel(address, options=options)
    from rpc.tls import channel_options, client_credentials

    return grpc.secure_channel(address, client_credentials(tls), options=(*options, *channel_options(tls)))


def _tls_problem(address: str, tls: "ClientTls | None", deadline: float) -> str | None:
    """Look for it where anybody listens, which is not where most checks fail."""
    import asyncio
    import socket

    host, _, port = address.rpartition(":")
    try:
        seconds = max(deadline - time.monotonic(), 0.01)
        socket.create_connection((host.strip("[]"), int(port)), timeout=seconds).close()
    except (OSError, ValueError):
        return None
    from rpc.diagnosis import tls_problem

    return asyncio.run(tls_problem(address, tls, timeout_seconds=max(deadline - time.monotonic(), 0.0)))


def _is_serving(channel: "grpc.Channel", timeout_seconds: float) -> bool:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout_seconds)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def _has_model(
    channel: "grpc.Channel", timeout_seconds: float, address: str, tls: "ClientTls | None", api_key: str | None
) -> bool:
    from protos.gateway.v1 import image_service_pb2, image_service_pb2_grpc

    metadata = None
    if api_key is not None:
        from rpc.access import key_metadata

        metadata = key_metadata(api_key, address, tls)
    list_models = image_service_pb2_grpc.ImageServiceStub(channel).ListModels
    request = image_service_pb2.ListModelsRequest()
    return bool(list_models(request, timeout=timeout_seconds, metadata=metadata).models)


def _details(error: Any) -> str:
    return " ".join(str(error.details() or error.code().name).split())

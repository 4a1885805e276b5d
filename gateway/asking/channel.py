"""The channel to a gateway: how it tries again and comes back, and how ready the gateway at its end is."""

import asyncio
import json
from collections.abc import AsyncGenerator

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

import rpc.tls
from gateway.asking.failures import error_of
from protos.gateway.v1 import image_service_pb2 as pb
from rpc.address import is_loopback
from rpc.tls import ClientTls

_SERVICE = pb.DESCRIPTOR.services_by_name["ImageService"].full_name
_MAX_ATTEMPTS = 4
_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [{"service": _SERVICE}],
            "retryPolicy": {
                "maxAttempts": _MAX_ATTEMPTS,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                # A grpc.aio server that begins to stop ends calls it has not begun with CANCELLED. A gateway that is
                # overloaded says when to come again, and is heard.
                "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED", "RESOURCE_EXHAUSTED"],
            },
        }
    ],
    # While most calls fail, retries stop.
    "retryThrottling": {"maxTokens": 10, "tokenRatio": 0.1},
}
_CHANNEL_OPTIONS = (
    # A connection of its own: several clients of one process reach several workers of a gateway.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    # The default lets a client wait minutes after its server is back.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
)
_REOPEN_SECONDS = 0.1


def open_channel(address: str, tls: ClientTls | None = None) -> grpc.aio.Channel:
    """
    Return a channel to the gateway at ``address``, ``host:port``; who opens it closes it.

    Raises:
        SettingsError: A TLS file cannot be used.
    """
    # Without it, http_proxy in the environment takes even the calls to this machine.
    proxy = ("grpc.enable_http_proxy", int(not is_loopback(address)))
    return rpc.tls.open_channel(address, tls, (*_CHANNEL_OPTIONS, proxy))


async def readiness(channel: grpc.aio.Channel, address: str) -> AsyncGenerator[bool, None]:
    """
    Yield whether the gateway is ready, and each change of it, across restarts, without end.

    Args:
        channel: To the gateway.
        address: Of the gateway, for messages.

    Raises:
        ClientError: The gateway does not tell.
    """
    watch = health_pb2_grpc.HealthStub(channel).Watch
    while True:
        call = watch(health_pb2.HealthCheckRequest(service=_SERVICE), wait_for_ready=True)
        try:
            async for response in call:
                yield response.status == health_pb2.HealthCheckResponse.SERVING
        except grpc.aio.AioRpcError as error:
            if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
                raise error_of(address, error) from error
        finally:
            call.cancel()
        # The gateway ended it, because it drains or died; wait_for_ready covers the time until it is back.
        await asyncio.sleep(_REOPEN_SECONDS)

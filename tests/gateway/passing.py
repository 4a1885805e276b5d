"""The passthrough in front of a Triton, without the rest of a gateway."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import Message
from tritonclient.grpc import service_pb2_grpc

from gateway.admission import Admission
from gateway.errors import UpstreamUnavailableError
from gateway.passthrough import PassthroughServicer
from rpc.interceptor import Guard

MAX_ANSWER_BYTES = 1 << 20
"""Largest answer of Triton that the passthrough here takes."""


class ChannelUpstream:
    """Triton's own RPCs on a channel."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(channel)

    async def infer(self, request: Message) -> Any:
        """Return the answer to an inference, without a deadline."""
        return await self._stub.ModelInfer(request)

    async def control(self, method: str, request: Message) -> Any:
        """Return the answer, within seconds."""
        return await getattr(self._stub, method)(request, timeout=30)

    def num_having(self, model: str) -> int:
        """Return that there is one Triton."""
        return 1


class Readiness:
    """
    What the gateway knows of its models.

    Attributes:
        models: Of those that it proves, whether they are ready.
        routed: Versions that requests without one go to, the first until the next :meth:`refresh`.
        num_failures: Of inferences that Triton failed.
    """

    def __init__(self) -> None:
        self.models = {"mnist": True}
        self.routed: dict[str, list[int]] = {}
        self.num_failures = 0

    def of(self, name: str, version: int) -> bool | None:
        """Return whether a model is ready, None for one that is not proven."""
        return self.models.get(name)

    def require(self, name: str, version: int) -> None:
        """Refuse a model that is not ready."""
        if self.models.get(name) is False:
            raise UpstreamUnavailableError(f"{name} does not answer now; try again")

    async def refresh(self) -> None:
        """Learn that the versions routed to have gone."""
        for versions in self.routed.values():
            versions.pop(0)

    def route(self, name: str) -> int:
        """Return the version for requests without one."""
        return next(iter(self.routed.get(name, ())), 0)

    def fail(self) -> None:
        """Count a failure."""
        self.num_failures += 1


@dataclass(frozen=True)
class Passing:
    """The passthrough where it listens, ``host:port``, and what knows whether it is idle."""

    address: str
    guard: Guard


@asynccontextmanager
async def passing_through(
    triton_address: str, admission: Admission, readiness: Readiness, *, timeout_seconds: float = 60
) -> AsyncIterator[Passing]:
    """Serve the passthrough in front of a Triton."""
    guard = Guard()
    server = grpc.aio.server(interceptors=(guard,), options=[("grpc.so_reuseport", 0)])
    limit = ("grpc.max_receive_message_length", MAX_ANSWER_BYTES)
    async with grpc.aio.insecure_channel(triton_address, options=[limit]) as channel:
        servicer = PassthroughServicer(
            upstream=ChannelUpstream(channel),
            admission=admission,
            identity=lambda context: context.peer().rpartition(":")[0],
            require=readiness.require,
            route=readiness.route,
            refresh=readiness.refresh,
            is_ready=lambda: all(readiness.models.values()),
            is_model_ready=readiness.of,
            upstream_timeout_seconds=timeout_seconds,
            on_upstream_error=readiness.fail,
            on_answer=lambda name, version: None,
        )
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            yield Passing(f"127.0.0.1:{port}", guard)
        finally:
            await server.stop(None)

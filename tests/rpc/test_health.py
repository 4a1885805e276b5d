import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from rpc.health import MAX_WATCHERS, Health

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
def health() -> Health:
    return Health(["", "a.Service"])


@pytest.fixture
async def health_stub(health: Health) -> AsyncIterator[Any]:
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield health_pb2_grpc.HealthStub(channel)
    await server.stop(None)


def ask(service: str = "a.Service") -> Any:
    return health_pb2.HealthCheckRequest(service=service)


async def test_check_follows_what_is_reported(health: Health, health_stub: Any) -> None:
    assert (await health_stub.Check(ask())).status == NOT_SERVING
    health.report(True)
    assert (await health_stub.Check(ask())).status == SERVING
    assert (await health_stub.Check(ask(""))).status == SERVING


async def test_check_of_unknown_service_names_the_known_but_for_what_came_later(
    health: Health, health_stub: Any
) -> None:
    health.tell("a.Service/model", True)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await health_stub.Check(ask("b"))

    assert refused.value.code() is grpc.StatusCode.NOT_FOUND
    assert refused.value.details() == "service: no service 'b'; here are a.Service, or empty for the server"


async def test_watch_of_unknown_service_is_told_so(health_stub: Any) -> None:
    call = health_stub.Watch(ask("b"))
    assert (await call.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    call.cancel()


async def test_watch_tells_changes_until_drained(health: Health, health_stub: Any) -> None:
    told = aiter(health_stub.Watch(ask()))
    seen = [(await anext(told)).status]
    for is_serving in (True, False, True):
        health.report(is_serving)
        seen.append((await anext(told)).status)
    health.drain()
    seen += [response.status async for response in told]

    assert seen == [NOT_SERVING, SERVING, NOT_SERVING, SERVING, NOT_SERVING]
    health.report(True)
    assert not health.is_serving


async def test_watcher_who_leaves_does_not_silence_the_others(health: Health, health_stub: Any) -> None:
    first, second = health_stub.Watch(ask()), health_stub.Watch(ask())
    await asyncio.gather(first.read(), second.read())
    first.cancel()
    await health_stub.Check(ask())  # the server has seen the cancel when this has come back
    health.report(True)

    assert (await second.read()).status == SERVING
    second.cancel()


async def test_watcher_above_the_limit_is_refused_until_one_leaves(health_stub: Any) -> None:
    first, *others = (health_stub.Watch(ask()) for _ in range(MAX_WATCHERS))
    await asyncio.gather(first.read(), *(call.read() for call in others))
    with pytest.raises(grpc.aio.AioRpcError, match="health has 128 watchers and takes no more") as refused:
        await health_stub.Watch(ask()).read()
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

    first.cancel()
    await health_stub.Check(ask())  # the server has seen the cancel when this has come back
    others.append(health_stub.Watch(ask()))
    assert (await others[-1].read()).status == NOT_SERVING
    for call in others:
        call.cancel()

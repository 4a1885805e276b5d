import asyncio
from contextlib import aclosing

from gateway.asking.channel import open_channel, readiness
from gateway.server import GatewayServer
from gateway.settings import GatewaySettings
from tests.gateway.fake_triton import FakeTriton


async def test_readiness_goes_on_when_the_gateway_is_started_anew(
    settings: GatewaySettings, triton: FakeTriton
) -> None:
    triton.models = {}
    async with GatewayServer(settings) as gateway:
        address = gateway.address
        channel = open_channel(address)
        statuses = readiness(channel, address)
        assert not await anext(statuses)
    triton.models = {"mnist": [1]}
    again = settings.model_copy(update={"port": int(address.rpartition(":")[2])})

    async with GatewayServer(again), channel, aclosing(statuses), asyncio.timeout(60):
        while not await anext(statuses):
            pass

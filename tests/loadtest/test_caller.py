import asyncio
import math
from typing import Any

import grpc
import pytest

from gateway.server import GatewayServer
from loadtest.caller import Caller
from loadtest.errors import CallError, StartError
from loadtest.images import Sample
from loadtest.tally import Verdict
from loadtest.targets import KINDS, Kind, Target, make
from tests.gateway.fake_triton import Context
from tests.loadtest.conftest import NewestTriton


def target_of(kind: Kind, samples: list[Sample], model: str = "mnist") -> Target:
    return make(kind, samples, image_format="png", model=model, batch_size=4, seed=0)


def address_of(kind: Kind, gateway: GatewayServer, triton: NewestTriton) -> str:
    return triton.address if kind == "triton" else gateway.address


@pytest.mark.parametrize("kind", KINDS)
async def test_every_target_answers_right(
    kind: Kind, gateway: GatewayServer, triton: NewestTriton, samples: list[Sample]
) -> None:
    address = address_of(kind, gateway, triton)
    async with Caller(address, target_of(kind, samples), timeout_seconds=10) as caller:
        model = await caller.start()
        verdicts = [await caller.ask(number) for number in range(4)]

    assert model == "mnist version 1"
    if kind == "compare":
        assert all(math.isclose(verdict.same_score or 0, 0.7, abs_tol=0.3) for verdict in verdicts[::2])
        assert all(verdict.different_score is not None for verdict in verdicts[1::2])
    else:
        images = 1 if kind == "classify" else 4
        assert verdicts == [Verdict(images=images, judged=images, right=images)] * 4


async def test_failed_call_carries_code_and_words(
    gateway: GatewayServer, triton: NewestTriton, samples: list[Sample]
) -> None:
    async with Caller(gateway.address, target_of("classify", samples), timeout_seconds=10) as caller:
        await caller.start()
        triton.failure = grpc.StatusCode.RESOURCE_EXHAUSTED, "full"
        with pytest.raises(CallError) as failed:
            await caller.ask(0)

    assert failed.value.code == "RESOURCE_EXHAUSTED"
    assert "overloaded" in failed.value.details


async def test_nothing_is_tried_again(triton: NewestTriton, samples: list[Sample]) -> None:
    async with Caller(triton.address, target_of("triton", samples), timeout_seconds=10) as caller:
        await caller.start()
        num_before = len(triton.requests)
        triton.failure = grpc.StatusCode.UNAVAILABLE, "gone for a moment"
        with pytest.raises(CallError):
            await caller.ask(0)

    assert len(triton.requests) == num_before + 1


async def test_gateway_call_ends_at_its_deadline(
    gateway: GatewayServer, triton: NewestTriton, samples: list[Sample]
) -> None:
    async with Caller(gateway.address, target_of("classify", samples), timeout_seconds=0.1) as caller:
        await caller.start()
        triton.gate.clear()
        with pytest.raises(CallError) as failed:
            await caller.ask(0)
        triton.gate.set()

    assert failed.value.code == "DEADLINE_EXCEEDED"


async def test_abandoned_call_is_cancelled(gateway: GatewayServer, triton: NewestTriton, samples: list[Sample]) -> None:
    """Its place at the gateway is free again; only the inference itself goes on."""
    async with Caller(gateway.address, target_of("classify", samples), timeout_seconds=60) as caller:
        await caller.start()
        triton.gate.clear()
        triton.arrived.clear()
        call = asyncio.create_task(caller.ask(0))
        await triton.arrived.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await asyncio.wait_for(gateway.grpc_server.stop(grace=60), 10)
        triton.gate.set()


class TimedTriton(NewestTriton):
    """Notes what time each ModelInfer was given."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[float | None] = []

    async def ModelInfer(self, request: Any, context: Context) -> Any:
        self.given.append(context.time_remaining())
        return await super().ModelInfer(request, context)


async def test_triton_itself_is_given_no_deadline(samples: list[Sample]) -> None:
    """It may crash when one passes."""
    async with TimedTriton() as triton:
        async with Caller(triton.address, target_of("triton", samples), timeout_seconds=10) as caller:
            await caller.start()
            await caller.ask(0)

        assert set(triton.given) == {None}


async def test_absent_server_is_named(samples: list[Sample]) -> None:
    async with Caller("127.0.0.1:1", target_of("classify", samples), timeout_seconds=10) as caller:
        with pytest.raises(StartError, match=r"127\.0\.0\.1:1 does not answer .*Classify: .*is it running"):
            await caller.start()


async def test_refusal_of_the_first_call_is_told(gateway: GatewayServer, samples: list[Sample]) -> None:
    async with Caller(gateway.address, target_of("classify", samples, model="fashion"), timeout_seconds=10) as caller:
        with pytest.raises(StartError, match=r"refuses .*Classify \(NOT_FOUND\): .*fashion"):
            await caller.start()


async def test_proxy_is_not_asked_for_this_machine(
    triton: NewestTriton, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    async with Caller(triton.address, target_of("triton", samples), timeout_seconds=10) as caller:
        assert await caller.start() == "mnist version 1"

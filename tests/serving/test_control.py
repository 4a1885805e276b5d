"""Against a server of ours that speaks Triton's protocol; what needs Triton itself is in test_triton.py."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio
from tritonclient.grpc import service_pb2, service_pb2_grpc

from serving.control import TritonControl
from serving.errors import ControlError

IMAGES = np.zeros((2, 1, 28, 28), np.uint8)


class SlowTriton(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]  # the base is untyped
    """Answers an inference when told to, and remembers whether a call was cancelled."""

    def __init__(self) -> None:
        self.arrived, self.proceed = asyncio.Event(), asyncio.Event()
        self.answered = self.cancelled = 0
        self.not_ready_for = 0

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        self.arrived.set()
        try:
            await self.proceed.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        self.answered += 1
        answer = service_pb2.ModelInferResponse()
        for output, width in zip(request.outputs, (10, 500), strict=True):
            answer.outputs.add(name=output.name, shape=[2, width])
            answer.raw_output_contents.append(np.zeros((2, width), np.float32).tobytes())
        return answer

    async def ServerReady(self, request: Any, context: Any) -> Any:
        self.not_ready_for -= 1
        return service_pb2.ServerReadyResponse(ready=self.not_ready_for < 0)


@pytest.fixture
def servicer() -> SlowTriton:
    return SlowTriton()


@pytest_asyncio.fixture
async def address(servicer: SlowTriton) -> AsyncIterator[str]:
    server = grpc.aio.server()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(0)


async def test_inference_goes_on_when_its_caller_is_cancelled(servicer: SlowTriton, address: str) -> None:
    async with TritonControl(address) as control:
        asking = asyncio.create_task(control.infer("mnist", IMAGES))
        await servicer.arrived.wait()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        servicer.proceed.set()

    assert (servicer.answered, servicer.cancelled) == (1, 0)


async def test_inference_goes_on_after_the_deadline(servicer: SlowTriton, address: str) -> None:
    async with TritonControl(address, answer_seconds=0.2) as control:
        with pytest.raises(ControlError, match=r"did not answer ModelInfer within 0\.2 s"):
            await control.infer("mnist", IMAGES)
        servicer.proceed.set()

    assert (servicer.answered, servicer.cancelled) == (1, 0)


async def test_wait_ready_asks_again_until_triton_says_so(servicer: SlowTriton, address: str) -> None:
    servicer.not_ready_for = 3
    async with TritonControl(address) as control:
        await control.wait_ready(timeout_seconds=30)

    assert servicer.not_ready_for == -1


async def test_wait_ready_gives_up_at_its_deadline(servicer: SlowTriton, address: str) -> None:
    servicer.not_ready_for = 1_000_000
    async with TritonControl(address) as control:
        with pytest.raises(ControlError, match=rf"{address} is not ready after 0\.2 s"):
            await control.wait_ready(timeout_seconds=0.2)


async def test_wait_live_gives_up_when_nothing_listens() -> None:
    async with TritonControl("127.0.0.1:1") as control:
        with pytest.raises(ControlError, match=r"127\.0\.0\.1:1 is not live"):
            await control.wait_live(timeout_seconds=0.3)


async def test_refusal_names_method_and_model(address: str) -> None:
    async with TritonControl(address) as control:
        with pytest.raises(ControlError, match="RepositoryModelLoad of model 'absent'"):
            await control.load("absent")


@pytest.mark.parametrize("images", [np.zeros((1, 1, 28, 28), np.float32), np.zeros((28, 28), np.uint8)])
async def test_images_of_another_kind_are_refused_before_asking(images: Any) -> None:
    async with TritonControl("127.0.0.1:1") as control:
        with pytest.raises(ValueError, match="images have to be uint8"):
            await control.infer("mnist", images)

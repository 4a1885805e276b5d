"""Many images over one stream after another; the gateway and its Triton run in here."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gateway.client import (
    Classification,
    DeadlineError,
    ImageClient,
    ImageError,
    InvalidInputError,
    ServerUnreachableError,
)
from gateway.server import GatewayServer
from gateway.settings import GatewaySettings
from tests.gateway.fake_triton import FakeTriton, label_of
from tests.scraping import becomes

IMAGES = np.random.default_rng(0).integers(0, 256, (300, 28, 28), np.uint8)


def told(answer: Classification | ImageError) -> int | str:
    return answer.label if isinstance(answer, Classification) else str(answer)


async def test_answers_come_in_the_order_of_the_images(client: ImageClient) -> None:
    many = client.classify_many(IMAGES, polarity="light_on_dark", window=64)

    assert [told(answer) async for answer in many] == [label_of(image) for image in IMAGES]


async def test_image_that_cannot_be_read_fails_in_its_place(client: ImageClient, digit: Any, tmp_path: Path) -> None:
    images: list[Any] = [digit, tmp_path / "none.png", digit, b"no image", 3.5, digit]
    answers = [told(answer) async for answer in client.classify_many(image for image in images)]

    assert [answers[index] for index in (0, 2, 5)] == [label_of(digit)] * 3
    assert answers[1] == f"images[1]: {tmp_path / 'none.png'}: No such file or directory"
    assert str(answers[3]).startswith("image.encoded: not a readable image")
    assert str(answers[4]).startswith("images[4]: image: float; allowed are")


async def test_option_that_no_image_could_have_ends_it(client: ImageClient, digit: Any) -> None:
    with pytest.raises(InvalidInputError, match="polarity: 'upside down'"):
        await anext(client.classify_many([digit], polarity="upside down"))  # type: ignore[arg-type]  # on purpose


async def test_source_is_not_read_further_than_the_window(client: ImageClient, digit: Any) -> None:
    num_read = 0

    async def endless() -> AsyncIterator[NDArray[np.uint8]]:
        nonlocal num_read
        while True:
            num_read += 1
            yield digit

    async with aclosing(client.classify_many(endless(), window=8)) as many:
        for taken in range(1, 20):
            await anext(many)
            # One more may be in the hands of the reader, who has no room for it.
            assert num_read <= taken + 8 + 1


async def test_stream_that_breaks_is_opened_again_and_nothing_is_lost_or_twice(
    settings: GatewaySettings, triton: FakeTriton
) -> None:
    async with GatewayServer(settings) as first:
        fixed = settings.model_copy(update={"port": int(first.address.rpartition(":")[2])})
        async with ImageClient(first.address) as client:
            await client.wait_ready()
            many = client.classify_many(IMAGES, polarity="light_on_dark", window=16)
            answers = [await anext(many) for _ in range(20)]
            await first.grpc_server.stop(None)
            await first.__aexit__(None, None, None)
            async with GatewayServer(fixed):
                answers += [answer async for answer in many]

    labels = [told(answer) for answer in answers]
    assert len(labels) == len(IMAGES)
    # What found the new gateway before its model says so in its place.
    assert all(label == label_of(image) or "answer" in str(label) for label, image in zip(labels, IMAGES, strict=True))
    assert labels[:20] == [label_of(image) for image in IMAGES[:20]]


async def test_gateway_that_is_gone_for_good_is_told(client: ImageClient, gateway: GatewayServer, digit: Any) -> None:
    await gateway.grpc_server.stop(None)
    with pytest.raises(ServerUnreachableError, match="no gateway answers at"):
        await anext(client.classify_many([digit]))


async def test_gateway_that_does_not_answer_is_told(client: ImageClient, triton: FakeTriton, digit: Any) -> None:
    triton.gate.clear()
    with pytest.raises(DeadlineError, match=r"no answer from .* within 0.2 s"):
        await anext(client.classify_many([digit], timeout_seconds=0.2))
    triton.gate.set()

    assert (await client.classify(digit)).label == label_of(digit)


async def test_source_that_takes_its_time_runs_out_of_none(client: ImageClient, digit: Any) -> None:
    async def slow() -> AsyncIterator[NDArray[np.uint8]]:
        yield digit
        await asyncio.sleep(0.3)  # longer than an answer may take
        yield digit

    assert len([answer async for answer in client.classify_many(slow(), timeout_seconds=0.2)]) == 2


async def test_source_that_is_slow_to_begin_opens_no_stream_that_waits(settings: GatewaySettings, digit: Any) -> None:
    async def slow() -> AsyncIterator[NDArray[np.uint8]]:
        await asyncio.sleep(0.3)  # longer than a gateway waits for the first image of a stream
        yield digit

    async with GatewayServer(settings.model_copy(update={"request_seconds": 0.1})) as impatient:
        async with ImageClient(impatient.address) as client:
            await client.wait_ready()
            assert len([answer async for answer in client.classify_many(slow())]) == 1
        stream = {"method": "sluice.gateway.v1.ImageService/ClassifyStream"}
        await becomes(1, impatient.metrics_url, "gateway_streams_total", **stream, code="OK")
        await becomes(0, impatient.metrics_url, "gateway_streams_total", **stream, code="ABORTED")


async def test_leaving_early_leaves_nothing_behind(client: ImageClient, gateway: GatewayServer, digit: Any) -> None:
    async with aclosing(client.classify_many([digit] * 100, window=4)) as many:
        await anext(many)

    stream = {"method": "sluice.gateway.v1.ImageService/ClassifyStream"}
    await becomes(0, gateway.metrics_url, "gateway_streams_in_flight", **stream)
    assert not [task for task in asyncio.all_tasks() if "asking/conversation.py" in repr(task)]


async def test_model_that_is_not_there_is_told_for_each(client: ImageClient, digit: Any) -> None:
    answers = [told(answer) async for answer in client.classify_many([digit, digit], model="none")]

    assert answers == ["model: no model 'none'; loaded are mnist"] * 2

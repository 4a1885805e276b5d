"""Counts and names that are none: fields of requests, beside the images. Section I of docs/faults.md."""

from typing import Any

import grpc
import pytest

from gateway.settings import GatewaySettings
from protos.gateway.v1 import image_service_pb2 as pb
from tests.faults.gateway.asker import INVALID_ARGUMENT, Asker
from tests.faults.gateway.conftest import Measured
from tests.faults.gateway.files import seven_as
from tests.faults.gateway.process import PATIENCE_SECONDS, Gateway

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_counts_are_checked(ask: Asker, measured: Measured) -> None:
    """I13: too few images, too many."""
    limit = GatewaySettings().max_batch_images
    row = measured(
        "I13",
        fault=f"batches of 0, {limit} and {limit + 1}; comparisons with an image missing; no source",
        promised="INVALID_ARGUMENT that names the field and the limit; the largest batch answered",
    )
    image = pb.Image(encoded=seven_as())

    async def text_of(call: Any) -> str:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is INVALID_ARGUMENT
        return caught.value.details() or ""

    for count in (0, limit + 1):
        asked = ask.stub.ClassifyBatch(pb.ClassifyBatchRequest(images=[image] * count), timeout=PATIENCE_SECONDS)
        assert await text_of(asked) == f"images: {count} images; allowed are 1..{limit}"
    full = await ask.stub.ClassifyBatch(pb.ClassifyBatchRequest(images=[image] * limit), timeout=PATIENCE_SECONDS)
    assert [result.code for result in full.results] == [0] * limit
    compare = ask.stub.Compare
    assert (await text_of(compare(pb.CompareRequest(first=image)))).startswith("second: missing")
    assert (await text_of(compare(pb.CompareRequest(second=image)))).startswith("first: missing")
    assert (await text_of(compare(pb.CompareRequest(first=image, second=pb.Image())))).startswith("second: missing")
    row.add("largest batch", f"{len(full.results)} answers")


async def test_strings_are_escaped(ask: Asker, unprobed: Gateway, measured: Measured) -> None:
    """I14: names that are meant for somebody else."""
    row = measured(
        "I14",
        fault="model names with NUL, newlines, ../, right-to-left marks, escape codes, 10 kB",
        promised="NOT_FOUND with the name escaped and cut; one line of JSON in the log for each call",
    )
    names = ["a\0b", "a\nb", "../../etc/passwd", "\u202egnp", "\x1b[31mred", "x" * 10_000, '{"event": "forged"}']
    num_lines = len(unprobed.lines())
    data = seven_as()
    for name in names:
        asked = await ask.image(data, model=name)
        assert asked.code is grpc.StatusCode.NOT_FOUND
        assert asked.text.isascii()
        assert asked.text.isprintable()
        assert len(asked.text) < 300
    row.add("refused", len(names))
    # Logged after those.
    await unprobed.check()
    lines = [line for line in unprobed.lines()[num_lines:] if line.get("code") != "OK"]
    assert [(line["event"], line["code"]) for line in lines] == [("rpc", "NOT_FOUND")] * len(names)
    ask.note(row)

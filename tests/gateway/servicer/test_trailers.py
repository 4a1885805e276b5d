"""What comes with an answer: its id, and where its time went."""

from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from protos.gateway.v1 import image_service_pb2 as pb
from rpc.budget import parse
from tests.gateway.servicer.calls import picture


async def test_answer_comes_with_its_id_and_where_its_time_went(stub: Any, digit: NDArray[np.uint8]) -> None:
    call = stub.Classify(pb.ClassifyRequest(image=picture(digit)), metadata=[("x-request-id", "abc-1")])
    await call
    told = dict(await call.trailing_metadata())
    timing = parse(told["server-timing"])

    assert told["x-request-id"] == "abc-1"
    assert list(timing) == ["admission", "decode", "coalesce", "upstream", "batch", "total"]
    assert timing["batch"] == 1
    assert sum(timing[stage] for stage in ("admission", "decode", "coalesce", "upstream")) <= timing["total"] + 0.1


async def test_refusal_comes_with_an_id_too(stub: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.Classify(pb.ClassifyRequest(image=pb.Image(encoded=b"no")))

    assert dict(refused.value.trailing_metadata() or ())["x-request-id"]

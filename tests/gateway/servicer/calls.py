"""What callers send, and how they are refused."""

from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image

from imaging.decoding import Pixels
from protos.gateway.v1 import image_service_pb2 as pb
from tests.digits import encoded

INVALID = grpc.StatusCode.INVALID_ARGUMENT


def png(pixels: Pixels) -> bytes:
    return encoded(Image.fromarray(pixels))


TRUNCATED = png(np.eye(28, dtype=np.uint8) * 255)[:-20]


def picture(pixels: Pixels, **fields: Any) -> pb.Image:
    return pb.Image(encoded=png(pixels), **fields)


async def refusal(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await call
    return failed.value.code(), failed.value.details() or ""

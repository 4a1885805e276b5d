"""What is sent: one digit or a batch of them as bytes, in the frame gRPC puts around a message or as a form's file."""

import io
import struct
from collections.abc import Sequence

import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray
from PIL import Image
from tritonclient.grpc import service_pb2

from protos.gateway.v1 import image_service_pb2 as pb

CLASSIFY = "/sluice.gateway.v1.ImageService/Classify"
CLASSIFY_BATCH = "/sluice.gateway.v1.ImageService/ClassifyBatch"
CLASSIFY_STREAM = "/sluice.gateway.v1.ImageService/ClassifyStream"
MODEL_INFER = "/inference.GRPCInferenceService/ModelInfer"

FRAME_BYTES = 5
"""In front of each message."""

_BOUNDARY = "a-line-that-is-in-no-image"


def framed(message: bytes) -> bytes:
    """
    Return a message as gRPC sends it: whether it is compressed, its length, its bytes.

    Source: "Length-Prefixed-Message" of gRPC over HTTP/2 (PROTOCOL-HTTP2.md).
    """
    return struct.pack(">BI", 0, len(message)) + message


def classify(image_HW: NDArray[np.uint8], *, is_png: bool) -> bytes:
    """Return a ClassifyRequest."""
    return _serialised(pb.ClassifyRequest(image=_image(image_HW, is_png)))


def classify_batch(images_NHW: NDArray[np.uint8], *, is_png: bool) -> bytes:
    """Return a ClassifyBatchRequest."""
    return _serialised(pb.ClassifyBatchRequest(images=[_image(image_HW, is_png) for image_HW in images_NHW]))


def stream_requests(images_NHW: NDArray[np.uint8], *, is_png: bool) -> Sequence[bytes]:
    """Return a ClassifyStreamRequest for each image."""
    return [
        _serialised(pb.ClassifyStreamRequest(id=number, request=pb.ClassifyRequest(image=_image(image_HW, is_png))))
        for number, image_HW in enumerate(images_NHW)
    ]


def model_infer(image_HW: NDArray[np.uint8], *, model: str) -> bytes:
    """Return a ModelInferRequest for the probabilities of one image, as the gateway asks for them."""
    request = service_pb2.ModelInferRequest(model_name=model, model_version="1")
    request.inputs.add(name="image", datatype="UINT8", shape=(1, 1, *image_HW.shape))
    request.outputs.add(name="probabilities__0")
    request.raw_input_contents.append(image_HW.tobytes())
    return _serialised(request)


def png(image_HW: NDArray[np.uint8]) -> bytes:
    """Return an image as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image_HW).save(file, "PNG")
    return file.getvalue()


def form(name: str, content: bytes) -> tuple[bytes, str]:
    """Return a form with one PNG file in a field of that name, and its content type."""
    head = f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"; filename="digit.png"\r\n'
    body = head.encode() + b"Content-Type: image/png\r\n\r\n" + content + f"\r\n--{_BOUNDARY}--\r\n".encode()
    return body, f"multipart/form-data; boundary={_BOUNDARY}"


def _image(image_HW: NDArray[np.uint8], is_png: bool) -> pb.Image:
    if is_png:
        return pb.Image(encoded=png(image_HW))
    height, width = image_HW.shape
    return pb.Image(raw=pb.RawImage(height=height, width=width, pixels=image_HW.tobytes()))


def _serialised(message: Message) -> bytes:
    return bytes(message.SerializeToString())

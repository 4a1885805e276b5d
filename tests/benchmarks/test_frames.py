import email
import io

import numpy as np
from PIL import Image
from tritonclient.grpc import service_pb2

from benchmarks import digits, frames
from protos.gateway.v1 import image_service_pb2 as pb

IMAGES_NHW = digits.digits(3)


def test_frame_tells_the_length_in_network_order() -> None:
    assert frames.framed(b"x" * 258) == b"\0\0\0\1\2" + b"x" * 258


def test_requests_hold_the_images_as_pixels_or_png() -> None:
    pixels = pb.ClassifyRequest.FromString(frames.classify(IMAGES_NHW[0], is_png=False)).image.raw
    batch = pb.ClassifyBatchRequest.FromString(frames.classify_batch(IMAGES_NHW, is_png=True)).images

    assert (pixels.height, pixels.width, pixels.pixels) == (28, 28, IMAGES_NHW[0].tobytes())
    read = [np.asarray(Image.open(io.BytesIO(image.encoded))) for image in batch]
    np.testing.assert_array_equal(np.stack(read), IMAGES_NHW)


def test_stream_requests_are_numbered() -> None:
    requests = [pb.ClassifyStreamRequest.FromString(each) for each in frames.stream_requests(IMAGES_NHW, is_png=False)]

    assert [request.id for request in requests] == [0, 1, 2]
    assert requests[2].request.image.raw.pixels == IMAGES_NHW[2].tobytes()


def test_triton_is_asked_for_probabilities_of_one_image() -> None:
    request = service_pb2.ModelInferRequest.FromString(frames.model_infer(IMAGES_NHW[0], model="any"))

    assert request.model_name == "any"
    assert [(tensor.datatype, list(tensor.shape)) for tensor in request.inputs] == [("UINT8", [1, 1, 28, 28])]
    assert [output.name for output in request.outputs] == ["probabilities__0"]
    assert list(request.raw_input_contents) == [IMAGES_NHW[0].tobytes()]


def test_form_is_one_file_in_one_field() -> None:
    body, content_type = frames.form("image", b"\x89PNG\r\n\r\nand more")

    message = email.message_from_bytes(f"content-type: {content_type}\r\n\r\n".encode() + body)
    (part,) = message.walk() if not message.is_multipart() else list(message.walk())[1:]
    assert part.get_param("name", header="content-disposition") == "image"
    assert part.get_content_type() == "image/png"
    assert part.get_payload(decode=True) == b"\x89PNG\r\n\r\nand more"

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from protos.gateway.v1 import image_service_pb2 as pb
from tests.gateway.fake_triton import FakeTriton, label_of
from tests.gateway.servicer.calls import INVALID, picture


async def test_classify_answers_with_the_best_classes(stub: Any, triton: FakeTriton, digit: NDArray[np.uint8]) -> None:
    triton.answer = lambda images: np.array([[0, 0.1, 0, 0.2, 0, 0, 0, 0.6, 0.1, 0]], np.float32)
    response = await stub.Classify(pb.ClassifyRequest(image=picture(digit), top_k=4))

    assert [one.label for one in response.top] == [7, 3, 1, 8]
    assert [one.name for one in response.top] == ["7", "3", "1", "8"]
    assert response.top[0] == response.prediction
    assert response.prediction.probability == pytest.approx(0.6)
    assert (response.model, response.model_version) == ("mnist", 1)
    assert np.array_equal(triton.received[-1][0], digit)


async def test_classify_lists_one_class_unless_asked_for_more(stub: Any, digit: NDArray[np.uint8]) -> None:
    response = await stub.Classify(pb.ClassifyRequest(image=picture(digit)))

    assert [one.label for one in response.top] == [label_of(digit)]


async def test_large_image_is_decoded_beside_the_loop(stub: Any, digit: NDArray[np.uint8]) -> None:
    big = np.kron(digit, np.ones((40, 40), np.uint8))
    noisy = np.random.default_rng(0).integers(0, 3, big.shape, np.uint8) + (big // 2)
    for pixels in (big, noisy):
        response = await stub.Classify(pb.ClassifyRequest(image=picture(pixels)))
        assert response.model == "mnist"


@pytest.mark.parametrize("turn_seconds", [0.0, 60.0], ids=["a turn for each", "a turn for all"])
async def test_unreadable_image_fails_alone_in_its_batch(
    stub: Any, triton: FakeTriton, monkeypatch: pytest.MonkeyPatch, turn_seconds: float
) -> None:
    monkeypatch.setattr("gateway.servicer._TURN_SECONDS", turn_seconds)
    pixels = np.random.default_rng(1).integers(0, 256, (100, 28, 28), np.uint8)
    images = [picture(one, polarity=pb.POLARITY_LIGHT_ON_DARK) for one in pixels]
    bad = {0: pb.Image(), 40: pb.Image(encoded=b"no"), 99: pb.Image(raw=pb.RawImage(height=1, width=0))}
    for index, image in bad.items():
        images[index] = image
    response = await stub.ClassifyBatch(pb.ClassifyBatchRequest(images=images, top_k=2))

    assert len(response.results) == 100
    for index, result in enumerate(response.results):
        if index in bad:
            assert result.code == INVALID.value[0]
            assert result.error.startswith(f"images[{index}]")
            assert not result.HasField("prediction")
        else:
            assert (result.code, result.error) == (0, "")
            assert result.prediction.label == label_of(pixels[index])
            assert len(result.top) == 2
    assert response.results[99].error == "images[99].raw.width: 0; allowed are 1..4096"


async def test_batch_of_unreadable_images_asks_nothing_of_triton(stub: Any, triton: FakeTriton) -> None:
    def count() -> int:
        return sum(image.any() for images in triton.received for image in images)

    response = await stub.ClassifyBatch(pb.ClassifyBatchRequest(images=[pb.Image(encoded=b"no")] * 3))

    assert [result.code for result in response.results] == [3, 3, 3]
    assert count() == 0

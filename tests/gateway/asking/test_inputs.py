import numpy as np
import pytest

from gateway.asking.inputs import calls_of


@pytest.mark.parametrize(
    ("num_images", "num_bytes", "expected"),
    [
        pytest.param(600, 784, [256, 256, 88], id="many"),
        pytest.param(5, 3 << 20, [2, 2, 1], id="large"),
        pytest.param(2, 9 << 20, [1, 1], id="larger than a call should be"),
        pytest.param(0, 0, [], id="none"),
    ],
)
async def test_images_leave_in_several_calls_when_they_are_too_much_for_one(
    num_images: int, num_bytes: int, expected: list[int]
) -> None:
    image = np.zeros((1, num_bytes), np.uint8)

    calls = [len(messages) async for messages in calls_of([image] * num_images, "unspecified", "unspecified")]

    assert calls == expected

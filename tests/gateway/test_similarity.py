import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from skimage.metrics import structural_similarity

from gateway.similarity import PIXEL_METHODS, Method, cosine, ssim

images = st.binary(min_size=784, max_size=784).map(lambda data: np.frombuffer(data, np.uint8).reshape(28, 28))


@given(images, images)
def test_ssim_is_that_of_scikit_image(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> None:
    expected = structural_similarity(  # type: ignore[no-untyped-call]  # so in scikit-image
        first, second, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255
    )
    assert ssim(first, second) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("method", PIXEL_METHODS)
@given(images, images)
def test_score_is_one_for_equals_symmetric_and_in_range(
    method: Method, first: NDArray[np.uint8], second: NDArray[np.uint8]
) -> None:
    score = PIXEL_METHODS[method]

    assert score(first, first) == pytest.approx(1.0, abs=1e-12)
    assert score(first, second) == score(second, first)
    assert -1.0 <= score(first, second) <= 1.0


def test_cosine_is_that_of_the_angle() -> None:
    assert cosine(np.array([1, 0]), np.array([1, 1])) == pytest.approx(np.sqrt(0.5))
    assert cosine(np.array([1.0, 2.0]), np.array([-1.0, -2.0])) == -1.0
    # As uint8 the product of 200 and 200 would be 64.
    assert cosine(np.array([200, 0], np.uint8), np.array([200, 0], np.uint8)) == 1.0


def test_blank_image_is_like_another_blank_and_like_nothing_else() -> None:
    blank = np.zeros((28, 28), np.uint8)
    ink = np.eye(28, dtype=np.uint8)

    assert [cosine(blank, blank), cosine(blank, ink), cosine(ink, blank)] == [1.0, 0.0, 0.0]
    assert ssim(blank, blank) == 1.0

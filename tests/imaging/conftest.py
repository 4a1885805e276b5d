import pytest

from imaging.decoding import Pixels
from tests.digits import seven


@pytest.fixture
def digit() -> Pixels:
    return seven()

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.streamers import streaming


@pytest.fixture(scope="package")
def streamer(tiny_mnist: Path) -> Iterator[str]:
    with streaming(f"mnist={tiny_mnist}") as address:
        yield address

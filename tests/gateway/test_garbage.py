import gc
from collections.abc import Iterator

import pytest

from gateway.client import ImageClient
from imaging.decoding import ImageFile


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


async def test_unreadable_images_of_a_batch_are_let_go_with_their_answer(
    client: ImageClient, no_collector: None
) -> None:
    await client.classify_batch([b"no image"] * 4)

    # In a circle with what went wrong they would stay until the garbage collector comes, up to 16 MiB each.
    assert not [one for one in gc.get_objects() if isinstance(one, ImageFile)]

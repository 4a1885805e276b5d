from collections.abc import Callable

import numpy as np
import pytest

from gateway.cache import RowCache
from gateway.client import ImageClient
from gateway.server import GatewayServer
from gateway.settings import GatewaySettings
from imaging.decoding import Pixels
from tests.gateway.coalescing.line import Line, settled, told
from tests.gateway.fake_triton import FakeTriton, label_of

ROW = np.array([1.0], np.float32)


def test_least_recently_used_goes_first() -> None:
    cache = RowCache(2)
    for pixels in (b"a", b"b"):
        cache.put("v1", pixels, ROW)
    cache.get("v1", b"a")
    cache.put("v1", b"c", ROW)

    assert [cache.get("v1", pixels) is not None for pixels in (b"a", b"b", b"c")] == [True, False, True]
    assert (len(cache), cache.num_hits, cache.num_misses) == (2, 3, 1)


def test_answer_of_other_weights_is_none() -> None:
    cache = RowCache(2)
    cache.put("v1", b"a", ROW)

    assert cache.get("v2", b"a") is None


def test_kept_row_does_not_keep_its_batch() -> None:
    cache = RowCache(1)
    batch = np.zeros((64, 10), np.float32)
    cache.put("v1", b"a", batch[3])
    batch[3] = 9
    row = cache.get("v1", b"a")

    assert row is not None
    assert row.base is None
    assert not row.any()


async def test_image_that_comes_again_is_not_asked_again_and_takes_no_place() -> None:
    line = Line(cache=RowCache(8))
    first = line.ask(b"\x05", b"\x06")
    await settled()
    line.model.answer()
    await settled()
    again = line.ask(b"\x06", b"\x05")

    assert told(first) == [10.0, 12.0]
    assert told(again) == [12.0, 10.0]
    assert line.model.sizes == [2]
    assert line.room.num_taken == 0


async def test_failure_is_not_kept() -> None:
    line = Line(cache=RowCache(8))
    line.ask(b"\xff")
    await settled()
    line.model.answer()
    await settled()
    line.ask(b"\xff")
    await settled()

    assert line.model.sizes == [1, 1]
    line.model.answer()


@pytest.fixture
def publish(settings: GatewaySettings) -> Callable[[str], None]:
    """Write the card of version 1, which tells the digest of its weights."""
    card = settings.model_repository / "mnist" / "1" / "card.json"
    card.parent.mkdir(parents=True)

    def write(digest: str) -> None:
        card.write_text(f'{{"digest": "sha256:{digest}"}}')

    write("aa")
    return write


@pytest.fixture
def keeping(settings: GatewaySettings) -> GatewaySettings:
    """With a cache."""
    return settings.model_copy(update={"cache_rows": 8})


async def test_version_published_anew_under_its_number_is_asked_anew(
    keeping: GatewaySettings, publish: Callable[[str], None], triton: FakeTriton, digit: Pixels
) -> None:
    async with GatewayServer(keeping) as gateway, ImageClient(gateway.address) as client:
        await client.wait_ready()
        for _ in range(2):
            assert (await client.classify(digit)).label == label_of(digit)
        publish("bb")
        await client.models()
        triton.answer = lambda images: np.eye(10, dtype=np.float32)[[9] * len(images)]
        assert (await client.classify(digit)).label == 9
    assert sum(images.any() for images in triton.received) == 2


@pytest.mark.usefixtures("publish")
async def test_version_that_was_unloaded_is_asked_anew_when_it_is_back(
    keeping: GatewaySettings, triton: FakeTriton, digit: Pixels
) -> None:
    async with GatewayServer(keeping) as gateway, ImageClient(gateway.address) as client:
        await client.wait_ready()
        await client.classify(digit)
        for models in ({}, {"mnist": [1]}):
            triton.models = models
            await client.models()
        await client.wait_ready()
        await client.classify(digit)

    assert sum(images.any() for images in triton.received) == 2

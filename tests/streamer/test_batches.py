import struct

import google_crc32c
import numpy as np

from streamer import batches
from streamer.order import Order, shares
from streamer.plan import Plan
from streamer.source import Split, make_split

PLAN = Plan(dataset="mnist", seed=9, epoch=2, batch_size=30)


def split(num_samples: int = 100) -> Split:
    images = np.random.default_rng(1).integers(0, 256, (num_samples, 4, 5), dtype=np.uint8)
    return make_split("train", images, np.arange(num_samples, dtype=np.uint8) % 10, num_classes=10)


def test_batches_hold_the_samples_of_the_order() -> None:
    data = split()
    order = Order(100, fingerprint=data.fingerprint, seed=9, epoch=2).indices(np.arange(100))

    assembled = list(batches.assemble(data, PLAN, shares(PLAN, 100)))
    assert [len(batch.indices) for batch in assembled] == [30, 30, 30, 10]
    assert np.concatenate([batch.indices for batch in assembled]).tolist() == order.tolist()
    for batch in assembled:
        assert np.array_equal(batch.images, data.images[batch.indices])
        assert np.array_equal(batch.labels, data.labels[batch.indices])


def test_blocks_of_positions_do_not_show() -> None:
    """9,000 samples are more than one block of look-ups."""
    data = split(9000)
    plan = Plan(dataset="mnist", seed=9, batch_size=1000)

    indices = np.concatenate([batch.indices for batch in batches.assemble(data, plan, shares(plan, 9000))])
    assert np.array_equal(np.sort(indices), np.arange(9000))


def test_checksum_is_the_one_of_the_contract() -> None:
    data = split()
    plan = Plan(dataset="mnist", epoch=3, world_size=2, rank=1, batch_size=20)

    first = next(batches.assemble(data, plan, shares(plan, 100)))
    header = struct.pack("<7Q", 0, 3, 2, 1, 0, 40, 20) + struct.pack("<20Q", *range(20, 40))
    content = header + data.images[20:40].tobytes() + data.labels[20:40].tobytes()
    assert first.crc32c == google_crc32c.value(content)


def test_nothing_is_gathered_before_it_is_asked_for() -> None:
    taken = []

    def watched() -> object:
        for share in shares(PLAN, 10_000):
            taken.append(share)
            yield share

    assembled = batches.assemble(split(10_000), PLAN, watched())  # type: ignore[arg-type]
    assert taken == []
    next(assembled)
    assert len(taken) * PLAN.batch_size <= 8192


def test_batch_of_the_largest_size_fits_its_message() -> None:
    assert batches.max_samples(split(), 256) == 0
    assert batches.max_samples(split(), 256 + 26 * 7) == 7

from typing import Any

import numpy as np
import pytest

from streamer.checksum import batch_checksum
from streamer.plan import Plan

PLAN = Plan(dataset="mnist", seed=1, epoch=2, world_size=4, rank=3)


def checksum(plan: Plan = PLAN, position: int = 5, next_position: int = 7, **other: Any) -> int:
    parts: dict[str, Any] = {"indices": np.array([8, 9], np.uint64), "images": b"images", "labels": b"labels"}
    return batch_checksum(plan, position=position, next_position=next_position, **(parts | other))


@pytest.mark.parametrize(
    "change",
    [
        {"position": 6},
        {"next_position": 8},
        {"indices": np.array([9, 8], np.uint64)},
        {"images": b"imagez"},
        {"labels": b"labelz"},
        {"plan": Plan(dataset="mnist", seed=0, epoch=2, world_size=4, rank=3)},
        {"plan": Plan(dataset="mnist", seed=1, epoch=3, world_size=4, rank=3)},
        {"plan": Plan(dataset="mnist", seed=1, epoch=2, world_size=5, rank=3)},
        {"plan": Plan(dataset="mnist", seed=1, epoch=2, world_size=4, rank=2)},
    ],
)
def test_checksum_changes_with_every_part(change: dict[str, Any]) -> None:
    assert checksum(**change) != checksum()


def test_checksum_is_the_same_for_arrays_and_their_bytes() -> None:
    images, labels = np.frombuffer(b"images", np.uint8), np.frombuffer(b"labels", np.uint8)

    assert checksum(images=images, labels=labels) == checksum()


def test_absent_seed_counts_as_zero() -> None:
    absent, zero = Plan(dataset="mnist"), Plan(dataset="mnist", seed=0)

    assert checksum(absent) == checksum(zero)

"""Batches as a streamer sends them, and trainers that keep a ledger of them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from streamer.ledger import Ledger
from streamer.order import Order, shares
from streamer.plan import Plan
from streamer.proof import Verdict, verify

PLAN = Plan(dataset="mnist", seed=7, batch_size=10, fingerprint=b"f" * 32)
NUM_SAMPLES = 100


@dataclass(frozen=True, eq=False)
class Received:
    """A batch without its pixels."""

    position: int
    next_position: int
    indices: NDArray[np.int64]


def sent(plan: Plan = PLAN, num_samples: int = NUM_SAMPLES, *, start: int = 0, stop: int = 0) -> Iterator[Received]:
    """Yield what a streamer that works sends."""
    order = Order(num_samples, fingerprint=plan.fingerprint, seed=plan.seed, epoch=plan.epoch)
    for share in shares(plan, num_samples, start_position=start, end_position=stop):
        if share.last > share.first:
            indices = order.indices(np.arange(share.first, share.last))
            yield Received(share.position, share.next_position, indices)


def train(
    path: Path,
    batches: Iterable[Received] | None = None,
    plan: Plan = PLAN,
    num_samples: int = NUM_SAMPLES,
    *,
    start: int = 0,
) -> None:
    """Keep the ledger of a trainer that commits each batch after its step."""
    with Ledger(path) as ledger:
        delivery = ledger.begin(plan, num_samples=num_samples, start_position=start)
        for batch in sent(plan, num_samples, start=start) if batches is None else batches:
            delivery.record(batch)
            delivery.commit(batch.next_position)


def ranks(plan: Plan, world_size: int) -> list[Plan]:
    """Return the plan of each rank."""
    return [replace(plan, world_size=world_size, rank=rank) for rank in range(world_size)]


def counts(verdict: Verdict) -> tuple[int, int, int, int]:
    """Return lost, repeated, unexpected and recovered samples."""
    return verdict.lost, verdict.repeated, verdict.unexpected, verdict.recovered


def judged(*paths: Path) -> tuple[int, int, int, int]:
    """Return the same of ledgers."""
    return counts(verify(paths))

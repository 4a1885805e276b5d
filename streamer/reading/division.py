"""
One rank's share of an epoch, divided among the worker processes that read it: pure arithmetic.

With n workers, worker w reads as rank ``w * W + r`` of ``W * n``: of n global batches in a row that with w before it,
and of that exactly what rank r has. Batches that are taken from the workers in turn are then the very batches, in the
very order, that one reader gets. What is left at the end, less than n global batches, is read one by one.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from streamer.plan import Plan, Remainder


@dataclass(frozen=True, slots=True)
class Leg:
    """What one worker reads by one call."""

    plan: Plan
    start_position: int
    end_position: int
    """0 means to the end of the epoch."""
    shift: int
    """What is to be added to a batch's position to have its position in the whole."""
    length: int
    """Samples of a global batch of the whole; 0 where positions are as they come."""

    def place(self, position: int, next_position: int) -> tuple[int, int]:
        """Return where a batch lies in the whole that came with these positions."""
        first = position + self.shift
        return first, first + self.length if self.length else next_position


@dataclass(frozen=True, slots=True)
class Division:
    """
    An epoch as one rank reads it.

    Args:
        plan: The rank's own.
        num_samples: Samples of the epoch.
        start_position: Of the first global batch.
    """

    plan: Plan
    num_samples: int
    start_position: int

    @property
    def _length(self) -> int:
        return self.plan.world_size * self.plan.batch_size

    def legs(self, worker: int, num_workers: int) -> Iterator[Leg]:
        """Yield what a worker has to read, in order; ``worker`` is 0 to ``num_workers - 1``."""
        if num_workers == 1 or self.start_position >= self.num_samples:
            # One that says that nothing is left, or what is wrong with the start, is enough.
            if worker == 0:
                yield Leg(self.plan, self.start_position, 0, 0, 0)
            return
        left, behind = self.num_samples - self.start_position, worker * self._length
        end = self.start_position + left // (num_workers * self._length) * (num_workers * self._length)
        if end > self.start_position:
            place = worker * self.plan.world_size + self.plan.rank
            plan = replace(self.plan, world_size=num_workers * self.plan.world_size, rank=place)
            yield Leg(plan, self.start_position, end, behind, self._length)
        last = end + behind
        if not self.is_over(last):
            yield Leg(self.plan, last, last + 1, 0, 0)

    def is_over(self, position: int) -> bool:
        """Tell whether no rank has anything to read from a global batch's end on."""
        left = self.num_samples - position
        return left < (self._length if self.plan.remainder is Remainder.DROP else 1)

    def ends_at(self, position: int) -> bool:
        """Tell whether the rank has nothing to read from a global batch's end on."""
        # Ranks with low numbers get what does not go round.
        return self.is_over(position) or (
            self.plan.remainder is Remainder.KEEP and self.num_samples - position <= self.plan.rank
        )

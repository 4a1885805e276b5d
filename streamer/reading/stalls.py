"""
Which stage holds a training job back: pure, from what the streamer says of each batch and what the reader measured.

A wait is followed back from the arrival that ended it: the batch was decoded here; before that it lay ready at the
streamer, and nobody took it; before that it was transformed, and before that read. What none of these covers was spent
on the way: the network, a call opened anew, a streamer busy with others.

How much more a stage needs is tf.data's rule (tensorflow/core/data/service/auto_scaler.h): as many workers as the rate
wanted over what one of them does. The rate wanted is the one at which the trainer never waits, and that of a stage now
is the one at which it would wait for this stage alone.
"""

import enum
import math
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")

# Less is noise.
_NOTABLE_SHARE = 0.01
# A trainer that hardly does anything takes any rate: no number would be enough.
_BUSY_SHARE = 0.02
# To hand a batch over that was here takes no longer.
_HANDING_OVER_SECONDS = 50e-6


class Stage(enum.Enum):
    """Where a batch can be."""

    START = "start"
    """
    Begin and end of a pass: whatever precedes its first batch, such as worker processes, connections and the first
    look at the data, and what follows its last one.
    """
    READ = "read"
    """From disk, cache or object storage."""
    TRANSFORM = "transform"
    """On the streamer's CPUs."""
    NETWORK = "network"
    """Ready, and not here yet."""
    DECODE = "decode"
    """Decoded, checked and handed over, on the reader's CPUs."""
    TRAIN = "train"
    """With the trainer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timings:
    """Where the time of one batch went, in seconds."""

    read_seconds: float = 0.0
    """Finding and reading its samples."""
    transform_seconds: float = 0.0
    """Changing them, and waiting for a CPU that does."""
    held_seconds: float = 0.0
    """Ready at the streamer, and not taken."""
    decode_seconds: float = 0.0
    """Decoding and checking it on the reader's side."""


# Saves asking where a batch was that nobody waited for.
_HANDED_OVER = Timings(decode_seconds=_HANDING_OVER_SECONDS)


@dataclass(frozen=True, kw_only=True, slots=True)
class StallReport:
    """What a job has waited for; as a string, a line for its log."""

    total_seconds: float
    """Waiting and training."""
    waited_seconds: float
    """Without a batch to train on."""
    shares: Mapping[Stage, float]
    """Of the time waited, for each stage but TRAIN; their sum is 1, or 0 where there was no wait."""
    factor: float | None
    """How many times what it has now the stage waited for most needs; None where the trainer takes any rate."""
    cpus: int | None = None
    """What the streamers have for transforms, where the caller knows."""
    readers: int = 1
    """Streams that are read side by side."""

    @property
    def waited_share(self) -> float:
        """Of the whole time, 0..1."""
        return self.waited_seconds / self.total_seconds if self.total_seconds > 0 else 0.0

    @property
    def bottleneck(self) -> Stage:
        """What holds the job back; TRAIN where it hardly waits."""
        if self.waited_share < _NOTABLE_SHARE:
            return Stage.TRAIN
        return max(self.shares, key=lambda stage: self.shares[stage])

    @property
    def advice(self) -> str:
        """Which stage to do something about, and what."""
        stage = self.bottleneck
        if stage is Stage.TRAIN:
            return "the trainer sets the pace"
        return f"{self.shares[stage]:.0%} of the wait is {stage.value}: {self._remedy(stage)}"

    def more(self, now: int) -> int | None:
        """Return how many more CPUs or readers the bottleneck needs where it has ``now``; None if that is unknown."""
        return None if self.factor is None else max(1, math.ceil(now * (self.factor - 1)))

    def _remedy(self, stage: Stage) -> str:
        times = "more" if self.factor is None else f"{self.factor:.1f} times the"
        if stage is Stage.START:
            return "it comes once a pass: read longer ones, and keep worker processes by persistent_workers"
        if stage is Stage.READ:
            return f"{times} read rate, by faster storage or a larger cache"
        if stage is Stage.NETWORK:
            return f"{times} bandwidth, by more readers or a nearer streamer"
        if stage is Stage.DECODE:
            return f"{_count(self.more(self.readers), 'worker')} that read (num_workers of the DataLoader)"
        if self.cpus is None:
            return f"{times} CPUs on the streamers"
        return f"{_count(self.more(self.cpus), 'CPU')} on the streamers"

    def __str__(self) -> str:
        return f"{self.waited_share:.1%} of the time was spent waiting for data; {self.advice}"


def _count(number: int | None, what: str) -> str:
    if number is None:
        return f"more {what}s"
    return f"{number} more {what}{'s'[: number != 1]}"


class Stalls:
    """What a reader has measured so far."""

    def __init__(self) -> None:
        self._trained_seconds = 0.0
        self._waits: dict[Stage, float] = {stage: 0.0 for stage in Stage if stage is not Stage.TRAIN}

    def watch(
        self, items: Generator[Item, None, None], timings_of: Callable[[Item], Timings]
    ) -> Generator[Item, None, None]:
        """Yield the items of one pass, and measure waits and what is done in between; closing it closes ``items``."""
        is_first = True
        with closing(items):
            while True:
                asked = time.perf_counter()
                try:
                    item = next(items)
                except StopIteration:
                    self.started(time.perf_counter() - asked)
                    return
                given = time.perf_counter()
                wait = given - asked
                if is_first:
                    self.started(wait)
                else:
                    self.waited(wait, _HANDED_OVER if wait < _HANDING_OVER_SECONDS else timings_of(item))
                is_first = False
                try:
                    yield item
                finally:
                    self.trained(time.perf_counter() - given)

    def trained(self, seconds: float) -> None:
        """Add time in which the trainer had a batch."""
        self._trained_seconds += seconds

    def started(self, seconds: float) -> None:
        """Add the wait for the first batch of a pass, or for its end."""
        self._waits[Stage.START] += seconds

    def waited(self, seconds: float, timings: Timings) -> None:
        """Add the wait for another batch, and where that was meanwhile."""
        for stage, spent in (
            (Stage.DECODE, timings.decode_seconds),
            (Stage.NETWORK, timings.held_seconds),
            (Stage.TRANSFORM, timings.transform_seconds),
            (Stage.READ, timings.read_seconds),
        ):
            covered = min(seconds, spent)
            self._waits[stage] += covered
            seconds -= covered
        self._waits[Stage.NETWORK] += seconds

    def report(self, *, cpus: int | None = None, readers: int = 1) -> StallReport:
        """
        Say what was waited for so far.

        Args:
            cpus: What the streamers have for transforms, if known: then the advice is a number of CPUs.
            readers: Streams that are read side by side, as by workers of a DataLoader.
        """
        waited, most = sum(self._waits.values()), max(self._waits.values())
        total = waited + self._trained_seconds
        return StallReport(
            total_seconds=total,
            waited_seconds=waited,
            shares={stage: seconds / waited if waited else 0.0 for stage, seconds in self._waits.items()},
            factor=1 + most / self._trained_seconds if self._trained_seconds > _BUSY_SHARE * total else None,
            cpus=cpus,
            readers=readers,
        )

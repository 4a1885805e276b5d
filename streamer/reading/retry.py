"""How long a reader goes on about streams that break."""

import random
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Retry:
    """How long to go on about a stream that breaks; every batch that arrives starts the count anew."""

    max_attempts: int = 20
    """Openings of a stream without a batch in between; 1 is no second try."""
    first_batch_seconds: float = 10.0
    """From the start to the first batch."""
    next_batch_seconds: float = 60.0
    """From one batch to the next, however often the stream breaks in between."""
    stall_seconds: float = 20.0
    """A stream that is silent for so long counts as broken."""
    first_delay_seconds: float = 0.1
    """Before the second attempt; doubled for each one after it and drawn from its upper half at random."""
    max_delay_seconds: float = 5.0
    """No delay is longer."""

    def delay_seconds(self, attempt: int) -> float:
        """Return how long to wait before an attempt; the first one is 1."""
        longest = min(self.max_delay_seconds, self.first_delay_seconds * 2.0 ** min(attempt - 2, 30))
        return longest * random.uniform(0.5, 1.0)

"""When calls begin: on a schedule that answers do not change, or one after the other."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, takewhile


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenLoop:
    """
    Calls at a fixed rate, however slow the answers are: users who do not know of each other.

    The i-th call is due at ``i / rate`` seconds, and its latency counts from then. So a server that stalls is charged
    with every call that was due meanwhile, and a client that is late with its own lateness.
    """

    rate: float
    """Calls a second, above 0."""
    max_outstanding: int
    """Calls that may wait for an answer at once; one more is not sent, and counted as that."""

    def due(self, seconds: float) -> Iterator[float]:
        """Return the moments, in seconds from the start, of the calls due before ``seconds`` have passed."""
        # Divided, not summed up: the millionth call is due as exactly as the first.
        return takewhile(lambda moment: moment < seconds, (number / self.rate for number in count()))


@dataclass(frozen=True, kw_only=True, slots=True)
class ClosedLoop:
    """
    Callers that each wait for an answer before the next call: a worker pool.

    While the server stalls they send nothing, so one stall costs each caller one slow call: percentiles hide it.
    """

    callers: int
    """At least 1."""


Pace = OpenLoop | ClosedLoop

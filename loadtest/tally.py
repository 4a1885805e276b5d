"""What came of the calls: codes, latencies, right and wrong answers."""

from collections import Counter
from dataclasses import dataclass, field

from loadtest.latency import Latencies

OK = "OK"
NOT_SENT = "NOT_SENT"
"""Due while as many calls were outstanding as may be."""
INTERRUPTED = "INTERRUPTED"
"""Without an answer when the test was stopped."""
DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
BAD_ANSWER = "BAD_ANSWER"
"""A message arrived, but not one that answers the request."""

_MAX_MESSAGES = 16
_OTHER_MESSAGES = "other messages"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an answer was worth."""

    images: int
    """That the call carried."""
    judged: int = 0
    """Images whose class was asked for."""
    right: int = 0
    """Of these, the ones named right."""
    refused: int = 0
    """Images that failed alone in a call that did not."""
    same_score: float | None = None
    """Similarity of two images of one class, where that was asked for."""
    different_score: float | None = None
    """Similarity of two images of different classes, where that was asked for."""


@dataclass(slots=True)
class Mean:
    """A mean and how many went into it."""

    count: int = 0
    total: float = 0.0

    def add(self, value: float | None) -> None:
        """Add a value; None is none."""
        if value is not None:
            self.count += 1
            self.total += value

    @property
    def value(self) -> float | None:
        """None while there is nothing to take the mean of."""
        return self.total / self.count if self.count else None


@dataclass(slots=True)
class Tally:
    """Counts of one phase of a test; memory does not grow with the number of calls."""

    codes: Counter[str] = field(default_factory=Counter)
    """Calls by the name of their gRPC status, or a name of ours; once closed, their sum is every call that was due."""
    messages: Counter[str] = field(default_factory=Counter)
    """Failed calls by code and words; rare words beyond the first few share one entry."""
    latencies: dict[str, Latencies] = field(default_factory=lambda: {OK: Latencies()})
    """By code; calls that were not sent or not waited for have none."""
    lateness: Latencies = field(default_factory=Latencies)
    """From the moment a call was due to the moment it was sent."""
    images: int = 0
    """In calls that were answered."""
    judged: int = 0
    right: int = 0
    refused: int = 0
    same: Mean = field(default_factory=Mean)
    different: Mean = field(default_factory=Mean)
    _unfinished: int = 0

    @property
    def count(self) -> int:
        """Calls that ended, or were not sent."""
        return self.codes.total()

    @property
    def succeeded(self) -> int:
        """Calls that were answered."""
        return self.codes[OK]

    @property
    def succeeded_latencies(self) -> Latencies:
        """Of the calls that were answered."""
        return self.latencies[OK]

    def begin(self, lateness_seconds: float) -> None:
        """Count a call as sent, this long after it was due."""
        self._unfinished += 1
        self.lateness.record(lateness_seconds)

    def skip(self) -> None:
        """Count a call that was due and could not be sent."""
        self.codes[NOT_SENT] += 1

    def succeed(self, seconds: float, verdict: Verdict) -> None:
        """Count an answer that came ``seconds`` after its call was due."""
        self._end(OK, seconds)
        self.images += verdict.images
        self.judged += verdict.judged
        self.right += verdict.right
        self.refused += verdict.refused
        self.same.add(verdict.same_score)
        self.different.add(verdict.different_score)

    def fail(self, seconds: float, code: str, details: str) -> None:
        """Count a call that failed ``seconds`` after it was due."""
        self._end(code, seconds)
        message = f"{code}: {details}"
        if message not in self.messages and len(self.messages) >= _MAX_MESSAGES:
            message = _OTHER_MESSAGES
        self.messages[message] += 1

    def close(self, code: str) -> None:
        """Count what was sent and never ended under ``code``."""
        if self._unfinished:
            self.codes[code] += self._unfinished
        self._unfinished = 0

    def _end(self, code: str, seconds: float) -> None:
        self._unfinished -= 1
        self.codes[code] += 1
        if code not in self.latencies:
            self.latencies[code] = Latencies()
        self.latencies[code].record(seconds)

"""Latencies in bounded memory, exact to three digits."""

import math

from hdrh.histogram import HdrHistogram

_MICROSECONDS = 1_000_000
_LONGEST_SECONDS = 3600
_DIGITS = 3


class Latencies:
    """
    Durations in an HdrHistogram, 1 µs to 1 h to three significant digits; extremes and mean are exact.

    Attributes:
        count: How many were recorded.
        fastest: In seconds; 0 while there are none.
        slowest: In seconds; 0 while there are none.
    """

    def __init__(self) -> None:
        self.count = 0
        self.slowest = 0.0
        self._fastest = math.inf
        self._sum = 0.0
        self._histogram = HdrHistogram(1, _LONGEST_SECONDS * _MICROSECONDS, _DIGITS)

    def record(self, seconds: float) -> None:
        """Add one duration; what is below 0 counts as 0."""
        seconds = max(0.0, seconds)
        self.count += 1
        self._sum += seconds
        self._fastest = min(self._fastest, seconds)
        self.slowest = max(self.slowest, seconds)
        self._histogram.record_value(min(round(seconds * _MICROSECONDS), _LONGEST_SECONDS * _MICROSECONDS))

    @property
    def fastest(self) -> float:
        """Shortest duration, in seconds; 0 while there are none."""
        return self._fastest if self.count else 0.0

    @property
    def mean(self) -> float:
        """In seconds; 0 while there are none."""
        return self._sum / self.count if self.count else 0.0

    def at(self, percentage: float) -> float:
        """
        Return the duration that ``percentage`` of all do not exceed, in seconds; 0 while there are none.

        Args:
            percentage: Above 0, up to 100.
        """
        if not self.count:
            return 0.0
        value: int = self._histogram.get_value_at_percentile(percentage)
        # A bucket's upper end can lie above everything that is in it.
        return min(value / _MICROSECONDS, self.slowest)

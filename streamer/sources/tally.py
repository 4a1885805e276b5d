"""What reading from disk and object storage has cost so far: plain counts for whoever shows metrics."""

from dataclasses import dataclass
from threading import Lock


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """Counts since the process began; none is ever less than the last time."""

    cache_hits: int = 0
    """Blocks read from the local cache."""
    cache_misses: int = 0
    """Blocks that were not there, or damaged."""
    evictions: int = 0
    """Blocks removed to make room."""
    uncached: int = 0
    """Fetched without being kept, whole blocks or parts: nothing could make room for them, or the disk refused."""
    fetched_objects: int = 0
    """Answers from the object storage, whole objects or ranges of them."""
    fetched_bytes: int = 0
    """Bytes in these answers."""
    retries: int = 0
    """Requests to the object storage made again after a failure."""
    checksum_failures: int = 0
    """Blocks or samples that were not what was written, wherever they lay."""


class Tally:
    """Counts that several threads add to."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._values = dict.fromkeys(Counts.__slots__, 0)

    def add(self, **amounts: int) -> None:
        """Add to the counts named."""
        with self._lock:
            for name, amount in amounts.items():
                self._values[name] += amount

    def counts(self) -> Counts:
        """Return all counts as of one moment."""
        with self._lock:
            return Counts(**self._values)

"""
Where the time of one call goes: told by whoever works on it, shown in the log and to the caller.

The caller gets it behind the answer, as trailing metadata: the call's id under :data:`REQUEST_ID_KEY` and the times in
the syntax of W3C's Server-Timing (https://www.w3.org/TR/server-timing/) under :data:`TIMING_KEY`.
"""

import itertools
import os
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from functools import cache

REQUEST_ID_KEY = "x-request-id"
"""Metadata of a call: the caller's id for it; and of its answer, the same or one made here."""
TIMING_KEY = "server-timing"
"""Trailing metadata: ``decode;dur=0.05, wait;dur=0.40, upstream;dur=6.10, batch;desc=17, total;dur=6.71``."""

_MAX_ID_LENGTH = 64


class Budget:
    """
    One call's id, and what its time was spent on.

    Args:
        request_id: The caller's, where it brought a usable one.

    Attributes:
        request_id: The call's id: printable ASCII without spaces, at most 64 characters.
    """

    __slots__ = ("_counts", "_spent", "request_id")

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self._spent: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def spend(self, stage: str, seconds: float) -> None:
        """Add time spent on a stage; a stage may come more than once."""
        self._spent[stage] = self._spent.get(stage, 0.0) + seconds

    def count(self, name: str, number: int) -> None:
        """Note a number that explains the times."""
        self._counts[name] = number

    def metadata(self, total_seconds: float) -> tuple[tuple[str, str], ...]:
        """Return what the caller is told, as trailing metadata."""
        # Written in one go: this is done for every call.
        times = "".join([f"{stage};dur={1000 * seconds:.2f}, " for stage, seconds in self._spent.items()])
        numbers = "".join([f"{name};desc={number}, " for name, number in self._counts.items()])
        return (REQUEST_ID_KEY, self.request_id), (TIMING_KEY, f"{times}{numbers}total;dur={1000 * total_seconds:.2f}")

    def fields(self) -> dict[str, float | int]:
        """Return what the log line is told: milliseconds by stage, and the numbers."""
        return {f"{stage}_ms": round(1000 * seconds, 3) for stage, seconds in self._spent.items()} | self._counts


def begin(metadata: Iterable[tuple[str, str | bytes]] | None) -> Budget:
    """
    Begin the budget of the call that this task handles, and return it.

    Args:
        metadata: What came with the call.
    """
    budget = Budget(_given(metadata or ()) or _made())
    _current.set(budget)
    return budget


def current() -> Budget:
    """Return the budget of the call that this task handles; outside of one, one that nobody looks at."""
    budget = _current.get()
    return Budget("") if budget is None else budget


def parse(timing: str) -> Mapping[str, float]:
    """Return milliseconds, or a number, by name, of what :data:`TIMING_KEY` holds; leaves out what it does not know."""
    found = {}
    for part in timing.split(","):
        name, _, rest = part.strip().partition(";")
        _, _, value = rest.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            continue
    return found


_current: ContextVar[Budget | None] = ContextVar("budget", default=None)
_numbers = itertools.count(1)


def _made() -> str:
    """Return an id that no other call has."""
    return f"{_process()}-{next(_numbers):x}"


@cache
def _process() -> str:
    return os.urandom(6).hex()


def _given(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    for key, value in metadata:
        if key == REQUEST_ID_KEY:
            usable = isinstance(value, str) and value.isascii() and value.isprintable() and " " not in value
            return str(value) if usable and 0 < len(value) <= _MAX_ID_LENGTH else ""
    return ""

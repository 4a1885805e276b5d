"""A bounded amount of something, of which each caller has a fair share; pure."""

import time
from collections import OrderedDict
from typing import Literal

# Below this part of the bound everybody gets what they ask for.
_AMPLE = 0.5
# The last part of the bound, which is kept for who comes next: one sixteenth.
_KEPT = 16
# How long, and how many, of those count as callers who hold nothing because they were refused.
_REMEMBERED_SECONDS = 10.0
_MAX_REMEMBERED = 64


class Shares:
    """
    So much of something, over all callers.

    While less than half is taken, anybody may take it. Beyond, a caller may hold an equal share of all; and in the
    last sixteenth a share as if one more had come, so that a flood of one, or of some, leaves room for who comes next.
    Who was refused counts for a while as if it held something: whoever has more than its share makes room for it. A
    caller who holds nothing is not asked for its share.

    Args:
        limit: All there is, at least 1.

    Attributes:
        limit: The same.
        taken: What is held now.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.taken = 0
        self._ample = int(_AMPLE * limit)
        self._kept_from = limit - limit // _KEPT
        self._by_caller: dict[str, int] = {}
        self._refused: OrderedDict[str, float] = OrderedDict()

    def held_by(self, caller: str) -> int:
        """Return what a caller holds."""
        return self._by_caller.get(caller, 0)

    def lack(self, caller: str, amount: int, *, leaving: int = 0) -> Literal["", "room", "share"]:
        """
        Return why a caller cannot take so much now: there is too little, or it is more than its share.

        Args:
            caller: Who.
            amount: How much.
            leaving: So much is to be left for others, whatever their shares; at most half.
        """
        would_be = self.taken + amount
        if would_be <= self._ample:
            return ""
        if would_be > self.limit - leaving:
            return "room"
        held = self._by_caller.get(caller, 0)
        return "share" if held and held + amount > self._share(would_be) else ""

    def refuse(self, caller: str, amount: int, what: str) -> str:
        """
        Say why a caller cannot take so much, and remember that it wants some.

        Args:
            caller: As of :meth:`lack`, which has said why.
            amount: The same.
            what: Of what, for people.
        """
        held = self._by_caller.get(caller, 0)
        if self.taken + amount <= self.limit and held:
            share = self._share(self.taken + amount)
            return f"this caller has {held} {what} in flight and its share is {share}"
        self.remember(caller)
        return f"{self.taken} {what} are in flight and {amount} more would exceed {self.limit}"

    def remember(self, caller: str) -> None:
        """Count a caller who holds nothing, and would, for a while."""
        if caller in self._by_caller:
            return
        self._refused[caller] = time.monotonic() + _REMEMBERED_SECONDS
        self._refused.move_to_end(caller)
        if len(self._refused) > _MAX_REMEMBERED:
            self._refused.popitem(last=False)

    def take(self, caller: str, amount: int) -> None:
        """Take so much, which is owed a :meth:`give_back`; whether it may be taken was asked before."""
        self.taken += amount
        self._by_caller[caller] = self._by_caller.get(caller, 0) + amount
        if self._refused:
            self._refused.pop(caller, None)

    def give_back(self, caller: str, amount: int) -> None:
        """Give so much back."""
        self.taken -= amount
        held = self._by_caller.get(caller, 0) - amount
        # Who holds nothing takes no share of the room; nothing at all may have been taken, or several times.
        if held:
            self._by_caller[caller] = held
        else:
            self._by_caller.pop(caller, None)

    def _share(self, would_be: int) -> int:
        while self._refused and next(iter(self._refused.values())) <= time.monotonic():
            self._refused.popitem(last=False)
        num_callers = len(self._by_caller) + len(self._refused) + (would_be > self._kept_from)
        return self.limit // max(num_callers, 1)

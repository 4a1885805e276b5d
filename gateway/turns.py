"""So many at once, and a turn for each caller who waits; pure."""

import asyncio
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass

# Weight of the newest observation in the average time that a place is held.
_SMOOTHING = 0.1


class Turns:
    """
    A number of places. Callers who wait for one take turns, whatever each of them sends; one event loop.

    What waits is bounded by whoever lets callers in.

    Args:
        limit: How many places there are, at least 1.

    Attributes:
        limit: The same; may be changed.
        num_taken: Places taken now.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.num_taken = 0
        self._waiting: OrderedDict[str, deque[_Turn]] = OrderedDict()
        # Places that each of them waits for.
        self._wanted: Counter[str] = Counter()
        # How long the last ones held theirs; 0 without experience.
        self._seconds = 0.0

    def expected_seconds(self, caller: str, num_places: int) -> float:
        """Return how long it would be until a caller has given so many back again; 0 where nothing is under way."""
        if not self.num_taken:
            return 0.0
        own = self._wanted[caller] + num_places
        # In turn: of each other no more goes before than of this one.
        ahead = self.num_taken + own + sum(min(wanted, own) for name, wanted in self._wanted.items() if name != caller)
        return (1 + max(ahead - self.limit, 0) / self.limit) * self._seconds

    async def take(self, caller: str, num_places: int) -> None:
        """
        Take some places as soon as they are free; owes a :meth:`give_back`.

        Who wants more than there are waits for all. Safe to cancel: nothing is taken then.
        """
        if not self._waiting and self._fits(num_places):
            self.num_taken += num_places
            return
        turn = _Turn(num_places, asyncio.get_running_loop().create_future())
        self._waiting.setdefault(caller, deque()).append(turn)
        self._wanted[caller] += num_places
        try:
            await turn.came
        except asyncio.CancelledError:
            if turn.came.cancelled():
                self._forget(caller, turn)
                # It may have been the one for which others waited.
                self._pass_on()
            else:
                self.give_back(num_places)
            raise

    def give_back(self, num_places: int, *, seconds: float | None = None) -> None:
        """Give some places back, and say how long they were held where that tells of others."""
        self.num_taken -= num_places
        if seconds is not None:
            self._seconds += (_SMOOTHING if self._seconds else 1) * (seconds - self._seconds)
        self._pass_on()

    def _fits(self, num_places: int) -> bool:
        return not self.num_taken or self.num_taken + num_places <= self.limit

    def _pass_on(self) -> None:
        while self._waiting:
            caller, turns = next(iter(self._waiting.items()))
            turn = turns[0]
            if turn.came.cancelled():
                return  # it forgets itself, and goes on from here
            if not self._fits(turn.num_places):
                return
            self._forget(caller, turn)
            if caller in self._waiting:
                self._waiting.move_to_end(caller)
            self.num_taken += turn.num_places
            turn.came.set_result(None)

    def _forget(self, caller: str, turn: "_Turn") -> None:
        turns = self._waiting[caller]
        turns.remove(turn)
        self._wanted[caller] -= turn.num_places
        if not turns:
            del self._waiting[caller], self._wanted[caller]


@dataclass(eq=False, frozen=True, slots=True)
class _Turn:
    """Who waits."""

    num_places: int
    came: asyncio.Future[None]

"""How much may be in flight at once, and whose; what comes beyond is refused before anything is begun, or waits."""

import asyncio
import time
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from gateway.errors import OverloadedError
from rpc.shares import Shares

# Weight of the newest observation in the average time in flight.
_SMOOTHING = 0.1
_RETRY_SECONDS = (0.01, 5.0)
# Who can wait leaves the last part of the room, one quarter, to those who cannot.
_LEFT = 4

REASONS = ("images", "bytes", "share", "deadline")
"""Why a call is refused: too many images, or bytes, in flight; too many of this caller; no answer by its deadline."""


class Admission:
    """
    A bounded number of images and bytes in flight, over all calls, and a fair share of both for each caller.

    What is fair is said in :class:`rpc.shares.Shares`. Belongs to one event loop.

    Args:
        max_images: Bound, at least 1.
        max_bytes: Bound of the bytes they came in, at least 1. A call that finds no bytes in flight is let in.

    Attributes:
        max_images: The same.
        max_bytes: The same.
        num_admitted: Images let in so far.
        num_refused: Images refused so far, by :data:`REASONS`; one for each request that was not read.
    """

    def __init__(self, max_images: int, max_bytes: int) -> None:
        self.max_images = max_images
        self.max_bytes = max_bytes
        self.num_admitted = 0
        self.num_refused: Counter[str] = Counter()
        self._images = Shares(max_images)
        self._bytes = Shares(max_bytes)
        self._seconds_in_flight = 0.05
        # By who waits; they take turns.
        self._waiting: OrderedDict[str, deque[_Waiter]] = OrderedDict()

    @property
    def num_images(self) -> int:
        """Images in flight now."""
        return self._images.taken

    @property
    def num_bytes(self) -> int:
        """The bytes they came in."""
        return self._bytes.taken

    def enter(
        self, num_images: int, *, num_bytes: int = 0, identity: str = "",
        remaining_seconds: float | None = None, expected_seconds: float = 0.0,
    ) -> "Slot":  # fmt: skip
        """Admit a call, or refuse it; never waits. Arguments and errors as of :meth:`require`."""
        self.require(
            num_images, num_bytes=num_bytes, identity=identity,
            remaining_seconds=remaining_seconds, expected_seconds=expected_seconds,
        )  # fmt: skip
        return self._admit(num_images, num_bytes, identity)

    def require(
        self, num_images: int, *, num_bytes: int = 0, identity: str = "",
        remaining_seconds: float | None = None, expected_seconds: float = 0.0,
    ) -> None:  # fmt: skip
        """
        Refuse a call that could not be admitted now.

        Args:
            num_images: That it brings, or at least brings.
            num_bytes: That they take.
            identity: Who calls.
            remaining_seconds: Until the caller stops waiting; None is never.
            expected_seconds: How long the answer is expected to take.

        Raises:
            OverloadedError: It does not fit, or could not be answered in time; carries when to try again.
        """
        if self._lacks(identity, num_images, num_bytes):
            raise self._full(identity, num_images, num_bytes)
        if remaining_seconds is not None and expected_seconds > remaining_seconds:
            raise self._refusal(
                "deadline", num_images, f"an answer would take {expected_seconds:.3g} s and the deadline is in "
                f"{max(remaining_seconds, 0):.3g} s", retry_seconds=expected_seconds,
            )  # fmt: skip

    async def enter_in_turn(
        self, num_images: int, *, num_bytes: int = 0, identity: str = "", timeout_seconds: float
    ) -> "Slot":
        """
        Admit as soon as there is room, in turn with others who wait; the last quarter is left to :meth:`enter`.

        Safe to cancel: nothing is taken then.

        Args:
            num_images: As of :meth:`enter`.
            num_bytes: The same.
            identity: The same.
            timeout_seconds: Longest wait.

        Raises:
            OverloadedError: There was no room in time.
        """
        if identity not in self._waiting and not self._lacks_for_patient(identity, num_images, num_bytes):
            return self._admit(num_images, num_bytes, identity)
        waiter = _Waiter(num_images, num_bytes, asyncio.get_running_loop().create_future())
        self._waiting.setdefault(identity, deque()).append(waiter)
        self._images.remember(identity)
        self._bytes.remember(identity)
        try:
            async with asyncio.timeout(timeout_seconds):
                return await waiter.slot
        except TimeoutError as error:
            if _is_let_in(waiter):
                return waiter.slot.result()
            raise self._full(identity, num_images, num_bytes) from error
        except asyncio.CancelledError:
            if _is_let_in(waiter):
                waiter.slot.result().release()
            raise
        finally:
            self._forget(identity, waiter)

    def _lacks(self, identity: str, num_images: int, num_bytes: int) -> bool:
        # A request that is too large for all is let in by itself.
        return bool(
            self._images.lack(identity, num_images) or (self._bytes.taken and self._bytes.lack(identity, num_bytes))
        )

    def _lacks_for_patient(self, identity: str, num_images: int, num_bytes: int) -> bool:
        return bool(
            self._images.lack(identity, num_images, leaving=self.max_images // _LEFT)
            or (self._bytes.taken and self._bytes.lack(identity, num_bytes, leaving=self.max_bytes // _LEFT))
        )

    def _full(self, identity: str, num_images: int, num_bytes: int) -> OverloadedError:
        for of, amount, what in ((self._images, num_images, "images"), (self._bytes, num_bytes, "bytes")):
            if lack := of.lack(identity, amount):
                return self._refusal(
                    "share" if lack == "share" else what, num_images, of.refuse(identity, amount, what)
                )
        return self._refusal("images", num_images, "too much is in flight for those who can wait")

    def _refusal(
        self, reason: str, num_images: int, words: str, *, retry_seconds: float | None = None
    ) -> OverloadedError:
        self.num_refused[reason] += num_images
        shortest, longest = _RETRY_SECONDS
        seconds = self._seconds_in_flight if retry_seconds is None else retry_seconds
        return OverloadedError(
            f"overloaded: {words}; try again later", retry_after_seconds=min(max(shortest, seconds), longest)
        )

    def _admit(self, num_images: int, num_bytes: int, identity: str) -> "Slot":
        self._images.take(identity, num_images)
        self._bytes.take(identity, num_bytes)
        self.num_admitted += num_images
        return Slot(self, num_images, num_bytes, identity)

    def _leave(self, num_images: int, num_bytes: int, identity: str, seconds: float) -> None:
        self._images.give_back(identity, num_images)
        self._bytes.give_back(identity, num_bytes)
        self._seconds_in_flight += _SMOOTHING * (seconds - self._seconds_in_flight)
        if self._waiting:
            self._let_in()

    def _let_in(self) -> None:
        """Let in who waits and fits, one of each caller at a time."""
        can_go_on = True
        while can_go_on:
            can_go_on = False
            for identity in list(self._waiting):
                waiter = self._waiting[identity][0]
                if self._lacks_for_patient(identity, waiter.num_images, waiter.num_bytes):
                    continue
                self._forget(identity, waiter)
                if identity in self._waiting:
                    self._waiting.move_to_end(identity)
                waiter.slot.set_result(self._admit(waiter.num_images, waiter.num_bytes, identity))
                can_go_on = True

    def _forget(self, identity: str, waiter: "_Waiter") -> None:
        queue = self._waiting.get(identity)
        if queue is not None and waiter in queue:
            queue.remove(waiter)
            if not queue:
                del self._waiting[identity]


@dataclass(eq=False, frozen=True, slots=True)
class _Waiter:
    """Who waits for room."""

    num_images: int
    num_bytes: int
    slot: "asyncio.Future[Slot]"


def _is_let_in(waiter: _Waiter) -> bool:
    """Tell whether it has its place; it may have come as the waiter left."""
    return waiter.slot.done() and not waiter.slot.cancelled()


class Slot:
    """
    The place of one admitted call, given back when the last of its holders lets go.

    The ``with`` block is the first holder. Work that may outlive the block, because its caller has gone, takes a
    :meth:`hold` of its own, so that what still burdens Triton still counts.

    Attributes:
        identity: Whose it is.
    """

    __slots__ = ("_admission", "_entered", "_num_bytes", "_num_holders", "_num_images", "identity")

    def __init__(self, admission: Admission, num_images: int, num_bytes: int = 0, identity: str = "") -> None:
        self._admission = admission
        self._num_images = num_images
        self._num_bytes = num_bytes
        self.identity = identity
        self._num_holders = 1
        self._entered = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def hold(self) -> Self:
        """Add a holder, who owes one :meth:`release`, or is a ``with`` block; returns itself."""
        self._num_holders += 1
        return self

    def release(self) -> None:
        """Let go; the last one frees the place."""
        self._num_holders -= 1
        if self._num_holders == 0:
            seconds = time.monotonic() - self._entered
            self._admission._leave(self._num_images, self._num_bytes, self.identity, seconds)

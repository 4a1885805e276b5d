"""How much may be in flight at once, and whose; what comes beyond is refused before anything is begun."""

import time
from collections import Counter
from types import TracebackType
from typing import Self

from gateway.errors import OverloadedError

# Weight of the newest observation in the average time in flight.
_SMOOTHING = 0.1
_RETRY_SECONDS = (0.01, 5.0)
# Below this part of the bound everybody gets what they ask for; above it nobody more than an equal share.
_FAIR_FROM = 0.5

REASONS = ("images", "bytes", "share", "deadline")
"""Why a call is refused: too many images, or bytes, in flight; too many of this caller; no answer by its deadline."""


class Admission:
    """
    A bounded number of images and bytes in flight, over all calls, and a fair share of it for each caller.

    While less than half is taken, anybody may take it. Beyond, a caller who holds an equal share of it already is
    refused, so that one flood leaves room for the others. Belongs to one event loop.

    Args:
        max_images: Bound, at least 1.
        max_bytes: Bound of their bytes as they came, at least 1. A call that finds nothing in flight is let in.

    Attributes:
        max_images: The same.
        max_bytes: The same.
        num_admitted: Images let in so far.
        num_refused: Images refused so far, by :data:`REASONS`.
    """

    def __init__(self, max_images: int, max_bytes: int) -> None:
        self.max_images = max_images
        self.max_bytes = max_bytes
        self.num_admitted = 0
        self.num_refused: Counter[str] = Counter()
        self._num_images = 0
        self._num_bytes = 0
        self._by_identity: dict[str, int] = {}
        self._seconds_in_flight = 0.05

    @property
    def num_images(self) -> int:
        """Images in flight now."""
        return self._num_images

    @property
    def num_bytes(self) -> int:
        """Their bytes."""
        return self._num_bytes

    def enter(
        self, num_images: int, *, num_bytes: int = 0, identity: str = "",
        remaining_seconds: float | None = None, expected_seconds: float = 0.0,
    ) -> "Slot":  # fmt: skip
        """
        Admit a call, or refuse it; never waits.

        Args:
            num_images: That it brings.
            num_bytes: That they take.
            identity: Who calls.
            remaining_seconds: Until the caller stops waiting; None is never.
            expected_seconds: How long the answer is expected to take.

        Raises:
            OverloadedError: It does not fit, or could not be answered in time; carries when to try again.
        """
        if self._num_images + num_images > self.max_images:
            raise self._refusal(
                "images", num_images, f"{self._num_images} images are in flight and {num_images} more would exceed "
                f"{self.max_images}",
            )  # fmt: skip
        if self._num_bytes and self._num_bytes + num_bytes > self.max_bytes:
            raise self._refusal(
                "bytes", num_images, f"{self._num_bytes} bytes are in flight and {num_bytes} more would exceed "
                f"{self.max_bytes}",
            )  # fmt: skip
        held = self._by_identity.get(identity, 0)
        if self._num_images + num_images > _FAIR_FROM * self.max_images:
            share = self.max_images // (len(self._by_identity) + (not held))
            if held and held + num_images > share:
                raise self._refusal(
                    "share", num_images, f"this caller has {held} images in flight and its share is {share}"
                )
        if remaining_seconds is not None and expected_seconds > remaining_seconds:
            raise self._refusal(
                "deadline", num_images, f"an answer would take {expected_seconds:.3g} s and the deadline is in "
                f"{max(remaining_seconds, 0):.3g} s", retry_seconds=expected_seconds,
            )  # fmt: skip
        self._num_images += num_images
        self._num_bytes += num_bytes
        self._by_identity[identity] = held + num_images
        self.num_admitted += num_images
        return Slot(self, num_images, num_bytes, identity)

    def _refusal(
        self, reason: str, num_images: int, words: str, *, retry_seconds: float | None = None
    ) -> OverloadedError:
        self.num_refused[reason] += num_images
        shortest, longest = _RETRY_SECONDS
        seconds = self._seconds_in_flight if retry_seconds is None else retry_seconds
        return OverloadedError(
            f"overloaded: {words}; try again later", retry_after_seconds=min(max(shortest, seconds), longest)
        )

    def _leave(self, num_images: int, num_bytes: int, identity: str, seconds: float) -> None:
        self._num_images -= num_images
        self._num_bytes -= num_bytes
        held = self._by_identity[identity] - num_images
        # Who holds nothing takes no share of the room.
        if held:
            self._by_identity[identity] = held
        else:
            del self._by_identity[identity]
        self._seconds_in_flight += _SMOOTHING * (seconds - self._seconds_in_flight)


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

    def hold(self) -> None:
        """Add a holder, who owes one :meth:`release`."""
        self._num_holders += 1

    def release(self) -> None:
        """Let go; the last one frees the place."""
        self._num_holders -= 1
        if self._num_holders == 0:
            seconds = time.monotonic() - self._entered
            self._admission._leave(self._num_images, self._num_bytes, self.identity, seconds)

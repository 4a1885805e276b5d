"""How much may be in flight at once; what comes beyond is refused before anything is begun."""

import time
from types import TracebackType
from typing import Self

from gateway.errors import OverloadedError

# Weight of the newest observation in the average time in flight.
_SMOOTHING = 0.1
_RETRY_SECONDS = (0.01, 5.0)


class Admission:
    """
    A bounded number of images in flight, over all calls.

    Belongs to one event loop.

    Args:
        max_images: Bound, at least 1.

    Attributes:
        max_images: The same.
        num_admitted: Images let in so far.
        num_refused: Images refused so far.
    """

    def __init__(self, max_images: int) -> None:
        self.max_images = max_images
        self.num_admitted = 0
        self.num_refused = 0
        self._num_images = 0
        self._seconds_in_flight = 0.05

    @property
    def num_images(self) -> int:
        """Images in flight now."""
        return self._num_images

    def enter(self, num_images: int) -> "Slot":
        """
        Admit a call with so many images, or refuse it; never waits.

        Raises:
            OverloadedError: It does not fit; carries the usual time in flight as the time to wait.
        """
        if self._num_images + num_images > self.max_images:
            self.num_refused += num_images
            shortest, longest = _RETRY_SECONDS
            raise OverloadedError(
                f"overloaded: {self._num_images} images are in flight and {num_images} more would exceed "
                f"{self.max_images}; try again later",
                retry_after_seconds=min(max(shortest, self._seconds_in_flight), longest),
            )
        self._num_images += num_images
        self.num_admitted += num_images
        return Slot(self, num_images)

    def _leave(self, num_images: int, seconds: float) -> None:
        self._num_images -= num_images
        self._seconds_in_flight += _SMOOTHING * (seconds - self._seconds_in_flight)


class Slot:
    """
    The place of one admitted call, given back when the last of its holders lets go.

    The ``with`` block is the first holder. Work that may outlive the block, because its caller has gone, takes a
    :meth:`hold` of its own, so that what still burdens Triton still counts.
    """

    def __init__(self, admission: Admission, num_images: int) -> None:
        self._admission = admission
        self._num_images = num_images
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
            self._admission._leave(self._num_images, time.monotonic() - self._entered)

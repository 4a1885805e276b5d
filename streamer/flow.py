"""Byte credits: how much one reader can take now, as SampleService's contract counts it; pure."""

from streamer.errors import InvalidPlanError


class Credit:
    """
    The balance of one reader, in bytes of images and labels.

    A batch may go while the balance is above zero, and may take it below: at no moment more is on its way than what
    was granted and one batch.

    Args:
        max_bytes: Most the balance may come to; 1 or more.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._balance = 0
        self._first_grant = 0

    @property
    def balance(self) -> int:
        """Granted and not yet spent; below zero where the last batch was larger than what was left."""
        return self._balance

    @property
    def was_granted(self) -> bool:
        """Whether there was a grant: before the first one nothing is sent, however small."""
        return self._first_grant > 0

    @property
    def unacknowledged(self) -> int:
        """Sent, and not granted again since: the first grant is a reader's window, each later one says what it took."""
        return max(0, self._first_grant - self._balance)

    @property
    def lets_send(self) -> bool:
        """Whether a batch of any size may go now."""
        return self._balance > 0

    def grant(self, num_bytes: int) -> None:
        """
        Add to the balance.

        Raises:
            InvalidPlanError: 0, or more than a balance may come to; it stays as it was.
        """
        if num_bytes < 1:
            raise InvalidPlanError("grant_bytes", "0; grant 1 or more, or half-close to grant no more")
        if self._balance + num_bytes > self._max_bytes:
            raise InvalidPlanError(
                "grant_bytes",
                f"{num_bytes} on top of the {self._balance} left; a balance of at most {self._max_bytes} is allowed",
            )
        self._balance += num_bytes
        self._first_grant = self._first_grant or num_bytes

    def spend(self, num_bytes: int) -> None:
        """Take a batch off the balance; 0 for one that only closes the stream."""
        self._balance -= num_bytes

"""What a reader's process notes in its ledger, over epochs and restarts: see :mod:`streamer.ledger`."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from streamer.errors import ReaderError
from streamer.ledger import Delivered, Delivery, Ledger
from streamer.plan import Plan, Remainder


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """The pass that a batch comes from."""

    plan: Plan
    """The rank's own, with epoch and fingerprint."""
    num_samples: int
    """Of the epoch."""
    start_position: int


@dataclass(eq=False, slots=True)
class _Account:
    origin: Origin
    delivery: Delivery
    received: int
    """Where the last batch received ends."""
    committed: int

    @property
    def epoch(self) -> int:
        return self.origin.plan.epoch

    @property
    def is_settled(self) -> bool:
        return self.committed >= self.received

    @property
    def is_short(self) -> bool:
        """Whether other ranks may have had a batch after this one's last."""
        return self.origin.plan.remainder is Remainder.KEEP and self.committed < self.origin.num_samples


class Recording:
    """
    Keeps the ledger of one process.

    Args:
        ledger: A file, opened when there is something to note, and closed by :meth:`close`; or one that is open and
            the caller's own.
        step: Batches in the weights, by the trainer's count; None where it does not count.
    """

    def __init__(self, ledger: Ledger | Path | str, *, step: int | None) -> None:
        self._ledger = ledger
        self._opened: Ledger | None = None
        self._step = step
        # Of passes whose batches may not all be committed, in the order of their epochs.
        self._accounts: list[_Account] = []

    def resume(self, step: int | None) -> None:
        """Forget what is open: another checkpoint was loaded, with so many steps."""
        self._accounts.clear()
        self._step = step

    def skip(self) -> None:
        """Note that other ranks may have taken steps for which this one had no batch."""
        self._step = None

    def receive(self, batch: Delivered, origin: Origin) -> None:
        """
        Note that a batch came.

        Raises:
            LedgerError: The file cannot be written.
            ReaderError: One before it was never noted.
        """
        account = self._account(origin)
        if batch.next_position <= account.received:
            return
        if batch.position != account.received:
            raise ReaderError(
                f"batches between positions {account.received} and {batch.position} never reached the ledger: "
                "with workers, loop over StreamedLoader(dataset, ...), or commit every batch"
            )
        account.delivery.record(batch)
        account.received = batch.next_position

    def commit(self, batch: Delivered, origin: Origin, step: int | None) -> None:
        """
        Note that a restart needs neither this batch nor any before it.

        Raises:
            LedgerError: The file cannot be written.
        """
        self.receive(batch, origin)
        for account, position, steps in self._ends(batch, origin, step):
            account.delivery.commit(position, step=steps)
        self._settle(batch, origin, step)

    @contextmanager
    def committing(self, batch: Delivered, origin: Origin, step: int | None) -> Iterator[None]:
        """Commit around the writing of a checkpoint; see :meth:`streamer.ledger.Delivery.committing`."""
        self.receive(batch, origin)
        with ExitStack() as stack:
            for account, position, steps in self._ends(batch, origin, step):
                stack.enter_context(account.delivery.committing(position, step=steps))
            yield
        self._settle(batch, origin, step)

    def close(self) -> None:
        """Close the ledger, if it was opened here."""
        if self._opened is not None:
            self._opened.close()
        self._opened = None
        self._accounts.clear()

    def _account(self, origin: Origin) -> _Account:
        # The next pass may have begun before the last batches of this one are committed.
        for each in reversed(self._accounts):
            if each.origin == origin:
                return each
        # Another pass over the same epoch takes the place of the one before it.
        before = [each for each in self._accounts if each.epoch < origin.plan.epoch]
        # Only where all that came before is committed, the count of the last commit is that of this beginning.
        is_known = all(each.is_settled and not each.is_short for each in before)
        delivery = self._open().begin(
            origin.plan,
            num_samples=origin.num_samples,
            start_position=origin.start_position,
            step=self._step if is_known else None,
        )
        account = _Account(origin, delivery, origin.start_position, origin.start_position)
        self._accounts = [*(each for each in before if not each.is_settled), account]
        return account

    def _ends(self, batch: Delivered, origin: Origin, step: int | None) -> list[tuple[_Account, int, int | None]]:
        """Return up to where each pass is to be committed; the trainer's count is that of the batch's own."""
        own = self._account(origin)
        before = self._accounts[: self._accounts.index(own)]
        ends: list[tuple[_Account, int, int | None]] = [(each, each.received, None) for each in before]
        return [*ends, (own, batch.next_position, step)]

    def _settle(self, batch: Delivered, origin: Origin, step: int | None) -> None:
        self._step = step
        own = self._account(origin)
        del self._accounts[: self._accounts.index(own)]
        own.committed = batch.next_position

    def _open(self) -> Ledger:
        if isinstance(self._ledger, Ledger):
            return self._ledger
        if self._opened is None:
            self._opened = Ledger(self._ledger)
        return self._opened

"""
Proof of delivery: fold the ledgers of all ranks and restarts, and name the samples that came not exactly once.

A ledger holds ranges. Which samples a range stands for follows from the order (:mod:`streamer.order`), and the checksum
of their indices shows that these were the ones that came. A batch is the unit: where its checksum is wrong all of it
counts.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from streamer.ledger import Account, LedgerError, read
from streamer.order import Order, Share, shares
from streamer.plan import Remainder

Item = TypeVar("Item")
Integers = NDArray[np.int64]

Kind = Literal["lost", "repeated", "unexpected", "recovered"]
KINDS: tuple[Kind, ...] = ("lost", "repeated", "unexpected", "recovered")

_FINDINGS_NAMED = 5
_INDICES_NAMED = 4
# Positions turned into indices at once: a call costs the same for 100 as for 1,000.
_BLOCK_POSITIONS = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """A run of samples that one thing is true of."""

    kind: Kind
    dataset: str
    split: str
    epoch: int
    position: int
    """Of the first of them in the epoch's order."""
    samples: int
    indices: tuple[int, ...] = ()
    """Of the first few in the split's file, or in the slice, where they are known."""
    problem: str
    places: tuple[str, ...] = ()
    """``file:line`` of what shows it; empty where no ledger knows of the samples."""

    def __str__(self) -> str:
        rest = ", ..." if self.samples > len(self.indices) else ""
        indices = f" (indices {', '.join(map(str, self.indices))}{rest})" if self.indices else ""
        places = f" [{', '.join(self.places)}]" if self.places else ""
        where = f"{self.dataset} {self.split} epoch {self.epoch}, position {self.position}"
        return f"{where}: {self.samples:,} {self.kind}{indices}: {self.problem}{places}"


@dataclass(kw_only=True, slots=True)
class Verdict:
    """What ledgers prove; the first three are 0 where each sample was trained on exactly once."""

    lost: int = 0
    """Samples of an epoch that nobody committed."""
    repeated: int = 0
    """Commits of a sample beyond its first."""
    unexpected: int = 0
    """Samples committed that are not what the plan has there, or that the trainer had not come to."""
    recovered: int = 0
    """Samples committed that had been received before and not committed, as when a process dies."""
    committed: int = 0
    """Samples, each as often as it was committed."""
    epochs: int = 0
    """Of all splits of all data sets."""
    files: int = 0
    torn_lines: list[str] = field(default_factory=list)
    """``file:line`` of what processes left that died as they wrote."""
    findings: list[Finding] = field(default_factory=list)
    """The first few of each kind."""

    @property
    def is_clean(self) -> bool:
        """Whether each sample of each epoch was delivered exactly once."""
        return not (self.lost or self.repeated or self.unexpected)

    def as_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {"clean": self.is_clean, **asdict(self)}

    def add(self, kind: Kind, samples: int, findings: Iterable[Finding]) -> None:
        """Count samples, and keep the first few of what is found about them; asks for no more of it."""
        setattr(self, kind, getattr(self, kind) + samples)
        room = _FINDINGS_NAMED - sum(known.kind == kind for known in self.findings)
        self.findings += [finding for finding, _ in zip(findings, range(room), strict=False)]


def verify(paths: Iterable[Path]) -> Verdict:
    """
    Fold the ledgers of one training run: all ranks, all restarts, any number of epochs and data sets.

    An epoch counts as a whole once a ledger begins it. World size, batch size and the ranks' files may change between
    any two batches. What ``Remainder.DROP`` leaves out is not lost. Takes some seconds for millions of batches.

    Args:
        paths: The files; one given twice is read once.

    Raises:
        LedgerError: A file is damaged or no ledger, or none of them holds a delivery.
        OSError: A file cannot be read.
    """
    contents = [read(path) for path in {path.resolve(): path for path in paths}.values()]
    accounts = sorted((account for found in contents for account in found.accounts), key=lambda account: account.at)
    if not accounts:
        raise LedgerError(", ".join(str(found.path) for found in contents), "no delivery was begun")
    torn_lines = [f"{found.path}:{line}" for found in contents for line in found.torn_lines]
    verdict = Verdict(files=len(contents), torn_lines=torn_lines)
    for split in _grouped(accounts, lambda account: (account.plan.dataset, account.plan.split)):
        _settle(split)
        claims = [_Claim(account) for account in split]
        for number, claim in enumerate(claims):
            _compare_start(claim, claims[:number], verdict)
            _compare_commits(claim, verdict)
        for epoch in _grouped(claims, lambda claim: claim.account.plan.epoch):
            _judge(epoch, verdict)
    return verdict


class _Claim:
    """
    What one delivery claims, with one item for each batch received.

    Attributes:
        is_committed: Whether the trainer made it its own.
        firsts: Position in the order of its first sample, as the plan has it.
        lasts: Behind its last one.
        faults: What is wrong, by number of the batch.
        voided: Why a commit does not count, by number of the batch.
    """

    def __init__(self, account: Account) -> None:
        size = len(account.lines)
        self.account = account
        self.is_committed = np.zeros(size, bool)
        self.is_committed[account.committed] = True
        self.firsts, self.lasts = np.zeros(size, np.int64), np.zeros(size, np.int64)
        self.faults: dict[int, str] = {}
        self.voided: dict[int, str] = {}

    @property
    def sizes(self) -> Integers:
        """Samples of each batch."""
        return np.asarray(self.account.sizes, np.int64)

    @property
    def reach(self) -> int:
        """Position up to which the trainer came, or from which it would have gone on."""
        counts = self.is_committed.copy()
        counts[list(self.faults)] = False
        return max(self.account.start_position, int(np.asarray(self.account.ends, np.int64)[counts].max(initial=0)))

    def committed_before(self, position: int) -> list[int]:
        """Return where the batches begin that were committed and end up to ``position``, in order."""
        account = self.account
        return sorted(account.positions[number] for number in account.committed if account.ends[number] <= position)

    def has_committed_to(self, position: int) -> bool:
        """Tell whether a batch that was committed ends there."""
        return any(self.account.ends[number] == position for number in self.account.committed)

    def place(self, batch: int) -> str:
        """Return where the ledger speaks of a batch."""
        return f"{self.account.file}:{self.account.lines[batch]}"

    def finding(self, kind: Kind, position: int, samples: int, problem: str, place: str) -> Finding:
        """Make a finding about this delivery alone."""
        plan = self.account.plan
        return Finding(
            kind=kind,
            dataset=plan.dataset,
            split=plan.split,
            epoch=plan.epoch,
            position=position,
            samples=samples,
            problem=problem,
            places=(place,),
        )

    def check(self, order: Order) -> None:
        """Compare each batch with the plan's; sets all but ``is_committed``."""
        account = self.account
        for number, share in enumerate(self._shares()):
            if share is None or share.next_position != account.ends[number]:
                self.faults[number] = "the plan has no such batch"
                continue
            self.firsts[number], self.lasts[number] = share.first, share.last
            expected = share.last - share.first
            if account.sizes[number] != expected:
                self.faults[number] = f"{account.sizes[number]} samples came where the plan has {expected}"
        self._check_sequence()
        self._check_indices(order)

    def _shares(self) -> Iterator[Share | None]:
        """Yield what the plan has at each batch's position."""
        account = self.account
        full = account.plan.world_size * account.plan.batch_size
        walk: Iterator[Share] = iter(())
        expected = -1
        for position in account.positions:
            share = None
            if account.start_position <= position < account.num_samples:
                if position != expected and (position - account.start_position) % full == 0:
                    walk = shares(account.plan, account.num_samples, start_position=position)
                    expected = position
                share = next(walk, None) if position == expected else None
            expected = -1 if share is None else share.next_position
            yield share

    def _check_sequence(self) -> None:
        furthest = self.account.start_position
        seen: set[int] = set()
        for number, position in enumerate(self.account.positions):
            # One that was there before is repeated, which is found by folding.
            if position < furthest and position not in seen:
                self.faults.setdefault(number, f"came out of order, after position {furthest} was reached")
            seen.add(position)
            furthest = max(furthest, self.account.ends[number])

    def _check_indices(self, order: Order) -> None:
        account = self.account
        good = [number for number in range(len(account.lines)) if number not in self.faults]
        for block in _blocks(good, account.sizes):
            positions = np.concatenate([np.arange(self.firsts[number], self.lasts[number]) for number in block])
            indices = order.indices(positions).astype("<i8", copy=False)
            taken = 0
            for number in block:
                size = account.sizes[number]
                if google_crc32c.value(indices[taken : taken + size]) != account.checksums[number]:
                    self.faults[number] = "other samples came than the plan has there"
                taken += size


def _grouped(items: Iterable[Item], key: Callable[[Item], Hashable]) -> list[list[Item]]:
    groups: defaultdict[Hashable, list[Item]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return list(groups.values())


def _blocks(numbers: Iterable[int], sizes: Sequence[int]) -> Iterator[list[int]]:
    block: list[int] = []
    samples = 0
    for number in numbers:
        block.append(number)
        samples += sizes[number]
        if samples >= _BLOCK_POSITIONS:
            yield block
            block, samples = [], 0
    if block:
        yield block


def _settle(accounts: Sequence[Account]) -> None:
    """Commit what a process was about to when it died, where its successor began with a checkpoint that has it."""
    for account in accounts:
        saving = account.saving
        if saving is None:
            continue
        successor = next((other for other in accounts if other.at > saving.at), None)
        if successor and (successor.plan.epoch, successor.start_position) >= (account.plan.epoch, saving.position):
            account.commit(saving.line, saving.position, saving.step)


def _compare_start(claim: _Claim, earlier: Sequence[_Claim], verdict: Verdict) -> None:
    """Compare the steps in the checkpoint that a delivery began with to the batches that led there."""
    account = claim.account
    found = _led_to(account, earlier)
    if account.step is None or found is None:
        return
    before, position = found
    done = before.committed_before(position)
    assert before.account.step is not None
    steps = before.account.step + len(done)
    problem = f"the checkpoint loaded after it has {account.step} steps, where {steps} batches were committed"
    if account.step < steps:
        _void(earlier, before.account.plan.epoch, set(done[account.step - steps :]), problem)
    elif account.step > steps:
        samples = (account.step - steps) * account.plan.batch_size
        finding = claim.finding("unexpected", position, samples, problem, f"{account.file}:{account.line}")
        verdict.add("unexpected", samples, [finding])


def _led_to(account: Account, earlier: Sequence[_Claim]) -> tuple[_Claim, int] | None:
    """Return who came to where a delivery begins, of those with steps, and that position as it saw it."""
    counting = [before for before in reversed(earlier) if before.account.step is not None]
    if account.start_position:
        position, epoch = account.start_position, account.plan.epoch
        same = (before for before in counting if before.account.plan.epoch == epoch)
        return next(((before, position) for before in same if before.has_committed_to(position)), None)
    # The end of an epoch is the beginning of the next one; not every rank has a share of its last batch.
    previous = [before for before in counting if before.account.plan.epoch == account.plan.epoch - 1]
    if not previous:
        return None
    before = max(previous, key=lambda before: before.reach)
    return before, before.reach


def _void(claims: Sequence[_Claim], epoch: int, positions: set[int], problem: str) -> None:
    """Take back the commits of the global batches at these positions, on all ranks."""
    for claim in claims:
        if claim.account.plan.epoch != epoch:
            continue
        for number in np.flatnonzero(claim.is_committed).tolist():
            if claim.account.positions[number] in positions:
                claim.is_committed[number] = False
                claim.voided[number] = problem


def _compare_commits(claim: _Claim, verdict: Verdict) -> None:
    """Find what was committed before the trainer's steps came to it, and steps that no batch accounts for."""
    account = claim.account
    if account.step is None:
        return
    ahead = np.zeros(len(account.committed) + 1, np.int64)
    for mark in account.commits:
        if mark.step is None:
            continue
        stepped = mark.step - account.step
        if stepped > mark.num_committed:
            samples = (stepped - mark.num_committed) * account.plan.batch_size
            problem = f"{stepped} steps, where {mark.num_committed} batches were received"
            place = f"{account.file}:{mark.line}"
            verdict.add("unexpected", samples, [claim.finding("unexpected", mark.position, samples, problem, place)])
            return
        ahead[max(stepped, 0)] += 1
        ahead[mark.num_committed] -= 1
    early = [account.committed[number] for number in np.flatnonzero(np.cumsum(ahead)[:-1]).tolist()]
    problem = "committed before the trainer's step with it"
    verdict.add(
        "unexpected",
        sum(account.sizes[number] for number in early),
        (
            claim.finding("unexpected", account.positions[number], account.sizes[number], problem, claim.place(number))
            for number in early
        ),
    )


def _judge(claims: Sequence[_Claim], verdict: Verdict) -> None:
    """Judge all deliveries of one epoch."""
    verdict.epochs += 1
    weights: Counter[Hashable] = Counter()
    for claim in claims:
        samples = int(claim.sizes[claim.is_committed].sum())
        weights[_data_of(claim)] += samples
        verdict.committed += samples
    ((data, _),) = weights.most_common(1)
    ours = [claim for claim in claims if _data_of(claim) == data]
    for claim in claims:
        if _data_of(claim) != data:
            _add_foreign(claim, ours[0], verdict)
    account = ours[0].account
    order = Order(
        account.num_samples, fingerprint=account.plan.fingerprint, seed=account.plan.seed, epoch=account.plan.epoch
    )
    for claim in ours:
        claim.check(order)
        _add_faults(claim, verdict)
    _Fold(ours, order).report(verdict)


def _data_of(claim: _Claim) -> tuple[Hashable, ...]:
    """Return what the deliveries of an epoch have in common."""
    plan = claim.account.plan
    return plan.fingerprint, claim.account.num_samples, plan.seed, plan.transform


def _add_foreign(claim: _Claim, usual: _Claim, verdict: Verdict) -> None:
    """Count what was read by another plan than the epoch's."""
    names = ("fingerprint", "num_samples", "seed", "transform")
    pairs = zip(names, _data_of(claim), _data_of(usual), strict=True)
    differing = [f"{name} {_shown(own)} instead of {_shown(others)}" for name, own, others in pairs if own != others]
    account = claim.account
    samples = int(claim.sizes[claim.is_committed].sum())
    problem, place = f"read with {', '.join(differing)}", f"{account.file}:{account.line}"
    if samples:
        finding = claim.finding("unexpected", account.start_position, samples, problem, place)
        verdict.add("unexpected", samples, [finding])


def _shown(value: Hashable) -> str:
    return value.hex()[:12] if isinstance(value, bytes) else repr(value)


def _add_faults(claim: _Claim, verdict: Verdict) -> None:
    account = claim.account
    wrong = [number for number in claim.faults if claim.is_committed[number]]
    verdict.add(
        "unexpected",
        sum(account.sizes[number] for number in wrong),
        (
            claim.finding(
                "unexpected",
                account.positions[number],
                account.sizes[number],
                claim.faults[number],
                claim.place(number),
            )
            for number in sorted(wrong)
        ),
    )


class _Fold:
    """
    How often each sample of an epoch was committed, and whether it was received without that.

    Counted by position, of which the order is a bijection to samples, and by run: arrays have one item for each run of
    positions that no batch begins or ends in.
    """

    def __init__(self, claims: Sequence[_Claim], order: Order) -> None:
        self._claims = claims
        self._order = order
        self._end = _end_of_epoch(claims)
        self._firsts = np.concatenate([claim.firsts for claim in claims])
        self._lasts = np.concatenate([claim.lasts for claim in claims])
        is_committed = np.concatenate([claim.is_committed for claim in claims])
        is_right = np.ones(len(is_committed), bool)
        offsets = np.cumsum([0] + [len(claim.firsts) for claim in claims])
        self._batches = [(claim, int(offset)) for claim, offset in zip(claims, offsets, strict=False)]
        for claim, offset in self._batches:
            is_right[[offset + number for number in claim.faults]] = False
        self._is_delivered = is_committed & is_right
        self._bounds = np.unique(np.concatenate([self._firsts, self._lasts, [0, self._end]]))
        self._times_delivered = self._depth(self._is_delivered)
        self._times_left = self._depth(is_right & ~is_committed)

    def report(self, verdict: Verdict) -> None:
        """Count and name what is lost, repeated and recovered."""
        delivered, starts = self._times_delivered, self._bounds[:-1]
        is_lost = (delivered == 0) & (starts < self._end)
        self._add(verdict, "lost", is_lost.astype(np.int64), self._why_lost)
        self._add(verdict, "repeated", np.maximum(delivered - 1, 0), self._who_delivered)
        is_recovered = (delivered > 0) & (self._times_left > 0)
        self._add(verdict, "recovered", is_recovered.astype(np.int64), self._who_left)

    def _depth(self, counted: NDArray[np.bool_]) -> Integers:
        """Return in how many of the batches that count each run lies."""
        change = np.zeros(len(self._bounds), np.int64)
        np.add.at(change, np.searchsorted(self._bounds, self._firsts[counted]), 1)
        np.add.at(change, np.searchsorted(self._bounds, self._lasts[counted]), -1)
        return np.cumsum(change)[:-1]

    def _add(
        self, verdict: Verdict, kind: Kind, times: Integers, explain: Callable[[int], tuple[str, tuple[str, ...]]]
    ) -> None:
        lengths = np.diff(self._bounds) * times
        plan = self._claims[0].account.plan
        verdict.add(
            kind,
            int(lengths.sum()),
            (
                Finding(
                    kind=kind,
                    dataset=plan.dataset,
                    split=plan.split,
                    epoch=plan.epoch,
                    position=int(self._bounds[run]),
                    samples=int(lengths[run]),
                    indices=self._indices(run),
                    problem=problem,
                    places=places,
                )
                for run in np.flatnonzero(times).tolist()
                for problem, places in [explain(run)]
            ),
        )

    def _indices(self, run: int) -> tuple[int, ...]:
        first, last = self._bounds[run], self._bounds[run + 1]
        return tuple(self._order.indices(np.arange(first, min(last, first + _INDICES_NAMED))).tolist())

    def _over(self, run: int) -> Iterator[tuple[_Claim, int, bool]]:
        """Yield the batches that a run lies in, with their claims, and whether they count as delivered."""
        first, last = self._bounds[run], self._bounds[run + 1]
        for item in np.flatnonzero((self._firsts < last) & (self._lasts > first)).tolist():
            claim, offset = next((claim, offset) for claim, offset in reversed(self._batches) if offset <= item)
            yield claim, item - offset, bool(self._is_delivered[item])

    def _why_lost(self, run: int) -> tuple[str, tuple[str, ...]]:
        over = [(claim, batch) for claim, batch, _ in self._over(run)]
        places = tuple(claim.place(batch) for claim, batch in over)
        for claim, batch in over:
            if batch in claim.voided:
                return claim.voided[batch], places
        for claim, batch in over:
            if batch in claim.faults:
                return claim.faults[batch], places
        return ("received, and not committed" if over else "in no ledger"), places

    def _who_delivered(self, run: int) -> tuple[str, tuple[str, ...]]:
        return "committed more than once", tuple(
            claim.place(batch) for claim, batch, counts in self._over(run) if counts
        )

    def _who_left(self, run: int) -> tuple[str, tuple[str, ...]]:
        return "received once without a commit", tuple(claim.place(batch) for claim, batch, _ in self._over(run))


def _end_of_epoch(claims: Sequence[_Claim]) -> int:
    """Return the position that the epoch goes to: short of its end where the plan drops a remainder."""
    furthest = max(claims, key=lambda claim: (claim.reach, claim.account.at))
    account, plan = furthest.account, furthest.account.plan
    if plan.remainder is Remainder.KEEP:
        return account.num_samples
    full = plan.world_size * plan.batch_size
    return furthest.reach + (account.num_samples - furthest.reach) // full * full

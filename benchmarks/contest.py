"""Programs that have their turns one after the other, each in processes of its own, and what is read from that."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.interleaved import Spread
from benchmarks.turn import Program, TurnError, take_turn
from benchmarks.window import Turn

_TRIAL_ROUNDS = 2
# What a turn may take beside warm-up and measuring: imports, data into memory, data written, the end of workers; all
# of it on a machine that is busy.
_START_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """A row of the table."""

    name: str
    ways: Mapping[str, Program]
    """By what differs between them; a trial finds the fastest, and that one contends."""
    absent: str = ""
    """Why there is nothing to measure."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two rows, and what is asked of the first."""

    ours: str
    theirs: str
    asked: float | None
    """Least factor; None where none is asked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """How many turns there are, and how long they take."""

    rounds: int
    warm_seconds: float
    seconds: float


async def turn_at(pace: Pace, program: Program, *, temporary: Path) -> Turn:
    """
    Run a program for a turn at this pace; it may take as long as it needs to start, within reason.

    Raises:
        TurnError: It failed, or took too long.
    """
    return await take_turn(
        program,
        warm_seconds=pace.warm_seconds,
        seconds=pace.seconds,
        timeout_seconds=_START_SECONDS + 4 * (pace.warm_seconds + pace.seconds),
        temporary=temporary,
    )


@dataclass(slots=True)
class Outcome:
    """What was seen, by name of the contender."""

    turns: dict[str, list[Turn]] = field(default_factory=dict)
    trials: dict[str, dict[str, float]] = field(default_factory=dict)
    """Items a second of each way, where there are several."""
    chosen: dict[str, str] = field(default_factory=dict)
    """The way whose turns these are."""
    problems: dict[str, str] = field(default_factory=dict)
    """Why one could not be measured."""

    def factor(self, comparison: Comparison) -> Spread | None:
        """Return how many times as fast ours is, round by round; None where one of the two is missing."""
        ours, theirs = self.turns.get(comparison.ours), self.turns.get(comparison.theirs)
        if ours is None or theirs is None:
            return None
        return Spread.of([one.rate / other.rate for one, other in zip(ours, theirs, strict=True)])


class Contest:
    """
    Lets contenders have their turns; one that fails is left out from there on, and the others go on.

    Args:
        contenders: In the order of their turns.
        pace: Of the turns.
        temporary: Folder for what programs leave behind.
        report: Told one line for each turn.
    """

    def __init__(
        self, contenders: Sequence[Contender], pace: Pace, *, temporary: Path, report: Callable[[str], None]
    ) -> None:
        self._contenders = contenders
        self._pace = pace
        self._temporary = temporary
        self._report = report
        self._outcome = Outcome(problems={each.name: each.absent for each in contenders if each.absent})

    async def run(self) -> Outcome:
        """Find the best way of each, then go round: A B C A B C."""
        outcome = self._outcome
        for contender in self._contenders:
            if contender.name not in outcome.problems:
                outcome.chosen[contender.name] = await self._best(contender)
        for number in range(1, self._pace.rounds + 1):
            for contender in self._contenders:
                way = outcome.chosen.get(contender.name, "")
                turn = await self._turn(contender, way, f"round {number}")
                if turn is not None:
                    outcome.turns.setdefault(contender.name, []).append(turn)
        for name in outcome.problems:
            outcome.turns.pop(name, None)
        return outcome

    async def _best(self, contender: Contender) -> str:
        if len(contender.ways) == 1:
            return next(iter(contender.ways))
        rates = defaultdict[str, list[float]](list)
        for _ in range(min(_TRIAL_ROUNDS, self._pace.rounds)):
            for way in contender.ways:
                turn = await self._turn(contender, way, "trial")
                if turn is not None:
                    rates[way].append(turn.rate)
        trials = self._outcome.trials[contender.name] = {way: statistics.mean(seen) for way, seen in rates.items()}
        return max(trials, key=lambda way: trials[way], default="")

    async def _turn(self, contender: Contender, way: str, when: str) -> Turn | None:
        name = contender.name
        if name in self._outcome.problems:
            return None
        label = f"{when}: {name}" + (f", {way}" if way else "")
        try:
            turn = await turn_at(self._pace, contender.ways[way], temporary=self._temporary)
        except TurnError as error:
            self._outcome.problems[name] = f"{way}: {error}" if way else str(error)
            self._report(f"{label}: {error}")
            return None
        self._report(f"{label}: {turn.rate:,.0f} a second")
        return turn

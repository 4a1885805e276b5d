"""The trials of a search for eyes: a live table, how long it still takes, and what came of it."""

import math
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from training.search.logbook import Search, Trial, best, command, ranked
from training.search.space import Value

MAX_LINE = 10_000
"""Characters to a line where no eye has to follow it."""

_SHOWN = 15
_BAR_WIDTH = 24
_VALUE_LENGTH = 24
_STYLES = {"running": "cyan", "finished": "green", "stopped": "dim", "failed": "red", "waiting": "dim"}


class Board:
    """A search as a live table on standard error, or where that is no terminal as a line for each trial that ended."""

    def __init__(self, search: Search) -> None:
        self._search = search
        self._console = Console(file=sys.stderr)
        self._trials: tuple[Trial, ...] = ()
        self._told: set[str] = set()
        self._started = time.monotonic()
        self._epochs_before: int | None = None
        self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=2)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def changed(self, trials: tuple[Trial, ...]) -> None:
        """Take in how things stand."""
        self._trials = trials
        if self._epochs_before is None:
            self._epochs_before = sum(trial.epoch for trial in trials)
            self._told = {trial.id for trial in trials if trial.is_over}
        if self._console.is_terminal:
            return
        for trial in trials:
            if trial.is_over and trial.id not in self._told:
                self._told.add(trial.id)
                self._console.print(f"{_line(trial, self._search)}; {self._footer()}", highlight=False, soft_wrap=True)

    def _render(self) -> RenderableType:
        share = _done_share(self._trials, self._search)
        line = Table.grid(padding=(0, 1))
        line.add_row(ProgressBar(total=1.0, completed=share, width=_BAR_WIDTH), self._footer())
        return Group(self._fitting(), line)

    def _fitting(self) -> Table:
        """Return as many trials as the terminal has lines for; it would cut off the last, which are running."""
        console = self._console
        for limit in range(_SHOWN, 0, -1):
            shown = table(self._trials, self._search, limit=limit, width=console.width)
            if len(console.render_lines(shown)) < console.height - 1:
                break
        return shown

    def _footer(self) -> str:
        over = [trial for trial in self._trials if trial.is_over]
        words = [f"{len(over)}/{self._search.budget.trials} trials done"]
        for state, name in (("stopped", "stopped early"), ("failed", "failed")):
            if count := sum(trial.state == state for trial in over):
                words.append(f"{count} {name}")
        for trial in ranked(self._trials, self._search)[:1]:
            words.append(f"best {_score(trial, self._search)}")
        seconds = time_left(
            self._trials, self._search, elapsed=time.monotonic() - self._started, before=self._epochs_before or 0
        )
        if seconds is not None:
            words.append(f"about {_duration(seconds)} left")
        return ", ".join(words)


def time_left(trials: Sequence[Trial], search: Search, *, elapsed: float, before: int = 0) -> float | None:
    """
    Return about how many seconds a search still takes, none as long as nobody can know.

    Args:
        trials: As they stand.
        search: Its budget.
        elapsed: Seconds since it began, or went on.
        before: Epochs that were done then.
    """
    here = sum(trial.epoch for trial in trials) - before
    if here <= 0:
        return None
    over = [trial.epoch for trial in trials if trial.is_over]
    usual = sum(over) / len(over) if over else search.budget.epochs
    open_trials = [trial for trial in trials if not trial.is_over]
    coming = sum(max(usual - trial.epoch, 1.0) for trial in open_trials)
    coming += usual * max(search.budget.trials - len(trials), 0)
    seconds = coming * elapsed / here
    return seconds if search.budget.minutes is None else min(seconds, max(search.budget.minutes * 60 - elapsed, 0.0))


def table(trials: Sequence[Trial], search: Search, *, limit: int, width: int | None = None) -> Table:
    """
    Return the trials that are running, and the best of the others up to ``limit`` in all.

    Args:
        trials: As they stand.
        search: Theirs.
        limit: Most rows.
        width: Characters to a line; where a column for each setting does not fit, they share one. None has no end.
    """
    shown = _table(trials, search, limit, is_narrow=False)
    if width is not None:
        endless = Console(width=MAX_LINE)
        if Measurement.get(endless, endless.options, shown).maximum > width:
            return _table(trials, search, limit, is_narrow=True)
    return shown


def _table(trials: Sequence[Trial], search: Search, limit: int, *, is_narrow: bool) -> Table:
    running = [trial for trial in trials if not trial.is_over]
    places = {trial.id: place for place, trial in enumerate(ranked(trials, search), start=1)}
    over = sorted((trial for trial in trials if trial.is_over), key=lambda trial: places.get(trial.id, len(trials) + 1))
    shown = Table(box=None, pad_edge=False, header_style="bold")
    shown.add_column("trial", justify="right", no_wrap=True)
    for column in ("state", "epoch", search.goal.removeprefix("validation_"), "time"):
        shown.add_column(column, no_wrap=True)
    if is_narrow:
        shown.add_column("settings")
    else:
        for name in search.space.names():
            shown.add_column(_short(name), no_wrap=True)
    for trial in [*over[: max(limit - len(running), 0)], *running]:
        shown.add_row(
            str(trial.number),
            Text(trial.state + (" (2nd try)" if trial.failures and trial.state != "failed" else ""),
                 style=_STYLES[trial.state]),
            f"{trial.epoch}/{search.budget.epochs}",
            Text(_score(trial, search), style="bold green" if places.get(trial.id) == 1 else ""),
            _duration(trial.seconds),
            *([_settings(trial)] if is_narrow else [_shown(trial.values[name]) for name in search.space.names()]),
        )  # fmt: skip
    hidden = len(over) - max(limit - len(running), 0)
    if hidden > 0:
        shown.caption = f"and {hidden} more"
    return shown


def summary(trials: Sequence[Trial], search: Search) -> str:
    """
    Return in a few lines what was found.

    Raises:
        SearchError: Nothing was.
    """
    winner = best(trials, search)
    counts = ", ".join(
        f"{count} {state}"
        for state in ("finished", "stopped", "failed")
        if (count := sum(trial.state == state for trial in trials))
    )
    values = ", ".join(f"{name} = {_shown(value)}" for name, value in winner.values.items())
    return (
        f"{len(trials)} trials: {counts}\n"
        f"best is trial {winner.number}: {search.goal.replace('_', ' ')} {_score(winner, search)} with {values}\n"
        f"train and publish it with:\n  {command(search, winner)}"
    )


def _line(trial: Trial, search: Search) -> str:
    ending = f": {trial.error}" if trial.state == "failed" else f" after {trial.epoch} epochs"
    return f"trial {trial.number} {trial.state}{ending}, {_score(trial, search)} ({_settings(trial)})"


def _settings(trial: Trial) -> str:
    return ", ".join(f"{_short(name)} {_shown(value)}" for name, value in trial.values.items())


def _short(name: str) -> str:
    return name.rpartition(".")[2]


def _done_share(trials: Sequence[Trial], search: Search) -> float:
    epochs = search.budget.epochs
    return sum(epochs if trial.is_over else trial.epoch for trial in trials) / (search.budget.trials * epochs)


def _score(trial: Trial, search: Search) -> str:
    if trial.score is None:
        return "-"
    return f"{trial.score:.2%}" if search.goal == "validation_accuracy" else f"{trial.score:.4f}"


def _shown(value: Value) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    text = str(value) or "none"
    return text if len(text) <= _VALUE_LENGTH else f"{text[: _VALUE_LENGTH - 1]}…"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"

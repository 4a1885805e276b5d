"""What a search has found: its trials as CSV, and pictures of what mattered."""

import csv
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import StringIO
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from training.search.logbook import Search, Trial, ranked
from training.search.space import Choices, Range, Value

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH_INCHES = 9.0
_DPI = 150
_LABEL_LENGTH = 22
_TICKS = 5
_COLOUR = "#2a6f97"
_BEST = "#d1495b"
_UNFINISHED = ("stopped", "running", "waiting", "failed")
_FEWEST_FOR_IMPORTANCE = 4
_FEWEST_FOR_LINES = 2
# Trials that count as good. Optuna's tenth is two of twenty, which put chance before the learning rate.
_GOOD_SHARE = 1 / 3


def as_csv(trials: Sequence[Trial], search: Search) -> str:
    """Return a line for each trial, the best first and those without a score last."""
    file = StringIO()
    names = search.space.names()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("rank", "trial", "state", search.goal, "epochs", "seconds", "failures", *names, "error"))
    best_first = ranked(trials, search)
    for rank, trial in enumerate(best_first, start=1):
        writer.writerow((rank, *_row(trial, names)))
    for trial in trials:
        if trial.score is None:
            writer.writerow(("", *_row(trial, names)))
    return file.getvalue()


def importance(trials: Sequence[Trial], search: Search) -> dict[str, float]:
    """
    Return each varied field's share of what made trials better or worse, 0..1, the largest first.

    It compares trials after the first look, which is as far as all of them came.

    Source: PED-ANOVA, Watanabe, Bansal & Hutter 2023 (arXiv 2304.10255), by Optuna.
    """
    import optuna

    look = search.budget.first_look
    distributions = search.space.distributions()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study = optuna.create_study(direction="maximize" if search.is_better_when_higher else "minimize")
        for trial in trials:
            if look in trial.scores:
                study.add_trial(
                    optuna.trial.create_trial(
                        params=dict(trial.values), distributions=distributions, value=trial.scores[look]
                    )
                )
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=_GOOD_SHARE)
        return optuna.importance.get_param_importances(study, evaluator=evaluator)


def write(folder: Path, trials: Sequence[Trial], search: Search) -> list[Path]:
    """
    Write ``trials.csv`` and, of enough trials, ``importance.png``, ``parallel.png`` and ``history.png``; return them.

    Raises:
        OSError: The folder cannot be written.
    """
    written = [folder / "trials.csv"]
    written[0].write_text(as_csv(trials, search))
    scored = [trial for trial in trials if trial.score is not None]
    if sum(search.budget.first_look in trial.scores for trial in scored) >= _FEWEST_FOR_IMPORTANCE:
        shares = importance(scored, search)
        path, height = folder / "importance.png", 0.45 * len(shares) + 1.5
        written.append(_picture(path, height, lambda axes: _draw_importance(axes, shares)))
    if len(scored) >= _FEWEST_FOR_LINES:
        written.append(_picture(folder / "parallel.png", 5.0, lambda axes: _draw_parallel(axes, scored, search)))
        written.append(_picture(folder / "history.png", 4.0, lambda axes: _draw_history(axes, scored, search)))
    return written


def _row(trial: Trial, names: Sequence[str]) -> list[object]:
    values = [trial.values[name] for name in names]
    return [trial.number, trial.state, trial.score, trial.epoch, f"{trial.seconds:.1f}", trial.failures, *values,
            trial.error]  # fmt: skip


def _picture(path: Path, height: float, draw: Callable[["Axes"], None]) -> Path:
    """Draw to a file, whole or not at all, without a display and without pyplot's globals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH_INCHES, height), layout="constrained")
    axes = figure.subplots()
    draw(axes)
    axes.spines[["top", "right"]].set_visible(False)
    partial = path.with_name(f".{path.name}")
    figure.savefig(partial, dpi=_DPI, format="png")
    partial.replace(path)
    return path


def _draw_importance(axes: "Axes", shares: dict[str, float]) -> None:
    names = list(reversed(shares))
    bars = axes.barh(names, [shares[name] for name in names], color=_COLOUR)
    axes.bar_label(bars, [f"{shares[name]:.0%}" for name in names], padding=3)
    axes.set(xlim=(0, 1.08), xlabel="share of the difference between trials", title="What mattered")


def _draw_history(axes: "Axes", trials: Sequence[Trial], search: Search) -> None:
    from matplotlib.ticker import MaxNLocator

    for states, colour, label in ((("finished",), _COLOUR, "all epochs"), (_UNFINISHED, "0.7", "fewer epochs")):
        chosen = [trial for trial in trials if trial.state in states]
        axes.scatter([trial.number for trial in chosen], [_known(trial) for trial in chosen], color=colour, label=label)
    whole = [trial for trial in trials if trial.state == "finished"]
    if whole:
        better = max if search.is_better_when_higher else min
        line = list(accumulate((_known(trial) for trial in whole), better))
        axes.step([trial.number for trial in whole], line, where="post", color=_BEST, label="best so far")
    axes.set(xlabel="trial", ylabel=search.goal.replace("_", " "), title="How the search went")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()


def _draw_parallel(axes: "Axes", trials: Sequence[Trial], search: Search) -> None:
    """Draw a line for each trial through its values, each axis with its own scale, and the score as the last one."""
    import matplotlib as mpl
    from matplotlib.colors import Normalize

    order = list(reversed(ranked(trials, search)))  # the best on top of the others
    scales = [_Scale.of(name, entry) for name, entry in search.space.root.items()]
    scores = [_known(trial) for trial in order]
    # One trial that learnt nothing would make all others one colour.
    low, high = float(np.quantile(scores, 0.1)), max(scores)
    if not search.is_better_when_higher:
        low, high = float(np.quantile(scores, 0.9)), min(scores)
    colours = mpl.colormaps["viridis_r"]
    paint = Normalize(min(low, high), max(low, high) + 1e-12)
    last = _Scale(search.goal, low=min(scores), high=max(scores) + 1e-12, log=False, labels=())
    for trial in order:
        heights = [scale.height(trial.values[scale.name]) for scale in scales] + [last.height(_known(trial))]
        share = float(np.clip(paint(_known(trial)), 0, 1))
        is_best = trial is order[-1]
        axes.plot(
            range(len(heights)),
            heights,
            color=_BEST if is_best else colours(share if search.is_better_when_higher else 1 - share),
            linewidth=3.0 if is_best else 1.2,
            alpha=1.0 if trial.state == "finished" else 0.35,
        )
    for place, scale in enumerate([*scales, last]):
        axes.axvline(place, color="0.2", linewidth=0.8)
        for height, label in scale.ticks():
            axes.annotate(
                label,
                (place, height),
                xytext=(4, 0),
                textcoords="offset points",
                fontsize=8,
                va="center",
                bbox={"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.75},
            )
    axes.set_xticks(range(len(scales) + 1), [*(scale.name for scale in scales), search.goal], rotation=15, ha="right")
    axes.set_yticks([])
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_title(f"All trials; thick: the best, trial {order[-1].number}; faint: stopped early or not yet done")


@dataclass(frozen=True, slots=True)
class _Scale:
    """One axis among parallel ones: values to heights 0..1."""

    name: str
    low: float
    high: float
    log: bool
    labels: tuple[str, ...]
    """Of choices, from below."""

    @classmethod
    def of(cls, name: str, entry: Range | Choices) -> "_Scale":
        if isinstance(entry, Choices):
            return cls(name, 0.0, len(entry.choices) - 1.0, False, tuple(str(choice) for choice in entry.choices))
        return cls(name, entry.low, entry.high, entry.log, ())

    def height(self, value: Value) -> float:
        if self.labels:
            return self.labels.index(str(value)) / self.high
        low, high, here = (self._straight(bound) for bound in (self.low, self.high, float(value)))
        return (here - low) / (high - low)

    def ticks(self) -> list[tuple[float, str]]:
        if self.labels:
            return [(self.height(label), _short(label) or "none") for label in self.labels]
        heights = np.linspace(0, 1, _TICKS)
        low, high = self._straight(self.low), self._straight(self.high)
        values = [low + (high - low) * height for height in heights]
        return [(float(h), f"{10**v if self.log else v:.3g}") for h, v in zip(heights, values, strict=True)]

    def _straight(self, value: float) -> float:
        return math.log10(value) if self.log else value


def _short(label: str) -> str:
    return label if len(label) <= _LABEL_LENGTH else f"{label[: _LABEL_LENGTH - 1]}…"


def _known(trial: Trial) -> float:
    assert trial.score is not None
    return trial.score

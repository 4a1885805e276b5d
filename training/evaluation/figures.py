"""
The report's pictures, as PNG files, for bright and for dark surroundings.

Axes: H height, W width, K classes.
"""

import io
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter, StrMethodFormatter

from training.evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from training.evaluation.measures import wilson_interval
from training.evaluation.record import Calibration, CorruptionRow, Mistake, Picture

SCALE = 1.5
"""Dots of a picture for each pixel of a page: sharp on screens that have more of them."""

_DOTS_PER_INCH = 96 * SCALE
_WIDTH = 9.6
_MOST_NUMBERS = 20
_MOST_NAMES = 50

Draw = Callable[[Figure, "Palette"], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Palette:
    """Colours for one kind of surroundings."""

    name: str
    surface: str
    ink: str
    muted: str
    grid: str
    first: str
    second: str
    quiet: str
    """For what is as it should be."""
    ramp: tuple[str, str]
    """From little to much."""


LIGHT = Palette(
    name="light",
    surface="#ffffff",
    ink="#1f2328",
    muted="#59636e",
    grid="#d8dee4",
    first="#2a78d6",
    second="#d9541e",
    quiet="#dbe9fa",
    ramp=("#9cc3f2", "#123f7c"),
)
DARK = Palette(
    name="dark",
    surface="#161b22",
    ink="#e6edf3",
    muted="#9198a1",
    grid="#30363d",
    first="#4a94ec",
    second="#f0803c",
    quiet="#1c3352",
    ramp=("#c4dcf9", "#2367b8"),
)


def png(draw: Draw, palette: Palette) -> bytes:
    """Return a picture as a PNG file."""
    style: Any = {
        "text.parse_math": False,  # class names are anybody's text
        "text.color": palette.ink,
        "axes.edgecolor": palette.grid,
        "axes.facecolor": palette.surface,
        "axes.labelcolor": palette.muted,
        "axes.titlecolor": palette.ink,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.labelsize": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "grid.color": palette.grid,
        "grid.linewidth": 0.7,
        "xtick.color": palette.muted,
        "ytick.color": palette.muted,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "lines.linewidth": 1.6,
    }
    file = io.BytesIO()
    with mpl.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
        figure = Figure(facecolor=palette.surface, layout="constrained")
        draw(figure, palette)
        figure.savefig(file, format="png", dpi=_DOTS_PER_INCH)
    return file.getvalue()


def curves(steps: Sequence[Mapping[str, float]], epochs: Sequence[Mapping[str, float]]) -> Draw:
    """
    Draw loss, accuracy and learning rate over a run.

    Args:
        steps: Of the training: ``step``, ``loss``, ``accuracy``, ``lr``; any but the first may be missing.
        epochs: Of the validation: ``step``, ``validation_loss``, ``validation_accuracy``.
    """

    def draw(figure: Figure, palette: Palette) -> None:
        figure.set_size_inches(_WIDTH, 3.1)
        loss, error, rate = figure.subplots(1, 3)
        _line(loss, _points(steps, "loss"), palette.first, label="training")
        _line(loss, _points(epochs, "validation_loss"), palette.second, label="validation", marker="o")
        _line(error, _wrong(steps, "accuracy"), palette.first, label="training")
        _line(error, _wrong(epochs, "validation_accuracy"), palette.second, label="validation", marker="o")
        _line(rate, _points(steps, "lr"), palette.first)
        for axes, title in ((loss, "Loss"), (error, "Share wrong"), (rate, "Learning rate")):
            axes.set_title(title)
            axes.set_xlabel("step")
            axes.grid(axis="y")
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        for axes in (loss, error):
            # Most of a run happens near its end values, which only a logarithmic axis shows.
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}") if axes is loss else PercentFormatter(1))
            axes.yaxis.set_minor_formatter(NullFormatter())
            if len(axes.lines) > 1:
                axes.legend()

    return draw


def speed(steps: Sequence[Mapping[str, float]]) -> Draw:
    """Draw the samples trained on a second: ``step`` and ``samples_per_second`` of each line."""

    def draw(figure: Figure, palette: Palette) -> None:
        figure.set_size_inches(_WIDTH, 2.3)
        axes = figure.subplots()
        _line(axes, _points(steps, "samples_per_second"), palette.first)
        axes.set_ylim(bottom=0)
        axes.set_title("Samples a second, mean so far")
        axes.set_xlabel("step")
        axes.grid(axis="y")

    return draw


def _points(lines: Sequence[Mapping[str, float]], key: str) -> list[tuple[float, float]]:
    return [(line["step"], line[key]) for line in lines if key in line]


def _wrong(lines: Sequence[Mapping[str, float]], key: str) -> list[tuple[float, float]]:
    """Return the share wrong by step, without steps where nothing was: they have no place on the axis."""
    return [(step, 1 - right) for step, right in _points(lines, key) if right < 1]


def _line(axes: Axes, points: Sequence[tuple[float, float]], colour: str, *, label: str = "", marker: str = "") -> None:
    if points:
        axes.plot(*zip(*points, strict=True), color=colour, label=label, marker=marker, markersize=4)


def confusion(matrix_KK: npt.NDArray[np.int64], class_names: Sequence[str]) -> Draw:
    """Draw who was taken for whom; the colour tells mistakes, as what is right drowns them."""

    def draw(figure: Figure, palette: Palette) -> None:
        num_classes = len(class_names)
        side = min(8.0, 2.4 + 0.36 * num_classes)
        figure.set_size_inches(side + 0.6, side)
        axes = figure.subplots()
        mistakes_KK = np.where(np.eye(num_classes, dtype=bool), 0, matrix_KK)
        colours = LinearSegmentedColormap.from_list("mistakes", [palette.surface, palette.second])
        axes.imshow(np.sqrt(mistakes_KK), cmap=colours, vmin=0, vmax=max(1.0, math.sqrt(mistakes_KK.max())))
        right = np.ma.masked_array(np.ones_like(matrix_KK), ~np.eye(num_classes, dtype=bool))
        axes.imshow(right, cmap=LinearSegmentedColormap.from_list("right", [palette.quiet, palette.quiet]))
        if num_classes <= _MOST_NUMBERS:
            for row, column in zip(*np.nonzero(matrix_KK), strict=True):
                is_strong = row != column and matrix_KK[row, column] > 0.6 * mistakes_KK.max()
                colour = palette.surface if is_strong else palette.ink
                axes.text(column, row, str(matrix_KK[row, column]), ha="center", va="center", size=8, color=colour)
        _name_classes(axes, class_names)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        axes.tick_params(length=0)

    return draw


def _name_classes(axes: Axes, class_names: Sequence[str]) -> None:
    every = math.ceil(len(class_names) / _MOST_NAMES)
    places = range(0, len(class_names), every)
    names = [_short(class_names[place]) for place in places]
    turned = 45 if max(map(len, names)) > 2 else 0
    axes.set_xticks(places, names, rotation=turned, ha="right" if turned else "center", rotation_mode="anchor")
    axes.set_yticks(places, names)


def _short(name: str, length: int = 16) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def reliability(raw: Calibration | None, served: Calibration) -> Draw:
    """Draw confidence against accuracy, before the temperature, where there was one, and as served."""
    shown = [("As served", served)] if raw is None else [("As trained", raw), ("With the temperature", served)]

    def draw(figure: Figure, palette: Palette) -> None:
        figure.set_size_inches(4.8 * len(shown), 3.9)
        all_axes = figure.subplots(1, len(shown), sharex=True, sharey=True, squeeze=False)[0]
        lowest = min(min(one.confidence, one.accuracy) for _, part in shown for one in part.bins)
        low = max(0.0, lowest - 0.1 * (1 - lowest) - 0.002)
        for axes, (title, part) in zip(all_axes, shown, strict=True):
            axes.plot([low, 1], [low, 1], color=palette.muted, linewidth=1, linestyle=(0, (4, 3)))
            intervals = [wilson_interval(round(one.accuracy * one.count), one.count) for one in part.bins]
            confidence, accuracy = [one.confidence for one in part.bins], [one.accuracy for one in part.bins]
            low_high = [
                [max(0.0, right - low) for right, (low, _) in zip(accuracy, intervals, strict=True)],
                [max(0.0, high - right) for right, (_, high) in zip(accuracy, intervals, strict=True)],
            ]
            axes.errorbar(
                confidence, accuracy, yerr=low_high, color=palette.first, ecolor=palette.first, marker="o",
                markersize=4, linewidth=1, elinewidth=0.8,
            )  # fmt: skip
            axes.set_title(f"{title}: error {part.ece:.4f}, temperature {part.temperature:.2f}")
            axes.set_xlabel("confidence")
            axes.grid()
            axes.set_xlim(low, 1 + (1 - low) * 0.03)
            axes.set_ylim(low, 1 + (1 - low) * 0.03)
        all_axes[0].set_ylabel("accuracy")

    return draw


def corruption_bars(rows: Sequence[CorruptionRow], *, accuracy: float) -> Draw:
    """Draw the accuracy under each corruption and severity, the worst corruption on top; a line where nothing is."""
    by_name: dict[str, dict[int, float]] = {}
    for row in rows:
        by_name.setdefault(row.name, {})[row.severity] = row.accuracy
    names = sorted(by_name, key=lambda name: float(np.mean(list(by_name[name].values()))), reverse=True)

    def draw(figure: Figure, palette: Palette) -> None:
        figure.set_size_inches(_WIDTH, 1.0 + 0.4 * len(names))
        axes = figure.subplots()
        colours = LinearSegmentedColormap.from_list("severity", palette.ramp)(np.linspace(0, 1, len(SEVERITIES)))
        for place, severity in enumerate(SEVERITIES):
            axes.barh(
                [row + 0.34 - 0.17 * place for row in range(len(names))],
                [by_name[name].get(severity, 0) for name in names],
                height=0.15,
                color=colours[place],
                label=f"severity {severity}",
            )
        axes.axvline(accuracy, color=palette.muted, linewidth=1, linestyle=(0, (4, 3)), label="not corrupted")
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=len(SEVERITIES) + 1)

    return draw


def corruption_examples(example: Picture, names: Sequence[str], *, seed: int) -> Draw:
    """Draw one image under each corruption, severities from left to right; unknown corruptions are left out."""
    image_1HW = example.array()[None]
    known = [name for name in names if name in CORRUPTIONS]

    def draw(figure: Figure, palette: Palette) -> None:
        columns = 3
        figure.set_size_inches(_WIDTH, 0.95 * math.ceil(len(known) / columns) + 0.1)
        all_axes = figure.subplots(math.ceil(len(known) / columns), columns, squeeze=False).ravel()
        for axes in all_axes:
            axes.set_axis_off()
        for axes, name in zip(all_axes, known, strict=False):
            images = [corrupt(image_1HW, name, severity, seed=seed)[0] for severity in SEVERITIES]
            axes.imshow(np.hstack(images), cmap="gray", vmin=0, vmax=255)
            axes.set_title(name, size=8, pad=2, color=palette.muted)

    return draw


def mistakes(samples: Sequence[Mistake], class_names: Sequence[str]) -> Draw:
    """Draw images that were classified wrong: what they are, what they were taken for and how surely."""
    columns = 8

    def draw(figure: Figure, palette: Palette) -> None:
        rows = math.ceil(len(samples) / columns)
        figure.set_size_inches(_WIDTH, 1.75 * rows)
        all_axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes in all_axes:
            axes.set_axis_off()
        for axes, sample in zip(all_axes, samples, strict=False):
            axes.imshow(sample.picture.array(), cmap="gray", vmin=0, vmax=255)
            true, predicted = (_short(class_names[label], 12) for label in (sample.label, sample.predicted))
            axes.set_title(f"is {true}\nsaid {predicted}\n{sample.probability:.1%} sure", size=7.5, loc="center", pad=3)

    return draw

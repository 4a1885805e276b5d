"""The pictures beside the tables, as PNG files."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from benchmarks.interleaved import Spread

_INK, _MUTED, _GRID, _FIRST, _SECOND = "#1f2328", "#59636e", "#d8dee4", "#2a78d6", "#c2410c"
_SIZE = (7.2, 3.6)
_DOTS_PER_INCH = 144


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One of a picture."""

    name: str
    values: Sequence[Spread]
    """By place on the axis below."""


def draw_callers(path: Path, callers: Sequence[int], lines: Sequence[Line]) -> None:
    """Write the picture of calls a second over callers."""

    def draw(axes: Axes) -> None:
        axes.set_xscale("log", base=2)
        axes.set_xlabel("callers, each waiting for its answer", color=_MUTED)
        axes.set_ylabel("calls a second", color=_MUTED)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        _lines(axes, callers, lines)

    _save(path, draw)


def draw_overload(path: Path, factors: Sequence[float], lines: Sequence[Line]) -> None:
    """Write the picture of images a second answered in time over arrivals, in times of what can be served."""

    def draw(axes: Axes) -> None:
        axes.set_xscale("log")
        axes.set_xlabel("arrivals, times capacity", color=_MUTED)
        axes.set_ylabel("images a second", color=_MUTED)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}x"))
        _lines(axes, factors, lines)

    _save(path, draw)


def _lines(axes: Axes, places: Sequence[float], lines: Sequence[Line]) -> None:
    axes.xaxis.set_major_locator(FixedLocator(list(places)))
    axes.xaxis.set_minor_locator(NullLocator())
    for line, colour in zip(lines, (_FIRST, _SECOND), strict=False):
        lowest, highest = [value.lowest for value in line.values], [value.highest for value in line.values]
        axes.fill_between(places, lowest, highest, color=colour, alpha=0.15, linewidth=0)
        axes.plot(places, [value.median for value in line.values], color=colour, marker="o", ms=4, label=line.name)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.grid(color=_GRID, linewidth=0.6)
    axes.tick_params(colors=_INK, length=0)
    axes.spines[:].set_visible(False)
    axes.legend(frameon=False, labelcolor=_INK)


def _save(path: Path, draw: Callable[[Axes], None]) -> None:
    figure = Figure(figsize=_SIZE, dpi=_DOTS_PER_INCH, layout="constrained")
    draw(figure.add_subplot())
    # Without the date and the version of what drew it: the same figures are the same file.
    figure.savefig(path, metadata={"Software": None})

"""A run as one page: ``report.html`` with its pictures in it, and the same pictures as files."""

import base64
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from training.errors import TrainingError
from training.evaluation import figures, record
from training.evaluation.figures import DARK, LIGHT, Draw
from training.evaluation.record import Record

PAGE = "report.html"
FIGURES = "figures"

_MOST_CLASSES = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A picture for both kinds of surroundings, as data URLs."""

    name: str
    light: str
    dark: str
    alt: str
    width: int
    """On the page, in pixels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What a folder has to tell; what is missing is empty, and said in ``notes``."""

    name: str
    steps: list[dict[str, float]]
    """Lines of ``metrics.jsonl`` about training, by step."""
    epochs: list[dict[str, float]]
    """Those about validation."""
    config: dict[str, Any]
    environment: dict[str, Any]
    evaluation: Record | None
    notes: list[str]


def write(folder: Path) -> Path:
    """
    Write ``report.html`` and ``figures/`` into a folder, from what lies there, and return the page's path.

    Read are ``metrics.jsonl``, ``config.json``, ``environment.json`` and ``evaluation.json``; each may be missing.

    Raises:
        TrainingError: The folder is not there, or cannot be written to.
    """
    if not folder.is_dir():
        raise TrainingError(f"{folder}: no folder to report on")
    run = read(folder)
    try:
        shown = {name: _figure(folder / FIGURES, name, draw, alt) for name, draw, alt in _drawings(run)}
        page = folder / PAGE
        _replace(page, _render(run, shown).encode())
    except OSError as error:
        raise TrainingError(f"{folder}: cannot write the report: {error.strerror}") from error
    return page


def read(folder: Path) -> Run:
    """Return what a folder has to tell."""
    notes: list[str] = []
    lines = list(_lines(folder / "metrics.jsonl"))
    evaluation: Record | None = None
    if (folder / record.FILE).exists():
        try:
            evaluation = record.read(folder / record.FILE)
        except TrainingError as error:
            notes.append(f"{error}.")
    return Run(
        name=folder.resolve().name,
        steps=[line for line in lines if "loss" in line],
        epochs=[line for line in lines if "validation_loss" in line or "validation_accuracy" in line],
        config=_object(folder / "config.json", notes),
        environment=_object(folder / "environment.json", notes),
        evaluation=evaluation,
        notes=notes,
    )


def _lines(path: Path) -> Iterator[dict[str, float]]:
    """Yield the numbers of each line that has a step; a run that was killed may leave a torn one."""
    if not path.is_file():
        return
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if not isinstance(line, dict):
            continue
        numbers = {key: one for key, one in line.items() if isinstance(one, int | float) and math.isfinite(one)}
        if "step" in numbers:
            yield numbers


def _object(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        content = error
    if isinstance(content, dict):
        return content
    notes.append(f"{path}: not a JSON object.")
    return {}


def _drawings(run: Run) -> Iterator[tuple[str, Draw, str]]:
    """Yield name, drawing and description of each picture there is data for."""
    if run.steps or run.epochs:
        yield "curves", figures.curves(run.steps, run.epochs), "Loss, share wrong and learning rate by step"
    if any("samples_per_second" in line for line in run.steps):
        yield "speed", figures.speed(run.steps), "Samples a second by step"
    found = run.evaluation
    if found is None:
        return
    yield (
        "confusion",
        figures.confusion(np.array(found.confusion), found.class_names),
        "Confusion matrix: true classes as rows, predicted ones as columns",
    )
    yield "reliability", figures.reliability(found.raw, found.served), "Accuracy by confidence"
    if found.corruptions:
        bars = figures.corruption_bars(found.corruptions, accuracy=found.accuracy)
        yield "corruptions", bars, "Accuracy by corruption and severity"
        if found.example is not None:
            names = list(dict.fromkeys(row.name for row in found.corruptions))
            draw = figures.corruption_examples(found.example, names, seed=found.corruption_seed)
            yield "corruption-examples", draw, "One image under each corruption"
    if found.mistakes:
        yield "mistakes", figures.mistakes(found.mistakes, found.class_names), "Images that were classified wrong"


def _figure(folder: Path, name: str, draw: Draw, alt: str) -> Figure:
    folder.mkdir(exist_ok=True)
    urls = {}
    for palette in (LIGHT, DARK):
        content = figures.png(draw, palette)
        _replace(folder / (f"{name}.png" if palette is LIGHT else f"{name}-{palette.name}.png"), content)
        urls[palette.name] = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    # Bytes 16 to 19 of a PNG file are its width.
    width = round(int.from_bytes(content[16:20], "big") / figures.SCALE)
    return Figure(name=name, light=urls["light"], dark=urls["dark"], alt=alt, width=width)


def _render(run: Run, shown: Mapping[str, Figure]) -> str:
    pages = Environment(
        loader=PackageLoader("training.evaluation"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    pages.filters |= {"percent": _percent}
    found = run.evaluation
    return pages.get_template("report.html.j2").render(
        run=run,
        found=found,
        figures=shown,
        wrong=0 if found is None else found.num_samples - round(found.accuracy * found.num_samples),
        classes=[] if found is None else sorted(found.classes, key=_by_recall)[:_MOST_CLASSES],
        config=_flat(run.config),
        environment=_flat(run.environment),
        rate=next((line["samples_per_second"] for line in reversed(run.steps) if "samples_per_second" in line), None),
    )


def _by_recall(row: record.ClassRow) -> float:
    """Sort the worst class to the top, and those without samples to the bottom."""
    return 2.0 if row.recall is None else row.recall


def _percent(share: float | None, digits: int = 2) -> str:
    return "\N{EN DASH}" if share is None else f"{share * 100:.{digits}f}\N{NO-BREAK SPACE}%"


def _flat(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return nested values as rows, names joined by dots."""
    rows: list[tuple[str, str]] = []
    for name, value in content.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", _plain(value)))
    return rows


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_plain(one) for one in value)
    return str(value)


def _replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; it can be made again, so that it need not outlive a power cut."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_bytes(content)
    os.replace(temporary, path)

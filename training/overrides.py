"""
Fields of a config by their dotted path, such as ``optim.lr``: laid over a recipe, read from YAML, written as YAML.

A file holds what differs from a recipe, ``recipe: NAME`` and sections as in :class:`training.config.TrainConfig`.
"""

import difflib
import inspect
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from training.config import TrainConfig
from training.errors import ConfigError
from training.recipes import RECIPES

_WIDTH = 118
_BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most", "min_length": "length at least",
           "max_length": "length at most", "pattern": "matching"}  # fmt: skip


def recipe(name: str) -> TrainConfig:
    """
    Return a recipe's config.

    Raises:
        ConfigError: There is no such recipe.
    """
    if name not in RECIPES:
        raise ConfigError(f"--recipe {name}: no such recipe; {_meant(name, RECIPES)}known are {_listed(RECIPES)}")
    return RECIPES[name]()


def parse(assignments: Iterable[str]) -> dict[str, str]:
    """
    Return path and text of each ``path=value``.

    Raises:
        ConfigError: One has no ``=``.
    """
    values: dict[str, str] = {}
    for assignment in assignments:
        path, is_given, text = assignment.partition("=")
        if not is_given:
            raise ConfigError(f"--set {assignment}: a field and its value are expected, such as optim.lr=0.001")
        values[path.strip()] = text.strip()
    return values


def read(file: Path) -> tuple[str | None, dict[str, Any]]:
    """
    Return a YAML file's recipe, None when it names none, and its values by path.

    Raises:
        ConfigError: The file cannot be read, or is not YAML of a config; names the line.
    """
    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {file}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"--config {file}{place}: not YAML: {getattr(error, 'problem', error)}") from error
    if not isinstance(content, dict | None):
        raise ConfigError(f"--config {file}: fields and their values are expected, such as `seed: 3`")
    values = dict(_flat(content or {}))
    name = values.pop("recipe", None)
    return (None if name is None else str(name)), values


def overridden(config: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    """
    Return ``config`` with other values, each by its path: text as on a command line, or what YAML makes of it.

    Raises:
        ConfigError: No such field, or a value that is not allowed there; says what is, and which field may be meant.
    """
    content = config.model_dump()
    for path, value in values.items():
        field = _field(path)
        *sections, name = path.split(".")
        place = content
        for section in sections:
            place = place[section]
        place[name] = None if _is_none(value) and _allows_none(field) else value
    try:
        return TrainConfig.model_validate(content)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(problem) for problem in error.errors())) from error


def as_yaml(config: TrainConfig) -> str:
    """Return all of ``config`` as YAML that :func:`read` takes, each field with its meaning and range as a comment."""
    return "\n".join(_lines(config, "")) + "\n"


def _lines(section: BaseModel, indent: str) -> Iterator[str]:
    values = {name: getattr(section, name) for name in type(section).model_fields}
    for name, field in type(section).model_fields.items():
        if not isinstance(values[name], BaseModel):
            words = " ".join((field.description or "").replace("``", "").split())
            for line in textwrap.wrap(f"{words} [{_allowed(field)}]", _WIDTH - len(indent)):
                yield f"{indent}# {line}"
            yield indent + yaml.safe_dump({name: values[name]}, width=_WIDTH).rstrip()
    for name, value in values.items():
        if isinstance(value, BaseModel):
            yield ""
            yield f"{indent}{name}:  # {inspect.cleandoc(type(value).__doc__ or '').partition(chr(10))[0]}"
            yield from _lines(value, indent + "  ")


def _allowed(field: FieldInfo) -> str:
    """Say of what type a field is, and within which bounds."""
    return ", ".join(_bounds(field))


def _bounds(field: FieldInfo) -> Iterator[str]:
    annotation = field.annotation
    choices = get_args(annotation)
    if choices and all(isinstance(choice, str) for choice in choices):
        yield " or ".join(choices)
    else:
        yield (annotation.__name__ if isinstance(annotation, type) else str(annotation)).replace(" | None", " or none")
    for bound in field.metadata:
        for name, words in _BOUNDS.items():
            limit = getattr(bound, name, None)
            if limit is not None:
                yield f"{words} {limit}"


def _flat(content: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _flat(value, f"{path}.")
        else:
            yield path, value


def _fields(model: type[BaseModel] = TrainConfig, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _fields(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def _field(path: str) -> FieldInfo:
    known = dict(_fields())
    if path in known:
        return known[path]
    section = path.partition(".")[0]
    inside = [name for name in known if name.startswith(f"{section}.")] or known
    raise ConfigError(f"{path}: no such field; {_meant(path, known)}known are {_listed(inside)}")


def _meant(word: str, known: Iterable[str]) -> str:
    """Return which of ``known`` a misspelt word may be; of a path its last part counts, too."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.7)
    if not close:
        by_name = {path.rpartition(".")[2]: path for path in known}
        close = [by_name[name] for name in difflib.get_close_matches(word.rpartition(".")[2], by_name, n=1, cutoff=0.7)]
    return f"did you mean {close[0]}? " if close else ""


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _is_none(value: Any) -> bool:
    return isinstance(value, str) and value.lower() in ("none", "null", "~")


def _allows_none(field: FieldInfo) -> bool:
    return type(None) in get_args(field.annotation)


def _explain(problem: Any) -> str:
    message = problem["msg"].removeprefix("Value error, ")
    message = f"{message[0].lower()}{message[1:]}"
    path = ".".join(str(part) for part in problem["loc"] if isinstance(part, str) and part not in ("float", "int"))
    known = dict(_fields())
    if path not in known:
        return str(message)
    return f"{path} = {problem['input']}: {message}; allowed is {_allowed(known[path])}"

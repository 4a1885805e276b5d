"""Kinds of values that a step of a transform takes: how they are written, and what is allowed."""

import functools
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from types import MappingProxyType
from typing import Any, Generic, TypeVar, get_args, get_type_hints

import numpy as np
from numpy.typing import NDArray

Value = TypeVar("Value")

_NUMBER = re.compile(r"[+-]?(\d{1,12}(\.\d{1,20})?|\.\d{1,20})(e[+-]?\d{1,2})?", re.ASCII)
_WHOLE = re.compile(r"\d{1,9}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Spread:
    """A range that a value is drawn from, each number in it equally likely."""

    low: float
    high: float

    @property
    def is_zero(self) -> bool:
        """Whether it is 0 for certain."""
        return self.low == self.high == 0

    def at(self, uniform: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the value for each number in [0, 1)."""
        return self.low + (self.high - self.low) * uniform


class Kind(ABC, Generic[Value]):
    """How values of one kind are written; ``allowed`` says it in words."""

    allowed: str

    @abstractmethod
    def parse(self, text: str) -> Value:
        """Return the value; raise ValueError when it is not allowed."""

    @abstractmethod
    def format(self, value: Value) -> str:
        """Return the one way to write ``value`` that is used in normal forms."""


class Number(Kind[float]):
    """A number from ``low`` to ``high``; the unit is empty where it has none."""

    def __init__(self, low: float, high: float, unit: str = "") -> None:
        self._low, self._high = low, high
        self.allowed = f"{_plain(low)} to {_plain(high)}" + (f" {unit}" if unit else "")

    def parse(self, text: str) -> float:
        """Return the number."""
        if not _NUMBER.fullmatch(text):
            raise ValueError
        return _within(float(text), self._low, self._high)

    def format(self, value: float) -> str:
        """Return the shortest form that reads back as the same number."""
        return _plain(value)


class Whole(Kind[int]):
    """A whole number from ``low`` to ``high``."""

    def __init__(self, low: int, high: int, unit: str = "") -> None:
        self._low, self._high = low, high
        self.allowed = f"{low} to {high}" + (f" {unit}" if unit else "") + ", whole"

    def parse(self, text: str) -> int:
        """Return the number."""
        if not _WHOLE.fullmatch(text):
            raise ValueError
        return int(_within(int(text), self._low, self._high))

    def format(self, value: int) -> str:
        """Return its digits."""
        return str(value)


class Spreads(Kind[Spread]):
    """A range within ``low`` to ``high``: ``LOW..HIGH``, or ``X`` for -X to X."""

    def __init__(self, low: float, high: float, unit: str) -> None:
        self._bound = Number(low, high)
        self.allowed = f"X (-X to X) or LOW..HIGH within {_plain(low)} to {_plain(high)} {unit}"

    def parse(self, text: str) -> Spread:
        """Return the range."""
        low, dots, high = text.partition("..")
        if dots:
            spread = Spread(self._bound.parse(low), self._bound.parse(high))
        else:
            most = self._bound.parse(text)
            spread = Spread(self._bound.parse(_plain(-most)), most)
        if spread.low > spread.high:
            raise ValueError
        return spread

    def format(self, value: Spread) -> str:
        """Return ``X`` where that says it."""
        if value.low == -value.high:
            return _plain(value.high)
        return f"{_plain(value.low)}..{_plain(value.high)}"


class PerChannel(Kind[tuple[float, ...]]):
    """A number for all channels, or as many as there are channels, joined by colons."""

    def __init__(self, low: float, high: float) -> None:
        self._number = Number(low, high)
        self.allowed = f"{self._number.allowed}; or one for each channel, as in 0.5:0.4:0.4"

    def parse(self, text: str) -> tuple[float, ...]:
        """Return the numbers."""
        return tuple(self._number.parse(number) for number in text.split(":"))

    def format(self, value: tuple[float, ...]) -> str:
        """Return them joined again."""
        return ":".join(map(_plain, value))


class Choice(Kind[str]):
    """One of a few words."""

    def __init__(self, *words: str) -> None:
        self._words = words
        self.allowed = " or ".join(words)

    def parse(self, text: str) -> str:
        """Return the word."""
        if text not in self._words:
            raise ValueError
        return text

    def format(self, value: str) -> str:
        """Return it as it is."""
        return value


@dataclass(frozen=True, slots=True)
class Takes:
    """What a field of a step takes: goes with the field's type, as in ``Annotated[float, Takes(...)]``."""

    kind: Kind[Any]
    meaning: str


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter as users read of it."""

    name: str
    kind: Kind[Any]
    meaning: str
    default: object
    """None where it must be given."""

    @property
    def is_required(self) -> bool:
        """Whether it must be given."""
        return self.default is None


@functools.cache
def parameters_of(step: type[Any]) -> Mapping[str, Parameter]:
    """Return the parameters that a step's class declares, by name, in their order."""
    hints = get_type_hints(step, include_extras=True)
    found = {}
    for declared in fields(step):
        for takes in get_args(hints[declared.name])[1:]:
            if isinstance(takes, Takes):
                default = None if declared.default is MISSING else declared.default
                found[declared.name] = Parameter(declared.name, takes.kind, takes.meaning, default)
    return MappingProxyType(found)


def _within(value: float, low: float, high: float) -> float:
    if not low <= value <= high:
        raise ValueError
    return value


def _plain(number: float) -> str:
    if math.isfinite(number) and number == int(number) and abs(number) < 1e15:
        return str(int(number))
    return repr(number)

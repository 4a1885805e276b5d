"""What a search may vary: ranges and choices under the dotted names of the config, such as ``optim.lr``."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, RootModel, Tag, ValidationError, model_validator

from training.errors import SearchError
from training.recipes import mnist

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Value = bool | int | float | str
"""What a field of the config can be set to by a search."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Range(_Frozen):
    """Numbers between two ends, both of them allowed."""

    low: float
    """Least value."""
    high: float
    """Largest value."""
    log: bool = False
    """Whether each order of magnitude is as likely as the next; takes ``low`` above 0. For rates."""
    whole: bool = False
    """Whether only whole numbers are tried."""

    @model_validator(mode="after")
    def _has_a_middle(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low has to be less than high, and {self.low:g} is not less than {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"with log, low has to be above 0; it is {self.low:g}")
        if self.whole and not (self.low.is_integer() and self.high.is_integer()):
            raise ValueError(f"with whole, low and high have to be whole; they are {self.low:g} and {self.high:g}")
        return self

    def distribution(self) -> "BaseDistribution":
        """Return it in Optuna's terms."""
        from optuna.distributions import FloatDistribution, IntDistribution

        if self.whole:
            return IntDistribution(int(self.low), int(self.high), log=self.log)
        return FloatDistribution(self.low, self.high, log=self.log)

    def extremes(self) -> tuple[Value, ...]:
        """Return the values that are valid where all between them are."""
        return (int(self.low), int(self.high)) if self.whole else (self.low, self.high)

    def holds(self, value: object) -> bool:
        """Return whether it may be tried."""
        return isinstance(value, int | float) and self.low <= value <= self.high


class Choices(_Frozen):
    """A few values in no order."""

    choices: tuple[Value, ...] = Field(min_length=2)
    """Values, at least two."""

    def distribution(self) -> "BaseDistribution":
        """Return it in Optuna's terms."""
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(self.choices)

    def extremes(self) -> tuple[Value, ...]:
        """Return all of them."""
        return self.choices

    def holds(self, value: object) -> bool:
        """Return whether it may be tried."""
        return value in self.choices


def _kind(entry: Any) -> str:
    # Told apart by hand, as a union's errors speak of both its sides.
    has_choices = "choices" in entry if isinstance(entry, Mapping) else isinstance(entry, Choices)
    return "choices" if has_choices else "range"


Entry = Annotated[
    Annotated[Range, Tag("range")] | Annotated[Choices, Tag("choices")],
    Discriminator(_kind),
]


class Space(RootModel[dict[str, Entry]]):
    """What is varied, by dotted name."""

    model_config = ConfigDict(frozen=True)
    root: dict[str, Entry] = Field(min_length=1)

    def distributions(self) -> dict[str, "BaseDistribution"]:
        """Return it in Optuna's terms."""
        return {name: entry.distribution() for name, entry in self.root.items()}

    def extremes(self) -> Iterator[tuple[str, Value]]:
        """Give each name with each value to try before a search starts: a config takes all of them, or says why not."""
        return ((name, value) for name, entry in self.root.items() for value in entry.extremes())

    def names(self) -> tuple[str, ...]:
        """Return what is varied, in the order given."""
        return tuple(self.root)


def parse(text: str) -> tuple[str, Range | Choices]:
    """
    Return the name and what is tried of ``optim.lr=1e-4..1e-2,log``, or of ``data.batch_size=64|128|256``.

    ``log`` and ``whole`` may follow a range. The values of a choice mean what they mean on the line of ``--set``.

    Raises:
        SearchError: It is neither.
    """
    name, _, values = text.partition("=")
    try:
        if "|" in values:
            return name, Choices(choices=tuple(values.split("|")))
        bounds, *words = values.split(",")
        low, between, high = bounds.partition("..")
        if not between or not set(words) <= {"log", "whole"}:
            raise ValueError("LOW..HIGH, with ,log or ,whole behind it, or values between | are expected")
        return name, Range(low=float(low), high=float(high), log="log" in words, whole="whole" in words)
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise SearchError(f"--vary {text}: {message}") from error
    except ValueError as error:
        raise SearchError(f"--vary {text}: {error}") from error


def default_space(optimizer: Literal["adamw", "sgd"] = "sgd") -> Space:
    """
    Return what is worth trying for any images, the learning rate first of all.

    The augmentations go from none to strong. Two of them mirror, which is right for clothes and wrong for characters:
    what the validation images say decides.

    Args:
        optimizer: Whose rates and decays to try; they are of other orders of magnitude.
    """
    lr, weight_decay = {
        "adamw": (Range(low=3e-4, high=6e-3, log=True), Range(low=5e-3, high=0.5, log=True)),
        "sgd": (Range(low=0.02, high=0.3, log=True), Range(low=5e-5, high=5e-3, log=True)),
    }[optimizer]
    return Space(
        {
            "optim.lr": lr,
            "optim.weight_decay": weight_decay,
            "optim.label_smoothing": Range(low=0.0, high=0.15),
            "model.dropout": Range(low=0.1, high=0.6),
            "augmentation": Choices(
                choices=(
                    "",
                    "mirror",
                    "augment-v1(rotate=5,shift=1,scale=5,shear=3)",
                    mnist().augmentation,
                    "augment-v1(rotate=15,scale=15,shear=10,elastic=2,cutout=8)",
                    "mirror|augment-v1(rotate=5,shift=2,scale=8,shear=3)",
                )
            ),
        }
    )

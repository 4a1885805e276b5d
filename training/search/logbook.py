"""What a search over hyper-parameters is, and what is known of its trials; nothing of Ray in here."""

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from training.errors import SearchError
from training.recipes import RECIPES
from training.search.space import Space, Value, default_space

Goal = Literal["validation_accuracy", "validation_loss"]
TrialState = Literal["waiting", "running", "finished", "stopped", "failed"]

_SEARCH = "search.yaml"
_TRIALS = "trials.json"
# The search sets these itself, the same for every trial: what they are measured by has to stay one thing.
_OWN_FIELDS = frozenset(
    ("name", "seed", "data.streamer", "data.dataset", "data.train_split", "data.validation_split", "data.test_split")
)
_OWN_SECTIONS = ("budget.", "checkpoint.")
# Of a trial, in all its epochs: a network that saw fewer has hardly begun.
_LEAST_SAMPLES = 40_000
_MOST_EPOCHS = 100


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class SearchBudget(_Frozen):
    """How much a search may cost."""

    trials: int = Field(20, ge=1, le=10_000)
    """Combinations to try."""
    epochs: int = Field(8, ge=1, le=10_000)
    """Epochs of a trial that is not stopped early; more of them where the data is small and nobody said how many."""
    min_epochs: int | None = Field(None, ge=1)
    """Epochs that every trial gets before it may be stopped; none: a quarter of all, at least one."""
    minutes: float | None = Field(None, gt=0)
    """Time after which the search ends with what it has, the running trials unfinished; none: no limit."""

    @property
    def first_look(self) -> int:
        """Epochs after which trials are compared for the first time."""
        return self.min_epochs or max(self.epochs // 4, 1)

    @model_validator(mode="after")
    def _looks_before_the_end(self) -> Self:
        if self.min_epochs is not None and self.min_epochs > self.epochs:
            raise ValueError(f"min_epochs is {self.min_epochs}, and a trial has {self.epochs} epochs")
        return self


class Resources(_Frozen):
    """What one trial gets of a machine; as many run at once as fit."""

    cpus: int | None = Field(None, ge=1, le=1024)
    """Cores of a trial; none: four, or all where there are fewer."""
    gpus: float | None = Field(None, ge=0, le=16)
    """GPUs of a trial, parts of one allowed; none: one where there is one."""
    concurrency: int | None = Field(None, ge=1, le=10_000)
    """Most trials at once; none: as many as fit."""


class Search(_Frozen):
    """A search over the fields of a run's config."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")
    """Of the search, and of the model its winner becomes."""
    dataset: str = "mnist"
    """Data set as the streamer lists it."""
    data: Path | None = None
    """
    Folder of the data set, which the search then streams itself; none: a known one, or what a streamer has. Images of
    another size than the network's are scaled as a whole, or with ``:center`` behind the folder, framed as digits.
    """
    streamer: str | None = None
    """Address of a running streamer that has it, host:port; none: one that answers here, else one of its own."""
    recipe: str = "mnist"
    """Named run that every trial starts from."""
    goal: Goal = "validation_accuracy"
    """What is to be best after a trial's last epoch: the highest accuracy or the lowest loss."""
    validation: int = Field(10, ge=1, le=50)
    """Percent of the training split that trials are measured on, and not trained on. The test split is never read."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seeds what is tried, and each trial's weights and order of samples."""
    fixed: dict[str, Value] = {}
    """Fields that every trial has, by dotted name."""
    space: Space = Field(default_factory=default_space)
    """Fields that are varied, by dotted name; by default what suits the optimizer of recipe and ``fixed``."""
    budget: SearchBudget = SearchBudget()
    resources: Resources = Resources()

    @field_validator("recipe")
    @classmethod
    def _is_known(cls, recipe: str) -> str:
        if recipe not in RECIPES:
            raise ValueError(f"no such recipe; known are {', '.join(sorted(RECIPES))}")
        return recipe

    @model_validator(mode="before")
    @classmethod
    def _space_suits_the_optimizer(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or "space" in values:
            return values
        fixed, recipe = values.get("fixed", {}), values.get("recipe", "mnist")
        named = fixed.get("optim.name") if isinstance(fixed, Mapping) else None
        if named not in ("adamw", "sgd"):
            named = RECIPES[recipe]().optim.name if recipe in RECIPES else "sgd"
        return {**values, "space": default_space(named)}

    @model_validator(mode="after")
    def _fields_are_free(self) -> Self:
        for name in (*self.space.names(), *self.fixed):
            if name in _OWN_FIELDS or name.startswith(_OWN_SECTIONS):
                raise ValueError(f"{name} cannot be varied or fixed: the search sets it itself")
        if self.data is not None and self.streamer is not None:
            raise ValueError("data and streamer both say where the data is; give one of them")
        if both := set(self.fixed) & set(self.space.names()):
            raise ValueError(f"{', '.join(sorted(both))}: both fixed and varied")
        return self

    def fitted(self, num_train: int) -> Self:
        """
        Return it with more epochs where the data is so small that those by default would teach nothing.

        Args:
            num_train: Images that a trial trains on, at least 1.
        """
        if {"epochs", "min_epochs"} & self.budget.model_fields_set:
            return self
        epochs = min(max(self.budget.epochs, -(-_LEAST_SAMPLES // num_train)), _MOST_EPOCHS)
        return self.model_copy(update={"budget": self.budget.model_copy(update={"epochs": epochs})})

    @property
    def is_better_when_higher(self) -> bool:
        """Whether the goal is to be as high as possible."""
        return self.goal == "validation_accuracy"


class Trial(_Frozen):
    """One combination, and how far it has come."""

    number: int
    """From 1, in the order of their beginning."""
    id: str
    """Ray's name for it."""
    values: dict[str, Value]
    """What is varied, by dotted name."""
    state: TrialState = "waiting"
    """``stopped``: early, as others did better; ``failed``: twice."""
    scores: dict[int, float] = {}
    """The goal after each epoch."""
    seconds: float = 0.0
    """Time spent on it."""
    failures: int = 0
    """How often it failed; after the first time it is tried again."""
    error: str = ""
    """What it failed with last, in one line."""

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return max(self.scores, default=0)

    @property
    def is_over(self) -> bool:
        """Whether nothing more becomes of it."""
        return self.state in ("finished", "stopped", "failed")

    @property
    def score(self) -> float | None:
        """The goal after its last epoch; none before the first."""
        return self.scores.get(self.epoch)


def parse(content: Mapping[str, Any], *, source: str) -> Search:
    """
    Return the search that is described.

    Args:
        content: As in the file.
        source: Begins the message of an error.

    Raises:
        SearchError: Names each field that cannot be used, and what is allowed.
    """
    try:
        return Search.model_validate(content)
    except ValidationError as error:
        raise SearchError("; ".join(f"{source}: {_explain(problem)}" for problem in error.errors())) from error


def read(path: Path) -> dict[str, Any]:
    """
    Return the content of a search's file.

    Raises:
        SearchError: It cannot be read, or is no YAML mapping.
    """
    try:
        content = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise SearchError(f"{path}: cannot read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SearchError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise SearchError(f"{path}: has to hold fields such as `dataset: mnist`")
    return content


class Logbook:
    """
    A search's folder: what it is, and its trials.

    Args:
        folder: Made by :meth:`create`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def create(cls, folder: Path, search: Search) -> "Logbook":
        """
        Begin a search.

        Raises:
            SearchError: There is one of this name, or the folder cannot be written.
        """
        logbook = cls(folder)
        logbook.require_new(search.name)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / _SEARCH).open("x") as file:
                yaml.safe_dump(search.model_dump(mode="json"), file, sort_keys=False)
        except OSError as error:
            raise SearchError(f"{folder}: cannot write: {error.strerror}") from error
        logbook.write_trials(())
        return logbook

    def require_new(self, name: str) -> None:
        """
        Refuse a folder that holds a search already.

        Raises:
            SearchError: It does.
        """
        if (self.folder / _SEARCH).exists():
            raise SearchError(
                f"{self.folder}: there is a search of this name; `sluice tune resume {name}` goes on with it, "
                f"--name gives the new one another"
            )

    def search(self) -> Search:
        """
        Return what it is.

        Raises:
            SearchError: There is none in this folder.
        """
        path = self.folder / _SEARCH
        if not path.is_file():
            others = sorted(other.parent.name for other in self.folder.parent.glob(f"*/{_SEARCH}"))
            raise SearchError(
                f"{self.folder}: there is no search of this name; "
                + (f"there are {', '.join(others)}" if others else "there is none, and `sluice tune` begins one")
            )
        return parse(read(path), source=str(path))

    def trials(self) -> tuple[Trial, ...]:
        """Return its trials in the order of their beginning."""
        try:
            return _TRIALS_TYPE.validate_json((self.folder / _TRIALS).read_bytes())
        except FileNotFoundError:
            return ()
        except ValidationError as error:
            raise SearchError(f"{self.folder / _TRIALS}: not readable: {error}") from error

    def write_trials(self, trials: tuple[Trial, ...]) -> None:
        """Replace what is known of its trials; a reader sees the old or the new."""
        partial = self.folder / f".{_TRIALS}.partial"
        partial.write_bytes(_TRIALS_TYPE.dump_json(trials, indent=1))
        os.replace(partial, self.folder / _TRIALS)


def ranked(trials: Sequence[Trial], search: Search) -> list[Trial]:
    """Return the trials that have a score, the best first: those that went furthest, and of these by score."""
    sign = -1 if search.is_better_when_higher else 1
    # A score after few epochs says little beside one after all of them: the rate has not come down yet.
    scored = [(trial.state == "failed", -trial.epoch, sign * trial.score, trial.number, trial)
              for trial in trials if trial.score is not None]  # fmt: skip
    return [trial for *_, trial in sorted(scored)]


def best(trials: Sequence[Trial], search: Search) -> Trial:
    """
    Return the winner.

    Raises:
        SearchError: No trial has a score, or all of them failed.
    """
    for trial in ranked(trials, search):
        if trial.state != "failed":
            return trial
    failed = next((f"; trial {trial.number} failed: {trial.error}" for trial in trials if trial.error), "")
    raise SearchError(f"search {search.name}: no trial has been measured yet{failed}")


def splits(search: Search) -> dict[str, Value]:
    """Return the fields that say what trials are trained on and what they are measured on."""
    cut = 100 - search.validation
    return {"data.train_split": f"train[:{cut}%]", "data.validation_split": f"train[{cut}%:]"}


def command(search: Search, trial: Trial) -> str:
    """
    Return the shell's line that trains once more as a trial was, measures on the test split, and publishes.

    The trial's validation split stays one: it chooses the best epoch and calibrates the probabilities.
    """
    words = ["sluice", "train", "--recipe", search.recipe, "--epochs", str(search.budget.epochs)]
    if search.streamer is not None:
        words += ["--streamer", search.streamer]
    if search.data is not None:
        words += ["--data", str(search.data)]
    usual = dict(_flat(RECIPES[search.recipe]().model_dump()))
    own = {"seed": search.seed, **splits(search)}
    fields: dict[str, Value] = {"name": search.name, "data.dataset": search.dataset}
    fields |= {name: value for name, value in own.items() if value != usual[name]}
    fields |= {**search.fixed, **trial.values}
    for name, value in fields.items():
        words += ["--set", f"{name}={_plain(value)}"]
    return shlex.join(words)


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _plain(value: Value) -> str:
    # Five digits are more than the score tells apart.
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _explain(problem: Any) -> str:
    parts = [str(part) for part in problem["loc"]]
    if parts[:1] == ["space"]:
        del parts[2:3]  # the kind of the entry, where nobody wrote it
    where = ".".join(parts)
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        message = "no such field"
    if problem["type"] == "missing":
        message = "has to be given"
    return f"{where}: {message}" if where else message


_TRIALS_TYPE = TypeAdapter(tuple[Trial, ...])

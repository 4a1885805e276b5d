"""One trial of a search: a run that tells Ray how good it is after each epoch. The one place that knows both."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from streamer.client import SplitInfo
from training.config import TrainConfig
from training.errors import ConfigError, SearchError
from training.evaluation.evaluate import Evaluation
from training.journal import FILE as JOURNAL
from training.loop import Step
from training.overrides import overridden, recipe
from training.run import CHECKPOINTS, learn
from training.search.logbook import Search, splits
from training.search.space import Value

EPOCH = "epoch"
"""Name under which Ray is told how many epochs a trial has done."""

__all__ = ["CHECKPOINTS", "EPOCH", "check", "configure", "run_trial", "starting_point"]


def configure(search: Search, values: Mapping[str, Value], *, streamer: str) -> TrainConfig:
    """
    Return the config of a trial.

    Args:
        search: Gives recipe, data and budget.
        values: What is varied, by dotted name.
        streamer: Address, host:port.

    Raises:
        ConfigError: A field or a value is none.
    """
    own = {
        "name": search.name,
        "seed": search.seed,
        "data.streamer": streamer,
        "data.dataset": search.dataset,
        **splits(search),
        "budget.seconds": None,
        "budget.max_epochs": search.budget.epochs,
    }
    return overridden(recipe(search.recipe), {**search.fixed, **values, **own})


def check(search: Search) -> None:
    """
    Refuse a search whose trials could not run: an unknown field, or a range that leaves what is allowed.

    Raises:
        SearchError: Names the field and what is allowed.
    """
    try:
        configure(search, {}, streamer="127.0.0.1:1")
        for name, value in search.space.extremes():
            configure(search, {name: value}, streamer="127.0.0.1:1")
    except ConfigError as error:
        raise SearchError(f"search {search.name}: {error}") from error


def starting_point(search: Search) -> dict[str, Value] | None:
    """Return the values that the recipe itself has, or none where the space leaves one of them out."""
    content = configure(search, {}, streamer="127.0.0.1:1").model_dump()
    point = {name: _at(content, name) for name in search.space.names()}
    return point if all(entry.holds(point[name]) for name, entry in search.space.root.items()) else None


def run_trial(values: dict[str, Value], *, search: str, folder: str, streamer: str) -> None:
    """
    Train with ``values`` in a worker of Ray, and go on where this trial has been stopped before.

    Ray ends it, inside of ``report``, when others do better.

    Args:
        values: What is varied, by dotted name.
        search: As JSON.
        folder: Of all trials; on a cluster all machines have to see it.
        streamer: Address, host:port.

    Raises:
        TrainingError, streamer.errors.StreamerError: Ray tries again, once.
    """
    from ray import tune

    described = Search.model_validate_json(search)
    own = Path(folder) / tune.get_context().get_trial_id()
    # Ray's scheduler may have forgotten what this trial told before; told twice, nothing changes.
    for epoch, scores in _told(own / JOURNAL):
        tune.report({EPOCH: epoch, **scores})
    learn(configure(described, values, streamer=streamer), own, observer=_Reporter())


class _Reporter:
    """Tells Ray what each epoch came to."""

    def started(self, config: TrainConfig, split: SplitInfo, device: torch.device, folder: Path) -> None:
        """Nothing to tell."""

    def stepped(self, step: Step, num_samples: int) -> None:
        """Nothing to tell."""

    def validated(self, step: Step, evaluation: Evaluation) -> None:
        """Tell the scores; does not return where the trial is to end."""
        from ray import tune

        scores = {"validation_accuracy": evaluation.accuracy, "validation_loss": evaluation.loss}
        tune.report({EPOCH: step.epoch + 1, **scores})

    def evaluated(self, evaluation: Evaluation, split: SplitInfo) -> None:
        """Nothing to tell: the test split chooses nothing."""


def _at(content: dict[str, Any], path: str) -> Any:
    for part in path.split("."):
        content = content[part]
    return content


def _told(journal: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """Give the epochs of which a journal knows the scores, from 1; its last line may be torn."""
    lines = journal.read_text().splitlines() if journal.exists() else []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if "validation_accuracy" in entry:
            yield entry["epoch"] + 1, {name: entry[name] for name in ("validation_accuracy", "validation_loss")}

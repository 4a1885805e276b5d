"""Named runs: functions that return a full config; a variant calls another and changes fields."""

from collections.abc import Callable

from training.config import BudgetConfig, TrainConfig


def mnist() -> TrainConfig:
    """Train about three minutes on two cores; at least one epoch of full MNIST, eight of the small set."""
    return TrainConfig()


def smoke() -> TrainConfig:
    """Train one epoch and no more: shows that the line works, not how good the network is."""
    return TrainConfig(budget=BudgetConfig(seconds=None, max_epochs=1))


DEFAULT_RECIPE = "mnist"

RECIPES: dict[str, Callable[[], TrainConfig]] = {"mnist": mnist, "smoke": smoke}

from typing import Any

import pytest

from rpc.settings import SettingsError
from sluice.training import TrainOptions, configure

NOTHING: dict[str, Any] = {"streamer": None, "seed": None, "epochs": None, "minutes": None, "lr": None, "triton": None}


def test_options_are_laid_over_the_recipe() -> None:
    options = TrainOptions(**{**NOTHING, "recipe": "mnist", "seed": 3, "minutes": 2.0, "streamer": "far:1"})
    config = configure(options)

    assert (config.seed, config.budget.seconds, config.data.streamer) == (3, 120.0, "far:1")


def test_a_number_of_epochs_is_trained_however_long_it_takes() -> None:
    config = configure(TrainOptions(**{**NOTHING, "recipe": "mnist", "epochs": 2}))

    assert config.budget.epochs(1, done=0, elapsed_seconds=0, samples_per_second=1e9) == 2


def test_value_out_of_range_is_named() -> None:
    with pytest.raises(SettingsError, match=r"--lr: .*greater than 0"):
        configure(TrainOptions(**{**NOTHING, "recipe": "mnist", "lr": -1.0}))


def test_unknown_recipe_is_named_with_the_known_ones() -> None:
    with pytest.raises(SettingsError, match=r"--recipe big: .*mnist, smoke"):
        configure(TrainOptions(**{**NOTHING, "recipe": "big"}))


def test_epochs_and_minutes_together_are_refused() -> None:
    with pytest.raises(SettingsError, match="--epochs and --minutes"):
        configure(TrainOptions(**{**NOTHING, "recipe": "mnist", "epochs": 2, "minutes": 5.0}))


def test_streamer_is_asked_where_its_settings_put_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_STREAMER_HOST", "::1")
    monkeypatch.setenv("SLUICE_STREAMER_PORT", "5")

    assert configure(TrainOptions(**{**NOTHING, "recipe": "mnist"})).data.streamer == "[::1]:5"

import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rpc.settings import SettingsError
from sluice.training import TrainOptions, configure, run
from training.config import TrainConfig
from training.folders import config_of

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


def test_time_asked_for_is_not_outweighed_by_a_least_number_of_samples() -> None:
    budget = configure(TrainOptions(**{**NOTHING, "recipe": None, "minutes": 1.0})).budget

    assert budget.epochs(4_000, done=0, elapsed_seconds=0, samples_per_second=200) == 3


def test_folder_names_data_set_and_model_where_nobody_else_does() -> None:
    options = TrainOptions(**{**NOTHING, "recipe": None}, data=Path("some/My Shoes:center"))
    named = configure(replace(options, assignments=("name=boots",)))

    assert (configure(options).name, configure(options).data.dataset) == ("my-shoes", "my-shoes")
    assert (named.name, named.data.dataset) == ("boots", "my-shoes")


def test_folder_and_streamer_together_are_refused() -> None:
    options = TrainOptions(**{**NOTHING, "recipe": None, "streamer": "far:1"}, data=Path("shoes"))
    with pytest.raises(SettingsError, match="--data and --streamer"):
        run(options, report=lambda _: None)


def test_folder_is_streamed_until_the_run_is_interrupted(tiny_mnist: Path) -> None:
    command = [sys.executable, "-m", "sluice", "train", "--recipe", "smoke", "--data", str(tiny_mnist), "--no-load"]
    with subprocess.Popen([*command, "--epochs", "9999"], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        first = next(line for line in process.stderr if line.startswith("streamer "))
        next(line for line in process.stderr if line.startswith("after epoch 1: "))
        process.send_signal(signal.SIGINT)
        *_, hint, last = process.stderr
    (folder,) = Path("runs").iterdir()

    assert (process.returncode, hint) == (130, f"going on takes --data {tiny_mnist}, too\n"), last
    assert f"`sluice train --resume {folder}`" in last
    host, port = config_of(folder).data.streamer.split(":")
    assert first.startswith(f"streamer {host}:{port}, for this run; its log is .sluice/logs/run-tiny-mnist")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)))


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


def test_options_weigh_over_assignments_and_those_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("recipe: smoke\nseed: 1\noptim: {lr: 1e-4, name: sgd}\n")
    assignments = ("optim.lr=1e-3", "seed=2")
    config = configure(
        TrainOptions(**{**NOTHING, "recipe": None, "seed": 3}, assignments=assignments, config=tmp_path / "run.yaml")
    )

    assert (config.seed, config.optim.lr, config.optim.name, config.budget.max_epochs) == (3, 1e-3, "sgd", 1)


def test_misspelt_field_is_named_with_the_one_meant() -> None:
    with pytest.raises(SettingsError, match=r"optim.rl: no such field; did you mean optim.lr\?"):
        configure(TrainOptions(**{**NOTHING, "recipe": None}, assignments=("optim.rl=1",)))


def test_run_that_goes_on_takes_no_other_config(tmp_path: Path) -> None:
    options = TrainOptions(**{**NOTHING, "recipe": None, "lr": 0.1}, resume=str(tmp_path))
    with pytest.raises(SettingsError, match="goes on with the run's own config; leave out --lr"):
        run(options, report=lambda _: None)


def test_finished_run_does_not_go_on(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(TrainConfig().model_dump_json())
    (tmp_path / "result.json").touch()
    with pytest.raises(SettingsError, match="that run is finished"):
        run(TrainOptions(**{**NOTHING, "recipe": None}, resume=str(tmp_path)), report=lambda _: None)

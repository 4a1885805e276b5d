"""A run in MLflow: a real database, and a server that is not there."""

import json
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tests.training.ranked import Watching
from training.config import BudgetConfig, DataConfig, TrainConfig
from training.errors import StoppedError, TrackingError
from training.run import learn
from training.tracking import FILE, TrackedObserver, Tracking

# Of MLflow's own database migrations.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database for all, as MLflow takes seconds to make one; each test has an experiment of its own."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def tracked(uri: str, experiment: str) -> Any:
    """Return the only run there is."""
    client: Any = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return run


def test_run_is_in_mlflow_with_config_figures_and_report(uri: str, folder: Path) -> None:
    (folder / "report.html").write_text("a page")

    with Tracking(uri, folder, experiment="mnist") as tracking:
        tracking.describe({"optim": {"lr": 0.1}, "seed": 3}, {"commit": "abc", "versions": {"torch": "2"}})
        tracking.note({"loss": 2.0}, step=1)
        tracking.note({"loss": 1.0}, step=2)
        tracking.keep("report.html")
        tracking.keep("nothing.html")

    run, client = tracked(uri, "mnist"), MlflowClient(uri)
    assert tracking.complaint == ""
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert run.data.params == {"optim.lr": "0.1", "seed": "3"}
    assert run.data.tags.items() >= {"sluice.commit": "abc", "sluice.versions.torch": "2"}.items()
    assert [(each.step, each.value) for each in client.get_metric_history(run.info.run_id, "loss")] == [(1, 2), (2, 1)]
    assert [each.path for each in client.list_artifacts(run.info.run_id)] == ["report.html"]


@pytest.mark.parametrize(
    ("error", "status"),
    [(StoppedError(7, 2, "run"), "KILLED"), (ValueError("no"), "FAILED")],
    ids=["stopped", "failed"],
)
def test_run_that_ends_early_says_so_and_goes_on_as_the_same(
    uri: str, folder: Path, error: Exception, status: str
) -> None:
    with pytest.raises(type(error)), Tracking(uri, folder, experiment=status):
        raise error
    assert tracked(uri, status).info.status == status

    with Tracking(uri, folder, experiment=status) as tracking:
        assert not tracking.is_new
        assert tracked(uri, status).info.status == "RUNNING"
    assert tracked(uri, status).info.status == "FINISHED"


def test_server_that_is_not_there_is_named_before_the_run_begins(folder: Path) -> None:
    with pytest.raises(TrackingError, match=r"--mlflow http://127.0.0.1:9: .*"):
        Tracking("http://127.0.0.1:9", folder, experiment="mnist")
    assert not (folder / FILE).exists()


def test_database_that_goes_away_costs_figures_and_not_the_run(uri: str, folder: Path) -> None:
    with Tracking(uri, folder, experiment="mnist") as tracking:
        run = json.loads((folder / FILE).read_text())["run"]
        MlflowClient(uri).delete_run(run)
        tracking.note({"loss": 2.0}, step=1)

    assert tracking.complaint.startswith(f"MLflow at {uri} lacks 2 entries: ")


def test_training_tells_mlflow_what_its_observer_hears(uri: str, folder: Path, streamer: str) -> None:
    data = DataConfig(streamer=streamer, batch_size=20, train_split="train", validation_split="test")
    config = TrainConfig(name="told", data=data, budget=BudgetConfig(seconds=None, max_epochs=1), log_steps=1)

    with TrackedObserver(Watching(), uri) as observer:
        learnt = learn(config, folder, observer=observer)

    run, client = tracked(uri, "told"), MlflowClient(uri)
    losses = client.get_metric_history(run.info.run_id, "training/loss")
    assert [each.step for each in losses] == [1, 2]
    assert run.data.metrics["validation/accuracy"] == pytest.approx(learnt.validation_accuracy)
    assert run.data.params["data.batch_size"] == "20"
    assert "config.json" in {each.path for each in client.list_artifacts(run.info.run_id)}

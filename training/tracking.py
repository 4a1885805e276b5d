"""A run in MLflow, for those who keep theirs there: its config, its figures as they come, and its report."""

import importlib
import json
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from streamer.client import SplitInfo
from training.config import TrainConfig
from training.errors import StoppedError, TrackingError
from training.evaluation import record, report
from training.evaluation.evaluate import Evaluation
from training.folders import CONFIG, ENVIRONMENT, RESULT
from training.loop import Step
from training.run import Observer

LOCAL = "sqlite:///mlflow.db"
"""A file in the working folder; artifacts lie beside it, in ``mlruns``. MLflow gives up its own folders of files."""

FILE = "mlflow.json"
# The defaults are made for servers that are being rolled: minutes in which a run would not begin.
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
_KEPT = (CONFIG, ENVIRONMENT, record.FILE, report.PAGE, RESULT)
_CLOSE_SECONDS = 30.0
_MAX_WAITING = 10_000
_MAX_VALUE = 6000  # characters of a parameter or tag, in MLflow


class Tracking:
    """
    One run in MLflow; a resumed run goes on in the same.

    A thread of its own sends: a server that is slow or goes away costs figures, and never the training a moment.

    Args:
        uri: Of an MLflow server or database: ``http://...``, or ``sqlite:///FILE``.
        folder: Of the run; ``mlflow.json`` in it says where it is tracked.
        experiment: Which the run belongs to; made where there is none of the name.

    Raises:
        TrackingError: MLflow is not installed, or does not answer at the address.
    """

    def __init__(self, uri: str, folder: Path, *, experiment: str) -> None:
        for name, value in _PATIENCE.items():
            os.environ.setdefault(name, value)
        try:
            mlflow: Any = importlib.import_module("mlflow")
            self._entities: Any = importlib.import_module("mlflow.entities")
        except ImportError as error:
            raise TrackingError(f"--mlflow takes MLflow ({error}): pip install '.[mlflow]' in the sources") from error
        self._uri, self._folder = uri, folder
        self._waiting: queue.Queue[Callable[[], object] | None] = queue.Queue(_MAX_WAITING)
        self._lost = 0
        self._problem = ""
        try:
            self._client: Any = mlflow.MlflowClient(uri)
            known = self._known()
            self._run = known or self._created(experiment)
            self._client.update_run(self._run, "RUNNING")
        except Exception as error:  # whatever its database or web client raises comes through
            raise TrackingError(f"--mlflow {uri}: {_first_line(error)}") from error
        self.is_new = known is None
        """Whether nothing of this run was there before."""
        (folder / FILE).write_text(json.dumps({"uri": uri, "run": self._run}) + "\n")
        self._sender = threading.Thread(target=self._send, name="mlflow", daemon=True)
        self._sender.start()

    def describe(self, config: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
        """Note what the run is: the config's fields as parameters; commit, versions and data as tags."""
        params = [self._entities.Param(name, value) for name, value in _flat(config)]
        tags = [self._entities.RunTag(f"sluice.{name}", value) for name, value in _flat(environment)]
        self._enqueue(lambda: self._client.log_batch(self._run, params=params, tags=tags))

    def note(self, figures: Mapping[str, float], *, step: int) -> None:
        """Note figures of a step."""
        now = round(time.time() * 1000)
        # A GPU's first steps have NaN for what is not read yet.
        known = {name: value for name, value in figures.items() if math.isfinite(value)}
        metrics = [self._entities.Metric(name, value, now, step) for name, value in known.items()]
        self._enqueue(lambda: self._client.log_batch(self._run, metrics=metrics))

    def keep(self, name: str) -> None:
        """Hand over a file of the run's folder, if it is there."""
        path = self._folder / name
        if path.exists():
            self._enqueue(lambda: self._client.log_artifact(self._run, str(path)))

    @property
    def complaint(self) -> str:
        """What is missing in MLflow, and why; empty if nothing is."""
        return f"MLflow at {self._uri} lacks {self._lost} entries: {self._problem}" if self._lost else ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Send what waits, for half a minute at most, and say how the run ended."""
        was_stopped = isinstance(error, StoppedError | KeyboardInterrupt)
        status = "FINISHED" if error is None else "KILLED" if was_stopped else "FAILED"
        deadline = time.monotonic() + _CLOSE_SECONDS
        try:
            self._waiting.put(lambda: self._client.set_terminated(self._run, status), timeout=_CLOSE_SECONDS)
            self._waiting.put(None, timeout=max(deadline - time.monotonic(), 0))
        except queue.Full:
            pass
        else:
            self._sender.join(max(deadline - time.monotonic(), 0))
        if self._sender.is_alive():
            self._lost += self._waiting.qsize()
            self._problem = self._problem or f"not all was taken within {_CLOSE_SECONDS:g} s"

    def _known(self) -> str | None:
        """Return the id of the run that this folder has there already."""
        try:
            kept = json.loads((self._folder / FILE).read_text())
        except (OSError, ValueError):
            return None
        return str(kept["run"]) if kept.get("uri") == self._uri else None

    def _created(self, experiment: str) -> str:
        found = self._client.get_experiment_by_name(experiment)
        number = self._client.create_experiment(experiment) if found is None else found.experiment_id
        return str(self._client.create_run(number, run_name=self._folder.name).info.run_id)

    def _enqueue(self, call: Callable[[], object]) -> None:
        try:
            self._waiting.put_nowait(call)
        except queue.Full:
            self._lost += 1
            self._problem = "it does not keep up"

    def _send(self) -> None:
        while (call := self._waiting.get()) is not None:
            try:
                call()
            except Exception as error:  # as above; the training goes on without
                self._lost += 1
                self._problem = _first_line(error)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Give the leaves by dotted name, as text that MLflow takes."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)[:_MAX_VALUE]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


class TrackedObserver:
    """
    An observer of a run that tells MLflow what it hears, too.

    Args:
        observer: Hears everything first.
        uri: As for :class:`Tracking`.

    Raises:
        TrackingError: When the run starts, as :class:`Tracking`.
    """

    def __init__(self, observer: Observer, uri: str) -> None:
        self._observer = observer
        self._uri = uri
        self._tracking: Tracking | None = None
        self._log_steps = 1

    @property
    def complaint(self) -> str:
        """As of :class:`Tracking`."""
        return self._tracking.complaint if self._tracking is not None else ""

    def started(self, config: TrainConfig, split: SplitInfo, device: torch.device, folder: Path) -> None:
        """Begin a run in MLflow, or go on with this folder's."""
        self._observer.started(config, split, device, folder)
        self._log_steps = config.log_steps
        self._tracking = Tracking(self._uri, folder, experiment=config.name)
        # MLflow changes no parameter; what a run goes on with, such as another streamer, its own folder says.
        if self._tracking.is_new:
            described = json.loads((folder / ENVIRONMENT).read_text())
            self._tracking.describe(config.model_dump(mode="json"), described)

    def stepped(self, step: Step, num_samples: int) -> None:
        """Note as often as the run's own journal does."""
        self._observer.stepped(step, num_samples)
        if step.number % self._log_steps == 0:
            figures = {"loss": step.loss, "accuracy": step.accuracy, "lr": step.lr, "epoch": float(step.epoch)}
            self._note("training", figures | {"samples_per_second": step.samples_per_second}, step.number)

    def validated(self, step: Step, evaluation: Evaluation) -> None:
        """Note what an epoch came to."""
        self._observer.validated(step, evaluation)
        self._note("validation", {"loss": evaluation.loss, "accuracy": evaluation.accuracy}, step.number)

    def evaluated(self, evaluation: Evaluation, split: SplitInfo) -> None:
        """Note how good the network is, under ``test`` whichever split says so."""
        self._observer.evaluated(evaluation, split)
        self._note("test", {"loss": evaluation.loss, "accuracy": evaluation.accuracy}, 0)

    def _note(self, group: str, figures: Mapping[str, float], step: int) -> None:
        assert self._tracking is not None, "a run starts before its first step"
        self._tracking.note({f"{group}/{name}": value for name, value in figures.items()}, step=step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Hand over what lies in the run's folder, and close the run in MLflow."""
        if self._tracking is not None:
            for name in _KEPT:
                self._tracking.keep(name)
            self._tracking.__exit__(kind, error, trace)

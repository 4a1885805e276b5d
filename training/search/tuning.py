"""
A search run by Ray: Optuna's sampler says what to try, Ray Tune's ASHA what to stop, Ray where it runs.

Sources: TPE, Bergstra et al. 2011; ASHA, Li et al. 2020 (arXiv 1810.05934).
"""

import json
import pickle
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
import ray
from ray import tune
from ray.tune.experiment import Trial as RayTrial
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from streamer.errors import StreamerError
from training.errors import SearchError, TrainingError
from training.search.logbook import Logbook, Search, Trial, TrialState
from training.search.space import Value
from training.search.trial import CHECKPOINTS, EPOCH, run_trial, starting_point

_RAY = "ray"
_RUNS = "trials"
_SCHEDULER = "scheduler.pkl"
# Trials stopped at a look: two of three.
_REDUCTION_FACTOR = 3
_USUAL_CPUS = 4
_RESUMING = tune.ResumeConfig(errored=tune.ResumeConfig.ResumeType.RESUME)  # type: ignore[arg-type]  # Ray declares str and compares with these

Observer = Callable[[tuple[Trial, ...]], None]
"""Told all trials, in the order of their beginning, whenever one of them has changed."""


def run(logbook: Logbook, observer: Observer, *, streamer: str, trainable: Callable[..., None] = run_trial) -> bool:
    """
    Run a search, or what is left of it, and return whether it has come to its end.

    Call it inside of :func:`training.search.cluster.connected`, in the main thread, which gets the signals. The first
    SIGINT ends it early: every trial's last checkpoint is kept, and running it again goes on from there, as it does
    after a kill. A second one ends it at once.

    Args:
        logbook: The search; one that was begun goes on, and trials that had failed get another chance.
        observer: Told of every change.
        streamer: Address, host:port, as seen from the machines of the trials.
        trainable: What a trial does, with the arguments of :func:`training.search.trial.run_trial`.

    Raises:
        SearchError: The machine has less than one trial needs.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    search = logbook.search()
    resources = _resources(search)
    scheduler = ASHAScheduler(
        time_attr=EPOCH,
        metric=search.goal,
        mode=_mode(search),
        max_t=search.budget.epochs,
        grace_period=search.budget.first_look,
        reduction_factor=_REDUCTION_FACTOR,
    )
    # Ray keeps the searcher's state and each trial's, but not the scheduler's.
    kept = logbook.folder / _SCHEDULER
    watch = _Watch(logbook, scheduler, observer)
    started, seconds = time.monotonic(), search.budget.minutes and search.budget.minutes * 60
    runs = (logbook.folder / _RUNS).absolute()
    if kept.exists():
        scheduler.restore(str(kept))
    can_resume = _is_whole(logbook.folder / _RAY)
    num_trials = search.budget.trials
    if can_resume:
        searcher = _searcher(search, ())  # only a vessel for the state that Ray kept
    else:
        # Never begun, or killed in the middle of writing: a new searcher is told what has ended.
        shutil.rmtree(logbook.folder / _RAY, ignore_errors=True)
        searcher = _searcher(search, watch.ended())
        num_trials -= len(watch.over)
    if num_trials <= 0:
        return True
    with warnings.catch_warnings():
        # Of Optuna's experimental options, and of an epoch that a trial tells twice after it was resumed.
        warnings.simplefilter("ignore")
        tune.run(
            tune.with_parameters(
                _run_once,
                work=trainable,
                over=watch.over,
                search=search.model_dump_json(),
                folder=str(runs),
                streamer=streamer,
            ),
            name=_RAY,
            storage_path=str(logbook.folder.absolute()),
            num_samples=num_trials,
            max_concurrent_trials=search.resources.concurrency,
            resources_per_trial=resources,
            time_budget_s=seconds,
            search_alg=searcher,
            scheduler=scheduler,
            max_failures=1,
            raise_on_failed_trial=False,
            resume=can_resume,
            resume_config=_RESUMING if can_resume else None,
            trial_dirname_creator=lambda trial: str(trial.trial_id),
            callbacks=[watch],
            verbose=0,
        )
    watch.tidy()
    is_time_up = seconds is not None and time.monotonic() - started >= seconds
    return is_time_up or watch.num_over >= search.budget.trials


def _run_once(
    values: dict[str, Value],
    *,
    work: Callable[..., None],
    over: dict[str, dict[str, float]],
    search: str,
    folder: str,
    streamer: str,
) -> None:
    """Run a trial, unless it is over and Ray was killed before it wrote that down; then tell it so again."""
    known = over.get(tune.get_context().get_trial_id())
    if known is None:
        work(values, search=search, folder=folder, streamer=streamer)
    else:
        tune.report(known)


def _searcher(search: Search, ended: Sequence[tuple[dict[str, Value], float]]) -> OptunaSearch:
    """Return Optuna's searcher, which knows values and score of each trial that has ended."""
    start = None if ended else starting_point(search)
    # With the same seed it would begin with the same values again.
    seed = search.seed + len(ended)
    searcher = OptunaSearch(
        search.space.distributions(),
        metric=search.goal,
        mode=_mode(search),
        # Trials that run at once are not to try the same.
        sampler=optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True),
        # With the recipe's own values first, no search ends worse than its recipe.
        points_to_evaluate=None if start is None else [start],
    )
    for values, score in ended:
        searcher.add_evaluated_point(values, score)
    return searcher


def _is_whole(state: Path) -> bool:
    """Return whether Ray can go on from what it wrote last: it replaces its files in place, so a kill may tear them."""
    newest = max(state.glob("experiment_state-*.json"), default=None)
    if newest is None:
        return False
    session = newest.stem.removeprefix("experiment_state-")
    try:
        json.loads(newest.read_bytes())
        for name in (f"search_gen_state-{session}.json", f"searcher-state-{session}.pkl"):  # both are pickles
            pickle.loads((state / name).read_bytes())
    except Exception:  # a torn pickle raises anything
        return False
    return True


def _mode(search: Search) -> str:
    return "max" if search.is_better_when_higher else "min"


def _resources(search: Search) -> dict[str, float]:
    """Return what a trial gets, and refuse what no machine of the cluster has: Ray would wait for it for ever."""
    here: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]  # Ray leaves it untyped
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]  # Ray leaves it untyped
    cpus = search.resources.cpus or min(_USUAL_CPUS, int(max(node.get("CPU", 1) for node in nodes)))
    gpus = search.resources.gpus
    wanted: dict[str, float] = {"CPU": cpus, "GPU": min(1.0, here.get("GPU", 0.0)) if gpus is None else gpus}
    if not any(all(node.get(kind, 0) >= amount for kind, amount in wanted.items()) for node in nodes):
        have = ", ".join(f"{int(node.get('CPU', 0))} cores and {int(node.get('GPU', 0))} GPUs" for node in nodes)
        raise SearchError(
            f"resources: a trial is to have {cpus} cores and {wanted['GPU']:g} GPUs; the machines have {have}"
        )
    return {kind.lower(): amount for kind, amount in wanted.items()}


class _Watch(tune.Callback):
    """Writes down what Ray says of trials, for everybody who has no Ray."""

    def __init__(self, logbook: Logbook, scheduler: ASHAScheduler, observer: Observer) -> None:
        self._logbook = logbook
        self._scheduler = scheduler
        self._observer = observer
        self._search = logbook.search()
        self._trials = {trial.id: _at_rest(trial) for trial in logbook.trials()}
        self._is_new = True
        self.over: dict[str, dict[str, float]] = {
            trial.id: {EPOCH: trial.epoch, self._search.goal: score}
            for trial in self._trials.values()
            if trial.state in ("finished", "stopped") and (score := trial.score) is not None
        }
        """What Ray was told last by each trial that had ended before; nothing changes about them any more."""

    @property
    def num_over(self) -> int:
        """Trials of which nothing more becomes."""
        return sum(trial.is_over for trial in self._trials.values())

    def tidy(self) -> None:
        """Remove checkpoints of which nothing goes on: a trial that is told to end may write one more."""
        for trial in self._trials.values():
            if trial.state in ("finished", "stopped"):
                self._drop_checkpoints(trial.id)

    def ended(self) -> list[tuple[dict[str, Value], float]]:
        """Return values and score of the trials in :attr:`over`."""
        return [(dict(self._trials[name].values), told[self._search.goal]) for name, told in self.over.items()]

    def on_step_begin(self, iteration: int, trials: list[RayTrial], **info: Any) -> None:
        """Forget trials that had not ended and that Ray does not know any more."""
        if self._is_new:
            known = {trial.trial_id for trial in trials}
            for name in [name for name, trial in self._trials.items() if name not in known and not trial.is_over]:
                del self._trials[name]
                shutil.rmtree(self._logbook.folder / _RUNS / name, ignore_errors=True)
            self._is_new = False
            self._tell()

    def on_trial_start(self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any) -> None:
        """See it begin, or begin again."""
        self._change(trial, state="running")

    def on_trial_result(
        self, iteration: int, trials: list[RayTrial], trial: RayTrial, result: dict[str, Any], **info: Any
    ) -> None:
        """See the end of an epoch."""
        scores = self._of(trial).scores | {result[EPOCH]: result[self._search.goal]}
        seconds = self._of(trial).seconds + result["time_this_iter_s"]
        self._change(trial, scores=scores, seconds=seconds)
        partial = self._logbook.folder / f".{_SCHEDULER}"
        self._scheduler.save(str(partial))
        partial.replace(self._logbook.folder / _SCHEDULER)

    def on_trial_complete(self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any) -> None:
        """See it end, at its last epoch or before."""
        is_done = self._of(trial).epoch >= self._search.budget.epochs
        self._change(trial, state="finished" if is_done else "stopped")
        self._drop_checkpoints(trial.trial_id)

    def on_trial_recover(self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any) -> None:
        """See it fail; it is tried again."""
        self._fail(trial, state="waiting")

    def on_trial_error(self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any) -> None:
        """See it fail for good."""
        self._fail(trial, state="failed")

    def _drop_checkpoints(self, name: str) -> None:
        """Remove hundreds of megabytes that nothing goes on from."""
        shutil.rmtree(self._logbook.folder / _RUNS / name / CHECKPOINTS, ignore_errors=True)

    def _fail(self, trial: RayTrial, state: TrialState) -> None:
        failures = self._of(trial).failures + 1
        self._change(trial, state=state, failures=failures, error=_one_line(_error_of(trial)))

    def _of(self, trial: RayTrial) -> Trial:
        fresh = Trial(number=len(self._trials) + 1, id=trial.trial_id, values=trial.config)
        return self._trials.setdefault(trial.trial_id, fresh)

    def _change(self, trial: RayTrial, **changes: Any) -> None:
        if trial.trial_id in self.over:
            return
        self._trials[trial.trial_id] = self._of(trial).model_copy(update=changes)
        self._tell()

    def _tell(self) -> None:
        trials = tuple(self._trials.values())
        self._logbook.write_trials(trials)
        self._observer(trials)


def _at_rest(trial: Trial) -> Trial:
    return trial if trial.is_over else trial.model_copy(update={"state": "waiting"})


def _error_of(trial: RayTrial) -> Exception | None:
    """Return what a trial failed with just now; ``get_pickled_error`` may still have the failure before."""
    path = trial.pickled_error_file
    if path is None or not Path(path).is_file():
        return None
    with open(path, "rb") as file:
        error: Exception = ray.cloudpickle.load(file)
    return error


def _one_line(error: Exception | None) -> str:
    """Return what a trial failed with, without the traceback, which is in its folder."""
    if isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, Exception):
        error = error.cause
    if isinstance(error, TrainingError | StreamerError):
        return str(error)
    if isinstance(error, ray.exceptions.RayActorError):
        return "its process was killed"
    if error is None:
        return "Ray did not say why"
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[-1]}"

"""Readiness that is proven: Triton says ready while every inference fails, so one is tried, for each routed version."""

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import structlog

from gateway.errors import (
    GatewayError,
    OverloadedError,
    UnknownVersionError,
    UpstreamContractError,
    UpstreamTimeoutError,
    UpstreamUnavailableError,
)
from gateway.fleet import EJECTED_AFTER, Endpoint, Fleet
from gateway.models import Catalog, ServedModel, ServedVersion
from gateway.triton import PROBABILITIES
from rpc.health import Health

log = structlog.get_logger(__name__)

_BLANK = bytes(28 * 28)
# Least time from one probe to the next, however many calls fail meanwhile.
_LEAST_SECONDS = 0.1

_Key = tuple[str, int]
"""Model and version."""


@dataclass(eq=False, slots=True)
class _Trial:
    """What the latest inferences said of one version at one Triton."""

    error: GatewayError | None = None
    is_judged: bool = False
    """Whether there was one."""


class Probe:
    """
    Infers a blank image on every routed version of every Triton, and refreshes the catalog, over and over.

    A version serves while one Triton answers for it, a model while its default version does, the gateway while its
    default model does. Health is told of model and gateway, the catalog which canaries may have callers, and callers of
    a version that does not serve are refused at once by :meth:`require`; of those that nothing is routed to, what is
    found of the default holds. Each version at each Triton is tried by itself and waits for no other, nor for the
    catalog: while that cannot be refreshed, what was known last is tried. One probe of each at a time: one that takes
    too long counts as failed for as long as it runs, and is never cancelled; it does not take too long while the
    version answers others, who may be before it in Triton's queue.

    Args:
        catalog: Refreshed at each interval.
        fleet: Where inferences go; told which of them work.
        health: Told the outcome. If the probe itself dies, it is told NOT_SERVING, and every call is refused.
        service: Name in health; that of a model is ``service/model``.
        interval_seconds: Pause between two probes.
        timeout_seconds: What is too long.
        on_failure: Called with the name and number of a version that stopped serving, and why.
    """

    def __init__(
        self,
        catalog: Catalog,
        fleet: Fleet,
        health: Health,
        *,
        service: str,
        interval_seconds: float,
        timeout_seconds: float,
        on_failure: Callable[[str, int, GatewayError], None] = lambda model, version, error: None,
    ) -> None:
        self._catalog = catalog
        self._fleet = fleet
        self._health = health
        self._service = service
        self._interval_seconds = interval_seconds
        self._timeout_seconds = timeout_seconds
        self._on_failure = on_failure
        self._wanted = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._trials: dict[tuple[Endpoint, _Key], _Trial] = {}
        # Why the catalog was not refreshed.
        self._problem: GatewayError | None = None
        # Of every routed version that was tried, and as version 0 of each model that of its default.
        self._errors: Mapping[_Key, GatewayError | None] = {}
        self._was_reported = False
        self._last_reason: str | None = None

    def start(self) -> asyncio.Task[None]:
        """Begin; the first probe goes out at once. If the task ends before :meth:`stop`, nothing is known any more."""
        self._task = asyncio.create_task(self._run())
        self._task.add_done_callback(self._ended)
        return self._task

    def hasten(self) -> None:
        """
        Probe now instead of at the end of the pause, because a call just failed. No effect while NOT_SERVING.

        Probes begin 0.1 s after each other at the soonest, however often this is called.
        """
        if self._health.is_serving:
            wanted, self._wanted = self._wanted, asyncio.Event()
            wanted.set()

    def require(self, model: str, version: int) -> None:
        """
        Refuse what the latest probe of a version, 0 for the default one, says would fail.

        Raises:
            UpstreamUnavailableError: It does not serve.
        """
        error = self._error(model, version)
        if error is not None:
            raise UpstreamUnavailableError(f"{model} does not answer now: {error}; try again") from error

    def is_serving(self, model: str, version: int) -> bool | None:
        """Tell what the latest probe says of a version, 0 for the default one; None where it knows nothing of it."""
        if (model, 0) not in self._errors:
            return None
        try:
            self._catalog.known(model, version)
        except GatewayError:
            return None
        return self._error(model, version) is None

    async def stop(self) -> None:
        """End; inferences under way run on until the channel is closed."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as trying:
            while True:
                wanted = self._wanted
                await self._look()
                for model in self._catalog.listing():
                    for served in model.routed:
                        self._try_from_now(trying, served.name, served.version)
                self._tell()
                await self._pause(wanted)

    async def _look(self) -> None:
        try:
            await self._catalog.refresh()
        except GatewayError as error:
            self._problem = error
        else:
            self._problem = None

    async def _pause(self, wanted: asyncio.Event) -> None:
        """Wait for the interval, or less where a probe is wanted since."""
        least = min(_LEAST_SECONDS, self._interval_seconds)
        await asyncio.sleep(least)
        try:
            async with asyncio.timeout(self._interval_seconds - least):
                await wanted.wait()
        except TimeoutError:
            pass

    def _try_from_now(self, trying: asyncio.TaskGroup, model: str, version: int) -> None:
        for endpoint in self._fleet.with_version(model, version):
            if (endpoint, (model, version)) not in self._trials:
                self._trials[endpoint, (model, version)] = _Trial()
                trying.create_task(self._try_over_and_over(endpoint, model, version))

    async def _try_over_and_over(self, endpoint: Endpoint, model: str, version: int) -> None:
        """Infer on a version at one Triton for as long as it has it and callers are sent there."""
        while (served := self._routed(endpoint, model, version)) is not None:
            wanted = self._wanted
            inference = asyncio.create_task(_infer(endpoint, served))
            inference.add_done_callback(_see)
            if not await self._ends_in_time(inference, endpoint, served):
                self._judge(endpoint, served, UpstreamTimeoutError("the inference server does not answer"))
                await asyncio.wait((inference,))
            self._judge(endpoint, served, _failure(inference))
            await self._pause(wanted)
        del self._trials[endpoint, (model, version)]

    def _routed(self, endpoint: Endpoint, name: str, version: int) -> ServedVersion | None:
        if endpoint not in self._fleet.with_version(name, version):
            return None
        routed = (one for model in self._catalog.listing() if model.name == name for one in model.routed)
        return next((one for one in routed if one.version == version), None)

    async def _ends_in_time(self, inference: asyncio.Task[None], endpoint: Endpoint, served: ServedVersion) -> bool:
        loop = asyncio.get_running_loop()
        heard_at = loop.time()
        while not inference.done():
            seconds = heard_at + self._timeout_seconds - loop.time()
            if seconds <= 0:
                return False
            await asyncio.wait((inference,), timeout=seconds)
            # Who answers others works: what was asked before may have to be answered first.
            heard_at = max(heard_at, endpoint.answered_at(served.name, served.version))
        return True

    def _judge(self, endpoint: Endpoint, served: ServedVersion, error: GatewayError | None) -> None:
        """Take in how an inference ended, and tell the Triton how it did."""
        trial = self._trials[endpoint, (served.name, served.version)]
        if isinstance(error, UnknownVersionError) and endpoint.is_reachable:
            # It has just gone, which the next look will show.
            return
        if isinstance(error, OverloadedError):
            # It has too much to do, which does not say that it is ill.
            error = trial.error
        elif error is not None:
            endpoint.failed(served.name, served.version, error, times=EJECTED_AFTER)
        else:
            for version in self._standing_for(served):
                endpoint.worked(served.name, version)
        trial.error, trial.is_judged = error, True
        self._tell()

    def _standing_for(self, served: ServedVersion) -> Iterator[int]:
        """Yield a version and, where it is the default, those that are not tried themselves."""
        yield served.version
        for model in self._catalog.listing():
            if model.name == served.name and model.split.default == served.version:
                yield from {one.version for one in model.versions}.difference(model.split.versions)

    def _error(self, model: str, version: int) -> GatewayError | None:
        return _lookup(self._errors, model, version)

    def _tell(self) -> None:
        """Let everybody know what was found."""
        models = self._catalog.listing()
        before, errors = self._errors, self._found(models)
        self._errors = errors
        self._catalog.prove({key for key, error in errors.items() if error is None})
        for model in models:
            if (model.name, 0) in errors:
                self._health.tell(self._name(model.name), errors[model.name, 0] is None)
            for served in model.versions:
                error = _lookup(errors, model.name, served.version)
                if error is not None and _lookup(before, model.name, served.version) is None:
                    self._on_failure(model.name, served.version, error)
            _log_change("model", before, errors, model.name, 0)
            for version in model.split.versions[1:]:
                _log_change("canary", before, errors, model.name, version)
        for gone in {model for model, _ in before} - {model.name for model in models}:
            self._health.forget(self._name(gone))
        self._report()

    def _found(self, models: Sequence[ServedModel]) -> dict[_Key, GatewayError | None]:
        """Return why no Triton answers for a version, None where one does; what is not tried yet is left out."""
        errors: dict[_Key, GatewayError | None] = {}
        for model in models:
            for version in model.split.versions:
                key = model.name, version
                trials = [self._trials.get((endpoint, key), _Trial()) for endpoint in self._fleet.with_version(*key)]
                if any(trial.is_judged and trial.error is None for trial in trials):
                    errors[key] = None
                elif trials and all(trial.is_judged for trial in trials):
                    errors[key] = trials[0].error
                elif key in self._errors:
                    # Another Triton has it too since just now; or it went away, which the next look will show.
                    errors[key] = self._errors[key]
            default = model.name, model.split.default
            if default in errors:
                errors[model.name, 0] = errors[default]
            elif (model.name, 0) in self._errors:
                # Until a new default is tried, what was found of the one before holds.
                errors[model.name, 0] = self._errors[model.name, 0]
        return errors

    def _name(self, model: str) -> str:
        return f"{self._service}/{model}"

    def _report(self) -> None:
        try:
            self._catalog.known("", 0)
        except GatewayError as error:
            self._say(self._problem or error)
            return
        default = self._catalog.default_model, 0
        if default in self._errors:
            self._say(self._errors[default])

    def _say(self, problem: GatewayError | None) -> None:
        """Tell how the gateway itself is."""
        self._health.report(problem is None)
        reason = None if problem is None else str(problem)
        if self._was_reported and reason == self._last_reason:
            return
        self._was_reported, self._last_reason = True, reason
        if reason is None:
            log.info("serving")
        else:
            log.warning("not serving", reason=reason)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or (error := task.exception()) is None:
            return
        log.error("probe died", exc_info=error)
        unknown = UpstreamUnavailableError("the gateway does not know any more whether it does")
        self._errors = dict.fromkeys(self._errors, unknown)
        for model, _ in self._errors:
            self._health.tell(self._name(model), False)
        self._health.report(False)


def _lookup(errors: Mapping[_Key, GatewayError | None], model: str, version: int) -> GatewayError | None:
    key = model, version
    return errors[key] if key in errors else errors.get((model, 0))


def _log_change(
    what: str,
    before: Mapping[_Key, GatewayError | None],
    now: Mapping[_Key, GatewayError | None],
    model: str,
    version: int,
) -> None:
    was, error = before.get((model, version)), now.get((model, version))
    if str(was) == str(error):
        return
    place = {"model": model, "version": version} if version else {"model": model}
    log.info(f"{what} serving" if error is None else f"{what} not serving", **place, reason=str(error or ""))


async def _infer(endpoint: Endpoint, served: ServedVersion) -> None:
    width = len(served.class_names)
    rows = await endpoint.triton.asking(served.name, served.version, PROBABILITIES, width=width)(_BLANK, 1)
    if not PROBABILITIES.holds(rows).all():
        raise UpstreamContractError(f"the model did not answer with {PROBABILITIES.promise}")


def _see(task: asyncio.Task[None]) -> None:
    # Marks the error as seen: one that took too long is looked at by nobody else.
    if not task.cancelled():
        task.exception()


def _failure(task: asyncio.Task[None]) -> GatewayError | None:
    if task.cancelled():
        return UpstreamUnavailableError("the gateway is stopping")
    error = task.exception()
    if error is not None and not isinstance(error, GatewayError):
        raise error
    return error

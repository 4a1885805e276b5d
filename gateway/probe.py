"""Readiness that is proven: Triton says ready while every inference fails, so one is tried, for each routed version."""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence

import structlog

from gateway.errors import (
    GatewayError,
    OverloadedError,
    UnknownVersionError,
    UpstreamContractError,
    UpstreamError,
    UpstreamTimeoutError,
    UpstreamUnavailableError,
)
from gateway.fleet import EJECTED_AFTER, Endpoint, Fleet
from gateway.models import Catalog, ServedModel, ServedVersion
from gateway.triton import PROBABILITIES
from rpc.health import Health

log = structlog.get_logger(__name__)

_BLANK = bytes(28 * 28)

_Key = tuple[str, int]
"""Model and version."""
_Begun = list[tuple[Endpoint, asyncio.Task[None]]]


class Probe:
    """
    Refreshes the catalog and infers a blank image on every routed version of every Triton, over and over.

    A version serves while one Triton answers for it, a model while its default version does, the gateway while its
    default model does. Health is told of model and gateway, the catalog which canaries may have callers, and callers of
    a version that does not serve are refused at once by :meth:`require`; of those that nothing is routed to, what is
    found of the default holds. One probe of each version and Triton at a time: one that takes too long counts as failed
    for as long as it runs, and is never cancelled.

    Args:
        catalog: Refreshed before each inference.
        fleet: Where inferences go; told which of them work.
        health: Told the outcome. If the probe itself dies, it is told NOT_SERVING.
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
        self._inferences: dict[tuple[str, _Key], asyncio.Task[None]] = {}
        # Of every routed version, and as version 0 of each model that of its default.
        self._errors: Mapping[_Key, GatewayError | None] = {}
        self._was_reported = False
        self._last_reason: str | None = None

    def start(self) -> None:
        """Begin; the first probe goes out at once."""
        self._task = asyncio.create_task(self._run())
        self._task.add_done_callback(self._ended)

    def hasten(self) -> None:
        """Probe now instead of at the end of the pause, because a call just failed. No effect while NOT_SERVING."""
        if self._health.is_serving:
            self._wanted.set()

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
        while True:
            self._wanted.clear()
            await self._probe()
            try:
                async with asyncio.timeout(self._interval_seconds):
                    await self._wanted.wait()
            except TimeoutError:
                pass

    async def _probe(self) -> None:
        problem: GatewayError | None = None
        try:
            await self._catalog.refresh()
        except UpstreamError as error:
            problem = error
        models = self._catalog.listing()
        begun = await self._infer_all(models) if problem is None else {}
        errors: dict[_Key, GatewayError | None] = {}
        for model in models:
            # It stands for all that nothing is routed to.
            alike = {served.version for served in model.versions}.difference(model.split.versions)
            for version in model.split.versions:
                key = model.name, version
                errors[key] = problem or self._verdict(key, begun[key], alike)
                alike = set()
            errors[model.name, 0] = errors[model.name, model.split.default]
        self._tell(models, errors)
        if problem is None:
            try:
                self._catalog.known("", 0)
                problem = errors.get((self._catalog.default_model, 0))
            except GatewayError as error:
                problem = error
        self._report(problem)

    async def _infer_all(self, models: Sequence[ServedModel]) -> dict[_Key, _Begun]:
        """Infer once on every routed version, and return what was begun, done or not."""
        begun = {
            (served.name, served.version): [
                (endpoint, self._begin(endpoint, served))
                for endpoint in self._fleet.with_version(served.name, served.version)
            ]
            for model in models
            for served in model.routed
        }
        tasks = {task for each in begun.values() for _, task in each}
        if tasks:
            await asyncio.wait(tasks, timeout=self._timeout_seconds)
        # Those of versions that nothing is routed to any more, once they have ended.
        self._inferences = {key: task for key, task in self._inferences.items() if task in tasks or not task.done()}
        return begun

    def _begin(self, endpoint: Endpoint, served: ServedVersion) -> asyncio.Task[None]:
        key = endpoint.address, (served.name, served.version)
        task = self._inferences.get(key)
        if task is None or task.done():
            task = self._inferences[key] = asyncio.create_task(_infer(endpoint, served))
            task.add_done_callback(_see)
        return task

    def _verdict(self, key: _Key, begun: _Begun, alike: Iterable[int]) -> GatewayError | None:
        """
        Return why no Triton answers for a version, None where one does, and tell each how it did.

        Args:
            key: The version.
            begun: Its inferences, one at each Triton that has it.
            alike: Versions that are not tried themselves, and are taken back with this one.
        """
        errors = list[GatewayError | None]()
        for endpoint, task in begun:
            error = _failure(task) if task.done() else UpstreamTimeoutError("the inference server does not answer")
            if isinstance(error, UnknownVersionError | OverloadedError):
                # It has just gone, which the next look will show, or has too much to do: neither says that it is ill.
                error = self._errors.get(key)
            elif error is None:
                for version in (key[1], *alike):
                    endpoint.worked(key[0], version)
            else:
                endpoint.failed(*key, error, times=EJECTED_AFTER)
            errors.append(error)
        if not errors:
            # It went away since the catalog was read, which the next look will show as well.
            return self._errors.get(key)
        return None if None in errors else errors[0]

    def _error(self, model: str, version: int) -> GatewayError | None:
        return _lookup(self._errors, model, version)

    def _tell(self, models: Sequence[ServedModel], errors: Mapping[_Key, GatewayError | None]) -> None:
        """Let everybody know what was found."""
        before, self._errors = self._errors, errors
        self._catalog.prove({key for key, error in errors.items() if error is None})
        for model in models:
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

    def _name(self, model: str) -> str:
        return f"{self._service}/{model}"

    def _report(self, problem: GatewayError | None) -> None:
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
        if not task.cancelled() and (error := task.exception()) is not None:
            self._health.report(False)
            log.error("probe died", exc_info=error)


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
    was, error = before.get((model, version)), now[model, version]
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

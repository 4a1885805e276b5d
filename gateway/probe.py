"""Readiness that is proven: Triton says ready while every inference fails, so one is tried, for each model."""

import asyncio
from collections.abc import Callable

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
from gateway.models import Catalog, ServedModel
from gateway.triton import PROBABILITIES
from rpc.health import Health

log = structlog.get_logger(__name__)

_BLANK = bytes(28 * 28)


class Probe:
    """
    Refreshes the catalog and infers a blank image on every model of every Triton, over and over.

    A model serves while one Triton answers for it; the gateway serves while its default model does. Health is told
    both, and callers of a model that does not serve are refused at once by :meth:`require`. One probe of each model and
    Triton at a time: one that takes too long counts as failed for as long as it runs, and is never cancelled.

    Args:
        catalog: Refreshed before each inference.
        fleet: Where inferences go; told which of them work.
        health: Told the outcome. If the probe itself dies, it is told NOT_SERVING.
        service: Name in health; that of a model is ``service/model``.
        interval_seconds: Pause between two probes.
        timeout_seconds: What is too long.
        on_failure: Called with the name of a model that stopped serving, and why.
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
        on_failure: Callable[[str, GatewayError], None] = lambda model, error: None,
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
        self._inferences: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._errors: dict[str, GatewayError | None] = {}
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

    def require(self, model: str) -> None:
        """
        Refuse what the latest probe of a model says would fail.

        Raises:
            UpstreamUnavailableError: It does not serve.
        """
        error = self._errors.get(model)
        if error is not None:
            raise UpstreamUnavailableError(f"{model} does not answer now: {error}; try again") from error

    def is_serving(self, model: str, version: int) -> bool | None:
        """Tell what the latest probe says of a version, 0 for the default one; None where it knows nothing of it."""
        try:
            served = self._catalog.known(model, version) if model in self._errors else None
        except GatewayError:
            served = None
        return None if served is None else self._errors[model] is None

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
        if problem is None:
            await self._infer_all(models)
        for model in models:
            self._tell(model.name, problem or self._verdict(model))
        for gone in self._errors.keys() - {model.name for model in models}:
            del self._errors[gone]
            self._health.forget(self._name(gone))
        if problem is None:
            try:
                self._catalog.known("", 0)
                problem = self._errors.get(self._catalog.default_model)
            except GatewayError as error:
                problem = error
        self._report(problem)

    async def _infer_all(self, models: list[ServedModel]) -> None:
        begun = [self._begin(endpoint, model) for model in models for endpoint in self._endpoints(model)]
        if begun:
            await asyncio.wait(begun, timeout=self._timeout_seconds)

    def _begin(self, endpoint: Endpoint, model: ServedModel) -> asyncio.Task[None]:
        key = endpoint.address, model.name
        task = self._inferences.get(key)
        if task is None or task.done():
            task = self._inferences[key] = asyncio.create_task(_infer(endpoint, model))
            task.add_done_callback(_see)
        return task

    def _verdict(self, model: ServedModel) -> GatewayError | None:
        """Return why no Triton answers for a model, None where one does; and tell each how it did."""
        errors = list[GatewayError | None]()
        for endpoint in self._endpoints(model):
            task = self._inferences[endpoint.address, model.name]
            error = _failure(task) if task.done() else UpstreamTimeoutError("the inference server does not answer")
            if isinstance(error, UnknownVersionError | OverloadedError):
                # It has just gone, which the next look will show, or has too much to do: neither says that it is ill.
                error = self._errors.get(model.name)
            elif error is None:
                endpoint.worked(model.name)
            else:
                endpoint.failed(model.name, error, times=EJECTED_AFTER)
            errors.append(error)
        if not errors:
            return UpstreamUnavailableError("no inference server has it ready")
        return None if None in errors else errors[0]

    def _endpoints(self, model: ServedModel) -> list[Endpoint]:
        return self._fleet.with_version(model.name, model.default.version)

    def _tell(self, model: str, error: GatewayError | None) -> None:
        was = self._errors.get(model)
        self._errors[model] = error
        self._health.tell(self._name(model), error is None)
        if error is not None and was is None:
            self._on_failure(model, error)
        if str(was) != str(error):
            log.info("model serving" if error is None else "model not serving", model=model, reason=str(error or ""))

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


async def _infer(endpoint: Endpoint, model: ServedModel) -> None:
    version = model.default
    width = len(version.class_names)
    rows = await endpoint.triton.asking(version.name, version.version, PROBABILITIES, width=width)(_BLANK, 1)
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

"""
Models that stopped answering are loaded anew.

Where a Python stub has died, Triton 2.51 says ready of server and model for ever while every inference fails
(server#7347, server#8604). What helps is to unload the model and load it, and else to start Triton again.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import structlog

from serving import soundness
from serving.control import TritonControl
from serving.errors import BeyondHealingError, ControlError

log = structlog.get_logger(__name__)

_Key = tuple[str, int]
"""Model and version."""

# One may be an accident, and a stub on a machine without time to spare; each takes Triton a second.
_REPEATED = 3
_PAUSE_AFTER_FAILURE_SECONDS = 0.1
_LOOK_SECONDS = 10.0
# Loading the same model again and again, for one that no loading helps.
_RELOADS_BEFORE_RESTART = 2
_LONGEST_RELOAD_PAUSE_SECONDS = 300.0
# So often the pause doubles: in days of trying, the power would outgrow every float.
_MAX_DOUBLINGS = 16
# After so long it is another illness.
_STEADY_SECONDS = 60.0


def reload_pause(num_reloads: int, first_seconds: float) -> float:
    """Return how long a model is left alone that was loaded so often in vain: each time twice as long, to 5 minutes."""
    if not num_reloads:
        return 0.0
    return min(first_seconds * 2.0 ** min(num_reloads - 1, _MAX_DOUBLINGS), _LONGEST_RELOAD_PAUSE_SECONDS)


@dataclass(slots=True)
class _Watched:
    """How one version does."""

    attempt: asyncio.Task[None] | None = None
    num_executions: int | None = None
    """When it was last looked at, while an attempt runs."""
    moved_at: float = 0.0
    """When it last did anything while an attempt runs."""
    num_failures: int = 0
    """In a row."""
    reason: str = ""


@dataclass(slots=True)
class _Course:
    """What was tried for one model."""

    num_reloads: int = 0
    ended_at: float = 0.0


class Healer:
    """
    Infers a blank image on every ready version, over and over, and unloads and loads a model that does not answer.

    Never two images at once on one version, and none is cancelled: cancelling crashes this Triton (server#7368). One
    that takes long is a hang only where the version finishes no batch of others meanwhile. Versions that are not what
    was published stay out. A model that takes anything else than images of this project is left alone.

    Args:
        control: Connected to the Triton; stays open until that has ended.
        repository: What it serves from.
        kill_stubs: Ends the processes of one version at once.
        interval_seconds: Pause between two images.
        hang_seconds: How long a version may do nothing while it has something to do.
        silent_seconds: How long Triton may not answer at all. Loading models can hold it up.
        reload_pause_seconds: Pause before a model is loaded the second time; it doubles, up to 5 minutes.
        restart_after_seconds: For so long from now nothing is beyond healing.
    """

    def __init__(
        self,
        control: TritonControl,
        repository: Path,
        kill_stubs: Callable[[str, int], None],
        *,
        interval_seconds: float = 2.0,
        hang_seconds: float = 10.0,
        silent_seconds: float = 30.0,
        reload_pause_seconds: float = 5.0,
        restart_after_seconds: float = 0.0,
    ) -> None:
        self._control = control
        self._repository = repository
        self._kill_stubs = kill_stubs
        self._interval_seconds = interval_seconds
        self._hang_seconds = hang_seconds
        self._silent_seconds = silent_seconds
        self._reload_pause_seconds = reload_pause_seconds
        self._loop = asyncio.get_running_loop()
        self._may_restart_at = self._loop.time() + restart_after_seconds
        self._heard_at = self._loop.time()
        self._watched: dict[_Key, _Watched] = {}
        self._courses: dict[str, _Course] = {}
        # Unloaded here, and not loaded again yet: Triton does not name them as ready any more.
        self._owed: dict[str, str] = {}

    async def run(self) -> NoReturn:
        """
        Watch and heal until cancelled.

        Raises:
            BeyondHealingError: Triton has to be started again: it says nothing, or no model answers for all that was
                loaded anew.
        """
        while True:
            await self._look()
            ill = {model: reason for model, reason in self._ill().items() if self._is_due(model)}
            self._require_hope(ill)
            await asyncio.gather(*(self._heal(model, reason) for model, reason in ill.items()))
            failed = any(0 < one.num_failures < _REPEATED for one in self._watched.values())
            await asyncio.sleep(_PAUSE_AFTER_FAILURE_SECONDS if failed else self._interval_seconds)

    async def _look(self) -> None:
        try:
            async with asyncio.timeout(min(_LOOK_SECONDS, self._silent_seconds)):
                states = await self._control.states()
        except (ControlError, TimeoutError) as error:
            if self._loop.time() > max(self._heard_at + self._silent_seconds, self._may_restart_at):
                raise BeyondHealingError(f"Triton has said nothing for {self._silent_seconds:g} s") from error
            return
        self._heard_at = self._loop.time()
        ready = {(state.model, state.version) for state in states if state.ready}
        for gone in self._watched.keys() - ready:
            del self._watched[gone]
        for model, _ in ready:
            self._owed.pop(model, None)
        await asyncio.gather(*(self._try(key) for key in ready))
        for model, course in list(self._courses.items()):
            if self._is_well(model) and self._loop.time() - course.ended_at > _STEADY_SECONDS:
                del self._courses[model]

    async def _try(self, key: _Key) -> None:
        watched = self._watched.setdefault(key, _Watched())
        if watched.attempt is None:
            try:
                if not await self._control.takes_images(*key):
                    return
            except ControlError:
                return  # it has just gone, or Triton has, which the next look will show
            watched.attempt = self._control.begin_blank(*key)
            watched.num_executions, watched.moved_at = None, self._loop.time()
        await asyncio.wait((watched.attempt,), timeout=self._interval_seconds)
        if not watched.attempt.done():
            await self._see_whether_it_moves(key, watched)
            return
        error, watched.attempt = watched.attempt.exception(), None
        if error is None:
            watched.num_failures = 0
        elif isinstance(error, ControlError):
            watched.num_failures += 1
            watched.reason = str(error)
        else:
            raise error

    async def _see_whether_it_moves(self, key: _Key, watched: _Watched) -> None:
        try:
            num_executions = (await self._control.statistics(*key)).executions
        except ControlError:
            return
        now = self._loop.time()
        if num_executions != watched.num_executions:
            watched.num_executions, watched.moved_at = num_executions, now
        elif now - watched.moved_at > self._hang_seconds:
            watched.num_failures = _REPEATED
            watched.reason = f"it has done nothing for {self._hang_seconds:g} s"

    def _ill(self) -> dict[str, str]:
        """Return why, by model, of those that need something to be done."""
        failing = {model: one.reason for (model, _), one in self._watched.items() if one.num_failures >= _REPEATED}
        return self._owed | failing

    def _is_well(self, model: str) -> bool:
        versions = [one for (name, _), one in self._watched.items() if name == model]
        return bool(versions) and not any(one.num_failures for one in versions)

    def _is_due(self, model: str) -> bool:
        course = self._courses.setdefault(model, _Course())
        return self._loop.time() >= course.ended_at + reload_pause(course.num_reloads, self._reload_pause_seconds)

    def _require_hope(self, ill: dict[str, str]) -> None:
        if self._loop.time() < self._may_restart_at or not self._nothing_answers():
            return
        for model, reason in ill.items():
            if self._courses[model].num_reloads >= _RELOADS_BEFORE_RESTART:
                raise BeyondHealingError(f"{model} does not answer, though it was loaded again: {reason}")

    def _nothing_answers(self) -> bool:
        return all(one.num_failures or one.attempt is not None for one in self._watched.values())

    async def _heal(self, model: str, reason: str) -> None:
        course = self._courses[model]
        log.warning("model reloading", model=model, reason=reason)
        course.num_reloads += 1
        self._owed[model] = reason
        try:
            await self._reload(model)
        except (ControlError, OSError) as error:
            log.warning("model not reloaded", model=model, reason=str(error))
        course.ended_at = self._loop.time()

    async def _reload(self, model: str) -> None:
        for name, version in list(self._watched):
            if name == model and self._watched.pop((name, version)).num_failures:
                # Triton waits for one that hangs.
                self._kill_stubs(name, version)
        await self._control.unload(model)
        found = await asyncio.to_thread(soundness.inspect, self._repository, model)
        for version, damage in found.damaged.items():
            log.warning("version refused", model=model, version=version, reason=damage)
        if found.sound:
            await soundness.load(self._control, self._repository, model, found)
            log.info("model reloaded", model=model, versions=found.sound)
        self._owed.pop(model, None)

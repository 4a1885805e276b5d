"""Where a reader stands, as it is kept in a checkpoint: a small dictionary of plain values."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from streamer.errors import ReaderError
from streamer.plan import Plan, Remainder

VERSION = 1
"""Of the dictionary; another one is refused."""

# World size, rank and batch size may change at any position; what else changed would be another order, or other data.
_KEPT = ("dataset", "split", "seed", "remainder", "transform")


class StateError(ReaderError):
    """A saved state is none, or belongs to another plan or other data; the message names the field."""

    def __init__(self, field: str, problem: str) -> None:
        self.field = field
        super().__init__(f"state: {field}: {problem}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cursor:
    """Everything before it is in the weights."""

    epoch: int
    position: int = 0
    """Global position in the epoch's order."""
    step: int | None = None
    """Batches in the weights, by the trainer's own count; None where it does not say."""


def to_state(cursor: Cursor, plan: Plan) -> dict[str, Any]:
    """Return what a checkpoint keeps; plain values, fit for JSON."""
    return {
        "version": VERSION,
        "epoch": cursor.epoch,
        "position": cursor.position,
        "step": cursor.step,
        "fingerprint": plan.fingerprint.hex(),
        "plan": {**_kept(plan), "world_size": plan.world_size, "batch_size": plan.batch_size},
    }


def from_state(state: Mapping[str, Any], plan: Plan) -> tuple[Cursor, bytes]:
    """
    Return the cursor in a state of :func:`to_state`, and the fingerprint of the data that it belongs to.

    Raises:
        StateError: It is of another version, plan or data, or damaged.
    """
    if state.get("version") != VERSION:
        raise StateError("version", f"{state.get('version')!r}; {VERSION} is what this version of sluice reads")
    epoch, position = _count(state, "epoch"), _count(state, "position")
    step = None if state.get("step") is None else _count(state, "step")
    saved = state.get("plan")
    if not isinstance(saved, Mapping):
        raise StateError("plan", "missing")
    for name, value in _kept(plan).items():
        if saved.get(name) != value:
            raise StateError(f"plan.{name}", f"saved with {saved.get(name)!r}, and the plan now has {value!r}")
    try:
        fingerprint = bytes.fromhex(state["fingerprint"])
    except (KeyError, TypeError, ValueError) as error:
        raise StateError("fingerprint", f"{state.get('fingerprint')!r}; hex digits are expected") from error
    if fingerprint and plan.fingerprint and fingerprint != plan.fingerprint:
        raise StateError(
            "fingerprint",
            f"saved with data {fingerprint.hex()[:12]}, and the data now is {plan.fingerprint.hex()[:12]}: "
            "a position means nothing in other data",
        )
    return Cursor(epoch=epoch, position=position, step=step), fingerprint


def _kept(plan: Plan) -> dict[str, Any]:
    values = {name: getattr(plan, name) for name in _KEPT}
    return {name: value.name if isinstance(value, Remainder) else value for name, value in values.items()}


def _count(state: Mapping[str, Any], field: str) -> int:
    value = state.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise StateError(field, f"{value!r}; a number from 0 on is expected")
    return value

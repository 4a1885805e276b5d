import json
from dataclasses import replace
from typing import Any

import pytest

from streamer.plan import Plan, Remainder
from streamer.reading.cursor import Cursor, StateError, from_state, to_state

PLAN = Plan(dataset="mnist", seed=7, batch_size=64, fingerprint=b"\xab" * 32)
CURSOR = Cursor(epoch=2, position=640, step=30)


def test_cursor_comes_back_from_json() -> None:
    state = json.loads(json.dumps(to_state(CURSOR, PLAN)))

    assert from_state(state, PLAN) == (CURSOR, PLAN.fingerprint)


@pytest.mark.parametrize(
    "change", [{"world_size": 8, "rank": 3}, {"batch_size": 5}, {"epoch": 9}, {"fingerprint": b""}]
)
def test_state_goes_on_with_other_ranks_and_batches(change: dict[str, Any]) -> None:
    assert from_state(to_state(CURSOR, PLAN), replace(PLAN, **change))[0] == CURSOR


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("plan.dataset", {"dataset": "fashion-mnist"}),
        ("plan.split", {"split": "test"}),
        ("plan.seed", {"seed": None}),
        ("plan.remainder", {"remainder": Remainder.DROP}),
        ("plan.transform", {"transform": "augment-v1"}),
        ("fingerprint", {"fingerprint": b"\xcd" * 32}),
    ],
)
def test_state_of_another_plan_or_data_is_refused(field: str, change: dict[str, Any]) -> None:
    with pytest.raises(StateError, match=f"state: {field}: saved with") as raised:
        from_state(to_state(CURSOR, PLAN), replace(PLAN, **change))

    assert raised.value.field == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version", 2),
        ("epoch", -1),
        ("position", "640"),
        ("position", None),
        ("step", True),
        ("plan", None),
        ("fingerprint", "xy"),
        ("fingerprint", None),
    ],
)
def test_state_that_is_damaged_is_refused(field: str, value: object) -> None:
    with pytest.raises(StateError, match=f"state: {field}: "):
        from_state({**to_state(CURSOR, PLAN), field: value}, PLAN)

import pytest

from rpc import budget
from rpc.budget import REQUEST_ID_KEY, TIMING_KEY


def test_times_are_told_as_server_timing_and_read_again() -> None:
    spent = budget.begin([(REQUEST_ID_KEY, "mine")])
    spent.spend("decode", 0.0001)
    spent.spend("decode", 0.0002)
    spent.count("batch", 17)
    told = dict(spent.metadata(0.012345))

    assert told == {REQUEST_ID_KEY: "mine", TIMING_KEY: "decode;dur=0.30, batch;desc=17, total;dur=12.35"}
    assert budget.parse(told[TIMING_KEY]) == {"decode": 0.3, "batch": 17, "total": 12.35}
    assert spent.fields() == {"decode_ms": 0.3, "batch": 17}


@pytest.mark.parametrize("given", ["", "a b", "a\nb", "ä", "x" * 65, b"bytes"])
def test_id_that_cannot_be_used_is_replaced(given: str | bytes) -> None:
    first, second = budget.begin([(REQUEST_ID_KEY, given)]), budget.begin(None)

    assert first.request_id != given
    assert len({first.request_id, second.request_id, ""}) == 3


def test_timing_that_nobody_understands_is_left_out() -> None:
    assert budget.parse("cache, db;dur=fast, total;dur=2") == {"total": 2}
    assert budget.parse("") == {}


def test_outside_of_a_call_nobody_looks() -> None:
    budget.current().spend("decode", 1.0)

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpc import shares
from rpc.shares import Shares


def fill(room: Shares, caller: str) -> int:
    """Take one after the other for as long as there is some, and return how many."""
    before = room.held_by(caller)
    while not room.lack(caller, 1):
        room.take(caller, 1)
    return room.held_by(caller) - before


def test_flood_of_one_leaves_room_for_who_comes_next() -> None:
    room = Shares(160)

    assert fill(room, "flood") == 150
    assert room.lack("flood", 1) == "share"
    assert fill(room, "next") == 10


def test_floods_meet_at_equal_shares_as_places_come_back() -> None:
    room = Shares(160)
    fill(room, "first")
    for _ in range(500):
        room.give_back("first", 1)
        fill(room, "second")
        fill(room, "first")

    assert abs(room.held_by("first") - room.held_by("second")) <= 10


def test_who_was_refused_finds_room_as_soon_as_places_come_back() -> None:
    room = Shares(160)
    room.take("large", 160)
    assert room.lack("next", 1) == "room"
    assert "160 streams are in flight and 1 more would exceed 160" in room.refuse("next", 1, "streams")
    room.give_back("large", 20)

    assert room.lack("large", 1) == "share"
    assert "this caller has 140 streams in flight and its share is 80" in room.refuse("large", 1, "streams")
    assert room.lack("next", 20) == ""


def test_who_was_refused_counts_for_a_while_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("rpc.shares.time", SimpleNamespace(monotonic=lambda: now))
    room = Shares(160)
    room.take("large", 100)
    for number in range(1000):
        room.remember(str(number))
    assert room.lack("large", 1) == "share"
    assert len(room._refused) == shares._MAX_REMEMBERED

    now = shares._REMEMBERED_SECONDS
    assert room.lack("large", 1) == ""


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 60), st.booleans())))
def test_never_more_is_taken_than_there_is_and_all_of_it_comes_back(steps: list[tuple[str, int, bool]]) -> None:
    room, held = Shares(100), list[tuple[str, int]]()
    for caller, amount, takes in steps:
        if not takes and held:
            room.give_back(*held.pop())
        elif not room.lack(caller, amount):
            room.take(caller, amount)
            held.append((caller, amount))
        else:
            room.refuse(caller, amount, "images")
        assert room.taken == sum(amount for _, amount in held) <= 100
    for each in held:
        room.give_back(*each)

    assert room.taken == 0
    assert not room._by_caller

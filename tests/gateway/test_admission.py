import asyncio

import pytest

from gateway.admission import Admission
from gateway.errors import OverloadedError


def test_enter_refuses_what_exceeds_the_bound() -> None:
    admission = Admission(10, 1000)
    with admission.enter(8):
        with pytest.raises(OverloadedError, match=r"8 images are in flight and 3 more would exceed 10") as refusal:
            admission.enter(3)
        with admission.enter(2):
            assert admission.num_images == 10

    assert 0.01 <= refusal.value.retry_after_seconds <= 5
    assert admission.num_images == 0


def test_place_is_kept_until_the_last_holder_lets_go() -> None:
    admission = Admission(1, 1000)
    with admission.enter(1) as slot:
        slot.hold()

    assert admission.num_images == 1
    slot.release()
    assert admission.num_images == 0


def test_place_is_given_back_when_the_call_fails() -> None:
    admission = Admission(1, 1000)
    with pytest.raises(ZeroDivisionError), admission.enter(1):
        _ = 1 / 0

    assert admission.num_images == 0


def test_bytes_are_bounded_but_for_who_comes_alone() -> None:
    admission = Admission(10, 1000)
    with (
        admission.enter(1, num_bytes=5000),
        pytest.raises(OverloadedError, match="5000 bytes are in flight and 1 more"),
    ):
        admission.enter(1, num_bytes=1)

    assert admission.num_bytes == 0
    assert admission.num_refused == {"bytes": 1}


def test_flood_of_one_caller_leaves_room_for_the_others() -> None:
    admission = Admission(100, 1000)
    held = [admission.enter(1, identity="flood") for _ in range(60)]
    held.append(admission.enter(30, identity="other"))
    with pytest.raises(OverloadedError, match="this caller has 60 images in flight and its share is 50"):
        admission.enter(1, identity="flood")
    held.append(admission.enter(1, identity="third"))
    for slot in held:
        slot.release()

    admission.enter(100, identity="flood")
    assert admission.num_images == 100


def test_newcomer_is_let_in_while_one_caller_refills_each_place() -> None:
    admission = Admission(160, 1000)

    def refill() -> None:
        try:
            while True:
                held.append(admission.enter(1, identity="flood"))
        except OverloadedError:
            return

    held = [admission.enter(40, identity="flood"), admission.enter(40, identity="flood")]
    refill()
    for _ in range(100):
        with admission.enter(1, identity="next"):
            held.pop().release()
            refill()
    assert admission.num_refused["images"] == 0


def test_bytes_have_fair_shares_too() -> None:
    admission = Admission(1000, 256)
    held = [admission.enter(1, num_bytes=16, identity="flood") for _ in range(15)]
    with pytest.raises(OverloadedError, match="this caller has 240 bytes in flight and its share is 128"):
        admission.enter(1, num_bytes=16, identity="flood")

    held.append(admission.enter(1, num_bytes=16, identity="next"))
    assert admission.num_bytes == 256
    assert admission.num_refused == {"share": 1}


async def test_who_waits_is_let_in_as_soon_as_there_is_room_and_callers_take_turns() -> None:
    admission, came = Admission(1, 1000), list[str]()

    async def ask(identity: str) -> None:
        with await admission.enter_in_turn(1, identity=identity, timeout_seconds=60):
            came.append(identity)

    with admission.enter(1):
        asking = [asyncio.create_task(ask(identity)) for identity in ("many", "many", "many", "one")]
        await asyncio.sleep(0)
        assert not came
    await asyncio.gather(*asking)

    assert came == ["many", "one", "many", "many"]
    assert (admission.num_images, admission.num_refused.total()) == (0, 0)


async def test_who_waits_too_long_is_refused_once() -> None:
    admission = Admission(1, 1000)
    with admission.enter(1), pytest.raises(OverloadedError, match="1 images are in flight and 1 more would exceed 1"):
        await admission.enter_in_turn(1, timeout_seconds=0.01)

    assert admission.num_refused == {"images": 1}
    assert (await admission.enter_in_turn(1, timeout_seconds=0.01)).identity == ""


async def test_who_can_wait_leaves_room_to_who_cannot() -> None:
    admission = Admission(16, 1000)
    for _ in range(12):
        await admission.enter_in_turn(1, identity="stream", timeout_seconds=60)
    with pytest.raises(OverloadedError, match="too much is in flight for those who can wait"):
        await admission.enter_in_turn(1, identity="stream", timeout_seconds=0.01)

    admission.enter(1, identity="stream")
    assert admission.num_images == 13


@pytest.mark.parametrize("is_let_in", [False, True])
async def test_who_leaves_the_line_takes_no_place(is_let_in: bool) -> None:
    admission = Admission(1, 1000)
    slot = admission.enter(1)
    waiting = asyncio.create_task(admission.enter_in_turn(1, timeout_seconds=60))
    await asyncio.sleep(0)
    if is_let_in:
        slot.release()
    waiting.cancel()
    await asyncio.wait((waiting,))

    assert waiting.cancelled()
    assert admission.num_images == (0 if is_let_in else 1)
    assert not admission._waiting


def test_call_that_cannot_be_answered_in_time_is_refused_at_arrival() -> None:
    admission = Admission(10, 1000)
    with pytest.raises(OverloadedError, match=r"would take 0.5 s and the deadline is in 0.2 s") as refusal:
        admission.enter(1, remaining_seconds=0.2, expected_seconds=0.5)

    assert refusal.value.retry_after_seconds == 0.5
    admission.enter(1, remaining_seconds=0.6, expected_seconds=0.5)
    assert admission.num_refused == {"deadline": 1}

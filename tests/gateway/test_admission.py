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


def test_call_that_cannot_be_answered_in_time_is_refused_at_arrival() -> None:
    admission = Admission(10, 1000)
    with pytest.raises(OverloadedError, match=r"would take 0.5 s and the deadline is in 0.2 s") as refusal:
        admission.enter(1, remaining_seconds=0.2, expected_seconds=0.5)

    assert refusal.value.retry_after_seconds == 0.5
    admission.enter(1, remaining_seconds=0.6, expected_seconds=0.5)
    assert admission.num_refused == {"deadline": 1}

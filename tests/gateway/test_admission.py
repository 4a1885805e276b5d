import pytest

from gateway.admission import Admission
from gateway.errors import OverloadedError


def test_enter_refuses_what_exceeds_the_bound() -> None:
    admission = Admission(10)
    with admission.enter(8):
        with pytest.raises(OverloadedError, match=r"8 images are in flight and 3 more would exceed 10") as refusal:
            admission.enter(3)
        with admission.enter(2):
            assert admission.num_images == 10

    assert 0.01 <= refusal.value.retry_after_seconds <= 5
    assert admission.num_images == 0


def test_place_is_kept_until_the_last_holder_lets_go() -> None:
    admission = Admission(1)
    with admission.enter(1) as slot:
        slot.hold()

    assert admission.num_images == 1
    slot.release()
    assert admission.num_images == 0


def test_place_is_given_back_when_the_call_fails() -> None:
    admission = Admission(1)
    with pytest.raises(ZeroDivisionError), admission.enter(1):
        _ = 1 / 0

    assert admission.num_images == 0

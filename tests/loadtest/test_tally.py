from loadtest.tally import INTERRUPTED, NOT_SENT, OK, Tally, Verdict


def test_every_call_has_a_code_once_closed() -> None:
    tally = Tally()
    for _ in range(4):
        tally.begin(0)
    tally.skip()
    tally.succeed(0.1, Verdict(images=1))
    tally.fail(0.2, "UNAVAILABLE", "gone")
    tally.close(INTERRUPTED)

    assert tally.codes == {OK: 1, "UNAVAILABLE": 1, INTERRUPTED: 2, NOT_SENT: 1}
    assert tally.count == 5


def test_failed_calls_leave_the_latencies_of_answers_alone() -> None:
    tally = Tally()
    tally.succeed(0.1, Verdict(images=1))
    tally.fail(9.0, "DEADLINE_EXCEEDED", "")

    assert tally.succeeded_latencies.slowest == 0.1
    assert tally.latencies["DEADLINE_EXCEEDED"].slowest == 9.0


def test_messages_are_bounded_when_each_is_another() -> None:
    tally = Tally()
    for number in range(1000):
        tally.fail(0.1, "INTERNAL", f"logged as {number}")

    assert len(tally.messages) == 17
    assert tally.messages["other messages"] == 1000 - 16


def test_answers_are_added_up() -> None:
    tally = Tally()
    tally.succeed(0.1, Verdict(images=3, judged=2, right=1, refused=1))
    tally.succeed(0.1, Verdict(images=2, same_score=1.0))
    tally.succeed(0.1, Verdict(images=2, same_score=0.5))
    tally.succeed(0.1, Verdict(images=2, different_score=0.0))

    assert (tally.images, tally.judged, tally.right, tally.refused) == (9, 2, 1, 1)
    assert (tally.same.value, tally.different.value) == (0.75, 0.0)

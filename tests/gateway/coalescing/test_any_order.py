"""Whatever comes in whatever order."""

from collections.abc import Coroutine
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gateway.coalesce import Ask
from gateway.errors import (
    GatewayError,
    UpstreamUnavailableError,
)
from tests.gateway.coalescing.line import FAILED, TIMEOUT_SECONDS, Clock, Line, settled


class Coalescing(RuleBasedStateMachine):
    """Random arrivals, cancels, deadlines, failures and hangs: nobody gets another's answer, nobody waits for ever."""

    @initialize(
        max_batch_size=st.integers(1, 4),
        num_instances=st.integers(1, 2),
        batches_per_instance=st.integers(1, 3),
        joins=st.booleans(),
        may_cancel=st.booleans(),
        fails_at_last=st.booleans(),
    )
    def begin(
        self,
        max_batch_size: int,
        num_instances: int,
        batches_per_instance: int,
        joins: bool,
        may_cancel: bool,
        fails_at_last: bool,
    ) -> None:
        self.loop = Clock()
        self.fails_at_last = fails_at_last
        self.asks: list[tuple[Ask, list[bytes]]] = []

        async def opened() -> Line:
            return Line(
                max_batch_size=max_batch_size, num_instances=num_instances, batches_per_instance=batches_per_instance,
                joins=joins, may_cancel=may_cancel,
            )  # fmt: skip

        self.line = self.run(opened())
        self.max_batch_size, self.max_batches = max_batch_size, num_instances * batches_per_instance

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(work)

    @rule(
        numbers=st.lists(st.integers(0, 255), min_size=1, max_size=6),
        who=st.sampled_from("abc"),
        late=st.sampled_from([False, False, True]),
    )
    def arrive(self, numbers: list[int], who: str, late: bool) -> None:
        images = [bytes([number]) for number in numbers]
        deadline = self.loop.time() - 1 if late else None
        self.asks.append((self.line.ask(*images, identity=who, deadline=deadline), images))

    @rule()
    def wait(self) -> None:
        self.run(settled())

    @rule(seconds=st.sampled_from([0.1, TIMEOUT_SECONDS / 2, TIMEOUT_SECONDS]))
    def hang(self, seconds: float) -> None:
        """Let time pass without an answer, be it to a batch or to an image that is tried again."""
        self.loop.now += seconds
        self.run(settled())

    @precondition(lambda self: self.asks)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        ask, _ = data.draw(st.sampled_from(self.asks))
        if not ask.future.done():
            self.line.lane.leave(ask)

    @precondition(lambda self: self.line.model.batches)
    @rule(data=st.data(), error=st.sampled_from([None, FAILED, FAILED, UpstreamUnavailableError("u")]))
    def answer(self, data: st.DataObject, error: GatewayError | None) -> None:
        self.line.model.answer(data.draw(st.integers(0, len(self.line.model.batches) - 1)), error)
        self.run(settled())

    @rule()
    def stop_serving(self) -> None:
        self.line.lane.fail_waiting(UpstreamUnavailableError("not serving"))

    @invariant()
    def answers_belong_to_their_images(self) -> None:
        for ask, images in self.asks:
            if ask.future.done() and not ask.future.cancelled() and ask.future.exception() is None:
                for image, row in zip(images, ask.future.result(), strict=True):
                    assert isinstance(row, GatewayError) or row.tolist() == [2 * image[0]]

    @invariant()
    def bounds_hold(self) -> None:
        if hasattr(self, "line"):
            model, now = self.line.model, self.loop.time()
            # Beside those which have taken so long that they do not count any more.
            assert sum(model.sent_at[told] == now and not told.done() for _, told in model.batches) <= self.max_batches
            assert max(model.sizes, default=0) <= self.max_batch_size

    def teardown(self) -> None:
        if not hasattr(self, "line"):
            return
        self.run(settled())
        if self.fails_at_last:
            for _ in range(len(self.line.model.batches)):
                self.line.model.answer(error=FAILED)
        # Whatever hangs: nobody waits longer than for a batch, and then for its answer.
        for _ in range(2):
            self.run(settled())
            self.loop.now += TIMEOUT_SECONDS
        self.run(settled())
        assert all(ask.future.done() for ask, _ in self.asks)
        while self.line.model.batches:
            self.line.model.answer()
            self.run(settled())
        assert self.line.room.num_taken == 0
        assert self.line.lane.is_idle
        assert self.line.lane.expected_seconds(1) == 0
        self.loop.close()


TestCoalescing = Coalescing.TestCase
TestCoalescing.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)

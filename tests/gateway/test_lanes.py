"""Lanes come with the versions that are asked for, and go with them."""

import asyncio

import numpy as np
import pytest

from gateway.cache import RowCache
from gateway.coalesce import Ask, Infer, Rows
from gateway.errors import UpstreamUnavailableError
from gateway.lanes import Lanes
from gateway.models import Card, ServedModel, ServedVersion
from gateway.routing import Split
from gateway.triton import EMBEDDING, PROBABILITIES, Output
from tests.gateway.coalescing.line import Room, settled

DIED = UpstreamUnavailableError("it died")


class Model:
    """Says the same of every image, once the gate is open."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.asked = asyncio.Event()
        self.says = 0
        self.sizes: list[int] = []

    def asking(self, model: str, version: int, output: Output, width: int) -> Infer:
        async def infer(pixels: bytes, num_images: int) -> Rows:
            self.sizes.append(num_images)
            self.asked.set()
            row = np.eye(width, dtype=np.float32)[[self.says] * num_images]
            await self.gate.wait()
            return row

        return infer


def version(number: int = 1, digest: str = "sha256:aa", num_instances: int = 1) -> ServedVersion:
    return ServedVersion("m", number, ("a", "b"), 3, 8, Card(digest=digest), num_instances=num_instances)


def served(*versions: ServedVersion) -> list[ServedModel]:
    return [ServedModel("m", versions, True, Split(versions[0].version))] if versions else []


class Rig:
    """All lanes, the model behind them, and the room before them."""

    def __init__(self) -> None:
        self.model, self.room, self.cache = Model(), Room(), RowCache(8)
        self.lanes = Lanes(
            self.model.asking, timeout_seconds=60, may_cancel=lambda: False, batches_per_instance=1, joins=True,
            cache=self.cache, traces=None, on_batch=lambda record: None,
        )  # fmt: skip

    def ask(self, asked: ServedVersion, pixels: bytes = b"x") -> Ask:
        return self.lanes.of(asked, PROBABILITIES).ask((pixels,), self.room.take())

    async def label(self, asked: ServedVersion) -> int:
        (row,) = await self.ask(asked).future
        assert isinstance(row, np.ndarray)
        return int(row.argmax())


@pytest.fixture
async def rig() -> Rig:
    return Rig()


async def test_lane_is_kept_while_its_version_is_served_whatever_else_is_asked(rig: Rig) -> None:
    lane = rig.lanes.of(version(), PROBABILITIES)
    rig.lanes.of(version(), EMBEDDING)
    rig.lanes.keep(served(version()))

    assert rig.lanes.of(version(), PROBABILITIES) is lane


async def test_lane_is_forgotten_once_its_version_has_gone(rig: Rig) -> None:
    await rig.label(version(1))
    await settled()
    rig.lanes.keep(served(version(2)))

    assert list(rig.lanes) == []


async def test_work_under_way_is_not_lost_sight_of_when_its_version_goes(rig: Rig) -> None:
    rig.model.gate.clear()
    at_model = rig.ask(version(), b"x")
    await settled()
    waits, joins = rig.ask(version(), b"y"), rig.ask(version(), b"y")
    rig.lanes.keep(served(version(2)))
    assert [(lane.num_in_flight, lane.num_waiting) for lane in rig.lanes] == [(1, 1)]
    rig.lanes.fail_waiting("m", 1, DIED)
    assert (await waits.future, await joins.future) == ([DIED], [DIED])
    rig.model.gate.set()
    await rig.lanes.drained(5)

    assert isinstance((await at_model.future)[0], np.ndarray)
    rig.lanes.keep(served(version(2)))
    assert (list(rig.lanes), rig.lanes.num_joined, rig.room.num_taken) == ([], 1, 0)


async def test_instance_that_comes_takes_what_waits_next(rig: Rig) -> None:
    rig.model.gate.clear()
    rig.ask(version(), b"x")
    await settled()
    rig.lanes.keep(served(version(num_instances=2)))
    rig.ask(version(), b"y")
    await settled()

    assert rig.model.sizes == [1, 1]


async def test_nobody_is_expected_to_wait_while_any_version_is_idle(rig: Rig) -> None:
    rig.lanes.keep(served(version(2), version(1)))
    for _ in range(2):
        await rig.ask(version(2)).future
    rig.model.gate.clear()
    slow = rig.ask(version(2), b"y")
    await settled()

    assert rig.lanes.least_expected_seconds(PROBABILITIES, "somebody") == 0
    rig.lanes.keep(served(version(2)))
    assert rig.lanes.least_expected_seconds(PROBABILITIES, "somebody") > 0
    assert rig.lanes.least_expected_seconds(EMBEDDING, "somebody") == 0
    rig.model.gate.set()
    await slow.future


async def test_kept_answers_are_forgotten_when_their_version_goes(rig: Rig) -> None:
    assert [await rig.label(version()) for _ in range(2)] == [0, 0]
    rig.lanes.keep(served())
    rig.model.says = 1
    rig.lanes.keep(served(version()))

    assert await rig.label(version()) == 1
    assert rig.model.sizes == [1, 1]


async def test_answer_that_comes_after_its_version_went_is_not_kept_for_the_next(rig: Rig) -> None:
    rig.model.gate.clear()
    before = rig.ask(version())
    await settled()
    rig.lanes.keep(served())
    rig.lanes.keep(served(version()))
    rig.model.gate.set()
    await before.future
    rig.model.says = 1

    assert await rig.label(version()) == 1


async def test_nothing_is_kept_of_a_version_whose_weights_are_not_known(rig: Rig) -> None:
    for says in (0, 1):
        rig.model.says = says
        assert await rig.label(version(digest="")) == says

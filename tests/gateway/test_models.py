import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from gateway.errors import (
    GatewayError,
    UnknownModelError,
    UnknownVersionError,
    UpstreamUnavailableError,
)
from gateway.models import Card, Catalog
from gateway.routing import path_of
from gateway.triton import ReadyVersion


@dataclass
class ScriptedSource:
    ready: list[ReadyVersion] = field(default_factory=list)
    failure: GatewayError | None = None
    num_asked: int = 0
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    gate: asyncio.Event | None = None

    async def ready_versions(self) -> Sequence[ReadyVersion]:
        self.num_asked += 1
        self.asked.set()
        ready = list(self.ready)
        await asyncio.sleep(0)  # lets a second caller arrive meanwhile
        if self.gate is not None:
            await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        return ready


@pytest.fixture
def source() -> ScriptedSource:
    return ScriptedSource([ReadyVersion("mnist", version, 10, 64) for version in (2, 10, 9)])


@pytest.fixture
def catalog(source: ScriptedSource, tmp_path: Path) -> Catalog:
    return Catalog(source, repository=tmp_path, default_model="mnist")


def write_card(repository: Path, version: int, content: Any) -> None:
    folder = repository / "mnist" / str(version)
    folder.mkdir(parents=True)
    (folder / "card.json").write_text(content if isinstance(content, str) else json.dumps(content))


async def test_default_is_the_highest_version(catalog: Catalog) -> None:
    found = await catalog.find("", 0)

    assert (found.name, found.version) == ("mnist", 10)
    assert [one.version for one in catalog.listing()[0].versions] == [10, 9, 2]
    assert catalog.listing()[0].is_default


async def test_class_names_are_indices_without_a_card(catalog: Catalog) -> None:
    assert (await catalog.find("mnist", 9)).class_names == tuple("0123456789")


async def test_withdrawn_version_keeps_its_class_names_as_long_as_it_answers(catalog: Catalog, tmp_path: Path) -> None:
    names = tuple(f"digit {index}" for index in range(10))
    write_card(tmp_path, 10, {"class_names": names})
    await catalog.refresh()
    (tmp_path / "mnist" / "10").rename(tmp_path / "mnist" / ".withdrawn-10")
    await catalog.refresh()

    assert catalog.known("mnist", 10).class_names == names


async def test_card_is_read_with_fields_of_a_later_schema(catalog: Catalog, tmp_path: Path) -> None:
    names = [f"digit {index}" for index in range(10)]
    write_card(
        tmp_path,
        10,
        {
            "schema": 2,
            "model": "mnist",
            "version": 10,
            "created": "2030-01-02T03:04:05+00:00",
            "class_names": names,
            "image_shape": [28, 28],
            "polarity": "dark_on_light",
            "framing": "stretch",
            "metrics": {"test_accuracy": 0.98},
            "dataset": {"name": "mnist", "num_train": 4000, "fingerprint": "ab", "new": 1},
            "calibration": {"cosine": [1, 2]},
        },
    )
    found = await catalog.find("", 0)

    assert found.class_names == tuple(names)
    assert (found.card.polarity, found.card.framing) == ("dark_on_light", "stretch")
    assert found.card.metrics["test_accuracy"] == 0.98


@pytest.mark.parametrize("content", ["{", '{"class_names": 3}', '{"class_names": ["only one"]}', "[]"])
async def test_card_that_does_not_fit_is_ignored(catalog: Catalog, tmp_path: Path, content: str) -> None:
    write_card(tmp_path, 10, content)

    assert (await catalog.find("", 0)).class_names == tuple("0123456789")


def test_empty_card_has_a_default_for_everything() -> None:
    assert Card.model_validate({}).polarity == "auto"


async def test_version_loaded_just_now_is_found(catalog: Catalog, source: ScriptedSource) -> None:
    await catalog.refresh()
    source.ready.append(ReadyVersion("mnist", 11, 10, 64))

    assert (await catalog.find("mnist", 11)).version == 11


async def test_unknown_version_names_those_there_are(catalog: Catalog) -> None:
    with pytest.raises(UnknownVersionError, match=r"^model_version: mnist has no version 3; served are 10, 9, 2$"):
        await catalog.find("", 3)


async def test_unknown_model_names_those_there_are(catalog: Catalog) -> None:
    with pytest.raises(UnknownModelError, match=r"^model: no model 'b\\x00r'; loaded are mnist$"):
        await catalog.find("b\0r", 0)


@pytest.mark.parametrize(("name", "version"), [("", 3), ("resnet", 0)])
async def test_caller_who_may_not_list_models_is_told_none(
    source: ScriptedSource, tmp_path: Path, name: str, version: int
) -> None:
    closed = Catalog(source, repository=tmp_path, default_model="mnist", may_list=lambda: False)
    with pytest.raises(UnknownModelError, match=r"(mnist has no version 3|no model 'resnet')$"):
        await closed.find(name, version)


async def test_no_model_yet_says_what_to_do(catalog: Catalog, source: ScriptedSource) -> None:
    source.ready.clear()
    with pytest.raises(UpstreamUnavailableError, match="no model is loaded yet; train one with `sluice train`"):
        await catalog.find("", 0)
    with pytest.raises(UnknownModelError, match="no model 'mnist'; none is loaded; train one with `sluice train`"):
        await catalog.find("mnist", 0)


async def test_default_model_missing_among_others(catalog: Catalog, source: ScriptedSource) -> None:
    source.ready = [ReadyVersion("letters", 1, 26, 64)]
    with pytest.raises(UpstreamUnavailableError, match="the default model mnist is not loaded; loaded are letters"):
        await catalog.find("", 0)


async def test_last_answer_stays_when_a_refresh_fails(catalog: Catalog, source: ScriptedSource) -> None:
    await catalog.refresh()
    source.failure = UpstreamUnavailableError("gone")
    with pytest.raises(UpstreamUnavailableError, match="gone"):
        await catalog.refresh()

    assert catalog.known("", 0).version == 10


async def test_refreshes_at_the_same_time_ask_once(catalog: Catalog, source: ScriptedSource) -> None:
    await asyncio.gather(*(catalog.refresh() for _ in range(5)))
    assert source.num_asked == 1

    await catalog.refresh()
    assert source.num_asked == 2


async def test_version_loaded_during_a_look_is_found_by_the_next(catalog: Catalog, source: ScriptedSource) -> None:
    source.gate = asyncio.Event()
    look = asyncio.create_task(catalog.refresh())
    await source.asked.wait()
    source.ready.append(ReadyVersion("mnist", 11, 10, 64))
    asked = asyncio.create_task(catalog.find("mnist", 11))
    await asyncio.sleep(0)  # it is not known
    source.gate.set()

    assert (await asked).version == 11
    await look


async def test_looks_are_few_when_callers_ask_for_what_is_not_there(catalog: Catalog, source: ScriptedSource) -> None:
    await catalog.refresh()
    loop = asyncio.get_running_loop()
    started = loop.time()

    async def insist() -> None:
        while loop.time() < started + 0.5:
            with pytest.raises(UnknownModelError):
                await catalog.find("none", 0)

    await asyncio.gather(*(insist() for _ in range(20)))

    assert source.num_asked <= 2 + (loop.time() - started) / 0.1


async def test_refresh_outlives_the_caller_who_began_it(catalog: Catalog, source: ScriptedSource) -> None:
    first = asyncio.create_task(catalog.refresh())
    second = asyncio.create_task(catalog.refresh())
    await asyncio.sleep(0)  # both have begun to wait
    first.cancel()
    await second

    assert catalog.known("", 0).version == 10
    assert source.num_asked == 1


def route(repository: Path, content: Any) -> None:
    path_of(repository, "mnist").write_text(json.dumps(content))


async def test_route_says_which_version_answers_who_names_none(catalog: Catalog, tmp_path: Path) -> None:
    route(tmp_path, {"default": 9})
    assert (await catalog.find("", 0)).version == 9
    assert (await catalog.find("mnist", 10)).version == 10
    assert (catalog.routed("mnist"), catalog.routed("absent"), catalog.routed("")) == (9, 0, 0)

    route(tmp_path, {"default": 2})
    await catalog.refresh()
    assert catalog.known("", 0).version == catalog.listing()[0].default.version == 2


async def test_canary_gets_its_share_once_an_inference_worked(source: ScriptedSource, tmp_path: Path) -> None:
    draws = iter(range(10_000))
    catalog = Catalog(source, repository=tmp_path, default_model="mnist", draw=lambda: next(draws) % 100 / 100)
    route(tmp_path, {"default": 9, "canary": {"10": 0.1, "2": 0.25}})
    await catalog.refresh()
    assert {catalog.known("", 0).version for _ in range(100)} == {9}

    catalog.prove({("mnist", 9), ("mnist", 10), ("letters", 2)})
    assert Counter(catalog.known("", 0).version for _ in range(100)) == {9: 90, 10: 10}
    catalog.prove({("mnist", 10), ("mnist", 2)})
    assert Counter(catalog.known("", 0).version for _ in range(100)) == {9: 65, 10: 10, 2: 25}


async def test_route_to_a_version_that_is_not_ready_is_complained_of_once(catalog: Catalog, tmp_path: Path) -> None:
    route(tmp_path, {"default": 7})
    with capture_logs() as lines:
        for _ in range(3):
            await catalog.refresh()

    assert catalog.known("", 0).version == 10
    assert [(line["event"], line["reason"]) for line in lines] == [
        ("route not followed", "mnist: version 7 is not ready; 10, the highest, answers")
    ]


async def test_damaged_route_is_complained_of_once_and_the_last_one_stays(catalog: Catalog, tmp_path: Path) -> None:
    route(tmp_path, {"default": 9})
    await catalog.refresh()
    route(tmp_path, {"default": 0})
    with capture_logs() as lines:
        for _ in range(3):
            await catalog.refresh()

    assert catalog.known("", 0).version == 9
    (line,) = lines
    assert "default: Input should be greater than or equal to 1; followed is 9" in line["reason"]

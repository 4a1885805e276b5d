import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import RouteError
from gateway.routing import Route, Routes, path_of, split

numbers = st.integers(1, 10**6)


@st.composite
def routes(draw: st.DrawFn) -> Route:
    default = draw(numbers)
    canaries = draw(st.lists(numbers.filter(lambda number: number != default), unique=True, max_size=5))
    parts = draw(st.lists(st.integers(1, 1000), min_size=len(canaries), max_size=len(canaries)))
    whole = sum(parts) + draw(st.integers(1, 1000))
    return Route.of(default, {canary: part / whole for canary, part in zip(canaries, parts, strict=True)})


@given(routes(), st.lists(numbers, unique=True), st.data())
def test_every_version_gets_its_share_of_the_draws(route: Route, others: list[int], data: st.DataObject) -> None:
    ready = {*route.versions, *others}.difference(data.draw(st.sets(st.sampled_from(list(route.canary) or [0]))))
    found = split(route, ready)
    num_draws = 10_000
    chosen = [found.choose((draw + 0.5) / num_draws) for draw in range(num_draws)]

    for version, share in route.canary.items():
        assert abs(chosen.count(version) / num_draws - share * (version in ready)) <= 2 / num_draws
    assert set(chosen) <= set(found.versions) <= ready
    assert bool(found.problem) == bool(route.canary.keys() - ready)


@given(routes(), st.sets(numbers, min_size=1))
def test_highest_answers_everybody_when_the_default_is_not_ready(route: Route, others: set[int]) -> None:
    ready = others - {route.default} or {route.default + 1}
    found = split(route, ready)

    assert found.versions == (max(ready),)
    assert found.problem == f"version {route.default} is not ready; {max(ready)}, the highest, answers"


def test_highest_answers_without_a_route() -> None:
    assert split(None, [9, 10, 2]).versions == (10,)


@given(routes())
def test_route_survives_its_file(route: Route) -> None:
    assert Route.parse(route.model_dump_json().encode()) == route


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "Invalid JSON"),
        ("[]", "object"),
        ("{}", "^default: Field required"),
        ('{"default": 0}', "^default: .* greater than or equal to 1"),
        ('{"default": "3"}', "^default: .* valid integer"),
        ('{"default": 3, "canry": {"4": 0.1}}', "^canry: Extra inputs are not permitted"),
        ('{"default": 3, "canary": {"4": 0}}', "^canary.4: .* greater than 0"),
        ('{"default": 3, "canary": {"4": 1}}', "^canary.4: .* less than 1"),
        ('{"default": 3, "canary": {"4": NaN}}', "^canary.4: .* less than 1"),
        ('{"default": 3, "canary": {"-4": 0.1}}', "^canary.-4: .* greater than or equal to 1"),
        ('{"default": 3, "canary": {"3": 0.1}}', "^canary: version 3 is the default already"),
        ('{"default": 3, "canary": {"4": 0.5, "5": 0.5}}', "^canary: 100% together; the default has to keep something"),
    ],
)
def test_file_that_makes_no_sense_is_refused_with_its_field(content: str, reason: str) -> None:
    with pytest.raises(RouteError, match=reason):
        Route.parse(content.encode())


class TestFiles:
    @pytest.fixture
    def routes(self, tmp_path: Path) -> Routes:
        return Routes(tmp_path)

    def test_last_good_route_stays_while_the_file_is_damaged(self, routes: Routes, tmp_path: Path) -> None:
        path = path_of(tmp_path, "mnist")
        path.write_text('{"default": 3}')
        routes.look(["mnist"])
        path.write_text('{"default":')
        for _ in range(2):
            routes.look(["mnist"])
            assert routes.of("mnist") == Route(default=3)
            assert f"{path}: Invalid JSON" in routes.problem("mnist")

        path.write_text('{"default": 4}')
        routes.look(["mnist"])
        assert (routes.of("mnist"), routes.problem("mnist")) == (Route(default=4), "")

    def test_route_is_gone_with_its_file(self, routes: Routes, tmp_path: Path) -> None:
        path_of(tmp_path, "mnist").write_text('{"default": 3}')
        routes.look(["mnist"])
        path_of(tmp_path, "mnist").unlink()
        routes.look(["mnist"])

        assert routes.of("mnist") is None

    def test_file_is_read_only_when_it_has_changed(
        self, routes: Routes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = path_of(tmp_path, "mnist")
        path.write_text('{"default": 3}')
        routes.look(["mnist"])
        with monkeypatch.context() as patched:
            patched.setattr(Path, "read_bytes", lambda path: pytest.fail("read again"))
            routes.look(["mnist"])
        # As the command does, with a file of the same length and age.
        found = path.stat()
        new = tmp_path / "new"
        new.write_text(json.dumps({"default": 4}))
        os.utime(new, ns=(found.st_atime_ns, found.st_mtime_ns))
        new.replace(path)
        routes.look(["mnist"])

        assert routes.of("mnist") == Route(default=4)

from pathlib import Path

from benchmarks.contest import Comparison, Contender, Contest, Outcome, Pace
from benchmarks.turn import Program
from benchmarks.window import Turn

_PACE = Pace(rounds=2, warm_seconds=0.01, seconds=0.05)


def _program(target: str, **options: object) -> Program:
    return Program(target=f"tests.benchmarks.programs:{target}", options=options)


def _turn(items: int) -> Turn:
    return Turn(items=items, seconds=1, reader_cpu_seconds=0, server_cpu_seconds=0, other_cpu_seconds=0)


async def _run(*contenders: Contender, folder: Path) -> tuple[Outcome, list[str]]:
    told: list[str] = []
    return await Contest(contenders, _PACE, temporary=folder, report=told.append).run(), told


async def test_contenders_take_turns(tmp_path: Path) -> None:
    one, two = (Contender(name=name, ways={"": _program("counts")}) for name in ("one", "two"))

    outcome, told = await _run(one, two, folder=tmp_path)

    assert [line.split(":")[1].strip() for line in told] == ["one", "two", "one", "two"]
    assert {name: len(turns) for name, turns in outcome.turns.items()} == {"one": 2, "two": 2}


async def test_fastest_way_contends(tmp_path: Path) -> None:
    ways = {"slow": _program("paced", seconds=0.05), "fast": _program("counts")}

    outcome, told = await _run(Contender(name="one", ways=ways), folder=tmp_path)

    assert outcome.chosen == {"one": "fast"}
    assert outcome.trials["one"]["fast"] > outcome.trials["one"]["slow"]
    assert [line for line in told if line.startswith("round") and "slow" in line] == []


async def test_one_that_fails_is_left_out_and_the_others_go_on(tmp_path: Path) -> None:
    broken = Contender(name="broken", ways={"a": _program("fails"), "b": _program("counts")})
    absent = Contender(name="absent", ways={"": _program("counts")}, absent="not installed")

    outcome, _ = await _run(broken, absent, Contender(name="well", ways={"": _program("counts")}), folder=tmp_path)

    assert outcome.problems == {"broken": "a: ValueError: no such thing", "absent": "not installed"}
    assert list(outcome.turns) == ["well"]
    assert outcome.factor(Comparison(ours="well", theirs="broken", asked=2)) is None


def test_factor_is_taken_round_by_round() -> None:
    outcome = Outcome(turns={"ours": [_turn(20), _turn(30), _turn(400)], "theirs": [_turn(10), _turn(30), _turn(100)]})

    factor = outcome.factor(Comparison(ours="ours", theirs="theirs", asked=None))

    assert factor is not None
    assert (factor.median, factor.lowest, factor.highest) == (2, 1, 4)

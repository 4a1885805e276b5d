"""
``python -m benchmarks.gateway``: the gateway beside Triton asked directly, the bare model, and an empty server.

Prints tables and writes them, and two pictures, to ``benchmarks/results/``; docs/benchmarks.md says how to read them.
"""

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import alone, empty, h2load, overload, report, serving, throughput
from benchmarks.bench import Bench, Report, Section
from benchmarks.command import Command, plainly_ended, say, take_cores
from benchmarks.contest import Pace
from benchmarks.h2load import H2loadError
from benchmarks.surge import SurgeError
from benchmarks.turn import TurnError
from benchmarks.versions import NoVersionError, Version, newest, version_at
from benchmarks.window import Turn
from gateway.client import ClientError
from serving.errors import ServingError
from sluice.supervisor import ServiceError

SUITES = ("unary", "batches", "alone", "callers", "overload")

_COMMAND = Command(
    name="gateway",
    suites=SUITES,
    full=Pace(rounds=5, warm_seconds=1.0, seconds=3.0),
    quick=Pace(rounds=1, warm_seconds=0.1, seconds=0.3),
)
_PACKAGES = ("grpcio", "protobuf", "torch", "tritonclient")
_ERRORS = (H2loadError, SurgeError, TurnError, NoVersionError, ClientError, ServingError, ServiceError)


async def measure(
    suites: Sequence[str], version: Version, pace: Pace, *, pictures: Path | None, say: Report
) -> list[Section]:
    """
    Run these suites on a Triton and a gateway of their own.

    Args:
        suites: Some of :data:`SUITES`.
        version: The model.
        pace: Of the turns.
        pictures: Folder for them; None draws none.
        say: Told how it goes.

    Raises:
        H2loadError: h2load is missing or failed; and each of the parts has an error of its own.
    """
    h2load.require()
    images_NHW, _ = serving.images()
    with TemporaryDirectory(prefix="sluice-gateway-") as folder:
        async with serving.triton_with(version, Path(folder), say) as served:
            # Before there is a gateway: its probes would be in it.
            trials = await throughput.ways(served, images_NHW[0], pace, say) if "unary" in suites else None
            async with serving.gateway_before(served, say) as front:
                with empty.empty_server() as nothing:
                    bench = Bench(
                        served=served, front=front, nothing=nothing, images_NHW=images_NHW, pace=pace, report=say
                    )
                    return [await _section(suite, bench, trials, pictures) for suite in suites]


async def _section(suite: str, bench: Bench, trials: throughput.Trials | None, pictures: Path | None) -> Section:
    bench.report(f"{suite}:")
    match suite:
        case "batches":
            return await throughput.batches(bench)
        case "callers":
            return await throughput.callers_curve(bench, pictures)
        case "overload":
            return await overload.beyond_capacity(bench, pictures)
        case "alone":
            return await alone.lone_caller(bench)
    assert trials is not None
    return await throughput.unary(bench, trials)


def _text(sections: Sequence[Section], version: Version, pace: Pace, command: str) -> str:
    turns = [turn for section in sections for turn in section.turns]
    failed = sum(section.failed for section in sections)
    settings = ", ".join(f"`{name}={value}`" for name, value in serving.SETTINGS.items())
    return "\n".join(
        [
            "# The gateway, measured",
            "",
            report.surroundings(command, _PACKAGES),
            f"Model: {version.precision}. Images: {serving.images()[1]}. Contenders take turns in one run, "
            f"{pace.rounds} each, of {pace.seconds:g} s after {pace.warm_seconds:g} s to warm up; factors are "
            f"taken round by round. Load by h2load, which sends the same body again and again, so the gateway "
            f"runs with {settings}. All share the cores. "
            f"{'Every call was answered' if not failed else f'{failed:,} calls had no answer'} where none was to be "
            f"refused.{_others(turns)}",
            "",
            *(line for section in sections for line in section.lines),
        ]
    )


def _others(turns: Sequence[Turn]) -> str:
    if not turns:
        return ""
    return f" Everything else on the machine took {report.others_share(turns):.1%} of these cores meanwhile."


def main(words: Sequence[str]) -> None:
    """Measure what the command line says."""
    parser = _COMMAND.parser(__doc__)
    parser.add_argument("--model", type=Path, help="folder of a version; default: the newest in the model repository")
    given = parser.parse_args(words)
    pace, page = _COMMAND.pace(given), _COMMAND.page(given)
    take_cores(given.cores)
    with plainly_ended(*_ERRORS):
        version = version_at(given.model) if given.model else newest()
        measuring = measure(given.only, version, pace, pictures=page.parent if page else None, say=say)
        sections = asyncio.run(measuring)
    # The folder is the reader's business alone.
    words = [word for word in words if word != "--model" and (given.model is None or word != str(given.model))]
    report.publish(_text(sections, version, pace, " ".join(["python -m benchmarks.gateway", *words])), page)


if __name__ == "__main__":
    main(sys.argv[1:])

"""``sluice loadtest``: options to a plan, a report at the end, also of a test that was interrupted."""

import asyncio
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from gateway.settings import GatewaySettings
from loadtest.arrivals import ClosedLoop, OpenLoop, Pace
from loadtest.images import Format, Sample, from_folder, from_streamer
from loadtest.plan import Plan
from loadtest.progress import ProgressView
from loadtest.report import Report
from loadtest.runner import precise_event_loop
from loadtest.session import Session
from loadtest.targets import KINDS, Kind
from rpc.address import joined
from rpc.settings import SettingsError, load
from serving.settings import TritonSettings
from sluice.access import Access
from sluice.interruption import run_until_stopped
from streamer.settings import StreamerSettings

Choice = TypeVar("Choice", bound=str)

EXIT_NOTHING_ANSWERED = 1
EXIT_INTERRUPTED = 130

_CALLERS = 8
_MAX_OUTSTANDING = 10_000
_BATCH_SIZES: dict[Kind, int] = {"classify-batch": 64, "triton": 1}
_FORMATS: tuple[Format, ...] = ("png", "raw")
_STANDARD_OUTPUT = Path("-")
_DAY_SECONDS, _HOUR_SECONDS = 86_400.0, 3_600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadTestOptions:
    """What the command line gave; none means not given."""

    target: str = "classify"
    rate: float | None = None
    concurrency: int | None = None
    max_outstanding: int | None = None
    duration: float = 10.0
    warm_up: float = 2.0
    timeout: float = 5.0
    batch_size: int | None = None
    image_format: str | None = None
    model: str | None = None
    server: str | None = None
    triton: str | None = None
    triton_metrics: str | None = None
    streamer: str | None = None
    images: Path | None = None
    seed: int = 0
    json: Path | None = None
    access: Access = field(default_factory=Access)


def plan_of(options: LoadTestOptions) -> Plan:
    """
    Return what the options ask for.

    Raises:
        SettingsError: One is out of range, has no effect on this target, or contradicts another.
    """
    target = _choice("--target", options.target, KINDS)
    gateway, triton = load(GatewaySettings), load(TritonSettings)
    triton_address = options.triton or joined(triton.host, triton.grpc_port)
    server = options.server or joined(gateway.host, gateway.port)
    is_triton = target == "triton"
    if is_triton:
        _refuse("--server", options.server, "the target triton is asked at --triton")
        _refuse("--format", options.image_format, "the target triton takes pixels alone")
    if target not in _BATCH_SIZES:
        _refuse("--batch-size", options.batch_size, f"only {' and '.join(_BATCH_SIZES)} have batches")
    batch_size = _BATCH_SIZES.get(target, 1) if options.batch_size is None else options.batch_size
    return Plan(
        target=target,
        address=triton_address if is_triton else server,
        pace=_pace(options),
        duration_seconds=_within("--duration", options.duration, above=0, most=_DAY_SECONDS),
        warm_up_seconds=_within("--warm-up", options.warm_up, least=0, most=_DAY_SECONDS),
        timeout_seconds=_within("--timeout", options.timeout, above=0, most=_HOUR_SECONDS),
        batch_size=_whole("--batch-size", batch_size, most=65_536),
        image_format=_choice("--format", options.image_format or "png", _FORMATS),
        model=options.model or (gateway.default_model if is_triton else ""),
        seed=options.seed,
        triton=triton_address,
        triton_metrics=options.triton_metrics or joined(triton.host, triton.metrics_port),
    )


def run(options: LoadTestOptions) -> int:
    """
    Run a load test, print its report, and return the exit status.

    Raises:
        SettingsError: An option cannot be used.
        LoadTestError: The test cannot start.
        OSError: The JSON file cannot be written.
    """
    plan = plan_of(options)
    # A Triton knows neither.
    is_gateway = plan.target != "triton"
    tls = options.access.client_tls(is_own=options.server is None) if is_gateway else None
    api_key = options.access.api_key() if is_gateway else None
    if options.streamer and options.images:
        raise SettingsError("--streamer and --images both say where images come from; give one of them")
    # Now, and not after the test.
    if options.json and (options.json.is_dir() or not options.json.parent.is_dir()):
        raise SettingsError(f"--json {options.json}: no place for a file; give one in a folder that exists, or -")
    session: Session | None = None

    async def work() -> None:
        nonlocal session
        session = Session(plan, await _samples(options), display=ProgressView(), tls=tls, api_key=api_key)
        await session.run()

    with asyncio.Runner(loop_factory=precise_event_loop) as runner:
        is_complete = runner.run(run_until_stopped(work()))
    report = session.report() if session else None
    if report is None:
        print("interrupted before anything was measured", file=sys.stderr)
        return EXIT_INTERRUPTED
    _print(report, options.json)
    if not is_complete:
        return EXIT_INTERRUPTED
    return 0 if report.tally.succeeded else EXIT_NOTHING_ANSWERED


async def _samples(options: LoadTestOptions) -> Sequence[Sample]:
    if options.images:
        return await asyncio.to_thread(from_folder, options.images, seed=options.seed)
    place = load(StreamerSettings)
    return await from_streamer(options.streamer or joined(place.host, place.port))


def _print(report: Report, json_file: Path | None) -> None:
    """Print the report; where standard output is for the JSON, the page for a person goes to standard error."""
    is_piped = json_file == _STANDARD_OUTPUT
    print(report.as_text(), file=sys.stderr if is_piped else sys.stdout)
    if json_file is None:
        return
    text = json.dumps(report.as_json(), indent=2)
    if is_piped:
        print(text)
    else:
        json_file.write_text(f"{text}\n")


def _pace(options: LoadTestOptions) -> Pace:
    if options.rate is not None and options.concurrency is not None:
        raise SettingsError(
            "--rate and --concurrency exclude each other: a fixed rate (open loop), or callers that wait (closed loop)"
        )
    if options.rate is None:
        _refuse("--max-outstanding", options.max_outstanding, "only a test with --rate can have calls pile up")
        callers = _CALLERS if options.concurrency is None else options.concurrency
        return ClosedLoop(callers=_whole("--concurrency", callers, most=100_000))
    outstanding = _MAX_OUTSTANDING if options.max_outstanding is None else options.max_outstanding
    return OpenLoop(
        rate=_within("--rate", options.rate, above=0, most=1_000_000),
        max_outstanding=_whole("--max-outstanding", outstanding, most=1_000_000),
    )


def _choice(option: str, value: str, allowed: Sequence[Choice]) -> Choice:
    for choice in allowed:
        if value == choice:
            return choice
    raise SettingsError(f"{option} {value}: allowed are {', '.join(allowed)}")


def _refuse(option: str, value: object, reason: str) -> None:
    if value is not None:
        raise SettingsError(f"{option} {value} has no effect: {reason}")


def _whole(option: str, value: int, *, most: int) -> int:
    return int(_within(option, value, least=1, most=most))


def _within(option: str, value: float, *, most: float, least: float = -math.inf, above: float = -math.inf) -> float:
    # Written so that NaN, which compares with nothing, is refused.
    if not (above < value <= most and value >= least):
        lowest = f"{least:g} to" if least > -math.inf else f"above {above:g}, up to"
        raise SettingsError(f"{option} {value:g}: allowed is {lowest} {most:,.0f}")
    return value

"""
``python -m benchmarks.streamer``: the streamer against what one would use instead, on the same samples in one run.

Prints tables and writes them to ``benchmarks/results/streamer.md``; docs/benchmarks.md says how to read them.
"""

import asyncio
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import digits, report
from benchmarks.augmenting import AUGMENT, WAYS
from benchmarks.command import Command, plainly_ended, say, take_cores
from benchmarks.contest import Comparison, Contender, Contest, Outcome, Pace
from benchmarks.stage import BATCH_SIZE, Stage, stage
from benchmarks.turn import Program
from sluice.supervisor import ServiceError
from streamer.errors import StreamerError
from streamer.sources.declarations import declaration_of

PULL = "PullBatches into tensors"
STREAM = "StreamBatches by generated code, unchecked"
BARE_BATCHES = "bare stream of the same messages"
TENSORS = "DataLoader, TensorDataset"
WHOLE_BATCHES = "DataLoader, `__getitems__`"
MOSAIC = "mosaicml-streaming"
PLAIN_LOOP = "StreamedDataset in a plain loop"
SEED = "GetTrainingSamples, one a message"
BARE_SAMPLES = "bare stream of the same single samples"
AUGMENTED = f"PullBatches, {AUGMENT}"
AUGMENTED_LOADER = "DataLoader, 2 workers, the same augmentation"

_WORKERS = (0, 1, 2)
_MOSAIC_PYTHON = Path(__file__).parent.parent / ".venv-bench" / "bin" / "python"
_PACKAGES = ("grpcio", "protobuf", "numpy", "torch")


@dataclass(frozen=True, kw_only=True, slots=True)
class Suite:
    """One of the things that are compared."""

    names: Sequence[str]
    """Of the contenders it needs."""
    comparisons: Sequence[Comparison]


SUITES: Mapping[str, Suite] = {
    "pull": Suite(
        names=(PULL, BARE_BATCHES, STREAM),
        comparisons=(
            Comparison(ours=PULL, theirs=BARE_BATCHES, asked=0.85),
            Comparison(ours=STREAM, theirs=BARE_BATCHES, asked=None),
        ),
    ),
    "loader": Suite(
        names=(PULL, PLAIN_LOOP, TENSORS, WHOLE_BATCHES),
        comparisons=(
            Comparison(ours=PULL, theirs=TENSORS, asked=3),
            Comparison(ours=PULL, theirs=WHOLE_BATCHES, asked=None),
            Comparison(ours=PLAIN_LOOP, theirs=TENSORS, asked=None),
        ),
    ),
    "mosaic": Suite(names=(PULL, MOSAIC), comparisons=(Comparison(ours=PULL, theirs=MOSAIC, asked=20),)),
    "seed": Suite(names=(SEED, BARE_SAMPLES), comparisons=(Comparison(ours=SEED, theirs=BARE_SAMPLES, asked=0.9),)),
    "augment": Suite(
        names=(AUGMENTED, AUGMENTED_LOADER),
        comparisons=(Comparison(ours=AUGMENTED, theirs=AUGMENTED_LOADER, asked=2),),
    ),
}

FULL = Pace(rounds=5, warm_seconds=0.5, seconds=2.0)
_QUICK_SAMPLES = 2_000
_COMMAND = Command(
    name="streamer", suites=tuple(SUITES), full=FULL, quick=Pace(rounds=1, warm_seconds=0.05, seconds=0.1)
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What was seen, and of which data."""

    outcome: Outcome
    data_name: str


def contenders(stage: Stage, *, workers: Sequence[int], mosaic_python: Path) -> list[Contender]:
    """Return all of them, in the order of their turns."""
    ours = {"address": stage.streamer}
    streamer, bare = [stage.streamer_process], [stage.bare_process]
    batch_size = {"batch_size": BATCH_SIZE}
    data = {"data": str(stage.data), **batch_size}
    bare_batches = {"address": stage.bare, **batch_size, "num_samples": stage.num_train}

    def alone(name: str, target: str, options: Mapping[str, object], servers: Sequence[int]) -> Contender:
        return Contender(name=name, ways={"": Program(target=target, options=options, servers=servers)})

    def of_workers(name: str, target: str) -> Contender:
        ways = {_workers(num): Program(target=target, options={**data, "workers": num}) for num in workers}
        # Two threads for one batch may cost more than they save.
        ways["0 workers, 1 thread"] = Program(target=target, options={**data, "workers": 0, "threads": 1})
        return Contender(name=name, ways=ways)

    augmented = {
        way: Program(target="benchmarks.augmenting:read", options={**data, "workers": 2, "way": way}) for way in WAYS
    }
    return [
        alone(PULL, "benchmarks.reading:pull", {**ours, **batch_size}, streamer),
        alone(BARE_BATCHES, "benchmarks.reading:bare", bare_batches, bare),
        alone(STREAM, "benchmarks.reading:stream", {**ours, **batch_size}, streamer),
        alone(PLAIN_LOOP, "benchmarks.reading:plain_loop", {**ours, **batch_size}, streamer),
        of_workers(TENSORS, "benchmarks.loading:tensors"),
        of_workers(WHOLE_BATCHES, "benchmarks.loading:whole_batches"),
        _mosaic(stage, workers, mosaic_python),
        alone(SEED, "benchmarks.reading:samples", ours, streamer),
        alone(BARE_SAMPLES, "benchmarks.reading:samples", {"address": stage.bare}, bare),
        alone(AUGMENTED, "benchmarks.reading:pull", {**ours, **batch_size, "transform": AUGMENT}, streamer),
        Contender(name=AUGMENTED_LOADER, ways=augmented),
    ]


async def measure(
    suites: Sequence[str],
    pace: Pace,
    *,
    report: Callable[[str], None],
    num_train: int = digits.NUM_TRAIN,
    num_test: int = digits.NUM_TEST,
    workers: Sequence[int] = _WORKERS,
    mosaic_python: Path = _MOSAIC_PYTHON,
) -> Measured:
    """
    Measure the contenders of those suites, on a streamer and a bare server of their own.

    Args:
        suites: Names of :data:`SUITES`.
        pace: Of the turns.
        report: Told one line for each turn.
        num_train: Samples that are made up where ``SLUICE_DATA`` names no folder with MNIST.
        num_test: Likewise, for the other split.
        workers: Of a DataLoader, tried one after the other.
        mosaic_python: Of an environment with mosaicml-streaming.
    """
    wanted = names_of(suites)
    with TemporaryDirectory(prefix="sluice-bench-") as name:
        async with stage(Path(name), num_train=num_train, num_test=num_test) as place:
            every = contenders(place, workers=workers, mosaic_python=mosaic_python)
            chosen = [each for each in every if each.name in wanted]
            outcome = await Contest(chosen, pace, temporary=place.folder, report=report).run()
    return Measured(outcome=outcome, data_name=place.data_name)


def names_of(suites: Sequence[str]) -> list[str]:
    """Return the contenders of those suites, each once."""
    return list(dict.fromkeys(name for suite in suites for name in SUITES[suite].names))


def _mosaic(stage: Stage, workers: Sequence[int], python: Path) -> Contender:
    options = {
        "mds": str(stage.folder / "mds"),
        "images": str(stage.data / declaration_of("mnist").names["train"].images),
        "batch_size": BATCH_SIZE,
    }
    return Contender(
        name=MOSAIC,
        ways={
            _workers(num): Program(
                target="benchmarks.mosaic:read", options={**options, "workers": num}, python=str(python)
            )
            for num in workers
        },
        absent="" if python.exists() else "not installed; `make .venv-bench/.ready` does that",
    )


def _workers(num: int) -> str:
    return f"{num} worker{'s'[: num != 1]}"


def _text(measured: Measured, suites: Sequence[str], pace: Pace, command: str, mosaic_python: Path) -> str:
    outcome = measured.outcome
    comparisons = [each for suite in suites for each in SUITES[suite].comparisons]
    turns = [turn for seen in outcome.turns.values() for turn in seen]
    more = {"mosaicml-streaming": _mosaic_version(mosaic_python)} if "mosaic" in suites else {}
    return "\n".join(
        [
            "# The streamer, measured",
            "",
            report.surroundings(command, _PACKAGES, more=more),
            f"Data: {measured.data_name}; batches of {BATCH_SIZE}. Contenders take turns in one run, {pace.rounds} "
            f"each, of {pace.seconds:g} s after {pace.warm_seconds:g} s to warm up. Reader and server share the cores, "
            "and each turn has a reader of its own, a new process. Factors are taken round by round. "
            f"Everything else on the machine took {report.others_share(turns):.1%} of these cores meanwhile.",
            "",
            report.factors_table(outcome, comparisons),
            "",
            "Items are samples:",
            "",
            report.outcome_table(outcome, names_of(suites)),
            "",
            *(("Tried first, in the same run:", "", report.trials_table(outcome), "") if outcome.trials else ()),
        ]
    )


def _mosaic_version(python: Path) -> str:
    code = "from importlib.metadata import version; print(version('mosaicml-streaming'))"
    try:
        answer = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "not installed"
    return answer.stdout.strip()


def main(words: Sequence[str]) -> None:
    """Measure what the command line says."""
    parser = _COMMAND.parser(__doc__)
    parser.add_argument("--mosaic-python", type=Path, default=_MOSAIC_PYTHON, help="has mosaicml-streaming")
    given = parser.parse_args(words)
    pace, page = _COMMAND.pace(given), _COMMAND.page(given)
    take_cores(given.cores)
    sizes = {"num_train": _QUICK_SAMPLES, "num_test": _QUICK_SAMPLES} if given.quick else {}
    measuring = measure(
        given.only,
        pace,
        report=say,
        workers=_WORKERS[:2] if given.quick else _WORKERS,
        mosaic_python=given.mosaic_python,
        **sizes,
    )
    with plainly_ended(ServiceError, StreamerError):
        measured = asyncio.run(measuring)
    command = " ".join(["python -m benchmarks.streamer", *words])
    report.publish(_text(measured, given.only, pace, command, given.mosaic_python), page)


if __name__ == "__main__":
    main(sys.argv[1:])

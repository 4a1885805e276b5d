"""``sluice tune``: options to a search, the streamer it needs, and what was found."""

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from imaging.framing import SIDE
from rpc.address import joined
from rpc.settings import load
from sluice.board import MAX_LINE, Board, summary, table
from sluice.interruption import unwind_on_sigterm
from sluice.streaming import FRAMING, name_of, problem_of, slug, streaming
from streamer.client import Plan, SampleClient
from streamer.errors import StreamerError
from streamer.settings import StreamerSettings
from training.errors import SearchError
from training.overrides import parse as parse_fields
from training.search import findings
from training.search.cluster import address_of_this_machine, connected
from training.search.logbook import Logbook, Search, Trial, best, command, parse, read
from training.search.space import parse as parse_entry

SEARCHES = Path("runs/searches")
_LOOK_SECONDS = 1.0
_CONNECT_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneOptions:
    """What the command line gave; none means as in the file, or the default."""

    file: Path | None = None
    name: str | None = None
    dataset: str | None = None
    data: Path | None = None
    streamer: str | None = None
    recipe: str | None = None
    goal: str | None = None
    trials: int | None = None
    epochs: int | None = None
    minutes: float | None = None
    seed: int | None = None
    vary: Sequence[str] = ()
    fixed: Sequence[str] = ()
    cpus: int | None = None
    gpus: float | None = None
    concurrency: int | None = None


def describe(options: TuneOptions) -> Search:
    """
    Return the search that file and options ask for, options having the last word.

    Raises:
        SearchError: Names the field that cannot be used, and what is allowed.
    """
    content = {} if options.file is None else read(options.file)
    top = ("name", "dataset", "data", "streamer", "recipe", "goal", "seed")
    _lay(content, {field: getattr(options, field) for field in top})
    for section, fields in (
        ("budget", ("trials", "epochs", "minutes")),
        ("resources", ("cpus", "gpus", "concurrency")),
    ):
        given = content.setdefault(section, {})
        if isinstance(given, dict):
            _lay(given, {field: getattr(options, field) for field in fields})
    if options.vary:
        content["space"] = dict(parse_entry(text) for text in options.vary)
    if options.fixed:
        content["fixed"] = {**content.get("fixed", {}), **parse_fields(options.fixed)}
    if content.get("data") is not None:
        content["data"] = Path(content["data"]).absolute()
        if problem := problem_of(content["data"]):
            raise SearchError(f"data: {problem}")
        content.setdefault("dataset", name_of(content["data"]))
    content.setdefault("name", slug(str(content.get("dataset", "mnist"))))
    return parse(content, source="sluice tune" if options.file is None else str(options.file))


def begin(options: TuneOptions, *, cluster: str | None, report: Callable[[str], None]) -> bool:
    """
    Run a new search, and return whether it came to its end.

    Args:
        options: From the command line.
        cluster: Address of a Ray cluster; none: Ray on this machine.
        report: Told what does not fit into the table, in lines.

    Raises:
        SearchError, StreamerError, ServiceError: It cannot begin; nothing was made.
    """
    from training.search.trial import check

    search = describe(options)
    check(search)
    folder = SEARCHES / search.name
    Logbook(folder).require_new(search.name)  # here, too, as Ray takes a while to start
    return _run(lambda num: Logbook.create(folder, search.fitted(num)), search, cluster=cluster, report=report)


def resume(name: str, *, cluster: str | None, report: Callable[[str], None]) -> bool:
    """
    Go on with a search that was stopped or killed, and return whether it came to its end.

    Raises:
        SearchError, StreamerError, ServiceError: There is none of this name, or it cannot go on.
    """
    logbook = Logbook(SEARCHES / name)
    return _run(lambda _: logbook, logbook.search(), cluster=cluster, report=report)


def show(name: str, *, as_json: bool) -> None:
    """
    Print what is known of a search, running or not, and draw it anew.

    Raises:
        SearchError: There is none of this name.
    """
    logbook = Logbook(SEARCHES / name)
    search, trials = logbook.search(), logbook.trials()
    if as_json:
        print(json.dumps([_as_json(trial) for trial in trials]))
        return
    console = Console()
    if console.is_terminal:
        console.print(table(trials, search, limit=len(trials), width=console.width))
    else:  # for grep and files: a line to a trial
        Console(width=MAX_LINE).print(table(trials, search, limit=len(trials)))
    for path in findings.write(logbook.folder, trials, search):
        print(path)


def best_command(name: str) -> str:
    """
    Return the shell's line that trains and publishes a search's winner.

    Args:
        name: Of the search.

    Raises:
        SearchError: There is none of this name, or no trial of it was measured.
    """
    logbook = Logbook(SEARCHES / name)
    search = logbook.search()
    return command(search, best(logbook.trials(), search))


def _run(
    opened: Callable[[int], Logbook], search: Search, *, cluster: str | None, report: Callable[[str], None]
) -> bool:
    report("starting Ray" if cluster is None else f"joining Ray at {cluster}")
    with connected(cluster):
        from training.search import tuning  # may not be installed, and reads what was set just now

        unwind_on_sigterm()  # only now, as Ray puts a handler of its own there
        host = None if cluster is None else address_of_this_machine()
        with streamed(search, host=host, report=report) as address:
            num_train, told = asyncio.run(_look(address, search))
            report(told)
            logbook = opened(num_train)
            search = logbook.search()
            report(f"search {search.name} in {logbook.folder}: {_extent(search)}")
            with Board(search) as board:
                is_whole = tuning.run(logbook, board.changed, streamer=address)
    trials = logbook.trials()
    for path in findings.write(logbook.folder, trials, search):
        report(f"wrote {path}")
    for trial in trials:
        if trial.failures:
            ending = "" if trial.state == "failed" else f"; tried again, then {trial.state}"
            report(f"trial {trial.number} failed: {trial.error}{ending}")
    if not is_whole:
        report(f"stopped; `sluice tune resume {search.name}` goes on from here")
        return False
    report(summary(trials, search))
    return True


@contextmanager
def streamed(search: Search, *, host: str | None, report: Callable[[str], None]) -> Iterator[str]:
    """
    Give the address of a streamer that has the search's data: the one named, one that answers here, or one of its own.

    Args:
        search: Says what data.
        host: Where one of its own listens; none: on this machine alone.
        report: Told which it is, and when it dies.

    Raises:
        ServiceError: It did not get ready; the message says why.
        StreamerError: The search's folder holds no usable data set.
    """
    place = load(StreamerSettings)
    running = search.streamer or joined(place.host, place.port)
    if search.streamer is not None or (search.data is None and asyncio.run(_has(running, search.dataset))):
        report(f"streamer {running}, which runs already")
        yield running
        return
    with streaming(search.dataset, search.data, owner=f"search {search.name}", host=host, report=report) as address:
        yield address


async def _has(address: str, dataset: str) -> bool:
    async with SampleClient(address) as client:
        try:
            await client.wait_ready(timeout_seconds=_LOOK_SECONDS)
            return dataset in {info.name for info in await client.datasets()}
        except StreamerError:
            return False


async def _look(address: str, search: Search) -> tuple[int, str]:
    """Return how many images trials train on, and in a line what they read; refuse what no trial could."""
    cut = 100 - search.validation
    async with SampleClient(address) as client:
        await client.wait_ready(timeout_seconds=_CONNECT_SECONDS)
        names = {info.name for info in await client.datasets()}
        if search.dataset not in names:
            raise SearchError(
                f"dataset {search.dataset!r}: the streamer at {address} does not have it; it has "
                f"{', '.join(sorted(names)) or 'none'}"
            )
        train = await client.split(Plan(dataset=search.dataset, split=f"train[:{cut}%]"))
        validation = await client.split(Plan(dataset=search.dataset, split=f"train[{cut}%:]"))
    if tuple(train.image_shape) != (SIDE, SIDE):
        raise SearchError(
            f"dataset {search.dataset!r}: its images are {'x'.join(map(str, train.image_shape))}, the network takes "
            f"{SIDE}x{SIDE}: give the streamer FOLDER:{FRAMING} instead of FOLDER"
        )
    if train.num_classes < 2:
        raise SearchError(f"dataset {search.dataset!r}: has one class; at least two are needed")
    return train.num_samples, (
        f"{search.dataset}: {train.num_samples:,} images to train on, {validation.num_samples:,} to measure on, "
        f"{train.num_classes} classes; the test split is not read"
    )


def _as_json(trial: Trial) -> dict[str, Any]:
    return {**trial.model_dump(), "epoch": trial.epoch, "score": trial.score}


def _extent(search: Search) -> str:
    budget = search.budget
    limit = "" if budget.minutes is None else f", at most {budget.minutes:g} minutes"
    return (
        f"{budget.trials} trials of {budget.epochs} epochs, compared after {budget.first_look} and later{limit}; "
        f"varied: {', '.join(search.space.names())}"
    )


def _lay(content: dict[str, Any], given: dict[str, Any]) -> None:
    content |= {name: value for name, value in given.items() if value is not None}

"""A streamer for one command alone, and a folder as the data set that it serves."""

import asyncio
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from anyio.from_thread import start_blocking_portal

from rpc.settings import load
from sluice.supervisor import Service, Supervisor
from streamer.settings import StreamerSettings
from streamer.sources import datasets
from streamer.sources.declarations import DECLARATIONS
from streamer.sources.places import Reading, find, parted

LOGS = Path(".sluice/logs")
FRAMING = "stretch"
"""How images of a folder become what the network takes, where nothing is said."""

_READY_SECONDS = 600.0  # a first use may fetch data
_STOP_MARGIN_SECONDS = 10.0


@contextmanager
def streaming(
    dataset: str, data: Path | None, *, owner: str, host: str | None = None, report: Callable[[str], None]
) -> Iterator[str]:
    """
    Run a streamer with one data set while the block lasts, and give its address; this process' death ends it, too.

    Args:
        dataset: What it is called, and what it is where ``data`` is None.
        data: Its folder, as :func:`place_of` takes it.
        owner: What the streamer is for, in words and in the name of its log: ``search shoes``.
        host: Where it listens; None: on this machine alone.
        report: Told what becomes of the images, where the streamer is, and when it dies.

    Raises:
        ServiceError: It did not get ready; the message says why.
        streamer.errors.StreamerError: The folder holds no usable data set.
    """
    settings = load(StreamerSettings)
    served = dataset
    if data is not None:
        served = f"{dataset}={place_of(data)}"
        # Here, too, where it is seen what becomes of the images and what is wrong with them.
        asyncio.run(look_into(dataset, place_of(data), settings, report))
    options = ["--port", "0", "--metrics-port", "0", "--datasets", served]
    service = Service(
        name=f"{owner.replace(' ', '-')}-streamer",
        arguments=["streamer", *options, *([] if host is None else ["--host", host])],
        ready_seconds=_READY_SECONDS,
        stop_seconds=settings.drain_seconds + _STOP_MARGIN_SECONDS,
    )
    # In a thread of its own: the main one trains, or belongs to Ray, which takes its signals.
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(Supervisor(LOGS, report)) as supervisor,
    ):
        address = portal.call(supervisor.start, service)
        report(f"streamer {address}, for this {owner.partition(' ')[0]}; its log is {LOGS / service.name}.log")
        yield address


async def look_into(name: str, place: str | None, settings: StreamerSettings, report: Callable[[str], None]) -> None:
    """
    Fetch a known data set; tell what is wrong with a folder, and what becomes of its images.

    Args:
        name: What readers call it.
        place: As in ``--datasets``; None: where a known one is found.
        settings: Of the streamer that will serve it.
        report: Told what a person should know, in lines.

    Raises:
        streamer.errors.StreamerError: It is not there or not usable.
    """
    if place is not None and parted(place)[1] is not None:
        found = await find(name, place, Reading(cache=settings.cache), report=report)
        await found.close()
    elif place is None or (name in DECLARATIONS and settings.data in (Path(place), Path(place).parent)):
        await datasets.find(name, data=settings.data, cache=settings.cache, report=report)


def place_of(data: Path) -> str:
    """Return a folder with the way its images become what the network takes."""
    return str(data) if parted(str(data))[1] else f"{data}:{FRAMING}"


def name_of(data: Path) -> str:
    """Return what a folder's data set, and the model made of it, is called."""
    return slug(Path(parted(str(data))[0]).name)


def problem_of(data: Path) -> str | None:
    """Return why a folder cannot be named to a streamer, None where it can."""
    return f"{data}: a folder with a comma in its path cannot be streamed" if "," in str(data) else None


def slug(name: str) -> str:
    """Return a name that data sets, models and searches may have."""
    return re.sub(r"[^a-z0-9_-]+", "-", name.lower()).strip("-_")[:64]

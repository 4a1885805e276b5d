"""``sluice route``: which version of a model answers those who name none, and which canaries get a share of them."""

import asyncio
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gateway.client import ClientError, ImageClient, Model
from gateway.errors import RouteError
from gateway.routing import Route, path_of, split
from gateway.settings import GatewaySettings
from rpc.address import joined
from rpc.settings import SettingsError, load
from sluice.access import Access
from sluice.release import load_also
from training.release import versions

_CANARY = re.compile(r"([1-9][0-9]*)=([0-9]+(?:\.[0-9]+)?)(%?)")
_ASK_SECONDS = 5.0

Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class RouteOptions:
    """What ``sluice route`` was told."""

    model: str | None = None
    """None: all, to be shown."""
    default: int | None = None
    canary: Sequence[str] = ()
    """Each as in ``4=10%``."""
    clear: bool = False
    server: str | None = None
    """``host:port`` of the gateway that is asked; None: where the settings put it, if it answers there."""
    triton: str | None = None
    """``host:port`` of the Triton that loads what it lacks; None: one that answers where the settings put it."""
    access: Access = field(default_factory=Access)


def run(options: RouteOptions, *, report: Report) -> list[str]:
    """
    Set a route or take it away, where the options say so, and return what to show.

    Every gateway that reads the repository follows within a second; the one that is asked has followed on return.

    Args:
        options: From the command line.
        report: Told what is not as it should be, in lines.

    Raises:
        SettingsError: The options do not fit together.
        RouteError: The route makes no sense, or names a model or a version that is not there.
        ServingError: Triton does not load one of its versions, or one that was named does not answer.
        ClientError: The gateway that was named does not answer.
    """
    repository = load(GatewaySettings).model_repository
    if not (options.clear or options.default is not None or options.canary):
        return asyncio.run(_show(repository, options, report))
    if options.model is None:
        raise SettingsError("MODEL: missing; name the model whose route is to be changed")
    if options.clear:
        if options.default is not None or options.canary:
            raise SettingsError("--clear: takes the whole route away; leave --default and --canary out")
        _clear(repository, options.model)
        return [asyncio.run(_followed(options, None))]
    before = _before(repository, options.model)
    route = _wanted(before, options)
    _require_published(repository / options.model, route)
    # First loaded, then routed to: no caller is to find it missing.
    asyncio.run(load_also(repository, options.model, route.versions, options.triton, report))
    write(repository, options.model, route)
    if before is not None and set(before.canary) - set(route.canary):
        report(f"{options.model}: canary {_canaries(before)} is over; --default takes --canary again to go on with it")
    return [asyncio.run(_followed(options, route))]


def write(repository: Path, model: str, route: Route) -> None:
    """Write a model's route: whoever reads it gets all of the old one or all of the new one."""
    path = path_of(repository, model)
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        staged.write_text(route.model_dump_json() + "\n")
        versions.sync(staged)
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)
    versions.sync(repository)


def _clear(repository: Path, model: str) -> None:
    path = path_of(repository, model)
    if not path.exists() and not (repository / model).is_dir():
        raise RouteError(f"{repository}: no model {model}")
    path.unlink(missing_ok=True)
    versions.sync(repository)


def _before(repository: Path, model: str) -> Route | None:
    """Return the route that there is; a damaged one says nothing, and is about to be replaced."""
    try:
        return Route.parse(path_of(repository, model).read_bytes())
    except (FileNotFoundError, RouteError):
        return None


def _wanted(before: Route | None, options: RouteOptions) -> Route:
    canaries = dict[int, float]()
    for version, share in map(_canary, options.canary):
        if version in canaries:
            raise SettingsError(f"--canary {version}: given twice")
        canaries[version] = share
    if options.default is not None:
        return Route.of(options.default, canaries)
    if before is None:
        raise SettingsError("--canary: needs --default too, the version that gets the rest")
    return Route.of(before.default, canaries)


def _canary(text: str) -> tuple[int, float]:
    matched = _CANARY.fullmatch(text)
    if matched is None:
        raise SettingsError(f"--canary {text}: has to be VERSION=SHARE, such as 4=10%")
    version, share, percent = matched.groups()
    return int(version), float(share) / 100 if percent else float(share)


def _require_published(model: Path, route: Route) -> None:
    there, hidden = versions.published(model), versions.withdrawn(model)
    for version in route.versions:
        if version in hidden:
            raise RouteError(
                f"{model.name}: version {version} is withdrawn; "
                f"`sluice rollback {model.name} --to {version}` brings it back"
            )
        if version not in there:
            raise RouteError(f"{model}: no version {version}; published are {', '.join(map(str, there)) or 'none'}")


async def _followed(options: RouteOptions, route: Route | None) -> str:
    """Return what became of it at the gateway."""
    done = f"{options.model}: " + (_words(route) if route is not None else "the highest version that is ready answers")
    try:
        # A gateway that is asked what it serves looks at the file first.
        model = (await _ask(options)).get(options.model or "")
    except ClientError:
        if options.server is not None:
            raise
        return f"{done}; no gateway answers at {_address(options)}, those that read this repository follow"
    if model is None:
        return f"{done}; the gateway at {_address(options)} has no version of it ready"
    problem = next(_problems(model, route), "")
    answering = f"{model.default_version} answers at {_address(options)}"
    return f"{done}; {answering}" + (f": {problem}" if problem else "")


async def _show(repository: Path, options: RouteOptions, report: Report) -> list[str]:
    models = await _ask(options)
    if options.model is not None:
        if options.model not in models:
            raise RouteError(f"no model {options.model!r} is ready; there are {', '.join(sorted(models)) or 'none'}")
        models = {options.model: models[options.model]}
    rows = [("MODEL", "READY", "DEFAULT", "CANARY")]
    for name in sorted(models):
        model = models[name]
        route = _read(repository, name, report)
        rows.append((name, _listed(model.versions), str(model.default_version), _canaries(route) or "-"))
        for problem in _problems(model, route):
            report(f"{name}: {problem}")
    return list(_aligned(rows))


def _problems(model: Model, route: Route | None) -> Iterator[str]:
    wanted = split(route, model.versions)
    if wanted.problem:
        yield wanted.problem
    if wanted.default != model.default_version:
        yield f"the gateway sends callers to {model.default_version}, the route here to {wanted.default}"


def _read(repository: Path, model: str, report: Report) -> Route | None:
    path = path_of(repository, model)
    try:
        return Route.parse(path.read_bytes())
    except FileNotFoundError:
        return None
    except RouteError as error:
        report(f"{path}: {error}; gateways go on as before")
        return None


async def _ask(options: RouteOptions) -> Mapping[str, Model]:
    access = options.access
    tls = access.client_tls(is_own=options.server is None)
    async with ImageClient(_address(options), tls=tls, api_key=access.api_key()) as client:
        return {model.name: model for model in await client.models(timeout_seconds=_ASK_SECONDS)}


def _address(options: RouteOptions) -> str:
    place = load(GatewaySettings)
    return options.server or joined(place.host, place.port)


def _words(route: Route) -> str:
    canaries = _canaries(route)
    return f"{route.default} is the default" + (f", canary {canaries}" if canaries else "")


def _canaries(route: Route | None) -> str:
    return ", ".join(f"{version}={100 * share:.4g}%" for version, share in route.canary.items()) if route else ""


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()

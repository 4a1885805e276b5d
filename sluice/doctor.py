"""``sluice doctor``: what is missing here and what to do about it."""

import importlib.util
import shutil

from rich.console import Console
from rich.table import Table

from gateway.settings import GatewaySettings
from rpc.keys import load_keys
from rpc.settings import SettingsError, load
from rpc.tls import expiry
from serving import host
from serving.host import Finding
from serving.settings import TritonSettings
from serving.triton import servable_models
from sluice.ports import places
from sluice.settings import UpSettings
from streamer.errors import DataError
from streamer.settings import StreamerSettings
from streamer.sources.datasets import cached

_NEEDED_BYTES = 3 * 2**30


def examine() -> list[Finding]:
    """Look at everything the line needs here; changes nothing."""
    triton = load(TritonSettings)
    return [
        *host.examine(triton.cache),
        *_packages(),
        *_ports(),
        *_security(load(GatewaySettings)),
        _data(load(StreamerSettings)),
        _model(triton),
        _disk(triton),
    ]


def render(findings: list[Finding]) -> None:
    """Print one row a finding, and what to do about those that are not well."""
    console = Console()
    if not console.is_terminal:  # for grep: a line a finding, unwrapped
        for finding in findings:
            words = ["ok" if finding.ok else "problem", finding.name, finding.detail]
            print("\t".join([*words, finding.remedy] if finding.remedy else words))
        return
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for overflow in ("ignore", "fold", "fold"):
        table.add_column(overflow=overflow)
    for finding in findings:
        table.add_row("[green]ok[/]" if finding.ok else "[red]problem[/]", finding.name, finding.detail)
        if finding.remedy:
            table.add_row("", "", f"-> {finding.remedy}")
    console.print(table, highlight=False)


def _packages() -> list[Finding]:
    parts = {
        "gateway": ("PIL", "tritonclient"),
        "streamer": ("aiofiles", "httpx"),
        "training": ("torch", "safetensors"),
    }
    findings = []
    for part, modules in parts.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        remedy = f"pip install '.[{part}]' in the sources" if missing else None
        findings.append(_finding(f"packages of {part}", not missing, ", ".join(missing or modules), remedy))
    return findings


def _ports() -> list[Finding]:
    return [
        _finding(f"port of {place.name}", True, f"{place.port} is free")
        if place.is_free()
        else _finding(
            f"port of {place.name}",
            False,
            f"{place.port} is taken",
            f"`sluice up` may be running; else choose another with {place.variable}",
        )
        for place in places(load(UpSettings))
    ]


def _data(settings: StreamerSettings) -> Finding:
    try:
        files = cached("mnist", data=settings.data, cache=settings.cache)
    except DataError as error:
        return _finding("MNIST", False, str(error), "put SLUICE_DATA right, or unset it")
    if files is None:
        return _finding("MNIST", True, "not here yet; fetched on first use", None)
    if files.is_small:
        return _finding(
            "MNIST", True, f"small set of 5,000 in {files.folder}", "`sluice data fetch` looks for all 70,000"
        )
    return _finding("MNIST", True, str(files.folder), None)


def _model(settings: TritonSettings) -> Finding:
    if settings.model_repository.is_dir() and servable_models(settings.model_repository):
        return _finding("model", True, f"in {settings.model_repository}", None)
    return _finding("model", True, "none yet", "`make demo` or `sluice train` makes one")


def _security(settings: GatewaySettings) -> list[Finding]:
    """Look at TLS files and keys as the gateway will."""
    findings = []
    if settings.tls is not None:
        try:
            detail, remedy = f"valid until {expiry(settings.tls):%Y-%m-%d}", None
        except SettingsError as error:
            detail, remedy = str(error), "put the file right, or the setting"
        findings.append(_finding("TLS certificate", remedy is None, detail, remedy))
    if settings.keys_file is not None:
        try:
            detail, remedy = f"{len(load_keys(settings.keys_file))} in {settings.keys_file}", None
        except SettingsError as error:
            detail, remedy = str(error), "`sluice keys add NAME --scopes classify` makes one"
        findings.append(_finding("API keys", remedy is None, detail, remedy))
    return findings


def _disk(settings: TritonSettings) -> Finding:
    folder = next(folder for folder in (settings.cache, *settings.cache.absolute().parents) if folder.exists())
    free = shutil.disk_usage(folder).free
    ok = free > _NEEDED_BYTES
    return _finding("disk", ok, f"{free / 2**30:.0f} GiB free at {folder}", None if ok else "make 3 GiB free")


def _finding(name: str, ok: bool, detail: str, remedy: str | None = None) -> Finding:
    return Finding(name=name, ok=ok, detail=detail, remedy=remedy)

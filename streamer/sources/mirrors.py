"""A data set's files from an official mirror into the cache."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import httpx
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from streamer.errors import DataError, MirrorError
from streamer.sources import atomic
from streamer.sources.declarations import Declaration, content_of

_TIMEOUT = httpx.Timeout(30.0, connect=5.0)


async def download(mirror: str, folder: Path, known: Declaration) -> None:
    """
    Bring the files that ``folder`` lacks from one mirror, with a progress bar where there is a terminal.

    Each file is checked before it is given its name, so those that came before a failure can stay.

    Args:
        mirror: URL of a folder, with the slash at its end.
        folder: In the cache; made when missing.
        known: The data set.

    Raises:
        MirrorError: The mirror does not answer within 5 s, stops sending for 30 s, or sends something else.
        CacheError: ``folder`` cannot be made or written to.
    """
    with atomic.filling(folder):
        await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
    missing = await asyncio.to_thread(_missing, folder, known)
    async with httpx.AsyncClient(timeout=_TIMEOUT, follow_redirects=True) as client:
        with _progress_bar() as bar:
            for name in missing:
                raw = await _fetch(client, mirror, name, known, bar)
                with atomic.filling(folder):
                    await asyncio.to_thread(atomic.write_file, folder / f"{name}.gz", raw)


def _missing(folder: Path, known: Declaration) -> list[str]:
    return [name for name, sha256 in known.contents.items() if not _is_whole(folder / f"{name}.gz", sha256)]


def _is_whole(path: Path, sha256: str) -> bool:
    try:
        content_of(path.read_bytes(), sha256, path)
    except (DataError, OSError):
        return False
    return True


def _progress_bar() -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    # Transient: of a mirror that does not answer, the sentence about it says all there is to say.
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)


async def _fetch(client: httpx.AsyncClient, mirror: str, name: str, known: Declaration, bar: Progress) -> bytes:
    url = f"{mirror}{name}.gz"
    task = bar.add_task(f"{name}.gz", total=None)
    try:
        raw = await _get(client, url, known.max_packed_bytes, lambda done, total: _advance(bar, task, done, total))
        await asyncio.to_thread(content_of, raw, known.contents[name], url)
    except httpx.HTTPStatusError as error:
        raise MirrorError(url, f"HTTP status {error.response.status_code}") from error
    except httpx.HTTPError as error:
        raise MirrorError(url, str(error) or type(error).__name__) from error
    except DataError as error:
        raise MirrorError(mirror, str(error)) from error
    return raw


async def _get(
    client: httpx.AsyncClient, url: str, max_bytes: int, progress: Callable[[int, int | None], None]
) -> bytes:
    received = bytearray()
    async with client.stream("GET", url) as response:
        response.raise_for_status()
        announced = response.headers.get("content-length", "")
        total = int(announced) if announced.isdigit() else None
        # Raw: a server that says Content-Encoding: gzip of a .gz file must not have it unpacked here.
        async for chunk in response.aiter_raw():
            received += chunk
            progress(len(received), total)
            if len(received) > max_bytes:
                raise DataError(url, expected=f"at most {max_bytes} bytes", found="more")
    return bytes(received)


def _advance(bar: Progress, task: TaskID, done: int, total: int | None) -> None:
    bar.update(task, completed=done, total=total)

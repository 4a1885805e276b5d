"""A peer as a process: started ready, asked, and ended with all that it started."""

import asyncio
import base64
import json
import os
import signal
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import httpx

from benchmarks import frames
from benchmarks.peers.environments import Peer
from benchmarks.window import family

_HERE = Path(__file__).parent
_READY_SECONDS = 180.0
_STOP_SECONDS = 30.0
_ASK_SECONDS = 30.0
_PAUSE_SECONDS = 0.2
_LAST_LINES = 8


class PeerError(RuntimeError):
    """A peer could not be measured; the message says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Door:
    """How a peer wants to be asked."""

    path: str
    form: Literal["body", "form", "json"]
    """The PNG is the body, or in a field of a form, or of a JSON object as base64: as its documentation has it."""
    field: str = "image"

    def body(self, png: bytes) -> tuple[bytes, str]:
        """Return the body of a request, and its content type."""
        match self.form:
            case "body":
                return png, "image/png"
            case "form":
                return frames.form(self.field, png)
            case "json":
                return json.dumps({self.field: base64.b64encode(png).decode()}).encode(), "application/json"


DOORS = {
    "litserve": Door(path="/predict", form="json"),
    "bentoml": Door(path="/classify", form="form", field="images"),
    "ray": Door(path="/", form="body"),
}
"""By package."""


@asynccontextmanager
async def running(peer: Peer, *, model: Path, threads: int, png: bytes, folder: Path) -> AsyncIterator[str]:
    """
    Run a peer until this is left; yields its ``host:port`` once it answers.

    Args:
        peer: Which; installed.
        model: TorchScript file; absolute.
        threads: Intra-op.
        png: An image, to be asked until there is an answer.
        folder: For its log.

    Raises:
        PeerError: It ended, or did not answer in time.
    """
    port, log = _free_port(), folder / f"{peer.package}.log"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *(peer.python, _HERE / peer.script, model, str(port), str(threads)),
            cwd=folder,
            env=_environment(peer, threads),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        address = f"127.0.0.1:{port}"
        await _wait_answering(peer, process, address, png, log)
        yield address
    finally:
        await _end(process)


async def ask(peer: Peer, address: str, png: bytes) -> tuple[int, int]:
    """
    Return what a peer takes a PNG for, and of how many bytes its answer is.

    Raises:
        PeerError: It does not answer.
    """
    door = DOORS[peer.package]
    body, content_type = door.body(png)
    async with httpx.AsyncClient(trust_env=False, timeout=_ASK_SECONDS) as client:
        try:
            answer = await client.post(
                f"http://{address}{door.path}", content=body, headers={"content-type": content_type}
            )
            answer.raise_for_status()
            found = answer.json()
        except (httpx.HTTPError, ValueError) as error:
            words = str(error) or type(error).__name__
            raise PeerError(f"does not answer: {words.splitlines()[0]}") from error
    return int(found[0] if isinstance(found, list) else found["label"]), len(answer.content)


async def require_answers(peer: Peer, address: str, pngs: Sequence[bytes], labels: Sequence[int]) -> int:
    """
    See that a peer takes each image for what the model does; return of how many bytes its first answer is.

    Raises:
        PeerError: It does not.
    """
    answers = [await ask(peer, address, png) for png in pngs]
    if [label for label, _ in answers] != list(labels):
        raise PeerError(f"takes digits for {[label for label, _ in answers]}, not {list(labels)}")
    return answers[0][1]


async def _wait_answering(peer: Peer, process: asyncio.subprocess.Process, address: str, png: bytes, log: Path) -> None:
    problem = ""
    try:
        async with asyncio.timeout(_READY_SECONDS):
            # Nothing tells of it: one listens before its model is there, another one after.
            while process.returncode is None:
                try:
                    await ask(peer, address, png)
                    return
                except PeerError as error:
                    problem = str(error)
                await asyncio.sleep(_PAUSE_SECONDS)
    except TimeoutError as error:
        raise PeerError(f"{problem} after {_READY_SECONDS:g} s{_tail(log)}") from error
    raise PeerError(f"ended with status {process.returncode}{_tail(log)}")


async def _end(process: asyncio.subprocess.Process) -> None:
    started = family([process.pid])
    try:
        with suppress(ProcessLookupError):
            process.terminate()
        with suppress(TimeoutError):
            async with asyncio.timeout(_STOP_SECONDS):
                await process.wait()
    finally:
        # Some leave processes behind, in groups of their own.
        for each in started:
            with suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
        await process.wait()


def _environment(peer: Peer, threads: int) -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SLUICE_"))}
    return {
        **ours,
        "PATH": f"{peer.python.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "VIRTUAL_ENV": str(peer.folder),
        "OMP_NUM_THREADS": str(threads),
    }


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
    return "\n".join(["; its log ends with:", *lines]) if lines else ""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port

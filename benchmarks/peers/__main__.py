"""
``python -m benchmarks.peers``: Sluice's gateway beside LitServe, BentoML and Ray Serve, with the same model and PNGs.

``python -m benchmarks.peers setup`` installs them, each into an environment of its own in the cache folder. Prints
tables and writes them to ``benchmarks/results/peers.md``; docs/benchmarks.md says how to read them.
"""

import argparse
import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import frames, h2load, report, serving
from benchmarks.bench import CONNECTIONS, STREAMS, Report
from benchmarks.command import Command, plainly_ended, say, take_cores
from benchmarks.contest import Pace
from benchmarks.h2load import H2loadError, Load
from benchmarks.interleaved import Spread
from benchmarks.peers.environments import PEERS, EnvironmentMissingError, Peer, install
from benchmarks.peers.running import DOORS, PeerError, require_answers, running
from benchmarks.sending import Sending, Take, sending
from benchmarks.versions import PRECISIONS, NoVersionError, Version, newest, version_at
from benchmarks.window import Turn
from gateway.client import ClientError
from serving.errors import ServingError
from sluice.supervisor import ServiceError
from training.release.export import load_served

OURS = "Sluice"
CALLERS = CONNECTIONS * STREAMS
ASKED = {"bfloat16": 3.0, "float32": 1.5}
"""Rate of the gateway over that of the best of the others."""

_NUM_CHECKED = 8
_COMMAND = Command(
    name="peers",
    suites=[peer.package for peer in PEERS],
    full=Pace(rounds=5, warm_seconds=2.0, seconds=4.0),
    quick=Pace(rounds=1, warm_seconds=0.2, seconds=0.5),
)
_ERRORS = (*(H2loadError, EnvironmentMissingError, PeerError, NoVersionError, ClientError, ServingError, ServiceError),)


@dataclass(slots=True)
class Measured:
    """With one model."""

    precision: str
    rates: dict[str, list[float]] = field(default_factory=dict)
    """Calls a second of each turn, by name."""
    problems: dict[str, str] = field(default_factory=dict)

    async def take(self, name: str, take: Take) -> str:
        """Let a contender have its turn, unless one before failed; return in words what came of it."""
        if name not in self.problems:
            try:
                self.rates.setdefault(name, []).append((await take()).rate)
            except (PeerError, H2loadError) as error:
                self.problems[name] = str(error).splitlines()[0]
                del self.rates[name]
                return str(error)
        return self.problems.get(name) or f"{self.rates[name][-1]:,.0f} a second"


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """What a peer has its turn with."""

    model: Path
    threads: int
    pngs: Sequence[bytes]
    """The first is sent again and again, all are looked at first."""
    labels: Sequence[int]
    """What the model takes them for."""
    pace: Pace
    folder: Path
    """Temporary."""

    async def turn(self, peer: Peer) -> Turn:
        """
        Start a peer, see that it answers as the model does, load it, end it.

        Raises:
            PeerError: It failed, or answers something else.
            H2loadError: h2load could not.
        """
        starting = running(peer, model=self.model, threads=self.threads, png=self.pngs[0], folder=self.folder)
        async with starting as address:
            size = await require_answers(peer, address, self.pngs, self.labels)
            return await _sending(peer, address, self.pngs[0], size, self.pace, self.folder)()


async def measure(version: Version, peers: Sequence[Peer], pace: Pace, say: Report) -> Measured:
    """
    Let the gateway and each peer have their turns with this model.

    A peer is started for its turn and ended after it: some of them work while nobody asks. One that fails is left out
    from there on.

    Raises:
        H2loadError: h2load is missing or failed.
        ServingError: Triton cannot be had or started here.
        ServiceError: The gateway did not get ready.
    """
    h2load.require()
    checked_NHW = _checked_images()
    measured = Measured(version.precision)
    with TemporaryDirectory(prefix="sluice-peers-") as temporary:
        folder = Path(temporary)
        async with serving.triton_with(version, folder, say) as served, serving.gateway_before(served, say) as front:
            request = frames.classify(checked_NHW[0], is_png=True)
            ours = await sending(
                folder / "ours.bin", front.address, frames.CLASSIFY, request, pace=pace, callers=(CONNECTIONS, STREAMS)
            )
            stage = Stage(
                model=version.file,
                threads=served.threads,
                pngs=[frames.png(image_HW) for image_HW in checked_NHW],
                labels=await asyncio.to_thread(labels_of, version.file, checked_NHW),
                pace=pace,
                folder=folder,
            )
            contenders: dict[str, Take] = {OURS: ours} | {peer.name: partial(stage.turn, peer) for peer in peers}
            for number in range(1, pace.rounds + 1):
                for name, take in contenders.items():
                    told = await measured.take(name, take)
                    say(f"round {number}: {name}, {version.precision}: {told}")
                if problem := measured.problems.get(OURS):
                    raise H2loadError(f"{OURS}: {problem}")
    return measured


def labels_of(model: Path, images_NHW: NDArray[np.uint8]) -> list[int]:
    """Return what the model takes each image for."""
    with torch.inference_mode():
        image_N1HW = torch.from_numpy(np.array(images_NHW))[:, None]
        labels: list[int] = load_served(model, torch.device("cpu"))(image_N1HW)[0].argmax(1).tolist()
    return labels


def _checked_images() -> NDArray[np.uint8]:
    images_NHW, _ = serving.images()
    # From all over the set, which may be in the order of its classes.
    return images_NHW[:: max(len(images_NHW) // _NUM_CHECKED, 1)][:_NUM_CHECKED]


def _sending(peer: Peer, address: str, png: bytes, size: int, pace: Pace, folder: Path) -> Sending:
    door = DOORS[peer.package]
    content, content_type = door.body(png)
    body = folder / f"{peer.package}.bin"
    body.write_bytes(content)
    load = Load(
        address=address,
        path=door.path,
        body=body,
        connections=CALLERS,
        headers=[f"content-type: {content_type}"],
        is_http1=True,
    )
    return Sending(load, answer_bytes=size, pace=pace)


def _text(measured: Sequence[Measured], peers: Sequence[Peer], pace: Pace, command: str) -> str:
    versions = {peer.name: peer.versions() for peer in peers}
    more = {name: found[peer.package] for peer in peers for name, found in versions.items() if name == peer.name}
    torches = {found["torch"] for found in versions.values()}
    settings = ", ".join(f"`{name}={value}`" for name, value in serving.SETTINGS.items())
    lines = [
        "# The gateway beside other servers",
        "",
        report.surroundings(command, ("grpcio", "torch"), more=more),
        f"One PNG of a digit a call, {CALLERS} callers, the same `model.pt`; load by h2load, over HTTP/2 with gRPC for "
        f"Sluice and over HTTP/1.1 for the others. {pace.rounds} turns of {pace.seconds:g} s each, in a circle; "
        "each of the others is started for its turn, answers eight digits as the model does, is warmed up for "
        f"{pace.warm_seconds:g} s, measured and ended. Their scripts are in `benchmarks/peers/`, with one process for "
        f"the model, batches of up to 64, as many intra-op threads as in Triton, torch {', '.join(sorted(torches))}. "
        f"The gateway runs with {settings}: h2load sends the same image again and again. It stays up, with its Triton, "
        "while the others have their turns. Factors are taken round by round.",
        "",
    ]
    for each in measured:
        lines += [*_table(each, peers), ""]
    return "\n".join(lines)


def _table(measured: Measured, peers: Sequence[Peer]) -> list[str]:
    ours = measured.rates[OURS]
    rows = [[OURS, *report.figures(Spread.of(ours)), "", "", ""]]
    factors: list[list[float]] = []
    for peer in peers:
        theirs = measured.rates.get(peer.name)
        if theirs is None:
            rows.append([f"{peer.name}: {measured.problems[peer.name]}", *["-"] * 6])
            continue
        factors.append([one / other for one, other in zip(ours, theirs, strict=True)])
        rows.append([peer.name, *report.figures(Spread.of(theirs)), *report.figures(Spread.of(factors[-1]), 2)])
    header = (f"{measured.precision}", *report.RATES, "Sluice is faster by, median", "lowest", "highest")
    lines = [report.table(header, rows)]
    asked = ASKED.get(measured.precision)
    if factors and asked is not None:
        # The best of the others may be another one in each round.
        least = Spread.of([min(each) for each in zip(*factors, strict=True)]).median
        told = report.met(least, least=asked)
        lines += ["", f"Of the best of the others: {least:.2f} times the rate; asked: {told}."]
    return lines


def _versions(given: argparse.Namespace) -> list[Version]:
    named = {precision: getattr(given, precision) for precision in PRECISIONS}
    wanted = [precision for precision in PRECISIONS if named[precision]] or PRECISIONS
    return [version_at(named[precision]) if named[precision] else newest(precision) for precision in wanted]


async def _measure_all(versions: Sequence[Version], peers: Sequence[Peer], pace: Pace) -> list[Measured]:
    return [await measure(version, peers, pace, say) for version in versions]


def _arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = _COMMAND.parser(__doc__)
    parser.add_argument("action", nargs="?", choices=("run", "setup"), default="run")
    for precision in PRECISIONS:
        text = f"folder of a version in {precision}; default: the newest such in the model repository"
        parser.add_argument(f"--{precision}", type=Path, help=text + ", where neither is named")
    return parser.parse_args(words)


def main(words: Sequence[str]) -> None:
    """Install or measure, as the command line says."""
    given = _arguments(words)
    peers = [peer for peer in PEERS if peer.package in given.only]
    pace = _COMMAND.pace(given)
    with plainly_ended(*_ERRORS):
        if given.action == "setup":
            for peer in peers:
                install(peer, print)
            return
        take_cores(given.cores)
        for peer in peers:
            peer.versions()  # says what is missing before anything is measured
        versions = _versions(given)
        measured = asyncio.run(_measure_all(versions, peers, pace))
    page = _COMMAND.page(given, is_whole=len(measured) == len(PRECISIONS))
    report.publish(_text(measured, peers, pace, "python -m benchmarks.peers"), page)


if __name__ == "__main__":
    main(sys.argv[1:])

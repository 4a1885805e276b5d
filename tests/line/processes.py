"""`sluice` as a child process of a test."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rpc.settings import cache_folder

_NAMES = (
    "gateway",
    "gateway-metrics",
    "streamer",
    "streamer-metrics",
    "triton-grpc",
    "triton-http",
    "triton-metrics",
)


@dataclass(frozen=True)
class Line:
    """A running line."""

    process: subprocess.Popen[str]
    ports: dict[str, int]
    folder: Path
    printed: list[str]
    """What `sluice up` had printed once everything was up."""

    def address(self, name: str) -> str:
        return f"127.0.0.1:{self.ports[name]}"

    def sluice(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command beside the line and return what it printed."""
        return subprocess.run(
            [sys.executable, "-m", "sluice", *arguments],
            cwd=self.folder, env=environment(self.folder), capture_output=True, text=True, timeout=110, check=False,
        )  # fmt: skip

    def train(self, *arguments: str) -> dict[str, Any]:
        """Train one epoch over the stream and have Triton load it."""
        done = self.sluice(
            "train", "--recipe", "smoke", "--force", "--streamer", self.address("streamer"),
            "--triton", self.address("triton-grpc"), "--json", *arguments,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        result: dict[str, Any] = json.loads(done.stdout)
        return result


@dataclass(frozen=True)
class Split:
    """Real digits with their labels."""

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]


def environment(folder: Path) -> dict[str, str]:
    """The environment of a user who has set nothing but where models go."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLUICE_")}
    # What this run downloaded is kept for the next one.
    return {**kept, "SLUICE_CACHE": str(cache_folder()), "SLUICE_MODEL_REPOSITORY": str(folder / "models")}


def start_up(folder: Path, ports: dict[str, int], *arguments: str) -> subprocess.Popen[str]:
    """Start `sluice up` in a folder; its errors come with what it prints."""
    options = [word for name, port in ports.items() for word in (f"--{name}-port", str(port))]
    return subprocess.Popen(
        [sys.executable, "-m", "sluice", "up", *options, *arguments],
        cwd=folder, env=environment(folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def read_until(process: subprocess.Popen[str], end: str) -> list[str]:
    """Read what a process prints up to the first line that contains ``end``."""
    assert process.stdout is not None
    lines: list[str] = []
    while not lines or end not in lines[-1]:
        line = process.stdout.readline()
        assert line, f"ended after {lines}"
        lines.append(line.rstrip())
    return lines


def free_ports() -> dict[str, int]:
    """Ask the system for a port for each part of the line."""
    sockets = [socket.socket() for _ in _NAMES]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = {name: each.getsockname()[1] for name, each in zip(_NAMES, sockets, strict=True)}
    for each in sockets:
        each.close()
    return ports

"""A virtual environment for each peer, in the cache folder: they want other versions than Sluice does."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rpc.settings import cache_folder

TORCH = "torch==2.13.0"
"""As Sluice's own."""

_SHARED = ("numpy==2.4.6", "pillow==13.0.0")
_MARK = "complete"
_VERSIONS = (
    "import json; from importlib.metadata import distributions;"
    "print(json.dumps({each.name.lower(): each.version for each in distributions()}))"
)


class EnvironmentMissingError(RuntimeError):
    """A peer cannot be run; the message says what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """Another server."""

    name: str
    package: str
    requirement: str
    """What pip installs, beside torch and what decodes images."""
    script: str
    """Its module in this folder: takes a model's file, a port and a number of threads, and serves until SIGTERM."""

    @property
    def folder(self) -> Path:
        """Its environment."""
        return cache_folder() / "peers" / self.package

    @property
    def python(self) -> Path:
        """What runs it."""
        return self.folder / "bin" / "python"

    @property
    def is_installed(self) -> bool:
        """Whether its environment is what :func:`install` makes of it now."""
        mark = self.folder / _MARK
        return mark.is_file() and mark.read_text() == self._installed

    @property
    def requirements(self) -> tuple[str, ...]:
        """All that pip is asked for."""
        return (TORCH, *_SHARED, self.requirement)

    def versions(self) -> Mapping[str, str]:
        """
        Return the versions of everything in its environment, by name in lower case.

        Raises:
            EnvironmentMissingError: There is none.
        """
        if not self.is_installed:
            raise EnvironmentMissingError(f"{self.name} is not installed: `python -m benchmarks.peers setup` does that")
        answer = subprocess.run([self.python, "-I", "-c", _VERSIONS], capture_output=True, text=True, check=True)
        versions: dict[str, str] = json.loads(answer.stdout)
        return versions

    @property
    def _installed(self) -> str:
        return "\n".join(self.requirements) + "\n"


PEERS = (
    Peer(name="LitServe", package="litserve", requirement="litserve==0.2.19", script="on_litserve.py"),
    Peer(name="BentoML", package="bentoml", requirement="bentoml==1.4.39", script="on_bentoml.py"),
    Peer(name="Ray Serve", package="ray", requirement="ray[serve]==2.60.0", script="on_ray.py"),
)


def install(peer: Peer, report: Callable[[str], None]) -> None:
    """
    Make a peer's environment, where that is not done yet.

    Raises:
        EnvironmentMissingError: pip could not; the message holds what it said last.
    """
    if peer.is_installed:
        report(f"{peer.name}: ready in {peer.folder}")
        return
    report(f"{peer.name}: installing {', '.join(peer.requirements)} into {peer.folder}")
    python = str(peer.python)
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(peer.folder)],
        [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *peer.requirements],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines()[-5:]
            raise EnvironmentMissingError("\n".join([f"{peer.name}: `{' '.join(command)}` failed:", *said]))
    # Written last: an environment that was interrupted is made anew.
    (peer.folder / _MARK).write_text(peer._installed)

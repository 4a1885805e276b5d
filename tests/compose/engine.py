"""The container engine of this machine, and one compose project on it."""

import asyncio
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
BASE_IMAGE = "python:3.11-slim-bookworm"

_SECONDS = 120.0
_BUILD_SECONDS = 1800.0


class NoEngineError(Exception):
    """Containers cannot be run here; the message says what is missing."""


def compose_command() -> list[str]:
    """
    Return how compose is called here, ``docker compose`` or ``docker-compose``.

    Raises:
        NoEngineError: There is no docker, no engine that answers, no compose, or no base image.
    """
    if shutil.which("docker") is None:
        raise NoEngineError("there is no docker on this machine")
    _require(["docker", "info", "--format", "{{.ServerVersion}}"], "no container engine answers")
    commands = [["docker", "compose"], ["docker-compose"]]
    usable = (words for words in commands if shutil.which(words[0]) and _run([*words, "version"]).returncode == 0)
    command = next(usable, None)
    if command is None:
        raise NoEngineError("there is neither `docker compose` nor docker-compose on this machine")
    if _run(["docker", "image", "inspect", BASE_IMAGE]).returncode != 0:
        _require(["docker", "pull", "--quiet", BASE_IMAGE], f"{BASE_IMAGE} is not here and cannot be pulled")
    return command


def _require(words: Sequence[str], complaint: str) -> None:
    done = _run(words)
    if done.returncode != 0:
        reason = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[-1]
        raise NoEngineError(f"{complaint}: {reason}")


def _run(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(words, 1, "", f"no answer within {_SECONDS:g} s")


def docker(*words: str, timeout_seconds: float = _SECONDS) -> str:
    """Run docker and return what it prints, without the last line break."""
    done = subprocess.run(["docker", *words], capture_output=True, text=True, timeout=timeout_seconds, check=False)
    assert done.returncode == 0, f"docker {' '.join(words)}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


@dataclass(frozen=True)
class Project:
    """One set of containers, networks, volumes and images under a name of its own."""

    command: Sequence[str]
    name: str
    files: Sequence[str]
    variables: dict[str, str]
    """What compose.yaml reads from the environment."""

    def compose(self, *words: str, timeout_seconds: float = _SECONDS) -> subprocess.CompletedProcess[str]:
        """Run compose on this project, the profile ``train`` included."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLUICE_", "COMPOSE_"))}
        files = [word for file in self.files for word in ("--file", file)]
        return subprocess.run(
            [*self.command, *files, "--project-name", self.name, "--profile", "train", *words],
            cwd=ROOT, env={**kept, **self.variables},
            capture_output=True, text=True, timeout=timeout_seconds, check=False,
        )  # fmt: skip

    def build(self) -> None:
        """Build every image, from the engine's cache where it can."""
        done = self.compose("build", timeout_seconds=_BUILD_SECONDS)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"[-8000:]

    def up(self, *services: str, seconds: float) -> None:
        """Start services, and wait until each of them says that it is healthy."""

        def start() -> None:
            done = self.compose("up", "--detach", *services, timeout_seconds=seconds)
            assert done.returncode == 0, done.stderr

        self.healthy_after(start, *services, seconds=seconds)

    def healthy_after(self, action: Callable[[], object], *services: str, seconds: float) -> None:
        """Do something, and wait until each of ``services`` has become healthy since."""
        asyncio.run(self._healthy_after(action, services, seconds))

    async def _healthy_after(self, action: Callable[[], object], services: Sequence[str], seconds: float) -> None:
        events = await asyncio.create_subprocess_exec(
            *("docker", "events", *self._filters(), "--filter", "event=health_status"),
            # health_status: healthy gateway
            *("--format", '{{.Action}} {{index .Actor.Attributes "com.docker.compose.service"}}'),
            stdout=asyncio.subprocess.PIPE,
        )
        assert events.stdout is not None
        try:
            async with asyncio.timeout(seconds):
                await asyncio.to_thread(action)
                waiting = set(services)
                while waiting:
                    _, status, service = (await events.stdout.readline()).decode().split()
                    if status == "healthy":
                        waiting.discard(service)
        finally:
            events.terminate()
            await events.wait()

    def container(self, service: str) -> str:
        """Return the id of a service's only container."""
        (found,) = docker("ps", "--quiet", *self._filters(f"com.docker.compose.service={service}")).split()
        return found

    def inspect(self, service: str, template: str) -> str:
        """Return what the engine knows of a service's container, by a Go template."""
        return docker("inspect", "--format", template, self.container(service))

    def run(self, service: str, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a program inside a service's container, as the user that it runs as."""
        return _run(["docker", "exec", self.container(service), *words])

    def image(self, service: str) -> str:
        """Return the id of the image that was built for a service."""
        # One compose joins the two by an underscore, the other by a hyphen.
        (found,) = docker("image", "ls", "--quiet", "--filter", f"reference={self.name}?{service}").split()
        return found

    def logs(self) -> str:
        """Return the end of what every container wrote."""
        return self.compose("logs", "--no-color", "--tail", "60").stdout

    def down(self) -> None:
        """Remove all of it; what the builds keep for the next build stays."""
        done = self.compose("down", "--volumes", "--remove-orphans", "--rmi", "local")
        assert done.returncode == 0, done.stderr

    def left(self) -> list[str]:
        """Return the ids of the containers, volumes and networks that the engine has of this project."""
        containers = docker("ps", "--all", "--quiet", *self._filters())
        volumes = docker("volume", "ls", "--quiet", *self._filters())
        networks = docker("network", "ls", "--quiet", *self._filters())
        return f"{containers} {volumes} {networks}".split()

    def _filters(self, *more: str) -> list[str]:
        labels = (f"com.docker.compose.project={self.name}", *more)
        return [word for label in labels for word in ("--filter", f"label={label}")]

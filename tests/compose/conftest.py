"""The containers as their user starts them: built, up without a model, then trained into."""

import asyncio
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from rpc.settings import cache_folder
from streamer.sources import small
from streamer.sources.declarations import declaration_of
from tests.compose.engine import NoEngineError, Project, compose_command

_PORTS = ("GATEWAY_PORT", "GATEWAY_METRICS_PORT", "STREAMER_PORT", "STREAMER_METRICS_PORT")


@pytest.fixture(scope="session")
def small_mnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 5,000 real images where any user may read them, also on a machine that has or could fetch all 70,000."""
    known = declaration_of("mnist")
    cached = cache_folder() / "datasets" / "mnist-small"
    assert known.small is not None
    if not cached.is_dir():
        asyncio.run(small.make(cached, known, known.small))
    folder = tmp_path_factory.mktemp("mnist")
    folder.chmod(0o755)
    for file in cached.iterdir():
        Path(shutil.copyfile(file, folder / file.name)).chmod(0o644)
    return folder


@pytest.fixture(scope="session")
def compose() -> list[str]:
    try:
        return compose_command()
    except NoEngineError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def built_project(compose: list[str], small_mnist: Path) -> Iterator[Project]:
    """Images of a project that no other run has; everything but the build cache is removed at the end."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in _PORTS]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        ports = {f"SLUICE_{name}": str(each.getsockname()[1]) for name, each in zip(_PORTS, sockets, strict=True)}
    variables = {**ports, "SLUICE_DATA": str(small_mnist)}
    if network := os.environ.get("SLUICE_BUILD_NETWORK"):
        variables["SLUICE_BUILD_NETWORK"] = network
    project = Project(compose, f"sluice-test-{os.getpid()}", ("compose.yaml", "compose.data.yaml"), variables)
    try:
        project.build()
        yield project
    finally:
        project.down()


@pytest.fixture(scope="session")
def project(built_project: Project) -> Project:
    """Healthy, and without a model."""
    try:
        built_project.up("triton", "gateway", "streamer", seconds=300)
    except BaseException:
        print(built_project.logs())
        raise
    return built_project


@pytest.fixture(scope="session")
def trained_project(project: Project) -> Project:
    """With a model that the container `train` trained, as well as needed, from the container `streamer`."""
    # 40,000 samples: as few as `sluice demo` trains on.
    done = project.compose("run", "--rm", "-T", "train", "--epochs", "10", timeout_seconds=1800)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{project.logs()}"
    return project

import fnmatch
import socket
import warnings
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from torch import Tensor, nn

from rpc.settings import cache_folder
from serving.installation import Installation, install
from serving.settings import TritonSettings
from serving.triton import EmbeddedTriton
from training.release import manifest

CONFIG = (Path(__file__).parents[2] / "model_repository" / "mnist" / "config.pbtxt").read_text()


class TwoHeads(nn.Module):
    """As small as the served network's signature allows; answers depend on every pixel."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embed = nn.Parameter(torch.randn(784, 500, generator=generator) / 28)
        self.output = nn.Parameter(torch.randn(500, 10, generator=generator) / 22)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        features = torch.relu((image.to(torch.float32) / 255.0).flatten(1) @ self.embed)
        return torch.softmax(features @ self.output, dim=1), nn.functional.normalize(features, dim=1)


def scripted(seed: int) -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(TwoHeads(seed))


def add_version(repository: Path, model: str, version: int) -> torch.jit.ScriptModule:
    """Publish as training does: the version's folder appears whole."""
    module = scripted(seed=version)
    staged = repository / model / f".staged-{version}"
    staged.mkdir(parents=True)
    module.save(str(staged / "model.pt"))
    staged.rename(repository / model / str(version))
    return module


def seal(repository: Path, model: str, version: int) -> Path:
    """Give a version the rest of its files, as a publisher does; return its folder."""
    folder = repository / model / str(version)
    (folder / "card.json").write_text("{}")
    (folder / "golden.safetensors").write_bytes(b"golden")
    manifest.write(folder, model=model, version=version)
    return folder


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def add_model(repository: Path, model: str) -> None:
    (repository / model).mkdir(parents=True)
    (repository / model / "config.pbtxt").write_text(CONFIG.replace('name: "mnist"', f'name: "{model}"'))


def free_ports() -> dict[str, Any]:
    """Three ports that were free a moment ago."""
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    ports = [server.getsockname()[1] for server in servers]
    for server in servers:
        server.close()
    return dict(zip(("http_port", "grpc_port", "metrics_port"), ports, strict=True))


def on_free_ports(**settings: Any) -> TritonSettings:
    return TritonSettings(**free_ports(), **settings)


def processes_with(pattern: str) -> list[str]:
    """Command lines of living processes that hold what the shell pattern stands for."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if fnmatch.fnmatchcase(line, f"*{pattern}*"):
            found.append(line)
    return found


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def installation() -> Installation:
    """The real one, from the user's cache; downloaded on first use."""
    return await install(cache_folder(), print)


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``mnist`` with a configuration and no version, as in a fresh clone; files that Triton has to overlook."""
    folder = tmp_path_factory.mktemp("repository")
    add_model(folder, "mnist")
    (folder / "README.md").write_text("for people\n")
    return folder


@pytest.fixture(scope="session")
def triton_settings(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> TritonSettings:
    log_file = tmp_path_factory.mktemp("logs") / "triton.log"
    return on_free_ports(model_repository=repository, log_file=log_file, intra_op_threads=1, stop_grace_seconds=0)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def triton(triton_settings: TritonSettings, installation: Installation) -> AsyncIterator[EmbeddedTriton]:
    """A real Triton, started on a repository without any version."""
    async with EmbeddedTriton(triton_settings, installation) as running:
        yield running

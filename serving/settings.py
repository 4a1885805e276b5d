import os
from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from rpc.settings import Settings, cache_folder


class TritonSettings(Settings):
    """How the embedded Triton runs."""

    model_config = SettingsConfigDict(env_prefix="SLUICE_TRITON_")
    section: ClassVar[str] = "triton"

    host: str = Field("127.0.0.1", min_length=1)
    """Address that all three ports listen on. Triton checks no caller: let only the gateway reach it."""

    http_port: int = Field(8000, ge=1, le=65535)
    """Port of Triton's HTTP protocol."""

    grpc_port: int = Field(8001, ge=1, le=65535)
    """Port of Triton's gRPC protocol, which the gateway speaks."""

    metrics_port: int = Field(8002, ge=1, le=65535)
    """Port of Triton's Prometheus metrics."""

    model_repository: Path = Field(Path("model_repository"), validation_alias="SLUICE_MODEL_REPOSITORY")
    """Folder with one folder a model; read, never written."""

    cache: Path = Field(default_factory=cache_folder)
    """Folder that the server is installed into, once for all projects of a user."""

    log_file: Path = Path(".sluice/logs/tritonserver.log")
    """Where the server's output goes, ``-`` for standard error; a file larger than 16 MiB at a start becomes ``.1``."""

    ready_timeout_seconds: float = Field(120.0, gt=0, le=3600)
    """How long the start may take, with loading and warming up every model."""

    stop_grace_seconds: float = Field(10.0, ge=0, le=600)
    """How long requests in flight and unloading may take at the end; 0 kills at once."""

    intra_op_threads: int = Field(default_factory=lambda: _cores_at_most(4), ge=1, le=256)
    """Threads one forward pass may use on the CPU, in each model instance; by default the cores there are, up to 4."""

    @model_validator(mode="after")
    def _ports_differ(self) -> Self:
        if len({self.http_port, self.grpc_port, self.metrics_port}) < 3:
            raise ValueError("http_port, grpc_port and metrics_port have to be three different ports")
        return self


def _cores_at_most(most: int) -> int:
    # Measured on 2 cores, 64 callers: 2 threads answer a third more than 1, with the caller on the same cores.
    return min(len(os.sched_getaffinity(0)), most)

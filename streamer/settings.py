"""Settings of the streamer: ``[streamer]`` in the file, ``SLUICE_STREAMER_...`` in the environment."""

from pathlib import Path
from typing import ClassVar

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from rpc.log import Level
from rpc.settings import Settings, cache_folder


class StreamerSettings(Settings):
    """How the streamer serves, and where its data comes from."""

    model_config = SettingsConfigDict(env_prefix="SLUICE_STREAMER_")

    section: ClassVar[str] = "streamer"

    host: str = "127.0.0.1"
    """Name or address to listen on; 0.0.0.0 for every network of this machine."""

    port: int = Field(50052, ge=0, le=65535)
    """Port to listen on; 0 for any free one."""

    metrics_port: int = Field(9102, ge=0, le=65535)
    """Port of ``/metrics`` for Prometheus, on the same host; 0 for any free one."""

    data: Path | None = Field(None, validation_alias="SLUICE_DATA")
    """Folder with MNIST's four IDX files, gzipped or not; None: the cache, else the mirrors, else the small set."""

    cache: Path = Field(default_factory=cache_folder)
    """Where fetched data is kept."""

    max_batch_samples: int = Field(8192, ge=1, le=1_000_000)
    """Largest batch a reader may ask for, in samples."""

    max_message_bytes: int = Field(32 * 1024**2, ge=1024, le=1024**3)
    """Largest message sent, in bytes; a batch that would not fit is refused. Readers have to accept as much."""

    max_streams: int = Field(256, ge=1, le=100_000)
    """Streams served at once; one more is refused. Each holds two batches and what HTTP/2 has on its way."""

    drain_seconds: float = Field(10.0, ge=0, le=3600)
    """How long streams may go on after the first signal; readers of batches are told at once to go elsewhere."""

    log_level: Level = "info"
    """The least that is logged."""

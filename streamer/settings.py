"""Settings of the streamer: ``[streamer]`` in the file, ``SLUICE_STREAMER_...`` in the environment."""

from pathlib import Path
from typing import ClassVar

from pydantic import Field, field_validator
from pydantic_settings import SettingsConfigDict

from rpc.cores import num_cores
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

    workers: int = Field(1, ge=0, le=256)
    """Processes that serve; 0: one on each core it may use. Several share the port and the data in memory, on Linux."""

    datasets: str = "mnist"
    """
    What is served, separated by commas: NAME of a known data set, or NAME=PLACE, a folder or ``s3://bucket/prefix``.
    PLACE:stretch brings images of any size and colour to the network's 28x28, PLACE:center as MNIST's digits.
    """

    data: Path | None = Field(None, validation_alias="SLUICE_DATA")
    """Folder of a known data set, or with a folder for each; None: the cache, else the mirrors, else the small set."""

    cache: Path = Field(default_factory=cache_folder)
    """Where fetched data is kept."""

    cache_bytes: int = Field(10 * 1024**3, ge=0, le=1 << 60)
    """Most bytes of data sets in object storage that are kept in the cache, at every moment."""

    memory_bytes: int = Field(1024**3, ge=0, le=1 << 60)
    """Data sets up to this size are held in memory; a larger packed one is read where it lies."""

    max_downloads: int = Field(64, ge=1, le=4096)
    """Requests to object storage at once for each split and worker; each holds a block (256 KiB) in memory."""

    read_ahead_bytes: int = Field(64 * 1024**2, ge=0, le=1 << 40)
    """
    Most bytes that the streams of a data set, in each worker, hold of samples fetched from object storage before they
    are wanted; 0 fetches nothing ahead.
    """

    storage_deadline_seconds: float = Field(60.0, gt=0, le=3600)
    """How long object storage may be out of reach before a stream that needs it fails."""

    max_batch_samples: int = Field(8192, ge=1, le=1_000_000)
    """Largest batch a reader may ask for, in samples."""

    max_message_bytes: int = Field(32 * 1024**2, ge=1024, le=1024**3)
    """Largest message sent, in bytes; a batch that would not fit is refused. Readers have to accept as much."""

    max_streams: int = Field(256, ge=1, le=100_000)
    """Streams served at once, by all workers; one more is refused. Each holds up to four batches, beside HTTP/2's."""

    max_credit_bytes: int = Field(1024**3, ge=1, le=1 << 50)
    """Most bytes of images and labels that one reader of PullBatches may have granted and not been sent."""

    idle_seconds: float = Field(300.0, gt=0, le=86_400)
    """
    How long a stream waits for a reader that takes nothing, or grants nothing, before it is ended; a connection without
    streams is closed after seven times as long.
    """

    transform_workers: int | None = Field(None, ge=0, le=1024)
    """Processes for transforms, of all workers; None: one on each core, 0: threads. Started with the first one."""

    hang_seconds: float = Field(15.0, ge=1, le=3600)
    """How long the event loop of one of several workers may stand still before it is killed and another one started."""

    drain_seconds: float = Field(10.0, ge=0, le=3600)
    """How long streams may go on after the first signal; readers of batches are told at once to go elsewhere."""

    log_level: Level = "info"
    """The least that is logged."""

    @field_validator("datasets")
    @classmethod
    def _names_and_places(cls, value: str) -> str:
        names = [name for name, _ in _parsed(value)]
        if not names or not all(names):
            raise ValueError("has to be NAME or NAME=PLACE, several separated by commas")
        if len(set(names)) < len(names):
            raise ValueError("has to name each data set once")
        return value

    @property
    def num_workers(self) -> int:
        """Processes that serve, 1 or more."""
        return self.workers or num_cores()

    @property
    def places(self) -> dict[str, str | None]:
        """Where each data set lies, by name; None for a known one that is looked for."""
        parsed = _parsed(self.datasets)
        if self.data is None:
            return dict(parsed)
        # One may lie in the folder itself; of several each has to have its own, or one would be taken for another.
        is_alone = sum(place is None for _, place in parsed) == 1
        return {name: place or str(self.data if is_alone else self.data / name) for name, place in parsed}


def _parsed(datasets: str) -> list[tuple[str, str | None]]:
    parts = [part.strip().partition("=") for part in datasets.split(",")]
    return [(name.strip(), place.strip() or None) for name, _, place in parts]

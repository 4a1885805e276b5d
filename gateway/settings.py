from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from rpc.log import Level
from rpc.settings import Settings

_MEBI = 1 << 20


class GatewaySettings(Settings):
    """Settings of the gateway; ``[gateway]`` in the file, ``SLUICE_GATEWAY_...`` in the environment."""

    model_config = SettingsConfigDict(env_prefix="SLUICE_GATEWAY_")

    section: ClassVar[str] = "gateway"

    # Addresses
    host: str = "127.0.0.1"
    """Name or address to listen on; ``0.0.0.0`` for every IPv4 interface."""
    port: int = Field(50051, ge=0, le=65535)
    """Port to listen on; 0 takes any free one."""
    metrics_port: int = Field(9101, ge=0, le=65535)
    """Port of ``/metrics`` for Prometheus, on the same host; 0 takes any free one."""
    triton: str = Field("127.0.0.1:8001", min_length=1)
    """``host:port`` of Triton's gRPC endpoint."""

    # Models
    model_repository: Path = Field(Path("model_repository"), validation_alias="SLUICE_MODEL_REPOSITORY")
    """Folder that Triton serves from; the gateway reads ``<model>/<version>/card.json`` in it, nothing else."""
    default_model: str = Field("mnist", min_length=1)
    """Model of a request that names none, and the one whose inference proves readiness."""

    # Limits
    max_message_bytes: int = Field(32 * _MEBI, ge=1024, le=1024 * _MEBI)
    """Largest request in bytes; gRPC refuses a larger one with RESOURCE_EXHAUSTED."""
    max_image_bytes: int = Field(16 * _MEBI, ge=1, le=1024 * _MEBI)
    """Largest encoded image in bytes."""
    max_pixels: int = Field(16 * _MEBI, ge=28 * 28, le=64 * _MEBI)
    """Most pixels an image may have, by its header; decoding, in each thread, takes up to 13 bytes for each."""
    max_batch_images: int = Field(1024, ge=1, le=65536)
    """Most images in one ClassifyBatch."""
    max_in_flight: int = Field(2048, ge=2, le=1_000_000)
    """Most images worked on at once, over all calls, of which a comparison is two; what comes beyond is refused."""
    decode_threads: int = Field(2, ge=1, le=256)
    """Threads that decode large images; small ones are decoded where they arrive."""

    # Times
    probe_interval_seconds: float = Field(1.0, gt=0, le=3600)
    """Pause between two inferences that prove readiness, in seconds."""
    probe_timeout_seconds: float = Field(5.0, gt=0, le=3600)
    """After this long without an answer to the probe the gateway reports NOT_SERVING, in seconds."""
    upstream_timeout_seconds: float = Field(30.0, gt=0, le=3600)
    """Longest wait for Triton, also of a caller without a deadline, in seconds."""
    drain_seconds: float = Field(20.0, ge=0, le=3600)
    """How long calls in flight may take after the first signal, in seconds; 0 ends them at once."""

    log_level: Level = "info"
    """The least that is logged: debug, info, warning or error."""

    @model_validator(mode="after")
    def _largest_batch_can_be_admitted(self) -> Self:
        if self.max_batch_images > self.max_in_flight:
            raise ValueError(
                f"max_batch_images ({self.max_batch_images}) must not exceed max_in_flight ({self.max_in_flight})"
            )
        return self

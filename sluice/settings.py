"""Settings of the local line as a whole; each service has its own section beside these."""

from pathlib import Path
from typing import ClassVar

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from rpc.settings import Settings


class UpSettings(Settings):
    """What ``sluice up`` adds to the services' own settings; none means as in the service's own section."""

    model_config = SettingsConfigDict(env_prefix="SLUICE_UP_")
    section: ClassVar[str] = "up"

    gateway_port: int | None = Field(None, ge=1, le=65535, validation_alias="SLUICE_GATEWAY_PORT")
    """Port of the gateway."""
    gateway_metrics_port: int | None = Field(None, ge=1, le=65535, validation_alias="SLUICE_GATEWAY_METRICS_PORT")
    """Port of the gateway's metrics."""
    gateway_workers: int | None = Field(None, ge=0, le=256, validation_alias="SLUICE_GATEWAY_WORKERS")
    """Processes of the gateway; 0: one on each core."""
    streamer_port: int | None = Field(None, ge=1, le=65535, validation_alias="SLUICE_STREAMER_PORT")
    """Port of the streamer."""
    streamer_metrics_port: int | None = Field(None, ge=1, le=65535, validation_alias="SLUICE_STREAMER_METRICS_PORT")
    """Port of the streamer's metrics."""
    streamer_workers: int | None = Field(None, ge=0, le=256, validation_alias="SLUICE_STREAMER_WORKERS")
    """Processes of the streamer; 0: one on each core."""
    triton_grpc_port: int | None = Field(None, ge=1, le=65535, validation_alias="SLUICE_TRITON_GRPC_PORT")
    """Port of Triton's gRPC."""
    triton_http_port: int | None = Field(None, ge=1, le=65535, validation_alias="SLUICE_TRITON_HTTP_PORT")
    """Port of Triton's HTTP."""
    triton_metrics_port: int | None = Field(None, ge=1, le=65535, validation_alias="SLUICE_TRITON_METRICS_PORT")
    """Port of Triton's metrics."""
    data: Path | None = Field(None, validation_alias="SLUICE_DATA")
    """Folder of IDX files to stream from; none finds MNIST by itself."""
    logs: Path = Path(".sluice/logs")
    """Folder for the services' logs."""

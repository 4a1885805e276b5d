from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from rpc.cores import num_cores
from rpc.log import Level
from rpc.settings import Settings

if TYPE_CHECKING:
    from rpc.tls import ServerTls

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
    """``host:port`` of Triton's gRPC endpoint, or of several, separated by commas: each batch goes to one of them."""

    # Processes
    workers: int = Field(1, ge=0, le=256)
    """Processes that serve; 0: one on each core it may use. Several share the port and the limits, on Linux."""
    hang_seconds: float = Field(15.0, ge=1, le=3600)
    """How long the event loop of one of several workers may stand still before it is killed and another one started."""

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
    stream_window: int = Field(256, ge=1, le=65536)
    """Images of one ClassifyStream that are read and were not taken back as answers yet."""
    max_in_flight: int = Field(2048, ge=2, le=1_000_000)
    """Most images worked on at once, over all calls, of which a comparison is two; what comes beyond is refused."""
    max_in_flight_bytes: int = Field(256 * _MEBI, ge=1024, le=64 * 1024 * _MEBI)
    """Most bytes of requests worked on at once, as they came; beyond, calls are refused."""
    max_streams: int = Field(1024, ge=1, le=1_000_000)
    """Most streams open at once, ClassifyStream and ModelStreamInfer together; beyond, they are refused."""
    batches_per_instance: int = Field(2, ge=1, le=16)
    """Most requests at Triton at once, for each instance of the model over all Tritons: one that runs, one is next."""
    single_flight: bool = True
    """Whether equal images that are under way at the same time are asked of Triton once."""
    cache_rows: int = Field(0, ge=0, le=100_000_000)
    """Answers kept for equal images, 1.2 kB each, of versions whose card has their weights' digest; 0 keeps none."""
    decode_threads: int = Field(2, ge=1, le=256)
    """Threads that decode large images; small ones are decoded where they arrive."""

    # Times
    probe_interval_seconds: float = Field(0.5, gt=0, le=3600)
    """Pause between two inferences that prove readiness, in seconds."""
    probe_timeout_seconds: float = Field(1.2, gt=0, le=3600)
    """After this long without an answer to the probe the gateway reports NOT_SERVING, in seconds."""
    request_seconds: float = Field(10.0, gt=0, le=3600)
    """How long a call may take to bring its request, or a stream its first, in seconds; less where many are silent."""
    stream_idle_seconds: float = Field(900.0, ge=0, le=86400)
    """How long a stream may bring no further request, or take no answer, before it is ended, in seconds; 0 is never."""
    upstream_timeout_seconds: float = Field(30.0, gt=0, le=3600)
    """Longest wait for a batch, and then for Triton's answer, also of a caller without a deadline, in seconds."""
    drain_seconds: float = Field(20.0, ge=0, le=3600)
    """How long calls in flight may take after the first signal, in seconds; 0 ends them at once."""

    # Security
    tls_cert: Path | None = None
    """PEM file of the certificate, and after it those that lead to its root; with ``tls_key``, callers need TLS."""
    tls_key: Path | None = None
    """PEM file of the certificate's private key, without a passphrase."""
    tls_client_ca: Path | None = None
    """PEM file of authorities; callers then need a certificate from one of them."""
    keys_file: Path | None = None
    """File of API keys, made by ``sluice keys add``; callers then need one of them."""
    insecure: bool = False
    """Listen on more than loopback without TLS: what passes can be read and changed on its way."""
    max_connections: int = Field(900, ge=1, le=1_000_000)
    """Most connections at once, below the usual 1,024 open files; one more is closed at once."""
    max_connection_calls: int = Field(1024, ge=1, le=1_000_000)
    """Most calls under way on one connection; more of them wait at the caller."""
    max_metadata_bytes: int = Field(16384, ge=1024, le=_MEBI)
    """Most bytes of a call's metadata; a call with more is refused with RESOURCE_EXHAUSTED."""
    handshake_seconds: float = Field(5.0, gt=0, le=600)
    """How long a new connection may take to speak TLS and HTTP/2, in seconds."""
    connection_idle_seconds: float = Field(900.0, ge=0, le=86400)
    """After this long without a call a connection is closed, in seconds; 0 is never."""
    connection_age_seconds: float = Field(0.0, ge=0, le=864000)
    """At about this age a connection is closed and its caller opens another, in seconds; 0 is never."""
    connection_grace_seconds: float = Field(30.0, gt=0, le=86400)
    """How long calls on a connection of that age may still take, in seconds."""

    # Insight
    otlp_endpoint: str | None = None
    """``host:port`` of an OpenTelemetry collector (OTLP over gRPC) that gets a trace of each call; none by default."""
    log_level: Level = "info"
    """The least that is logged: debug, info, warning or error."""

    @property
    def num_workers(self) -> int:
        """Processes that serve, 1 or more."""
        return self.workers or num_cores()

    @property
    def tls(self) -> "ServerTls | None":
        """The TLS files together, None without TLS."""
        # Brings gRPC, which most who read settings do without.
        from rpc.tls import ServerTls

        if self.tls_cert is None or self.tls_key is None:
            return None
        return ServerTls(cert=self.tls_cert, key=self.tls_key, client_ca=self.tls_client_ca)

    @model_validator(mode="after")
    def _tls_is_whole(self) -> Self:
        given = {"tls_cert": self.tls_cert, "tls_key": self.tls_key}
        missing = [name for name, path in given.items() if path is None]
        if missing and (len(missing) == 1 or self.tls_client_ca is not None):
            raise ValueError(f"{' and '.join(missing)} missing: TLS needs tls_cert and tls_key")
        return self

    @model_validator(mode="after")
    def _largest_batch_can_be_admitted(self) -> Self:
        if self.max_batch_images > self.max_in_flight:
            raise ValueError(
                f"max_batch_images ({self.max_batch_images}) must not exceed max_in_flight ({self.max_in_flight})"
            )
        return self

    def triton_addresses(self) -> list[str]:
        """Return each address in ``triton``."""
        return [address.strip() for address in self.triton.split(",") if address.strip()]

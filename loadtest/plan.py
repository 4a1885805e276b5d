"""What a load test is to do."""

from dataclasses import dataclass

from loadtest.arrivals import Pace
from loadtest.images import Format
from loadtest.targets import Kind


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One load test, in plain values."""

    target: Kind
    address: str
    """``host:port`` of the gateway, or of Triton where that is the target."""
    pace: Pace
    duration_seconds: float
    """Of the measurement; above 0."""
    warm_up_seconds: float
    """Before it, not counted; at least 0."""
    timeout_seconds: float
    """Of each call; above 0, up to an hour."""
    image_format: Format = "png"
    batch_size: int = 1
    """Images a call, where the target has batches."""
    model: str = ""
    """Empty is the gateway's default; Triton needs a name."""
    seed: int = 0
    """Of the order of the images and the choice of pairs."""
    triton: str
    """``host:port`` of Triton's gRPC protocol, asked for batch sizes."""
    triton_metrics: str
    """``host:port`` of Triton's metrics, asked for batch sizes."""

"""When to come again, in the two ways in which gRPC's clients are told."""

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status

PUSHBACK_KEY = "grpc-retry-pushback-ms"
"""Trailing metadata that gRPC's own retries heed: milliseconds. Source: gRFC A6, "Pushback"."""
DETAILS_KEY = "grpc-status-details-bin"
"""Trailing metadata with a google.rpc.Status, here with a google.rpc.RetryInfo, for everybody else."""


def retry_metadata(code: grpc.StatusCode, message: str, seconds: float) -> tuple[tuple[str, str | bytes], ...]:
    """
    Return the trailing metadata of a refusal that passes.

    Args:
        code: Of the refusal.
        message: Of the refusal.
        seconds: After which another try has a chance.
    """
    delay = Duration()
    delay.FromNanoseconds(round(seconds * 1e9))
    status = Status(code=code.value[0], message=message)
    status.details.add().Pack(RetryInfo(retry_delay=delay))
    return (PUSHBACK_KEY, str(round(seconds * 1000))), (DETAILS_KEY, status.SerializeToString())

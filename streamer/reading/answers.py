"""What a streamer answers, as a reader sees it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
import numpy as np
from google.protobuf.duration_pb2 import Duration
from numpy.typing import NDArray

from protos.streamer.v1 import sample_service_pb2 as pb
from streamer.errors import DataChangedError, RefusedError
from streamer.reading.stalls import Timings
from streamer.slicing import Slice

# What another attempt may cure: the replica went away, ended the call as it stopped or because nobody read, or hangs.
_BROKEN = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.ABORTED,
)
# How grpc reports a status that crossed with a grant on its way: the status itself is lost, and asking again tells it.
_CROSSED = "Internal error from Core"


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitInfo:
    """What a streamer says about a split, or what follows from it about a slice of one."""

    name: str
    num_samples: int
    image_shape: tuple[int, ...]
    """Height, width, and channels when more than one."""
    num_classes: int
    fingerprint: bytes
    """Equal wherever the same samples lie in the same order."""
    label_bytes: int
    part: Slice | None = field(default=None, repr=False)
    """What it is of another split, where it is a slice."""

    def sliced(self, part: Slice, name: str) -> "SplitInfo":
        """Describe a part of it."""
        return replace(self, name=name, num_samples=part.num_samples, fingerprint=part.fingerprint, part=part)

    def base_indices(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """
        Return where samples lie in the split's file; the same unless this is a slice, which has indices of its own.

        Args:
            indices: Of a batch, or any others in ``range(num_samples)``; shape (N,).
        """
        return indices if self.part is None else self.part.base_indices(indices)


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetInfo:
    """What a streamer says about a data set."""

    name: str
    splits: Mapping[str, SplitInfo]
    class_names: tuple[str, ...]
    """By label; empty when the classes are plain numbers."""


@dataclass(frozen=True, eq=False, slots=True)
class Batch:
    """A batch that arrived whole: checksum, position and shape are checked."""

    images: NDArray[Any]
    """Shape (N, height, width), and channels when more than one; uint8 unless transformed; read-only."""
    labels: NDArray[np.int64]
    """Shape (N,)."""
    indices: NDArray[np.int64]
    """Of the samples in the split's file, or in the slice: see :meth:`SplitInfo.base_indices`; shape (N,)."""
    position: int
    """Global position of the global batch this is a share of."""
    next_position: int
    """Where to resume from once this batch is consumed."""
    end_of_epoch: bool
    """Nothing follows in this epoch."""
    decode_seconds: float = field(default=0.0, repr=False)
    """Spent on this batch here, decoding and checking it."""
    _timings: pb.Timings | None = field(default=None, repr=False)

    @property
    def timings(self) -> Timings:
        """Where its time went, on the streamer and here."""
        told = self._timings
        if told is None:
            return Timings(decode_seconds=self.decode_seconds)
        return Timings(
            read_seconds=_seconds(told.read),
            transform_seconds=_seconds(told.transform),
            held_seconds=_seconds(told.wait),
            decode_seconds=self.decode_seconds,
        )


class BrokenError(Exception):
    """A call ended early; another attempt, here or elsewhere, may cure it."""


def dataset_info(message: pb.Dataset) -> DatasetInfo:
    """Take a data set's description over."""
    splits = {
        split.name: SplitInfo(
            name=split.name,
            num_samples=split.num_samples,
            image_shape=tuple(split.image_shape),
            num_classes=split.num_classes,
            fingerprint=split.fingerprint,
            label_bytes=split.label_bytes,
        )
        for split in message.splits
    }
    return DatasetInfo(name=message.name, splits=splits, class_names=tuple(message.class_names))


def error_of(address: str, error: grpc.aio.AioRpcError) -> Exception:
    """Return what a call's end means: one to be tried again, or the refusal of the streamer at ``address``."""
    details = error.details() or error.code().name
    if error.code() in _BROKEN or _CROSSED in details:
        return BrokenError(details)
    kind = DataChangedError if error.code() is grpc.StatusCode.FAILED_PRECONDITION else RefusedError
    return kind(address, error.code().name, details)


def _seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9

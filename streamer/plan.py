"""A plan names an order of samples and a rank's share of it; a position in it is a stream's whole state."""

import enum
from dataclasses import dataclass


class Remainder(enum.Enum):
    """What becomes of the samples that do not fill the last global batch."""

    KEEP = 1
    """Every sample once; the last batches are smaller, differ by at most one, and a rank may get none."""
    DROP = 2
    """Only full global batches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """
    An order of the samples of one epoch, and a rank's share of it.

    Global positions count the samples of the epoch that all ranks together have consumed.
    """

    dataset: str
    """Name as the streamer lists it."""
    split: str = "train"
    """``train`` or ``test``, or a slice of one, such as ``train[:90%]``: see :mod:`streamer.slicing`."""
    seed: int | None = None
    """0 to 2**64 - 1; None is file order."""
    epoch: int = 0
    """0 to 2**32 - 1; each has an order of its own."""
    world_size: int = 1
    """Ranks reading together, at least 1; may differ at any position."""
    rank: int = 0
    """0 to world_size - 1."""
    batch_size: int = 128
    """Samples per batch for this rank, at least 1, at most the server's limit."""
    remainder: Remainder = Remainder.KEEP
    """Under data-parallel training use DROP, where all ranks get the same number of equal batches."""
    transform: str = ""
    """Named transform with its parameters; empty means the stored pixels."""
    fingerprint: bytes = b""
    """When set, a streamer with other data refuses."""

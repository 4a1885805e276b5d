"""
The order of an epoch, and each rank's share of it: pure arithmetic, no table of samples, no state.

An order is a keyed bijection from position to sample index, a function of (fingerprint, seed, epoch) and of
nothing else, so that any replica continues any stream. Changing it changes what saved cursors mean.
"""

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streamer.errors import InvalidPlanError, PositionError
from streamer.plan import Plan, Remainder

_VERSION = b"sluice order 1"

# Luby and Rackoff need 4 rounds, for large domains. Some thousand samples make a small one, where their proof says
# little: twice as many, for about 10 ns a position.
_ROUNDS = 8

# Halves of up to so many bits have their round functions worked out once, all their values: looking one up takes a
# tenth of computing it. These tables are no larger than a block of positions.
_TABLE_BITS = 13

MAX_SAMPLES = 1 << 32
"""Largest split an order can be made for: halves of the Feistel network are 16 bits then."""


class Order:
    """
    A pseudo-random bijection of ``range(num_samples)``, or file order when ``seed`` is None.

    A balanced Feistel network permutes the smallest domain of an even number of bits that holds
    ``num_samples``; what falls outside is permuted again until it falls inside, at most 4 times on average.

    Source: J. Black, P. Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002 (cycle walking, Feistel);
    M. Luby, C. Rackoff, "How to construct pseudorandom permutations from pseudorandom functions", 1988.
    The round function is MurmurHash3's 32-bit finalizer (A. Appleby, public domain) with an added key.
    """

    def __init__(self, num_samples: int, *, fingerprint: bytes, seed: int | None, epoch: int) -> None:
        if not 0 < num_samples <= MAX_SAMPLES:
            raise ValueError(f"num_samples: {num_samples}; 1 to {MAX_SAMPLES} are allowed")
        self._num_samples = num_samples
        self._half_bits = max(1, ((num_samples - 1).bit_length() + 1) // 2)
        self._mask = (1 << self._half_bits) - 1
        self._keys = None if seed is None else _keys(fingerprint, seed, epoch)
        self._tables: list[NDArray[np.int64]] = []
        if self._keys is not None and self._half_bits <= _TABLE_BITS:
            values = np.arange(self._mask + 1)
            self._tables = [self._round(values, key) for key in self._keys]

    def indices(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """
        Return the sample index at each position; some nanoseconds a position in blocks of some thousands.

        Args:
            positions: Shape (N,), each in ``range(num_samples)``.
        """
        if self._keys is None:
            return positions
        indices = self._permute(positions)
        outside = np.flatnonzero(indices >= self._num_samples)
        while outside.size:
            walked = self._permute(indices[outside])
            indices[outside] = walked
            outside = outside[walked >= self._num_samples]
        return indices

    def _permute(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        assert self._keys is not None
        left, right = values >> self._half_bits, values & self._mask
        for number, key in enumerate(self._keys):
            mixed = self._tables[number].take(right) if self._tables else self._round(right, key)
            left, right = right, np.bitwise_xor(mixed, left, out=mixed)
        return (left << self._half_bits) | right

    def _round(self, half: NDArray[np.int64], key: np.uint32) -> NDArray[np.int64]:
        return _mix(half.astype(np.uint32) + key).astype(np.int64) & self._mask


def _mix(words: NDArray[np.uint32]) -> NDArray[np.uint32]:
    words ^= words >> np.uint32(16)
    words *= np.uint32(0x85EBCA6B)
    words ^= words >> np.uint32(13)
    words *= np.uint32(0xC2B2AE35)
    words ^= words >> np.uint32(16)
    return words


def _keys(fingerprint: bytes, seed: int, epoch: int) -> NDArray[np.uint32]:
    digest = hashlib.blake2b(digest_size=4 * _ROUNDS)
    for part in (_VERSION, fingerprint, struct.pack("<QI", seed, epoch)):
        digest.update(struct.pack("<I", len(part)) + part)
    return np.frombuffer(digest.digest(), "<u4").astype(np.uint32)


@dataclass(frozen=True, slots=True)
class Share:
    """
    One rank's share of the global batch at ``position``.

    The rank's samples are at the positions ``first`` to ``last - 1`` of the order; none in a closing share.
    """

    position: int
    next_position: int
    first: int
    last: int
    end_of_epoch: bool


def shares(plan: Plan, num_samples: int, *, start_position: int = 0, end_position: int = 0) -> Iterator[Share]:
    """
    Return the shares of ``plan.rank``, one for each global batch that begins in the range asked for.

    The global batch at position p is the next ``world_size * batch_size`` samples, cut into contiguous shares
    in the order of ranks. A smaller last one (``Remainder.KEEP``) is cut as evenly as it goes: shares differ by
    at most one sample, and a rank left without one gets a closing share. ``end_of_epoch`` is set on the last.

    Args:
        plan: Checked: see :func:`check_plan`.
        num_samples: Samples of the epoch.
        start_position: Where the first global batch begins; at the epoch's end there is one closing share.
        end_position: No global batch begins here or later; 0 means the end of the epoch.

    Raises:
        PositionError: ``start_position`` lies past the end; raised at the call.
    """
    if not 0 <= start_position <= num_samples:
        raise PositionError("start_position", start_position, num_samples)
    return _shares(plan, num_samples, start_position, end_position or num_samples)


def _shares(plan: Plan, num_samples: int, position: int, end_position: int) -> Iterator[Share]:
    full = plan.world_size * plan.batch_size
    smallest = full if plan.remainder is Remainder.DROP else 1
    if num_samples - position < smallest:
        yield Share(position, position, position, position, end_of_epoch=True)
        return
    while position < end_position and num_samples - position >= smallest:
        size = min(full, num_samples - position)
        each, extra = divmod(size, plan.world_size)
        first = position + plan.rank * each + min(plan.rank, extra)
        last = first + each + (plan.rank < extra)
        following = position + size
        yield Share(position, following, first, last, end_of_epoch=num_samples - following < smallest)
        position = following


def ends_at(plan: Plan, num_samples: int, position: int) -> bool:
    """Tell whether nothing of the rank's follows in an epoch from ``position``, the end of a global batch, on."""
    left = num_samples - position
    if plan.remainder is Remainder.DROP:
        return left < plan.world_size * plan.batch_size
    # Ranks with low numbers get what does not go round.
    return left <= plan.rank


def check_plan(plan: Plan, *, max_batch_samples: int) -> None:
    """
    Refuse a plan whose ranks or batches make no sense.

    Args:
        plan: As the reader gave it.
        max_batch_samples: Largest ``batch_size`` allowed.

    Raises:
        InvalidPlanError: Names the field and what is allowed.
    """
    if not 0 <= plan.rank < plan.world_size:
        allowed = f"0 to {plan.world_size - 1} are allowed with plan.world_size {plan.world_size}"
        raise InvalidPlanError("plan.rank", f"{plan.rank}; {allowed}")
    if not 0 < plan.batch_size <= max_batch_samples:
        raise InvalidPlanError("plan.batch_size", f"{plan.batch_size}; 1 to {max_batch_samples} are allowed")

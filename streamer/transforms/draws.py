"""Random numbers of a sample: a function of (seed, epoch, index) and of a step's place, with no state to carry on."""

import numpy as np
from numpy.typing import NDArray

WORDS = 4
"""32-bit words in a block."""

MAX_PLACES = 256
"""Places that have random numbers of their own."""

_MAX_BLOCKS = 1 << 24
_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


class Draws:
    """
    The random numbers of N samples in one epoch.

    Source: Philox4x32-10 of J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw, "Parallel Random Numbers: As Easy as
    1, 2, 3", SC 2011. The key is the seed, the counter (index, epoch, place and number of the block).

    Args:
        indices: Of the samples, shape (N,), not negative.
        seed: 0 to 2**64 - 1; None counts as 0.
        epoch: 0 to 2**32 - 1.
    """

    def __init__(self, indices: NDArray[np.integer], *, seed: int | None, epoch: int) -> None:
        self._indices = indices.astype(np.uint64)
        self._seed = seed or 0
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, part: slice) -> "Draws":
        return Draws(self._indices[part], seed=self._seed, epoch=self._epoch)

    def words(self, place: int, count: int) -> NDArray[np.uint32]:
        """Return ``count`` words for each sample, those of the step at ``place``; shape (N, count)."""
        blocks = -(-count // WORDS)
        if blocks > _MAX_BLOCKS:
            raise ValueError(f"{count} random words a sample; {_MAX_BLOCKS * WORDS} are allowed")
        counters = np.arange(blocks, dtype=np.uint64) | np.uint64(place << 24)
        return self._blocks(counters).reshape(len(self), -1)[:, :count]

    def first_words(self, places: NDArray[np.integer]) -> NDArray[np.uint32]:
        """Return the first words of several places, shape (N, P, 4): at once, as a call costs what 500 blocks do."""
        return self._blocks(places.astype(np.uint64) << np.uint64(24))

    def _blocks(self, counters: NDArray[np.uint64]) -> NDArray[np.uint32]:
        index = self._indices[:, None]
        return philox(
            (index & _LOW, index >> _HALF, np.full((1, 1), self._epoch, np.uint64), counters[None, :]), self._seed
        )


def uniform(words: NDArray[np.uint32]) -> NDArray[np.float64]:
    """Return a number in [0, 1) for each word."""
    return np.multiply(words, 2.0**-32, dtype=np.float64)


def whole(words: NDArray[np.uint32], below: int) -> NDArray[np.int64]:
    """Return a number in ``range(below)`` for each word; below 2**24 all are equally likely within 0.4 %."""
    return ((words.astype(np.uint64) * np.uint64(below)) >> _HALF).astype(np.int64)


def philox(counter: tuple[NDArray[np.uint64], ...], seed: int) -> NDArray[np.uint32]:
    """
    Return the block of four words for each counter: Philox4x32-10.

    Args:
        counter: Its four words, each below 2**32, of shapes that broadcast together.
        seed: 64 bits: the key's two words, the lower one first.
    """
    shape = np.broadcast_shapes(*(word.shape for word in counter))
    c0, c1, c2, c3 = counter
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (product1 >> _HALF) ^ c1 ^ np.uint64(k0), product1 & _LOW
        c2, c3 = (product0 >> _HALF) ^ c3 ^ np.uint64(k1), product0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    block = np.empty((*shape, WORDS), np.uint32)
    for number, word in enumerate((c0, c1, c2, c3)):
        block[..., number] = word
    return block

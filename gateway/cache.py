"""Answers to images that were asked before, byte by byte the same."""

from collections import OrderedDict
from collections.abc import Hashable

import numpy as np
from numpy.typing import NDArray

Row = NDArray[np.float32]


class RowCache:
    """
    A bounded number of a model's rows, the least recently used of which go first.

    Exact: the key holds the pixels themselves, and which weights answered. Belongs to one event loop.

    Args:
        max_rows: Bound, at least 0, which keeps nothing. A row of MNIST takes about 1.2 kB, pixels included.

    Attributes:
        num_hits: Images answered from here so far.
        num_misses: Images looked for in vain.
    """

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self.num_hits = 0
        self.num_misses = 0
        self._rows: OrderedDict[tuple[Hashable, bytes], Row] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, answerer: Hashable, pixels: bytes) -> Row | None:
        """Return what ``answerer`` said to these pixels, None where that is not known."""
        row = self._rows.get((answerer, pixels))
        if row is None:
            self.num_misses += 1
            return None
        self._rows.move_to_end((answerer, pixels))
        self.num_hits += 1
        return row

    def put(self, answerer: Hashable, pixels: bytes, row: Row) -> None:
        """Keep what ``answerer`` said."""
        if not self.max_rows:
            return
        # A copy: the row is a view of its batch, all of which it would keep.
        self._rows[answerer, pixels] = row.copy()
        self._rows.move_to_end((answerer, pixels))
        if len(self._rows) > self.max_rows:
            self._rows.popitem(last=False)

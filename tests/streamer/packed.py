"""Packed data sets made on the spot."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from streamer.sources.packing import FolderTarget, StoreTarget, pack
from streamer.sources.shards import PackedIndex
from streamer.sources.split import MemorySplit, label_type

SHAPE = (4, 5)


def random_split(name: str = "train", size: int = 1000, num_classes: int = 10, seed: int = 5) -> MemorySplit:
    """Samples of 20 random pixels."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (size, *SHAPE), dtype=np.uint8)
    return MemorySplit(name, images, rng.integers(0, num_classes, size).astype(label_type(num_classes)), num_classes)


async def write_packed(
    target: Path | StoreTarget, split: MemorySplit, *, block_samples: int = 16, shard_blocks: int = 5
) -> PackedIndex:
    """Pack one split in blocks and shards of so many samples and blocks."""
    record_bytes = split.sample_bytes + 4
    splits: Mapping[str, MemorySplit] = {split.name: split}
    with ThreadPoolExecutor(2) as threads:
        return await pack(
            "random",
            (),
            splits,
            FolderTarget(target) if isinstance(target, Path) else target,
            threads=threads,
            block_bytes=block_samples * record_bytes,
            shard_bytes=shard_blocks * block_samples * record_bytes,
            report=lambda line: None,
        )


def flip(content: bytes, bit: int) -> bytes:
    """Return the content with one bit turned over."""
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)

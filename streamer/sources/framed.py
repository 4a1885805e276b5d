"""Data sets of any size as a network takes them: 28x28, grey, a split to test on, two classes at least."""

from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from functools import partial

import numpy as np

from imaging.framing import SIDE, Manner, frame
from streamer import slicing
from streamer.errors import DataError
from streamer.sources.packing import Readable
from streamer.sources.shards import in_thread
from streamer.sources.split import MemorySplit

SHAPE = (SIDE, SIDE)

MANNERS = {
    "stretch": Manner(framing="stretch"),
    # What is 28x28 already was framed by whoever made the data.
    "center": Manner(framing="auto"),
}
"""By the word behind a place."""


async def as_network_takes(
    splits: Mapping[str, Readable],
    manner: Manner,
    *,
    held_out: float,
    where: str,
    threads: Executor,
    report: Callable[[str], None],
) -> Mapping[str, Readable]:
    """
    Return a data set's splits with 28x28 grey images; where it has only one, a part of that becomes ``test``.

    Images that have this shape are what a network takes already, whoever made them so, and stay as they are.

    Args:
        splits: In memory, or of this shape.
        manner: How, as the gateway does it with files.
        held_out: Share of ``train`` that becomes ``test`` where there is none.
        where: Place, for messages.
        threads: Does what blocks.
        report: Told what becomes of the images.

    Raises:
        DataError: One class only, or images of another shape that are not in memory.
    """
    if any(split.num_classes < 2 for split in splits.values()):
        raise DataError(where, expected="at least two classes", found="one")
    framed: dict[str, Readable] = {}
    for name, split in splits.items():
        if tuple(split.image_shape) == SHAPE:
            framed[name] = split
        elif isinstance(split, MemorySplit):
            report(f"{where}: {split.num_samples:,} images of {_shown(split)} in {name} become {SIDE}x{SIDE}")
            framed[name] = await in_thread(threads, partial(_frame, split, manner))
        else:
            raise DataError(
                where,
                expected=f"packed images of {SIDE}x{SIDE}, grey",
                found=_shown(split),
                remedy="pack them anew from their folder: `sluice data pack FOLDER:stretch OUT`",
            )
    train = framed["train"]
    if len(framed) == 1 and isinstance(train, MemorySplit) and held_out and train.num_samples > 1:
        framed = await in_thread(threads, partial(_hold_out, train, held_out))
        report(f"{where}: has no test split; {framed['test'].num_samples:,} images of train become one")
    return framed


def _frame(split: MemorySplit, manner: Manner) -> MemorySplit:
    images = np.empty((split.num_samples, *SHAPE), np.uint8)
    for framed, image in zip(images, split.images, strict=True):
        framed[:] = frame(image, None, manner)
    return MemorySplit(split.name, images, split.labels, split.num_classes)


def _hold_out(train: MemorySplit, share: float) -> dict[str, Readable]:
    count = min(train.num_samples - 1, max(1, round(share * train.num_samples)))
    parts = {"train": f"train[:-{count}]", "test": f"train[-{count}:]"}
    return {name: _copied(name, train, split) for name, split in parts.items()}


def _copied(name: str, train: MemorySplit, split: str) -> MemorySplit:
    _, part = slicing.find(split, {"train": train})
    assert part is not None
    rows = np.sort(part.table())
    return MemorySplit(name, train.images[rows], train.labels[rows], train.num_classes)


def _shown(split: Readable) -> str:
    height, width, *depth = split.image_shape
    return f"{height}x{width}{' in colour' if depth else ''}"

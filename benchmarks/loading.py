"""Readers of the same samples in the trainer's own memory, by torch's ``DataLoader``; items are samples."""

from __future__ import annotations

from itertools import chain, repeat
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from benchmarks.turn import Work
from benchmarks.window import Window
from streamer.sources.declarations import declaration_of
from streamer.sources.idx import parse_images, parse_labels


class Batched(TensorDataset):
    """A ``TensorDataset`` that gives a whole batch at once."""

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, ...]:
        """Return the batch."""
        return tuple(tensor[indices] for tensor in self.tensors)


def tensors(data: str, batch_size: int, workers: int, threads: int | None = None) -> Work:
    """Read a ``TensorDataset`` as one does; ``threads`` is what torch may use in this process, None its default."""
    _use(threads)
    return read(TensorDataset(*in_memory(Path(data))), batch_size=batch_size, workers=workers)


def whole_batches(data: str, batch_size: int, workers: int, threads: int | None = None) -> Work:
    """Read with ``__getitems__``, so that nothing is left to collate; arguments are those of :func:`tensors`."""
    _use(threads)
    dataset = Batched(*in_memory(Path(data)))
    return read(dataset, batch_size=batch_size, workers=workers, collate_fn=_as_it_is)


def read(dataset: Dataset[Any], *, batch_size: int, workers: int, **options: Any) -> Work:
    """Read epoch after epoch, shuffled, of batches whose last part is labels; workers live on from one to the next."""

    def work(window: Window) -> None:
        loader = DataLoader(
            dataset,
            batch_size=batch_size,
            shuffle=True,
            num_workers=workers,
            persistent_workers=workers > 0,
            **options,
        )
        for _images, labels in chain.from_iterable(repeat(loader)):
            if window.add(len(labels)):
                return

    return work


def in_memory(data: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images, uint8 [N, 28, 28], and labels, int64 [N], of the training split in a folder of IDX files."""
    names = declaration_of("mnist").names["train"]
    images = parse_images((data / names.images).read_bytes(), file=names.images)
    labels = parse_labels((data / names.labels).read_bytes(), file=names.labels)
    return torch.tensor(images), torch.tensor(labels).long()


def _use(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


def _as_it_is(batch: Any) -> Any:
    return batch

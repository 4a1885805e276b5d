"""
A reader of the same samples by mosaicml-streaming from local disk; items are samples.

It runs in an environment of its own (``make .venv-bench/.ready``), as what that package wants does not go together with
what Sluice wants. Nothing of Sluice but the measuring is imported here.
"""

import importlib
import os
import sys
import warnings
from itertools import chain, repeat
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from benchmarks.turn import Work
from benchmarks.window import Window

_COLUMNS = {"image": "ndarray:uint8:28,28", "label": "int"}
_NUM_CLASSES = 10


def read(mds: str, images: str, batch_size: int, workers: int) -> Work:
    """
    Read a ``StreamingDataset`` through a ``DataLoader``, shuffled.

    Args:
        mds: Folder of the data set; written where it is missing.
        images: IDX file it is written from.
        batch_size: Samples in a batch.
        workers: Processes of the loader.
    """
    # What it hands to torch is read-only, and nobody here writes.
    warnings.filterwarnings("ignore", "The given NumPy array is not writable")
    streaming = _streaming()
    if not Path(mds).exists():
        _write(streaming, Path(mds), Path(images))
    dataset = streaming.StreamingDataset(local=mds, shuffle=True, batch_size=batch_size)

    def work(window: Window) -> None:
        loader = DataLoader(dataset, batch_size=batch_size, num_workers=workers, persistent_workers=workers > 0)
        for batch in chain.from_iterable(repeat(loader)):
            if window.add(len(batch["label"])):
                return

    return work


def _write(streaming: Any, mds: Path, images: Path) -> None:
    pixels = np.fromfile(images, np.uint8, offset=16).reshape(-1, 28, 28)
    new = mds.with_name(f"{mds.name}.{os.getpid()}")
    with streaming.MDSWriter(out=str(new), columns=_COLUMNS) as writer:
        for number, image in enumerate(pixels):
            writer.write({"image": image, "label": number % _NUM_CLASSES})
    new.rename(mds)


def _streaming() -> Any:
    """Import it without its parts for text and vision, which want transformers and torchvision and are not measured."""
    for name in ("streaming.multimodal", "streaming.text", "streaming.vision", "transformers"):
        sys.modules[name] = ModuleType(name)
    for name, kind in (("feature_extraction_utils", "BatchFeature"), ("tokenization_utils_base", "BatchEncoding")):
        module = ModuleType(f"transformers.{name}")
        setattr(module, kind, type(kind, (), {}))
        sys.modules[module.__name__] = module
    return importlib.import_module("streaming")

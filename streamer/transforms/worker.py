"""
A process that transforms batches for :class:`streamer.transforms.pool.TransformPool`, one after the other.

``python -m streamer.transforms.worker SOCKET MEMORY BYTES [MODULE...]``: descriptors of a socket and of shared memory,
the memory's size, and modules to import first. Requests and answers are lines of JSON; samples lie in the memory. Ends
when the other side of the socket does, however that happens.
"""

import functools
import importlib
import json
import math
import mmap
import socket
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamer.errors import TransformError
from streamer.transforms.transform import Transform, parse

_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Layout:
    """Where indices, images and results of ``count`` samples lie in the memory."""

    transform: Transform
    count: int

    @property
    def size(self) -> int:
        """Bytes in all."""
        return self._results_at + self.count * self.transform.sample_bytes

    def indices(self, memory: mmap.mmap) -> NDArray[np.int64]:
        """Return the samples' indices, shape (count,)."""
        return np.frombuffer(memory, np.int64, self.count)

    def images(self, memory: mmap.mmap) -> NDArray[np.uint8]:
        """Return what goes in."""
        shape = self.transform.input_shape
        flat = np.frombuffer(memory, np.uint8, self.count * math.prod(shape), self._images_at)
        return flat.reshape(self.count, *shape)

    def results(self, memory: mmap.mmap) -> NDArray[np.generic]:
        """Return what comes out."""
        shape = self.transform.image_shape
        flat = np.frombuffer(memory, self.transform.dtype, self.count * math.prod(shape), self._results_at)
        return flat.reshape(self.count, *shape)

    @property
    def _images_at(self) -> int:
        return _aligned(8 * self.count)

    @property
    def _results_at(self) -> int:
        return _aligned(self._images_at + self.count * math.prod(self.transform.input_shape))


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def main(arguments: list[str]) -> None:
    """Answer requests until there are no more."""
    descriptor, memory_descriptor, size, *modules = arguments
    for module in modules:
        importlib.import_module(module)
    with (
        mmap.mmap(int(memory_descriptor), int(size)) as memory,
        socket.socket(fileno=int(descriptor)) as connection,
        connection.makefile("rwb") as lines,
    ):
        try:
            _answer(lines, {})  # ready
            for line in lines:
                _answer(lines, _work(memory, json.loads(line)))
        except ConnectionError:
            pass  # nobody waits for answers any more


def _answer(lines: Any, answer: dict[str, object]) -> None:
    lines.write(json.dumps(answer).encode() + b"\n")
    lines.flush()


def _work(memory: mmap.mmap, request: dict[str, Any]) -> dict[str, object]:
    try:
        layout = Layout(_transform(request["spec"], tuple(request["shape"])), request["count"])
        images, indices = layout.images(memory), layout.indices(memory)
        results = layout.transform.apply(images, indices, seed=request["seed"], epoch=request["epoch"])
        np.copyto(layout.results(memory), results)
    except TransformError as error:
        return {"index": error.index, "problem": error.problem}
    except Exception as error:
        return {"problem": f"{type(error).__name__}: {error}"}
    return {}


@functools.lru_cache(maxsize=32)
def _transform(spec: str, shape: tuple[int, ...]) -> Transform:
    return parse(spec, image_shape=shape)


if __name__ == "__main__":
    main(sys.argv[1:])

"""Ways in which Triton can run the same model; asked directly, the fastest of them is what the gateway has to match."""

import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import product

from benchmarks.serving import Served
from benchmarks.versions import MODEL

_NAME = re.compile(r'^name: ".*"$', re.MULTILINE)
_INSTANCES = re.compile(r"^instance_group \[.*\]$", re.MULTILINE)
_BATCHING = re.compile(r"^dynamic_batching \{.*\}$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """One of them."""

    threads: int
    """Intra-op, of each instance."""
    instances: int
    delay_microseconds: int
    """Longest wait for a larger batch."""

    def __str__(self) -> str:
        return (
            f"{self.threads} thread{'s'[: self.threads != 1]}, {self.instances} "
            f"instance{'s'[: self.instances != 1]}, delay {self.delay_microseconds} µs"
        )

    @property
    def model(self) -> str:
        """Name under which Triton serves it beside the model itself."""
        return f"{MODEL}_{self.threads}_{self.instances}_{self.delay_microseconds}"


WAYS = tuple(
    Way(threads=threads, instances=instances, delay_microseconds=delay)
    for threads, instances, delay in product((1, 2), (1, 2), (0, 200))
)


def is_shipped(way: Way, threads: int) -> bool:
    """Tell whether this is how the line runs it by itself, with so many threads."""
    return way == Way(threads=threads, instances=1, delay_microseconds=0)


def config_of(shipped: str, way: Way) -> str:
    """
    Return a ``config.pbtxt`` that differs from the shipped one in this way alone.

    Raises:
        ValueError: The shipped one is not of the form that ``sluice publish`` writes.
    """
    group = f"instance_group [ {{ kind: KIND_AUTO count: {way.instances} }} ]"
    batching = f"dynamic_batching {{ max_queue_delay_microseconds: {way.delay_microseconds} }}"
    text, num_replaced = shipped, 0
    for pattern, line in ((_NAME, f'name: "{way.model}"'), (_INSTANCES, group), (_BATCHING, batching)):
        text, num = pattern.subn(line, text)
        num_replaced += num
    if num_replaced != 3:
        raise ValueError("config.pbtxt has no line each for name, instance_group and dynamic_batching")
    # libtorch's own parameter, which outweighs what the server was started with.
    threads = f'{{ key: "INTRA_OP_THREAD_COUNT" value: {{ string_value: "{way.threads}" }} }}'
    return f"{text.rstrip()}\nparameters {threads}\n"


@asynccontextmanager
async def loaded(served: Served, way: Way) -> AsyncIterator[str]:
    """
    Have Triton serve the model in this way until this is left; yields the name to ask for.

    Raises:
        serving.errors.ControlError: It does not load.
    """
    if is_shipped(way, served.threads):
        yield MODEL
        return
    folder = served.repository / way.model
    shutil.copytree(served.repository / MODEL / "1", folder / "1")
    (folder / "config.pbtxt").write_text(config_of(served.version.config, way))
    await served.control.load(way.model)
    try:
        yield way.model
    finally:
        await served.control.unload(way.model)
        shutil.rmtree(folder)

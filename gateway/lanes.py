"""The lanes of one gateway: one for each output of each version that is asked for."""

import asyncio
import math
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

from gateway.cache import RowCache
from gateway.coalesce import BatchRecord, Infer, Lane, Traces
from gateway.errors import GatewayError
from gateway.models import ServedModel, ServedVersion
from gateway.triton import EMBEDDING, PROBABILITIES, Output

Asking = Callable[[str, int, Output, int], Infer]
"""Model, version, output, and the length of its rows, to what sends images there."""

_Key = tuple[str, int, str, str, int]


class Lanes:
    """
    Every lane in use; made when a version is first asked for, and kept until the version goes.

    Args:
        asking: Where their batches go.
        timeout_seconds: After which a batch is given up.
        may_cancel: Whether one may be cancelled for which nobody waits any more.
        batches_per_instance: Batches in flight for each instance of the model, over all Tritons.
        joins: Whether equal images that are under way at the same time are asked once.
        cache: Of answers, shared by all lanes; nothing is kept of versions whose card does not tell their weights.
        traces: Told of each batch before it leaves.
        on_batch: Told of each batch that ended.
    """

    def __init__(
        self,
        asking: Asking,
        *,
        timeout_seconds: float,
        may_cancel: Callable[[], bool],
        batches_per_instance: int,
        joins: bool,
        cache: RowCache,
        traces: Traces | None,
        on_batch: Callable[[BatchRecord], None],
    ) -> None:
        self._asking = asking
        self._timeout_seconds = timeout_seconds
        self._may_cancel = may_cancel
        self._batches_per_instance = batches_per_instance
        self._joins = joins
        self._cache = cache
        self._traces = traces
        self._on_batch = on_batch
        self._lanes: dict[_Key, Lane] = {}
        self._served: dict[_Key, ServedVersion] = {}
        # Of versions that went while work for them was under way.
        self._leaving: list[tuple[_Key, Lane]] = []
        # Sums of what lanes that are gone have counted.
        self._num_joined = self._num_dropped = self._num_retried = 0

    def __iter__(self) -> Iterator[Lane]:
        return (lane for _, lane in self._all())

    def of(self, version: ServedVersion, output: Output) -> Lane:
        """Return the lane to one output of a version."""
        key = _key(version, output)
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = self._open(version, output)
        return lane

    def least_expected_seconds(self, output: Output, identity: str) -> float:
        """Return how soon one image of a caller could be answered by whatever gives this output; 0 is at once."""
        least = math.inf
        for key in self._served:
            if key[3] == output.name:
                lane = self._lanes.get(key)
                least = min(least, lane.expected_seconds(1, identity) if lane is not None else 0.0)
                if not least:
                    return 0.0
        return least if least < math.inf else 0.0

    def fail_waiting(self, model: str, version: int, error: GatewayError) -> None:
        """Answer all that wait for a version, and have not left yet, with an error."""
        for key, lane in self._all():
            if key[:2] == (model, version):
                lane.fail_waiting(error)

    def keep(self, models: Iterable[ServedModel]) -> None:
        """
        Take in what is served: lanes of other versions end with what is under way.

        Who asks for such a version later gets another lane, which knows nothing of the answers and the pace of before.
        """
        self._served = served = {
            _key(version, output): version
            for model in models
            for version in model.versions
            for output in (PROBABILITIES, EMBEDDING)
        }
        for key, lane in list(self._lanes.items()):
            version = served.get(key)
            if version is None:
                self._leaving.append((key, self._lanes.pop(key)))
            else:
                lane.max_batch_size, lane.num_instances = version.max_batch_size, version.num_instances
        for one in [one for one in self._leaving if one[1].is_idle]:
            self._leaving.remove(one)
            _, lane = one
            self._num_joined += lane.num_joined
            self._num_dropped += lane.num_dropped
            self._num_retried += lane.num_retried

    async def drained(self, timeout_seconds: float) -> None:
        """Wait until no batch is in flight, so long at most."""
        try:
            async with asyncio.timeout(timeout_seconds):
                for lane in list(self):
                    await lane.drained()
        except TimeoutError:
            pass

    @property
    def num_joined(self) -> int:
        """Images so far that were answered together with an equal one."""
        return self._num_joined + sum(lane.num_joined for lane in self)

    @property
    def num_dropped(self) -> int:
        """Images so far whose callers had gone before they left for Triton."""
        return self._num_dropped + sum(lane.num_dropped for lane in self)

    @property
    def num_retried(self) -> int:
        """Images so far that were tried again by themselves."""
        return self._num_retried + sum(lane.num_retried for lane in self)

    def _all(self) -> Iterable[tuple[_Key, Lane]]:
        return chain(self._lanes.items(), self._leaving)

    def _open(self, version: ServedVersion, output: Output) -> Lane:
        return Lane(
            self._asking(version.name, version.version, output, _width(version, output)),
            output.holds,
            output.promise,
            max_batch_size=version.max_batch_size,
            num_instances=version.num_instances,
            batches_per_instance=self._batches_per_instance,
            timeout_seconds=self._timeout_seconds,
            may_cancel=self._may_cancel,
            joins=self._joins,
            cache=self._cache if version.card.digest else None,
            traces=self._traces,
            on_batch=self._on_batch,
        )


def _key(version: ServedVersion, output: Output) -> _Key:
    # With the weights' digest: what is published again under an old number is another model.
    return version.name, version.version, version.card.digest, output.name, _width(version, output)


def _width(version: ServedVersion, output: Output) -> int:
    return version.embedding_width if output is EMBEDDING else len(version.class_names)

import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from threading import Lock

from google.protobuf.descriptor import ServiceDescriptor
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from rpc.health import Health
from rpc.telemetry import MethodMetrics, Registry, method_metrics
from streamer.flow import Credit
from streamer.settings import StreamerSettings
from streamer.sources.cache import BLOCKS_FOLDER, shown_bytes
from streamer.sources.tally import Tally
from streamer.transforms.pool import TransformPool

Amounts = tuple[int, int, int, int]
"""
Samples, bytes, nanoseconds of waiting for readers, and those of them that were for credit.

Whole numbers: a sum of fractions in another order may be less by a rounding.
"""

_NOTHING: Amounts = (0, 0, 0, 0)
# Seconds: from a batch out of memory to one that waits for object storage.
_BOUNDS = (0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
_LABELS = (*map(str, _BOUNDS), "+Inf")


class Durations:
    """How long something took, time and again: a histogram that one thread writes and another may read."""

    __slots__ = ("_counts", "_nanoseconds")

    def __init__(self) -> None:
        self._counts = [0] * len(_LABELS)
        self._nanoseconds = 0

    def add(self, seconds: float) -> None:
        """Count one."""
        self._counts[bisect_left(_BOUNDS, seconds)] += 1
        self._nanoseconds += int(seconds * 1e9)

    def buckets(self) -> list[tuple[str, float]]:
        """Return how many there were up to each bound."""
        # Copied first, at one moment.
        return list(zip(_LABELS, accumulate(map(float, self._counts.copy())), strict=True))

    @property
    def seconds(self) -> float:
        """Of all together."""
        return self._nanoseconds / 1e9


class Making:
    """How long the batches of one data set took to make."""

    __slots__ = ("read", "transform")

    def __init__(self) -> None:
        self.read = Durations()
        self.transform = Durations()


class Sending:
    """
    What one stream has sent so far.

    Plain numbers that one thread writes and another may read: samples can go out one by one, ten thousands a second.

    Attributes:
        credit: The reader's, where it grants any.
    """

    __slots__ = (
        "_asked",
        "_credit_waited",
        "_longest_credit_wait",
        "_longest_wait",
        "_making",
        "_num_bytes",
        "_num_samples",
        "_since",
        "_waited",
        "credit",
    )

    def __init__(self, making: Making | None = None) -> None:
        self._making = making or Making()
        self.credit: Credit | None = None
        self._num_samples = 0
        self._num_bytes = 0
        # How long it waited before, and since when it waits now, if it does.
        self._waited = 0
        self._since: int | None = None
        self._longest_wait = 0
        self._credit_waited = 0
        self._asked: int | None = None
        self._longest_credit_wait = 0

    def made(self, read_seconds: float, transform_seconds: float) -> None:
        """Count a batch that was made; 0 seconds where nothing was transformed."""
        making = self._making
        making.read.add(read_seconds)
        if transform_seconds:
            making.transform.add(transform_seconds)

    def ask(self) -> None:
        """Begin to wait until the reader grants more."""
        self._asked = time.perf_counter_ns()

    def go_on(self) -> None:
        """End the wait that :meth:`ask` began."""
        asked = self._asked
        assert asked is not None
        # As in count().
        self._asked = None
        self._credit_waited += time.perf_counter_ns() - asked

    def offer(self) -> None:
        """Begin to wait until a message is taken."""
        self._since = time.perf_counter_ns()

    def count(self, num_samples: int, num_bytes: int) -> None:
        """Count the message that was offered, now that it is taken."""
        since = self._since
        assert since is not None
        # In this order, and read in the other one: what is seen in between lacks this wait, and never has it twice.
        self._since = None
        self._waited += time.perf_counter_ns() - since
        self._num_samples += num_samples
        self._num_bytes += num_bytes

    def amounts(self) -> Amounts:
        """Return what was sent and how long it took, none of it less than the last time; for one thread at a time."""
        # Seen from another thread, a wait lasts a moment longer than it is counted in the end.
        self._longest_wait = max(self._longest_wait, _so_far(self._waited, self._since))
        self._longest_credit_wait = max(self._longest_credit_wait, _so_far(self._credit_waited, self._asked))
        waited = self._longest_wait + self._longest_credit_wait
        return self._num_samples, self._num_bytes, waited, self._longest_credit_wait


def _so_far(waited: int, since: int | None) -> int:
    return waited if since is None else waited + time.perf_counter_ns() - since


class _Sent:
    """What the streams of one data set have sent, those that ended and those that go on."""

    def __init__(self) -> None:
        self.making = Making()
        self._lock = Lock()
        self._ended = _NOTHING
        self._streams: set[Sending] = set()

    def add(self, stream: Sending) -> None:
        with self._lock:
            self._streams.add(stream)

    def end(self, stream: Sending) -> None:
        with self._lock:
            self._streams.remove(stream)
            self._ended = _sum(self._ended, stream.amounts())

    def unacknowledged(self) -> int:
        with self._lock:
            return sum(stream.credit.unacknowledged for stream in self._streams if stream.credit is not None)

    def amounts(self) -> Amounts:
        with self._lock:
            return _sum(self._ended, *(stream.amounts() for stream in self._streams))


def _sum(*amounts: Amounts) -> Amounts:
    samples, sizes, waits, credit_waits = zip(*amounts, strict=True)
    return sum(samples), sum(sizes), sum(waits), sum(credit_waits)


class StreamerMetrics(Collector):
    """
    Everything that one streamer shows at ``/metrics``.

    Args:
        descriptors: Of the services whose calls are measured.
        health: Read for readiness.
        settings: Limits, and where the cache is.
        tally: Of what is read from disk and object storage.

    Attributes:
        registry: What the endpoint shows.
        methods: For the interceptor.
        pool: For transforms, once there is one.
        worker_restarts: Workers that died and were started again.
    """

    registry: Registry
    methods: Mapping[str, MethodMetrics]
    pool: TransformPool | None
    worker_restarts: int

    def __init__(
        self, descriptors: Sequence[ServiceDescriptor], *, health: Health, settings: StreamerSettings, tally: Tally
    ) -> None:
        self._health = health
        self._settings = settings
        self._tally = tally
        self.pool = None
        self.worker_restarts = 0
        self._sent: dict[str, _Sent] = {}
        self.registry = Registry("streamer")
        self.methods = method_metrics("streamer", descriptors, self.registry)
        self.registry.register(self)

    def add_datasets(self, names: Iterable[str]) -> None:
        """Show data sets from now on; these names are all the values that the label ``dataset`` ever takes."""
        self._sent |= {name: _Sent() for name in names}

    @contextmanager
    def sending(self, dataset: str) -> Iterator[Sending]:
        """Measure a stream of this data set, while it goes on too; one of an unknown data set is shown nowhere."""
        sent = self._sent.get(dataset) or _Sent()
        stream = Sending(sent.making)
        sent.add(stream)
        try:
            yield stream
        finally:
            sent.end(stream)

    def collect(self) -> Iterable[Metric]:
        """Yield what is not measured by method."""
        is_serving = self._health.is_serving
        yield _gauge("streamer_serving", "1 while readers can come, else 0.", is_serving)
        yield _gauge("streamer_workers", "Processes that readers can come to.", is_serving)
        restarts = "Processes that died, hung or did not start, and were started again."
        yield _counter("streamer_worker_restarts", restarts, self.worker_restarts)
        limit = "Streams of samples beyond which one more is refused."
        yield _gauge("streamer_streams_in_flight_limit", limit, self._settings.max_streams)
        yield from self._by_dataset()
        yield from self._of_transforms()
        yield from self._of_storage()

    def _by_dataset(self) -> Iterable[Metric]:
        label = ["dataset"]
        samples = CounterMetricFamily("streamer_sent_samples", "Samples that went out.", labels=label)
        sizes = CounterMetricFamily("streamer_sent_bytes", "Size of the messages with them.", labels=label)
        waits = CounterMetricFamily(
            "streamer_send_wait_seconds", "Time in which streams waited to be rid of a message.", labels=label
        )
        credit_waits = CounterMetricFamily(
            "streamer_credit_wait_seconds", "The part of it that was for readers to grant more.", labels=label
        )
        unacknowledged = GaugeMetricFamily(
            "streamer_unacknowledged_bytes",
            "Images and labels sent under credits and not granted again since.",
            labels=label,
        )
        reads = HistogramMetricFamily(
            "streamer_batch_read_seconds", "Time to find and read the samples of a batch.", labels=label
        )
        transforms = HistogramMetricFamily(
            "streamer_batch_transform_seconds",
            "Time to transform a batch, and to wait for a turn at it; of batches that are transformed.",
            labels=label,
        )
        for dataset, sent in list(self._sent.items()):
            unacknowledged.add_metric([dataset], sent.unacknowledged())
            num_samples, num_bytes, nanoseconds, for_credit = sent.amounts()
            samples.add_metric([dataset], num_samples)
            sizes.add_metric([dataset], num_bytes)
            waits.add_metric([dataset], nanoseconds / 1e9)
            credit_waits.add_metric([dataset], for_credit / 1e9)
            for family, durations in ((reads, sent.making.read), (transforms, sent.making.transform)):
                family.add_metric([dataset], durations.buckets(), durations.seconds)
        yield from (samples, sizes, waits, credit_waits, unacknowledged, reads, transforms)

    def _of_transforms(self) -> Iterable[Metric]:
        pool = self.pool
        waiting, busy, workers, restarts = (
            (pool.waiting, pool.busy, pool.num_workers, pool.restarts) if pool else (0, 0, 0, 0)
        )
        yield _gauge("streamer_transform_batches_waiting", "Batches that wait for a turn to be transformed.", waiting)
        yield _gauge("streamer_transform_workers", "Processes for transforms, started with the first one.", workers)
        yield _gauge("streamer_transform_workers_busy", "Processes for transforms that are at work.", busy)
        text = "Processes for transforms that ended, or did not answer, and were started again."
        yield _counter("streamer_transform_worker_restarts", text, restarts)

    def _of_storage(self) -> Iterable[Metric]:
        counts = self._tally.counts()
        for name, text, count in (
            ("streamer_cache_hits", "Blocks read from the local cache.", counts.cache_hits),
            ("streamer_cache_misses", "Blocks that were not in it, or damaged.", counts.cache_misses),
            ("streamer_cache_evictions", "Blocks removed from it to make room.", counts.evictions),
            ("streamer_cache_refusals", "Blocks used but not kept, for want of room.", counts.uncached),
            ("streamer_storage_answers", "Objects and ranges that object storage sent.", counts.fetched_objects),
            ("streamer_storage_received_bytes", "Bytes in them.", counts.fetched_bytes),
            ("streamer_storage_retries", "Requests made to it again after a failure.", counts.retries),
            ("streamer_checksum_failures", "Blocks and samples other than written.", counts.checksum_failures),
        ):
            yield _counter(name, text, count)
        used = shown_bytes(self._settings.cache / BLOCKS_FOLDER)
        yield _gauge("streamer_cache_bytes", "Size of all blocks in the cache, whoever put them there.", used)
        yield _gauge("streamer_cache_limit_bytes", "What it may come to.", self._settings.cache_bytes)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value)

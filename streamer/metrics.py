import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Lock

from google.protobuf.descriptor import ServiceDescriptor
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from rpc.health import Health
from rpc.telemetry import MethodMetrics, Registry, method_metrics

Amounts = tuple[int, int, int]
"""Samples, bytes, nanoseconds. Whole numbers: a sum of fractions in another order may be less by a rounding."""


class Sending:
    """
    What one stream has sent so far.

    Plain numbers that one thread writes and another may read: samples can go out one by one, ten thousands a second.
    """

    __slots__ = ("_longest_wait", "_num_bytes", "_num_samples", "_since", "_waited")

    def __init__(self) -> None:
        self._num_samples = 0
        self._num_bytes = 0
        # How long it waited before, and since when it waits now, if it does.
        self._waited = 0
        self._since: int | None = None
        self._longest_wait = 0

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
        waited = self._waited
        since = self._since
        if since is not None:
            waited += time.perf_counter_ns() - since
        # Seen from another thread, a wait lasts a moment longer than it is counted in the end.
        self._longest_wait = max(self._longest_wait, waited)
        return self._num_samples, self._num_bytes, self._longest_wait


class _Sent:
    """What the streams of one data set have sent, those that ended and those that go on."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._ended: Amounts = (0, 0, 0)
        self._streams: set[Sending] = set()

    def add(self, stream: Sending) -> None:
        with self._lock:
            self._streams.add(stream)

    def end(self, stream: Sending) -> None:
        with self._lock:
            self._streams.remove(stream)
            self._ended = _sum(self._ended, stream.amounts())

    def amounts(self) -> Amounts:
        with self._lock:
            return _sum(self._ended, *(stream.amounts() for stream in self._streams))


def _sum(*amounts: Amounts) -> Amounts:
    samples, sizes, waits = zip(*amounts, strict=True)
    return sum(samples), sum(sizes), sum(waits)


class StreamerMetrics(Collector):
    """
    Everything that one streamer shows at ``/metrics``.

    Args:
        descriptors: Of the services whose calls are measured.
        health: Read for readiness.
        max_streams: Shown as the limit.

    Attributes:
        registry: What the endpoint shows.
        methods: For the interceptor.
    """

    registry: Registry
    methods: Mapping[str, MethodMetrics]

    def __init__(self, descriptors: Sequence[ServiceDescriptor], *, health: Health, max_streams: int) -> None:
        self._health = health
        self._max_streams = max_streams
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
        sent, stream = self._sent.get(dataset, _Sent()), Sending()
        sent.add(stream)
        try:
            yield stream
        finally:
            sent.end(stream)

    def collect(self) -> Iterable[Metric]:
        """Yield what is not measured by method."""
        yield GaugeMetricFamily("streamer_serving", "1 while readers can come, else 0.", self._health.is_serving)
        yield GaugeMetricFamily(
            "streamer_streams_in_flight_limit",
            "Streams of samples beyond which one more is refused.",
            self._max_streams,
        )
        samples = CounterMetricFamily("streamer_sent_samples", "Samples that went out.", labels=["dataset"])
        sizes = CounterMetricFamily("streamer_sent_bytes", "Size of the messages with them.", labels=["dataset"])
        waits = CounterMetricFamily(
            "streamer_send_wait_seconds", "Time in which streams waited to be rid of a message.", labels=["dataset"]
        )
        for dataset, sent in list(self._sent.items()):
            num_samples, num_bytes, nanoseconds = sent.amounts()
            samples.add_metric([dataset], num_samples)
            sizes.add_metric([dataset], num_bytes)
            waits.add_metric([dataset], nanoseconds / 1e9)
        yield from (samples, sizes, waits)

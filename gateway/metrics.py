"""What one gateway tells of itself in numbers."""

from collections import Counter
from collections.abc import Iterable, Mapping

from google.protobuf.descriptor import ServiceDescriptor
from prometheus_client import Histogram, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from gateway.admission import REASONS, Admission
from gateway.cache import RowCache
from gateway.coalesce import BatchRecord
from gateway.fleet import Fleet
from gateway.lanes import Lanes
from gateway.models import Catalog
from rpc.health import Health
from rpc.telemetry import MethodMetrics, Registry, method_metrics

_SECONDS = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class GatewayMetrics(Collector):
    """
    Everything that one gateway shows at ``/metrics``; read where it is kept, whenever somebody looks.

    Args:
        descriptors: Of the services whose calls are measured.
        admission: Read for images.
        health: Read for readiness.

    Attributes:
        registry: What the endpoint shows.
        methods: For the interceptor.
        worker_restarts: Workers that died and were started again.
    """

    registry: Registry
    methods: Mapping[str, MethodMetrics]
    worker_restarts: int

    def __init__(self, descriptors: Iterable[ServiceDescriptor], *, admission: Admission, health: Health) -> None:
        self._admission = admission
        self._health = health
        self._lanes: Lanes | None = None
        self._fleet: Fleet | None = None
        self._cache: RowCache | None = None
        self._catalog: Catalog | None = None
        # Of every version that ever answered, so that one that comes back counts on.
        self._num_answers: Counter[tuple[str, int]] = Counter()
        self.worker_restarts = 0
        self._num_upstream_errors = 0
        self._expected_seconds = self._busy_seconds = 0.0
        self.registry = Registry("gateway")
        self.methods = method_metrics("gateway", descriptors, self.registry)
        self._batch_images = self._histogram("batch_images", "Images in each request to Triton.", _IMAGES)
        self._batch_seconds = self._histogram("batch_seconds", "Time of each request to Triton.", _SECONDS)
        self._batch_wait = self._histogram(
            "batch_wait_seconds", "How long the image waited that had waited longest when its batch left.", _SECONDS
        )
        self._loop_lag = self._histogram("loop_lag_seconds", "How late the event loop came to a timer.", _SECONDS)
        self.registry.register(self)

    def watch(self, lanes: Lanes, fleet: Fleet, cache: RowCache, catalog: Catalog) -> None:
        """Show these as well; made after the metrics, as they report to them."""
        self._lanes, self._fleet, self._cache, self._catalog = lanes, fleet, cache, catalog

    def count_answer(self, model: str, version: int) -> None:
        """Count a request, or one of a stream, that a version answered."""
        self._num_answers[model, version] += 1

    def count_upstream_error(self) -> None:
        """Count an inference that failed."""
        self._num_upstream_errors += 1

    def observe_batch(self, record: BatchRecord) -> None:
        """Take in a batch that ended."""
        self._batch_images.observe(record.num_images)
        self._batch_seconds.observe(record.seconds)
        self._batch_wait.observe(record.waited_seconds)
        if record.expected_seconds:
            self._expected_seconds += record.expected_seconds
            self._busy_seconds += record.busy_seconds

    def observe_lag(self, seconds: float) -> None:
        """Take in how late a timer of the event loop was."""
        self._loop_lag.observe(seconds)

    def collect(self) -> Iterable[Metric]:
        """Yield what is not measured by method."""
        is_serving = self._health.is_serving
        yield GaugeMetricFamily(
            "gateway_serving", "1 while the last inference of the probe worked, else 0.", is_serving
        )
        yield GaugeMetricFamily("gateway_workers", "Processes whose last inference of the probe worked.", is_serving)
        yield CounterMetricFamily(
            "gateway_worker_restarts",
            "Processes that died, hung or did not start, and were started again.",
            self.worker_restarts,
        )
        yield from self._of_admission()
        yield CounterMetricFamily(
            "gateway_upstream_errors", "Inferences for callers that Triton did not answer.", self._num_upstream_errors
        )
        yield CounterMetricFamily(
            "gateway_batch_expected_seconds", "What batches were expected to keep Triton busy.", self._expected_seconds
        )
        yield CounterMetricFamily("gateway_batch_busy_seconds", "What those batches kept it busy.", self._busy_seconds)
        if self._lanes is not None:
            yield from _of_lanes(self._lanes)
        if self._fleet is not None:
            yield from _of_fleet(self._fleet)
        if self._catalog is not None:
            yield self._of_versions(self._catalog)
        if self._cache is not None:
            yield from _of_cache(self._cache)

    def _of_admission(self) -> Iterable[Metric]:
        admission = self._admission
        yield GaugeMetricFamily(
            "gateway_images_in_flight", "Images being worked on, also for callers that left.", admission.num_images
        )
        yield GaugeMetricFamily(
            "gateway_images_in_flight_limit", "Images in flight beyond which calls are refused.", admission.max_images
        )
        yield GaugeMetricFamily(
            "gateway_image_bytes_in_flight", "Bytes of their requests, as they came.", admission.num_bytes
        )
        yield CounterMetricFamily("gateway_images_admitted", "Images that were let in.", admission.num_admitted)
        refused = CounterMetricFamily(
            "gateway_images_refused", "Images refused before anything was begun.", labels=["reason"]
        )
        for reason in REASONS:
            refused.add_metric([reason], admission.num_refused[reason])
        yield refused

    def _of_versions(self, catalog: Catalog) -> Metric:
        answers = CounterMetricFamily(
            "gateway_version_requests", "Requests that each version answered.", labels=["model", "version"]
        )
        # Those that answer now: no caller adds one, and old ones do not pile up.
        for model in catalog.listing():
            for served in model.versions:
                count = self._num_answers[model.name, served.version]
                answers.add_metric([model.name, str(served.version)], count)
        return answers

    def _histogram(self, name: str, words: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"gateway_{name}", words, registry=self.registry, buckets=buckets)


def _of_lanes(lanes: Lanes) -> Iterable[Metric]:
    yield GaugeMetricFamily(
        "gateway_images_waiting", "Images that wait for a batch.", sum(lane.num_waiting for lane in lanes)
    )
    yield GaugeMetricFamily(
        "gateway_images_at_triton", "Images whose batch is at Triton.", sum(lane.num_in_flight for lane in lanes)
    )
    yield CounterMetricFamily(
        "gateway_images_joined", "Images answered together with an equal one, at no cost.", lanes.num_joined
    )
    yield CounterMetricFamily(
        "gateway_images_dropped", "Images whose callers had gone before their batch left.", lanes.num_dropped
    )
    yield CounterMetricFamily(
        "gateway_images_retried", "Images tried again by themselves after their batch failed.", lanes.num_retried
    )


def _of_fleet(fleet: Fleet) -> Iterable[Metric]:
    images = GaugeMetricFamily("gateway_triton_images", "Images that each Triton works on.", labels=["triton"])
    ejections = CounterMetricFamily(
        "gateway_triton_ejections", "How often a Triton was left out for a model that it failed.", labels=["triton"]
    )
    for endpoint in fleet.endpoints:
        images.add_metric([endpoint.address], endpoint.num_images)
        ejections.add_metric([endpoint.address], endpoint.num_ejections)
    yield images
    yield ejections


def _of_cache(cache: RowCache) -> Iterable[Metric]:
    yield GaugeMetricFamily("gateway_cache_rows", "Answers that are kept.", len(cache))
    yield GaugeMetricFamily("gateway_cache_rows_limit", "How many may be kept; 0 is no cache.", cache.max_rows)
    yield CounterMetricFamily("gateway_cache_hits", "Images answered from the cache.", cache.num_hits)
    yield CounterMetricFamily("gateway_cache_misses", "Images looked for in it in vain.", cache.num_misses)

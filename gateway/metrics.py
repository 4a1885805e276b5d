from collections.abc import Iterable, Mapping

from google.protobuf.descriptor import ServiceDescriptor
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from gateway.admission import Admission
from rpc.health import Health
from rpc.telemetry import MethodMetrics, Registry, method_metrics


class GatewayMetrics(Collector):
    """
    Everything that one gateway shows at ``/metrics``; read where it is kept, whenever somebody looks.

    Args:
        descriptor: Of the service whose calls are measured.
        admission: Read for images.
        health: Read for readiness.

    Attributes:
        registry: What the endpoint shows.
        methods: For the interceptor.
    """

    registry: Registry
    methods: Mapping[str, MethodMetrics]

    def __init__(self, descriptor: ServiceDescriptor, *, admission: Admission, health: Health) -> None:
        self._admission = admission
        self._health = health
        self._num_upstream_errors = 0
        self.registry = Registry("gateway")
        self.methods = method_metrics("gateway", [descriptor], self.registry)
        self.registry.register(self)

    def count_upstream_error(self) -> None:
        """Count an inference that failed."""
        self._num_upstream_errors += 1

    def collect(self) -> Iterable[Metric]:
        """Yield what is not measured by method."""
        admission = self._admission
        yield GaugeMetricFamily(
            "gateway_serving", "1 while the last inference of the probe worked, else 0.", self._health.is_serving
        )
        yield GaugeMetricFamily(
            "gateway_images_in_flight", "Images being worked on, also for callers that left.", admission.num_images
        )
        yield GaugeMetricFamily(
            "gateway_images_in_flight_limit", "Images in flight beyond which calls are refused.", admission.max_images
        )
        yield CounterMetricFamily("gateway_images_admitted", "Images that were let in.", admission.num_admitted)
        yield CounterMetricFamily(
            "gateway_images_refused", "Images refused because the limit was reached.", admission.num_refused
        )
        yield CounterMetricFamily(
            "gateway_upstream_errors", "Inferences for callers that Triton did not answer.", self._num_upstream_errors
        )

"""
OpenTelemetry traces of calls, where a collector is named; W3C context comes in with a call and goes on to the next.

A call is a span of its own. A batch that carries images of many calls has no one parent: it is a span linked to each
of theirs (https://opentelemetry.io/docs/specs/otel/trace/api/#link), under the first one's trace.
"""

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from threading import Thread
from typing import TYPE_CHECKING

import grpc

from rpc.settings import SettingsError

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, SpanContext

# For what is left to send when the process ends.
_FLUSH_SECONDS = 2.0


class Tracer:
    """
    Sends spans to a collector by OTLP over gRPC, in batches, from a thread of its own.

    Args:
        endpoint: ``host:port`` of the collector, in plaintext; ``https://host:port`` over TLS.
        service: What the collector shows these spans under.

    Raises:
        SettingsError: OpenTelemetry is not installed.
    """

    def __init__(self, endpoint: str, service: str) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise SettingsError(
                f"otlp_endpoint = {endpoint}: traces need OpenTelemetry: pip install '.[tracing]'"
            ) from error
        is_secure = endpoint.startswith("https://")
        exporter = OTLPSpanExporter(endpoint=endpoint.removeprefix("https://"), insecure=not is_secure)
        self._provider = TracerProvider(resource=Resource.create({"service.name": service}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("sluice")

    def begin(self, method: str, metadata: Iterable[tuple[str, str | bytes]] | None) -> "Span":
        """Begin the span of a call that this task handles; spans of other tasks that it starts lie within."""
        from opentelemetry import context, trace

        service, _, name = method.removeprefix("/").rpartition("/")
        span = self._tracer.start_span(
            f"{service}/{name}",
            context=_extracted(metadata or ()),
            kind=trace.SpanKind.SERVER,
            # https://opentelemetry.io/docs/specs/semconv/rpc/grpc/
            attributes={"rpc.system": "grpc", "rpc.service": service, "rpc.method": name},
        )
        # Never detached: the task ends with its call, and its context with it.
        context.attach(trace.set_span_in_context(span))
        return span

    def end(self, span: "Span", code: str, fields: dict[str, float | int]) -> None:
        """End the span of a call, with its gRPC status and whatever else is known of it."""
        from opentelemetry.trace import StatusCode

        status = getattr(grpc.StatusCode, code, grpc.StatusCode.UNKNOWN)
        span.set_attribute("rpc.grpc.status_code", status.value[0])
        for name, value in fields.items():
            span.set_attribute(f"sluice.{name}", value)
        # Of a server the caller's mistakes are no errors.
        if code in ("UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"):
            span.set_status(StatusCode.ERROR, code)
        span.end()

    def call(self) -> "SpanContext | None":
        """Return the span that this task works for, None where it works for none."""
        from opentelemetry import trace

        found = trace.get_current_span().get_span_context()
        return found if found.is_valid else None

    def outgoing(self) -> tuple[tuple[str, str], ...]:
        """Return the metadata to send with a call that this task makes: its ``traceparent``."""
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carrier)
        return tuple(carrier.items())

    @contextmanager
    def batch(self, calls: Iterable["SpanContext | None"], num_images: int) -> Iterator[None]:
        """Trace what is done for several calls at once, in a task of its own."""
        from opentelemetry import context, trace

        served = [call for call in calls if call is not None]
        parent = trace.set_span_in_context(trace.NonRecordingSpan(served[0])) if served else None
        span = self._tracer.start_span(
            "batch",
            context=parent,
            kind=trace.SpanKind.CLIENT,
            links=[trace.Link(call) for call in served[1:]],
            attributes={"sluice.batch": num_images},
        )
        context.attach(trace.set_span_in_context(span))
        try:
            yield
        finally:
            span.end()

    async def close(self) -> None:
        """Send what is left, for a bounded time."""
        loop, sent = asyncio.get_running_loop(), asyncio.Event()

        def shut_down() -> None:
            self._provider.shutdown()
            with suppress(RuntimeError):  # the loop has ended by itself
                loop.call_soon_threadsafe(sent.set)

        # A daemon: where the collector does not answer, it would hold up the process' end.
        Thread(target=shut_down, name="flush traces", daemon=True).start()
        with suppress(TimeoutError):
            async with asyncio.timeout(_FLUSH_SECONDS):
                await sent.wait()


def _extracted(metadata: Iterable[tuple[str, str | bytes]]) -> "Context":
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({key: value for key, value in metadata if isinstance(value, str)})

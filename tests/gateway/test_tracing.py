"""Traces as a collector gets them; it runs in here and keeps what comes."""

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from gateway.server import GatewayServer
from gateway.settings import GatewaySettings
from imaging.decoding import Pixels
from protos.gateway.v1 import image_service_pb2 as pb
from protos.gateway.v1 import image_service_pb2_grpc
from tests.gateway.fake_triton import FakeTriton
from tests.scraping import becomes

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps every span that is exported."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.services: set[str] = set()

    async def Export(self, request: Any, context: Any) -> Any:
        for resource in request.resource_spans:
            self.services |= {
                one.value.string_value for one in resource.resource.attributes if one.key == "service.name"
            }
            self.spans += [span for scope in resource.scope_spans for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.fixture
async def collector() -> AsyncIterator[Collector]:
    collector = Collector()
    server = grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]  # generated, and not typed
    collector.port = server.add_insecure_port("127.0.0.1:0")  # type: ignore[attr-defined]  # of this test
    await server.start()
    yield collector
    await server.stop(None)


async def test_call_is_followed_from_its_caller_to_triton(
    settings: GatewaySettings, triton: FakeTriton, collector: Any, digit: Pixels
) -> None:
    seen: list[dict[str, Any]] = []
    ask = triton.ModelInfer

    async def spy(request: Any, context: Any) -> Any:
        seen.append(dict(context.invocation_metadata()))
        return await ask(request, context)

    await triton.stop()
    triton.ModelInfer = spy  # type: ignore[method-assign]  # our own double
    await triton.start()
    traced = settings.model_copy(update={"otlp_endpoint": f"127.0.0.1:{collector.port}"})
    request = pb.ClassifyRequest(image=pb.Image(raw=pb.RawImage(height=28, width=28, pixels=digit.tobytes())))
    async with GatewayServer(traced) as gateway, grpc.aio.insecure_channel(gateway.address) as channel:
        await becomes(1, gateway.metrics_url, "gateway_serving")
        stub: Any = image_service_pb2_grpc.ImageServiceStub(channel)
        await stub.Classify(request, metadata=[("traceparent", f"00-{TRACE}-{PARENT}-01")])

    spans = {span.name: span for span in collector.spans if span.trace_id.hex() == TRACE}
    call, batch = spans["sluice.gateway.v1.ImageService/Classify"], spans["batch"]
    assert call.parent_span_id.hex() == PARENT
    assert batch.parent_span_id == call.span_id
    assert {one["traceparent"] for one in seen if "traceparent" in one} >= {f"00-{TRACE}-{batch.span_id.hex()}-01"}
    assert {one.key: one.value.int_value for one in call.attributes}["rpc.grpc.status_code"] == 0
    assert collector.services == {"sluice-gateway"}


async def test_collector_that_is_not_there_disturbs_nobody(
    settings: GatewaySettings, triton: FakeTriton, digit: Pixels
) -> None:
    traced = settings.model_copy(update={"otlp_endpoint": "127.0.0.1:1"})
    request = pb.ClassifyRequest(image=pb.Image(raw=pb.RawImage(height=28, width=28, pixels=digit.tobytes())))
    async with GatewayServer(traced) as gateway, grpc.aio.insecure_channel(gateway.address) as channel:
        stub: Any = image_service_pb2_grpc.ImageServiceStub(channel)
        assert (await stub.Classify(request)).model == "mnist"

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
from tritonclient.grpc import service_pb2

from loadtest.batches import Ran, TritonCounters, difference, parse_metrics
from tests.gateway.fake_triton import Context, FakeTriton

# As Triton 2.51 writes them.
METRICS = """\
# HELP nv_inference_request_success Number of successful inference requests, all batch sizes
# TYPE nv_inference_request_success counter
nv_inference_request_success{model="mnist",version="2"} 80
# HELP nv_inference_count Number of inferences performed (does not include cached requests)
# TYPE nv_inference_count counter
nv_inference_count{model="mnist",version="2"} 100
nv_inference_count{model="mnist",version="3"} 7
# HELP nv_inference_exec_count Number of model executions performed (does not include cached requests)
# TYPE nv_inference_exec_count counter
nv_inference_exec_count{model="mnist",version="2"} 37
nv_inference_exec_count{model="mnist",version="3"} 7
"""
NOWHERE = "127.0.0.1:1"


class CountingTriton(FakeTriton):
    """Has run one batch of 1 image, 9 of 2 and 27 of 3, as version 2 of mnist."""

    async def ModelStatistics(self, request: Any, context: Context) -> Any:
        answer = service_pb2.ModelStatisticsResponse()
        version = answer.model_stats.add(name="mnist", version="2", inference_count=100, execution_count=37)
        for size, count in ((1, 1), (2, 9), (3, 27)):
            version.batch_stats.add(batch_size=size).compute_infer.count = count
        return answer


@contextmanager
def metrics_page(text: str) -> Iterator[str]:
    """Serve a text as any Prometheus endpoint does."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@asynccontextmanager
async def foreign_protocol() -> AsyncIterator[str]:
    """Answer everything with words that are no HTTP."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"220 mail ready\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


def test_metrics_hold_totals_of_each_version() -> None:
    assert parse_metrics(METRICS) == {("mnist", 2): Ran(100, 37), ("mnist", 3): Ran(7, 7)}


def test_foreign_metrics_are_refused() -> None:
    with pytest.raises(ValueError, match="nv_inference_count"):
        parse_metrics("# TYPE up gauge\nup 1\n")


def test_only_what_ran_in_between_counts() -> None:
    before = {("mnist", 1): Ran(10, 10, {1: 10}), ("mnist", 2): Ran(20, 10, {1: 5, 3: 5})}
    after = {("mnist", 1): Ran(10, 10, {1: 10}), ("mnist", 2): Ran(30, 13, {1: 6, 3: 5, 4: 1, 5: 1})}

    assert difference(before, after) == {("mnist", 2): Ran(10, 3, {1: 1, 4: 1, 5: 1})}


def test_version_loaded_meanwhile_counts_whole() -> None:
    added = difference({}, {("mnist", 3): Ran(4, 2, {2: 2})})

    assert added == {("mnist", 3): Ran(4, 2, {2: 2})}
    assert added["mnist", 3].mean == 2


def test_counters_that_began_anew_count_whole() -> None:
    before = {("mnist", 2): Ran(20, 10, {2: 10})}

    assert difference(before, {("mnist", 2): Ran(4, 2, {2: 2})}) == {("mnist", 2): Ran(4, 2, {2: 2})}


async def test_sizes_come_with_totals_when_both_answer() -> None:
    with metrics_page(METRICS) as page:
        async with CountingTriton() as triton, TritonCounters(triton.address, page) as counters:
            counts = await counters.read()

    assert counts == {("mnist", 2): Ran(100, 37, {1: 1, 2: 9, 3: 27}), ("mnist", 3): Ran(7, 7)}


async def test_statistics_are_enough() -> None:
    async with CountingTriton() as triton, TritonCounters(triton.address, NOWHERE) as counters:
        assert await counters.read() == {("mnist", 2): Ran(100, 37, {1: 1, 2: 9, 3: 27})}


async def test_metrics_are_enough() -> None:
    with metrics_page(METRICS) as page:
        async with TritonCounters(NOWHERE, page) as counters:
            assert await counters.read() == {("mnist", 2): Ran(100, 37), ("mnist", 3): Ran(7, 7)}


async def test_nothing_is_known_when_neither_answers() -> None:
    async with foreign_protocol() as address, TritonCounters(NOWHERE, address) as counters:
        assert await counters.read() is None


async def test_proxy_is_not_asked_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with metrics_page(METRICS) as page:
        async with TritonCounters(NOWHERE, page) as counters:
            assert await counters.read() is not None
    async with CountingTriton() as triton, TritonCounters(triton.address, NOWHERE) as counters:
        assert await counters.read() is not None

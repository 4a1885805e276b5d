"""How fast a reader gets samples, against a bare grpc.aio stream of the same bytes that does nothing else."""

from __future__ import annotations  # grpc's classes are generic in their stubs alone

import asyncio
import multiprocessing
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import grpc

from benchmarks.interleaved import Contender
from protos import mnist_pb2, mnist_pb2_grpc
from streamer.client import Plan, SampleClient

BATCH_SIZE = 128
_SAMPLE_BYTES = 784


def contenders(streamer: str, bare: str) -> dict[str, Contender]:
    """Return readers of the streamer at one address and of the bare server at the other; items are samples."""

    async def batches(seconds: float) -> int:
        end, samples, epoch = time.perf_counter() + seconds, 0, 0
        async with SampleClient(streamer) as client:
            while time.perf_counter() < end:
                async for batch in client.batches(Plan(dataset="mnist", seed=1, epoch=epoch, batch_size=BATCH_SIZE)):
                    samples += len(batch.labels)
                epoch += 1
        return samples

    async def one_by_one(seconds: float) -> int:
        end, samples = time.perf_counter() + seconds, 0
        async with grpc.aio.insecure_channel(streamer) as channel:
            call = mnist_pb2_grpc.MnistServiceStub(channel).GetTrainingSamples(mnist_pb2.DataRequest(epochs=10_000))
            try:
                async for _sample in call:
                    samples += 1
                    if time.perf_counter() > end:
                        break
            finally:
                call.cancel()
        return samples

    return {
        f"PullBatches by our client, batches of {BATCH_SIZE}, checked": batches,
        f"bare stream of {BATCH_SIZE}-sample messages": lambda seconds: _read_bare(
            bare, "Batches", BATCH_SIZE, seconds
        ),
        "GetTrainingSamples, one by one": one_by_one,
        "bare stream of one-sample messages": lambda seconds: _read_bare(bare, "Samples", 1, seconds),
    }


@contextmanager
def bare_server() -> Iterator[str]:
    """Run the bare server in a process of its own and yield its address."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve_bare, args=(theirs,), daemon=True)
    process.start()
    try:
        yield f"127.0.0.1:{ours.recv()}"
    finally:
        process.terminate()
        process.join()


async def _read_bare(address: str, method: str, samples_a_message: int, seconds: float) -> int:
    end, samples = time.perf_counter() + seconds, 0
    async with grpc.aio.insecure_channel(address) as channel:
        stream: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(f"/Bare/{method}")
        call = stream(b"")
        try:
            async for _message in call:
                samples += samples_a_message
                if time.perf_counter() > end:
                    break
        finally:
            call.cancel()
    return samples


def _serve_bare(pipe: Connection) -> None:
    async def batches(_request: bytes, _context: object) -> AsyncIterator[bytes]:
        message = bytes(BATCH_SIZE * (_SAMPLE_BYTES + 1))
        while True:
            yield message

    async def samples(_request: bytes, _context: object) -> AsyncIterator[bytes]:
        message = bytes(_SAMPLE_BYTES + 8)
        while True:
            yield message

    async def run() -> None:
        server = grpc.aio.server()
        handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
            "Batches": grpc.unary_stream_rpc_method_handler(batches),
            "Samples": grpc.unary_stream_rpc_method_handler(samples),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("Bare", handlers),))
        pipe.send(server.add_insecure_port("127.0.0.1:0"))
        await server.start()
        await server.wait_for_termination()

    asyncio.run(run())

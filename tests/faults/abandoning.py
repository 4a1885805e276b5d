"""
A reader in a process of its own that opens streams, says so, and never comes back to them.

``python -m tests.faults.abandoning ADDRESS HOW COUNT``: prints a line once all are open, and lives on.
"""

import asyncio
import sys
from contextlib import suppress
from typing import Any

import grpc

from protos import mnist_pb2, mnist_pb2_grpc
from protos.streamer.v1 import sample_service_pb2 as pb
from protos.streamer.v1.sample_service_pb2_grpc import SampleServiceStub
from streamer.client import Plan, SampleClient

_STREAMS_PER_CONNECTION = 100
# A reader whose connection is full tells the streamer to wait, and nothing more.
_SMALL_WINDOWS = [
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 65_536),
    ("grpc.use_local_subchannel_pool", 1),
]


async def abandon(address: str, how: str, count: int) -> list[Any]:
    """Open so many streams and read one message of each."""
    return await (_iterators if how == "iterators" else _calls)(address, how, count)


async def _calls(address: str, how: str, count: int) -> list[Any]:
    kept: list[Any] = []
    asked = pb.StreamBatchesRequest(plan=pb.Plan(dataset="mnist", batch_size=64))
    for number in range(count):
        if number % _STREAMS_PER_CONNECTION == 0:
            channel = grpc.aio.insecure_channel(address, options=_SMALL_WINDOWS)
            kept.append(channel)
        call: Any
        if how == "pull":
            call = SampleServiceStub(channel).PullBatches()
            await call.write(pb.PullBatchesRequest(open=asked))
            await call.write(pb.PullBatchesRequest(grant_bytes=1))
        elif how == "samples":
            call = mnist_pb2_grpc.MnistServiceStub(channel).GetTrainingSamples(mnist_pb2.DataRequest(epochs=9))
        else:
            call = SampleServiceStub(channel).StreamBatches(asked)
        kept.append(call)
        # On a slow machine the streamer has ended some already: nobody grants.
        with suppress(grpc.aio.AioRpcError):
            await call.read()
    return kept


async def _iterators(address: str, how: str, count: int) -> list[Any]:
    client = await SampleClient(address, window_bytes=100_000).__aenter__()
    kept: list[Any] = [client]
    for _ in range(count):
        batches = client.batches(Plan(dataset="mnist", batch_size=64))
        kept.append(batches)
        await anext(batches)
    return kept


async def _main(address: str, how: str, count: str) -> None:
    _kept = await abandon(address, how, int(count))
    print("open", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))

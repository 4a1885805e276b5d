"""Readers of the streamer and of the bare server, as programs that do nothing but read; items are samples."""

from __future__ import annotations  # grpc's classes are generic in their stubs alone

import itertools
from collections.abc import AsyncIterator
from contextlib import aclosing

import grpc
from torch.utils.dlpack import from_dlpack

from benchmarks.turn import Work
from benchmarks.window import Window
from protos import mnist_pb2, mnist_pb2_grpc
from protos.streamer.v1 import sample_service_pb2 as pb
from protos.streamer.v1.sample_service_pb2_grpc import SampleServiceStub
from streamer.client import Plan, SampleClient
from streamer.loading import StreamedDataset

SEED_METHOD = "MnistService/GetTrainingSamples"
BATCH_METHOD = "Bare/Batches"

_PULL_METHOD = "sluice.streamer.v1.SampleService/PullBatches"
_CREDIT_BYTES = 2**30
_SEED = 1


def pull(address: str, batch_size: int, transform: str = "") -> Work:
    """Read epoch after epoch by ``SampleClient.batches`` into tensors."""

    async def work(window: Window) -> None:
        async with SampleClient(address) as client:
            for epoch in itertools.count():
                plan = Plan(dataset="mnist", seed=_SEED, epoch=epoch, batch_size=batch_size, transform=transform)
                async with aclosing(client.batches(plan)) as batches:
                    async for batch in batches:
                        _images, labels = from_dlpack(batch.images), from_dlpack(batch.labels)
                        if window.add(len(labels)):
                            return

    return work


def plain_loop(address: str, batch_size: int) -> Work:
    """Read epoch after epoch as a trainer does, in a loop that knows nothing of asyncio."""

    def work(window: Window) -> None:
        with StreamedDataset(address, Plan(dataset="mnist", seed=_SEED, batch_size=batch_size)) as dataset:
            for epoch in itertools.count():
                dataset.set_epoch(epoch)
                for batch in dataset:
                    dataset.commit(batch)
                    if window.add(len(batch.labels)):
                        return

    return work


def stream(address: str, batch_size: int) -> Work:
    """Read epoch after epoch by ``StreamBatches`` with nothing but the generated code; nothing is checked."""

    async def work(window: Window) -> None:
        async with grpc.aio.insecure_channel(address) as channel:
            stub = SampleServiceStub(channel)
            for epoch in itertools.count():
                plan = pb.Plan(dataset="mnist", seed=_SEED, epoch=epoch, batch_size=batch_size)
                call = stub.StreamBatches(pb.StreamBatchesRequest(plan=plan))
                try:
                    async for batch in call:
                        if window.add(batch.num_samples):
                            return
                finally:
                    call.cancel()

    return work


def bare(address: str, batch_size: int, num_samples: int) -> Work:
    """Read epoch after epoch of the bare server's batches, as bytes."""

    async def work(window: Window) -> None:
        async with grpc.aio.insecure_channel(address) as channel:
            batches: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(f"/{BATCH_METHOD}")
            while True:
                call, left = batches(b""), num_samples
                try:
                    async for _message in call:
                        size = min(batch_size, left)
                        left -= size
                        if window.add(size):
                            return
                finally:
                    call.cancel()

    return work


def samples(address: str) -> Work:
    """Read epoch after epoch by the seed RPC with the generated code, from a streamer or the bare server."""

    async def work(window: Window) -> None:
        async with grpc.aio.insecure_channel(address) as channel:
            stub = mnist_pb2_grpc.MnistServiceStub(channel)
            while True:
                call = stub.GetTrainingSamples(mnist_pb2.DataRequest())
                try:
                    async for _sample in call:
                        if window.add(1):
                            return
                finally:
                    call.cancel()

    return work


async def record_batches(address: str, batch_size: int) -> list[bytes]:
    """Return the messages of an epoch of ``PullBatches`` as they come over the wire."""

    async def requests() -> AsyncIterator[pb.PullBatchesRequest]:
        plan = pb.Plan(dataset="mnist", seed=_SEED, batch_size=batch_size)
        yield pb.PullBatchesRequest(open=pb.StreamBatchesRequest(plan=plan))
        yield pb.PullBatchesRequest(grant_bytes=_CREDIT_BYTES)

    async with grpc.aio.insecure_channel(address) as channel:
        method: grpc.aio.StreamStreamMultiCallable[pb.PullBatchesRequest, bytes] = channel.stream_stream(
            f"/{_PULL_METHOD}", pb.PullBatchesRequest.SerializeToString
        )
        return [message async for message in method(requests())]


async def record_samples(address: str) -> list[bytes]:
    """Return the messages of an epoch of ``GetTrainingSamples`` as they come over the wire."""
    async with grpc.aio.insecure_channel(address) as channel:
        method: grpc.aio.UnaryStreamMultiCallable[mnist_pb2.DataRequest, bytes] = channel.unary_stream(
            f"/{SEED_METHOD}", mnist_pb2.DataRequest.SerializeToString
        )
        return [message async for message in method(mnist_pb2.DataRequest())]

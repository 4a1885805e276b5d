"""
Feed bytes to every method of a running gateway: ``python -m tests.fuzz.request_bytes FOLDER_OF_SEEDS -runs=1000``.

The first byte chooses the method, the others are the request as it comes from the wire. Gateway, Triton and caller
share this process, so that its memory is watched and the gateway's code is covered; options are libFuzzer's.
"""

import asyncio
import importlib
import sys
import tempfile
import threading
import warnings
from collections import deque
from concurrent.futures import Future
from pathlib import Path
from typing import Any

atheris: Any = importlib.import_module("atheris")  # has no types, and no wheel for every Python

with atheris.instrument_imports(include=["gateway", "imaging", "rpc"]):
    import grpc

    from gateway.client import ImageClient
    from gateway.server import SERVICE, GatewayServer
    from gateway.settings import GatewaySettings
    from protos.gateway.v1 import image_service_pb2
    from rpc import log
    from tests.gateway.fake_triton import FakeTriton

METHODS = image_service_pb2.DESCRIPTOR.services_by_name["ImageService"].methods
LAWFUL = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNIMPLEMENTED}
_SECONDS = 60.0


async def serve(started: Future[grpc.aio.Channel]) -> None:
    """Run a gateway in front of a Triton for ever, and give a channel to it once it is ready."""
    with tempfile.TemporaryDirectory() as folder:
        async with FakeTriton() as triton:
            settings = GatewaySettings(
                port=0, metrics_port=0, triton=triton.address, model_repository=Path(folder), probe_timeout_seconds=60
            )
            triton.received, triton.requests = deque(maxlen=1), deque(maxlen=1)
            async with GatewayServer(settings) as gateway, grpc.aio.insecure_channel(gateway.address) as channel:
                async with ImageClient(gateway.address, timeout_seconds=_SECONDS) as client:
                    await client.wait_ready()
                started.set_result(channel)
                await asyncio.Event().wait()


async def ask(channel: grpc.aio.Channel, data: bytes) -> None:
    """Send one request, and fail where its end is the gateway's fault."""
    method = METHODS[data[0] % len(METHODS)] if data else METHODS[0]
    path = f"/{SERVICE}/{method.name}"
    try:
        if method.client_streaming:
            stream: Any = channel.stream_stream(path)
            async for _ in stream(iter([data[1:]]), timeout=_SECONDS):
                pass
        else:
            unary: Any = channel.unary_unary(path)
            await unary(data[1:], timeout=_SECONDS)
    except grpc.aio.AioRpcError as error:
        if error.code() not in LAWFUL:
            raise AssertionError(f"{path}: {error.code()}: {error.details()}") from error


def main() -> None:
    """Ask, from the thread that libFuzzer wants, a gateway on the event loop of another."""
    loop, started = asyncio.new_event_loop(), Future[grpc.aio.Channel]()
    threading.Thread(target=loop.run_until_complete, args=(serve(started),), daemon=True).start()
    channel = started.result(_SECONDS)
    atheris.Setup(sys.argv, lambda data: asyncio.run_coroutine_threadsafe(ask(channel, data), loop).result())
    atheris.Fuzz()


if __name__ == "__main__":
    # Of a server these go nowhere.
    warnings.simplefilter("ignore")
    log.configure("error")
    main()

from __future__ import annotations  # grpc's classes are generic in their stubs alone

from pathlib import Path

import grpc

from benchmarks.bare import bare_server, write_recording


async def test_each_call_sends_the_recording_as_it_is(tmp_path: Path) -> None:
    messages = [b"", b"a", bytes(300_000)]
    write_recording(tmp_path / "recording", messages)

    with bare_server({"Any/Thing": tmp_path / "recording"}) as server:
        async with grpc.aio.insecure_channel(server.address) as channel:
            method: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream("/Any/Thing")
            seen = [[message async for message in method(b"")] for _ in range(2)]

    assert seen == [messages, messages]

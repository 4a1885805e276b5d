"""What tests of both ends wait for."""

import asyncio

from streamer.server import StreamerServer


async def streams_become(server: StreamerServer, count: int) -> None:
    """Wait until that many streams are open; the test's own timeout is the limit."""
    # No event tells it, and turns of the loop are all it takes.
    while server.active_streams != count:  # noqa: ASYNC110 - the server counts, and tells nobody
        await asyncio.sleep(0)

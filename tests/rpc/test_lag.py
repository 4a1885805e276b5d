import asyncio
import time

from rpc.lag import LagWatch


async def test_loop_that_is_held_up_is_told() -> None:
    told = asyncio.Queue[float]()
    watch = LagWatch(told.put_nowait)
    await told.get()
    time.sleep(0.3)  # noqa: ASYNC251 - holds up the loop, which is the point
    late = await told.get()
    watch.stop()

    assert late >= 0.15

"""Many images over ClassifyStream: answers in the order of the images, across streams that break."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import grpc

from gateway.asking.failures import ImageError
from protos.gateway.v1 import image_service_pb2 as pb

# Streams that break one after the other, none of them with an answer, before it is given up.
_MAX_ATTEMPTS = 5
_PAUSES = (0.1, 2.0)
_PASSING = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.ABORTED)


class Conversation:
    """
    Images on their way to a gateway and answers on their way back; one use.

    At most ``window`` images are read from the source that were not yielded as answers: a slow gateway slows the
    source down, and who does not take answers is not answered any further. Where a stream breaks, the images that
    have no answer yet are asked again on the next.

    Args:
        open_stream: Returns a ClassifyStream call.
        requests: What to ask, in order; an error stands for an image that cannot be sent.
        window: At least 1.
        timeout_seconds: Longest wait for the next answer while one is due.
    """

    def __init__(
        self,
        open_stream: Callable[[], Any],
        requests: AsyncIterator[pb.ClassifyRequest | ImageError],
        *,
        window: int,
        timeout_seconds: float,
    ) -> None:
        self._open_stream = open_stream
        self._requests = requests
        self._timeout_seconds = timeout_seconds
        self._room = asyncio.Semaphore(window)
        self._asked: dict[int, pb.ClassifyRequest] = {}
        self._unsent: deque[int] = deque()
        self._answers: dict[int, pb.ClassifyStreamResponse | ImageError] = {}
        self._num_read = 0
        self._has_read_all = False
        # Set at each step of any of the two tasks; whoever waits looks again.
        self._something_new = asyncio.Event()
        self._something_to_send = asyncio.Event()

    async def answers(self) -> AsyncGenerator[pb.ClassifyStreamResponse | ImageError]:
        """
        Yield what each image gets, in their order.

        Raises:
            grpc.aio.AioRpcError: The stream broke too often, or was refused.
            TimeoutError: No answer in time.
            Exception: What the source raised.
        """
        tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._talk())]
        for task in tasks:
            task.add_done_callback(lambda _: self._something_new.set())
        next_index = 0
        try:
            while True:
                while next_index in self._answers:
                    yield self._answers.pop(next_index)
                    next_index += 1
                    self._room.release()
                if self._has_read_all and next_index == self._num_read:
                    return
                for task in tasks:
                    if task.done():
                        task.result()
                self._something_new.clear()
                await self._wait_for_something_new()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            for task in tasks:
                if not task.cancelled():
                    task.exception()

    async def _wait_for_something_new(self) -> None:
        # A source may take its time; a gateway that was asked may not.
        async with asyncio.timeout(self._timeout_seconds if self._asked else None):
            await self._something_new.wait()

    async def _read(self) -> None:
        async for request in self._requests:
            await self._room.acquire()
            index, self._num_read = self._num_read, self._num_read + 1
            if isinstance(request, ImageError):
                self._answers[index] = request
            else:
                self._asked[index] = request
                self._unsent.append(index)
            self._tell()
        self._has_read_all = True
        self._tell()

    async def _talk(self) -> None:
        num_broken, pause = 0, _PAUSES[0]
        while await self._has_something_to_send():
            call = self._open_stream()
            sending = asyncio.create_task(self._send(call))
            try:
                async for response in call:
                    num_broken, pause = 0, _PAUSES[0]
                    # An answer that came twice has nobody waiting for it.
                    if self._asked.pop(response.id, None) is not None:
                        self._answers[response.id] = response
                        self._tell()
            except grpc.aio.AioRpcError as error:
                # A stream on which nothing was due is no failure: a gateway ends those that are silent for long.
                num_broken += bool(self._asked)
                if error.code() not in _PASSING or num_broken == _MAX_ATTEMPTS:
                    raise
            finally:
                call.cancel()
                sending.cancel()
                await asyncio.wait((sending,))
                if not sending.cancelled():
                    # What a broken stream says to who writes; who reads was told why.
                    sending.exception()
            if not self._is_done:
                await asyncio.sleep(pause)
                pause = min(2 * pause, _PAUSES[1])
                self._unsent = deque(sorted(self._asked))

    async def _has_something_to_send(self) -> bool:
        """Wait until there is, or never will be; a gateway waits for the first image on a stream, but not long."""
        while not self._unsent and not self._is_done:
            self._something_to_send.clear()
            await self._something_to_send.wait()
        return not self._is_done

    @property
    def _is_done(self) -> bool:
        return self._has_read_all and not self._asked

    async def _send(self, call: Any) -> None:
        while True:
            while self._unsent:
                index = self._unsent.popleft()
                await call.write(pb.ClassifyStreamRequest(id=index, request=self._asked[index]))
            if self._has_read_all:
                await call.done_writing()
                return
            self._something_to_send.clear()
            await self._something_to_send.wait()

    def _tell(self) -> None:
        self._something_new.set()
        self._something_to_send.set()

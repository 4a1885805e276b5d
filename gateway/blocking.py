"""
The client of ImageService for scripts without asyncio.

::

    with BlockingImageClient("localhost:50051") as client:
        print(client.classify("seven.png").name)
        for answer in client.classify_many(Path("scans").glob("*.png")):
            print(answer)
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from concurrent.futures import CancelledError, Future
from functools import wraps
from threading import Thread
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from gateway.client import ImageClient
from rpc.tls import ClientTls

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class BlockingImageClient:
    """
    Every method of :class:`gateway.client.ImageClient`, waited for; safe to share between threads.

    Its event loop runs in a thread of its own. In a program that has one already, use the other client: gRPC wants
    one event loop in a process. Ctrl-C while a call is waited for cancels it.

    Args and errors are those of :class:`gateway.client.ImageClient`.
    """

    def __init__(
        self,
        address: str = "localhost:50051",
        *,
        model: str = "",
        version: int = 0,
        timeout_seconds: float = 10.0,
        tls: ClientTls | None = None,
        api_key: str | None = None,
    ) -> None:
        self._client = ImageClient(
            address, model=model, version=version, timeout_seconds=timeout_seconds, tls=tls, api_key=api_key
        )
        self._loop: asyncio.AbstractEventLoop | None = None

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="image-client", daemon=True)
        self._thread.start()
        try:
            self._wait(self._client.__aenter__())
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is in flight and close the channel; does nothing the second time."""
        if self._loop is None:
            return
        self._wait(self._client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._loop = None

    def _wait(self, work: Coroutine[Any, Any, Result]) -> Result:
        if self._loop is None:
            work.close()
            raise RuntimeError("the client is not open; use it as `with BlockingImageClient(...) as client:`")
        waiting: Future[Result] = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return waiting.result()
        except (KeyboardInterrupt, CancelledError):
            waiting.cancel()
            raise

    @staticmethod
    def _blocking(
        method: Callable[Concatenate[ImageClient, Arguments], Coroutine[Any, Any, Result]],
    ) -> Callable[Concatenate["BlockingImageClient", Arguments], Result]:
        @wraps(method)
        def waited(self: "BlockingImageClient", /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            return self._wait(method(self._client, *args, **kwargs))

        return waited

    @staticmethod
    def _iterating(
        method: Callable[Concatenate[ImageClient, Arguments], AsyncGenerator[Result]],
    ) -> Callable[Concatenate["BlockingImageClient", Arguments], Iterator[Result]]:
        @wraps(method)
        def iterated(
            self: "BlockingImageClient", /, *args: Arguments.args, **kwargs: Arguments.kwargs
        ) -> Iterator[Result]:
            items = method(self._client, *args, **kwargs)
            end = object()

            async def following() -> Result | object:
                return await anext(items, end)

            try:
                while (item := self._wait(following())) is not end:
                    yield item  # type: ignore[misc]  # it is no end
            finally:
                self._wait(items.aclose())

        return iterated

    classify = _blocking(ImageClient.classify)
    classify_batch = _blocking(ImageClient.classify_batch)
    classify_many = _iterating(ImageClient.classify_many)
    compare = _blocking(ImageClient.compare)
    embed = _blocking(ImageClient.embed)
    models = _blocking(ImageClient.models)
    wait_ready = _blocking(ImageClient.wait_ready)

"""Objects in an S3-compatible storage, asked for again until they come or time is up."""

import asyncio
import ipaddress
import os
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import (
    BaseError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnknownConfigurationKeyError,
)
from obstore.store import S3Store

from streamer.errors import NoObjectError, StorageError
from streamer.tally import Tally

SCHEME = "s3://"

_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 5.0
_CONNECT_SECONDS = 5.0
_ATTEMPT_SECONDS = 30.0
_SHORTEST_ATTEMPT_SECONDS = 0.05
_REFUSALS = (PermissionDeniedError, UnauthenticatedError)

Answer = TypeVar("Answer")


class ObjectStore:
    """
    The objects under one prefix, read with retries.

    Endpoint, region and credentials come from the environment as usual: ``AWS_ENDPOINT_URL``, ``AWS_REGION``,
    ``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ``AWS_SESSION_TOKEN``; ``AWS_SKIP_SIGNATURE=true`` for a
    bucket that anyone may read.

    A failure that may pass is tried again after a random pause of up to 0.1, 0.2, 0.4 ... 5 seconds (M. Brooker,
    "Exponential Backoff And Jitter", AWS Architecture Blog, 2015: full jitter).

    Args:
        url: ``s3://bucket`` or ``s3://bucket/prefix``.
        deadline_seconds: After which an answer is no longer waited for, all attempts together.
        tally: Counts answers and retries.

    Raises:
        StorageError: The URL or the environment makes no sense.
    """

    def __init__(self, url: str, *, deadline_seconds: float = 60.0, tally: Tally) -> None:
        bucket, _, prefix = url.removeprefix(SCHEME).rstrip("/").partition("/")
        self.url = f"{SCHEME}{bucket}/{prefix}".rstrip("/")
        self._deadline_seconds = deadline_seconds
        self._tally = tally
        if not url.startswith(SCHEME) or not bucket:
            raise StorageError(url, "not of the form s3://bucket/prefix", is_refusal=True)
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        try:
            self._store = S3Store(
                bucket,
                prefix=prefix or None,
                client_options=_client_options(endpoint),
                # Its own would neither be counted nor known to the deadline.
                retry_config={"max_retries": 0},
            )
        except (BaseError, ValueError, UnknownConfigurationKeyError) as error:
            raise StorageError(url, _first_line(error), is_refusal=True) from error

    def url_of(self, key: str) -> str:
        """Return the full URL of an object."""
        return f"{self.url}/{key}"

    async def read(self, key: str) -> bytes:
        """
        Return a whole object.

        Raises:
            NoObjectError: It is not there.
            StorageError: It may not be read, or did not come in time.
        """

        async def get() -> bytes:
            answer = await obstore.get_async(self._store, key)
            return bytes(await answer.bytes_async())

        content = await self._persist(self.url_of(key), get)
        self._tally.add(fetched_objects=1, fetched_bytes=len(content))
        return content

    async def read_range(self, key: str, first_byte: int, size: int) -> memoryview:
        """Return ``size`` bytes of an object, or fewer where it ends before; errors as for :meth:`read`."""

        async def get() -> memoryview:
            return memoryview(await obstore.get_range_async(self._store, key, start=first_byte, length=size))

        content = await self._persist(self.url_of(key), get)
        self._tally.add(fetched_objects=1, fetched_bytes=len(content))
        return content

    async def write(self, key: str, content: bytes | Path) -> None:
        """Make or replace an object, of bytes or of a file; errors as for :meth:`read`."""

        async def put() -> None:
            await obstore.put_async(self._store, key, content)

        await self._persist(self.url_of(key), put)

    async def _persist(self, place: str, attempt: Callable[[], Awaitable[Answer]]) -> Answer:
        ends_at = time.monotonic() + self._deadline_seconds
        for pause in _pauses():
            try:
                async with asyncio.timeout(min(_ATTEMPT_SECONDS, ends_at - time.monotonic())):
                    return await attempt()
            except FileNotFoundError as error:
                missing = "bucket" if "NoSuchBucket" in str(error) else "object"
                raise NoObjectError(place, f"no such {missing}") from error
            except _REFUSALS as error:
                problem = f"access denied: {_first_line(error)}; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
                raise StorageError(place, problem, is_refusal=True) from error
            except (BaseError, TimeoutError, OSError) as error:
                left = ends_at - time.monotonic()
                if left < _SHORTEST_ATTEMPT_SECONDS:
                    problem = f"no answer in {self._deadline_seconds:g} s: {_first_line(error)}{_hint()}"
                    raise StorageError(place, problem) from error
            self._tally.add(retries=1)
            # Half of what is left at most: the last pause is followed by an attempt.
            await asyncio.sleep(min(pause, left / 2))
        raise AssertionError("pauses never end")


def _pauses() -> Iterator[float]:
    ceiling = _FIRST_PAUSE_SECONDS
    while True:
        yield random.uniform(0, ceiling)
        ceiling = min(_LONGEST_PAUSE_SECONDS, 2 * ceiling)


def _client_options(endpoint: str | None) -> Any:
    options: dict[str, Any] = {
        "connect_timeout": timedelta(seconds=_CONNECT_SECONDS),
        "timeout": timedelta(seconds=_ATTEMPT_SECONDS),
    }
    host = urlsplit(endpoint).hostname if endpoint else None
    if endpoint and endpoint.startswith("http://"):
        options["allow_http"] = True
    if endpoint and host and _is_loopback(host):
        # The proxy of the environment cannot reach this machine's loopback; naming any proxy keeps that one out.
        options |= {"proxy_url": endpoint, "proxy_excludes": host}
    return options


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _hint() -> str:
    if os.environ.get("AWS_ACCESS_KEY_ID") or os.environ.get("AWS_SKIP_SIGNATURE"):
        return ""
    return "; AWS_ACCESS_KEY_ID is not set (AWS_SKIP_SIGNATURE=true reads a public bucket)"


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]

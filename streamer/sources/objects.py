"""Objects in an S3-compatible storage, asked for again until they come or time is up."""

import asyncio
import ipaddress
import os
import random
import re
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
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
from streamer.sources.tally import Tally

SCHEME = "s3://"

_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 5.0
_CONNECT_SECONDS = 5.0
_ATTEMPT_SECONDS = 30.0
_SHORTEST_ATTEMPT_SECONDS = 0.05
_REFUSALS = (PermissionDeniedError, UnauthenticatedError)
# What obstore has no exception for comes as text.
_STATUS = re.compile(r"non-2xx status code: (\d{3})")
_RANGE_NOT_SATISFIABLE = 416
# Statuses of 4xx that may pass; S3 also says 400 where a request took too long to arrive.
_PASSING = {408, 425, 429}
_TOO_SLOW = "RequestTimeout"
# Where a machine in a cloud is asked who it is: one that is none lets two requests go unanswered.
_METADATA = re.compile(r"/latest/(api/token|meta-data)")
_MOST_METADATA_FAILURES = 2

Report = Callable[[str], None]

Answer = TypeVar("Answer")


class ObjectStore:
    """
    The objects under one prefix, read with retries.

    Endpoint, region and credentials come from the environment as usual: ``AWS_ENDPOINT_URL``, ``AWS_REGION``,
    ``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ``AWS_SESSION_TOKEN``; ``AWS_SKIP_SIGNATURE=true`` for a
    bucket that anyone may read.

    A failure that may pass is tried again after a random pause of up to 0.1, 0.2, 0.4 ... 5 seconds (M. Brooker,
    "Exponential Backoff And Jitter", AWS Architecture Blog, 2015: full jitter), or as soon as a server that was away
    answers another request.

    Args:
        url: ``s3://bucket`` or ``s3://bucket/prefix``.
        deadline_seconds: After which an answer is no longer waited for, all attempts together.
        tally: Counts answers and retries.
        report: Told in plain sentences what is waited for.

    Raises:
        StorageError: The URL or the environment makes no sense.
    """

    def __init__(
        self, url: str, *, deadline_seconds: float = 60.0, tally: Tally, report: Report = lambda line: None
    ) -> None:
        bucket, _, prefix = url.removeprefix(SCHEME).rstrip("/").partition("/")
        self.url = f"{SCHEME}{bucket}/{prefix}".rstrip("/")
        self._deadline_seconds = deadline_seconds
        self._tally = tally
        self._report = report
        # Replaced each time it is set.
        self._answered = asyncio.Event()
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
        if _lacks_credentials():
            report(f"{url}: AWS_ACCESS_KEY_ID is not set; asking this machine's cloud for credentials, if it has one")

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
            try:
                return memoryview(await obstore.get_range_async(self._store, key, start=first_byte, length=size))
            except BaseError as error:
                if _status(error) == _RANGE_NOT_SATISFIABLE:
                    return memoryview(b"")
                raise

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
        for number, pause in enumerate(_pauses(), 1):
            try:
                async with asyncio.timeout(min(_ATTEMPT_SECONDS, ends_at - time.monotonic())):
                    answer = await attempt()
                self._answered.set()
                self._answered = asyncio.Event()
                return answer
            except FileNotFoundError as error:
                missing = "bucket" if "NoSuchBucket" in str(error) else "object"
                raise NoObjectError(place, f"no such {missing}") from error
            except (BaseError, TimeoutError, OSError) as error:
                if (problem := _refusal(error, number)) is not None:
                    raise StorageError(place, problem, is_refusal=True) from error
                left = ends_at - time.monotonic()
                if left < _SHORTEST_ATTEMPT_SECONDS:
                    problem = f"no answer in {self._deadline_seconds:g} s: {_first_line(error)}{_hint()}"
                    raise StorageError(place, problem) from error
                if number == 1:
                    self._report(f"{place}: {_first_line(error)}; trying again for up to {left:.0f} s")
                # A server that answers with an error is there, and wants to be left alone.
                is_away = _status(error) is None
            self._tally.add(retries=1)
            # Half of what is left at most: the last pause is followed by an attempt.
            await self._pause(min(pause, left / 2), is_away=is_away)
        raise AssertionError("pauses never end")

    async def _pause(self, seconds: float, *, is_away: bool) -> None:
        """Wait; for a server that was away no longer than until another request is answered."""
        if not is_away:
            return await asyncio.sleep(seconds)
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._answered.wait()
            await asyncio.sleep(random.uniform(0, _FIRST_PAUSE_SECONDS))


def _refusal(error: Exception, number: int) -> str | None:
    """Say why asking again is of no use after this many attempts; None where it may be."""
    if isinstance(error, _REFUSALS):
        return f"access denied: {_first_line(error)}; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if number >= _MOST_METADATA_FAILURES and _METADATA.search(str(error)):
        return f"no credentials: {_first_line(error)}{_hint()}"
    status = _status(error)
    if status is not None and 400 <= status < 500 and status not in _PASSING and _TOO_SLOW not in str(error):
        return f"refused: {_first_line(error)}"
    return None


def _status(error: Exception) -> int | None:
    """Return the status of HTTP that an error is about, if it is about one."""
    found = _STATUS.search(str(error))
    return int(found[1]) if found else None


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


def _lacks_credentials() -> bool:
    # The latter two are other ways to come by them.
    names = ("ACCESS_KEY_ID", "SKIP_SIGNATURE", "WEB_IDENTITY_TOKEN_FILE", "CONTAINER_CREDENTIALS_RELATIVE_URI")
    return not any(os.environ.get(f"AWS_{name}") for name in names)


def _hint() -> str:
    if not _lacks_credentials():
        return ""
    return "; AWS_ACCESS_KEY_ID is not set (AWS_SKIP_SIGNATURE=true reads a public bucket)"


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]

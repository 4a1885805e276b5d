import asyncio
import itertools
import random
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import obstore
import pytest

from streamer.errors import NoObjectError, StorageError
from streamer.sources import objects
from streamer.sources.objects import ObjectStore
from streamer.sources.tally import Tally
from tests.streamer.storage import S3Server


def open_store(url: str = "s3://objects/here", *, seconds: float = 20) -> tuple[ObjectStore, Tally]:
    tally = Tally()
    return ObjectStore(url, deadline_seconds=seconds, tally=tally), tally


async def test_object_is_read_whole_and_in_part(s3: S3Server) -> None:
    store, tally = open_store()
    await store.write("a", bytes(range(100)))

    assert await store.read("a") == bytes(range(100))
    assert bytes(await store.read_range("a", 10, 5)) == bytes(range(10, 15))
    assert bytes(await store.read_range("a", 98, 5)) == bytes(range(98, 100))
    counts = tally.counts()
    assert (counts.fetched_objects, counts.fetched_bytes, counts.retries) == (3, 107, 0)


async def test_file_is_uploaded(s3: S3Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    store, _ = open_store("s3://objects")
    await store.write("deep/file", tmp_path / "file")

    assert s3.get("s3://objects/deep/file") == b"content"


@pytest.mark.parametrize(("url", "problem"), [("s3://objects", "no such object"), ("s3://absent", "no such bucket")])
async def test_what_is_not_there_is_named_at_once(s3: S3Server, url: str, problem: str) -> None:
    s3.put("s3://objects/some", b"1")
    store, tally = open_store(url)

    with pytest.raises(NoObjectError, match=f"^{url}/nowhere: {problem}$"):
        await store.read("nowhere")
    assert tally.counts().retries == 0


async def test_wrong_key_is_refused_at_once(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    store, tally = open_store()

    with pytest.raises(StorageError, match=r"access denied: .*check AWS_ACCESS_KEY_ID") as caught:
        await store.read("a")
    assert caught.value.is_refusal
    assert tally.counts().retries == 0


@pytest.mark.parametrize("url", ["s3://", "s3:///x", "gs://bucket", "bucket/x"])
def test_url_that_names_no_bucket_is_refused(url: str) -> None:
    with pytest.raises(StorageError, match="not of the form s3://bucket/prefix"):
        open_store(url)


async def test_proxy_of_the_environment_is_not_asked_for_loopback(s3: S3Server, dead_proxy: None) -> None:
    store, tally = open_store()
    await store.write("a", b"1")

    assert await store.read("a") == b"1"
    assert tally.counts().retries == 0


async def test_nobody_there_is_told_when_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "REGION": "c"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    store, tally = open_store(seconds=0.5)
    started = time.monotonic()

    with pytest.raises(StorageError, match=r"^s3://objects/here/a: no answer in 0.5 s: ") as caught:
        await store.read("a")
    assert not caught.value.is_refusal
    assert 0.4 < time.monotonic() - started < 2
    assert tally.counts().retries >= 1


async def test_missing_key_is_pointed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    # Where a machine in a cloud would be asked who it is.
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")
    lines: list[str] = []
    store = ObjectStore("s3://objects/here", deadline_seconds=1000, tally=Tally(), report=lines.append)
    assert lines[0].startswith("s3://objects/here: AWS_ACCESS_KEY_ID is not set; asking this machine's cloud")

    with pytest.raises(StorageError, match=r"no credentials: .*AWS_ACCESS_KEY_ID is not set") as caught:
        await store.read("a")
    assert caught.value.is_refusal
    assert lines[1].startswith("s3://objects/here/a: Generic S3 error: ")


async def test_request_that_makes_no_sense_to_the_server_is_not_made_again(s3: S3Server) -> None:
    store, tally = open_store("s3://x")

    with pytest.raises(StorageError, match=r"refused: .*400 Bad Request") as caught:
        await store.write("a", b"1")
    assert caught.value.is_refusal
    assert tally.counts().retries == 0


async def test_range_past_the_end_of_an_object_is_empty(s3: S3Server) -> None:
    s3.put("s3://objects/short", b"123")
    store, tally = open_store("s3://objects")

    assert bytes(await store.read_range("short", 3, 5)) == b""
    assert tally.counts().retries == 0


async def test_server_that_takes_connections_and_says_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for name, value in {"ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "REGION": "c"}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        store, _ = open_store(seconds=0.3)

        with pytest.raises(StorageError, match="no answer in"):
            await asyncio.wait_for(store.read("a"), 5)


async def test_server_that_is_back_for_one_request_is_asked_for_the_others_at_once(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "_pauses", lambda: itertools.repeat(1000.0))
    store, tally = open_store(seconds=10_000)
    for key in ("a", "b"):
        await store.write(key, b"1")
    honest = obstore.get_async
    monkeypatch.setattr(obstore, "get_async", Away(honest))
    waiting = asyncio.create_task(store.read("a"))
    while not tally.counts().retries:  # noqa: ASYNC110 - it tells nobody
        await asyncio.sleep(0)

    assert await store.read("b") == b"1"
    assert await asyncio.wait_for(waiting, 100) == b"1"


class Away:
    """Lets the first request fail as where nobody listens."""

    def __init__(self, honest: Callable[..., Awaitable[object]]) -> None:
        self._honest = honest
        self._is_first = True

    async def __call__(self, store: object, key: str) -> object:
        is_first, self._is_first = self._is_first, False
        if is_first:
            raise ConnectionRefusedError("nobody there")
        return await self._honest(store, key)


def test_pauses_are_random_and_their_ceiling_doubles_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "uniform", lambda low, high: high if low == 0 else None)

    assert list(itertools.islice(objects._pauses(), 8)) == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]

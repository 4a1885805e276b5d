"""Faults of API keys: guessing, a neighbour that floods, and secrets where they do not belong."""

from __future__ import annotations  # grpc's classes are generic in their stubs alone

import asyncio
import secrets
import statistics
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2

from gateway.client import ClientError, ClientTls, ImageClient, OverloadedError
from protos.gateway.v1 import image_service_pb2 as pb
from protos.gateway.v1.image_service_pb2_grpc import ImageServiceStub
from rpc.access import key_metadata
from rpc.keys import add_key, load_keys
from rpc.tls import open_channel
from tests.digits import seven
from tests.faults.gateway.callers import tally
from tests.faults.gateway.conftest import Measured
from tests.faults.gateway.process import MEBI
from tests.faults.gateway.secured import Party, party, running
from tests.gateway.fake_triton import FakeTriton

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def classify(stub: Any, key: str, *, timeout: float = 60) -> grpc.StatusCode:
    """Return how one call ends, with an image of its own: equal ones would be asked once."""
    raw = pb.RawImage(height=28, width=28, pixels=secrets.token_bytes(784))
    request = pb.ClassifyRequest(image=pb.Image(raw=raw))
    call = stub.Classify(request, metadata=key_metadata(key, "127.0.0.1:1", None), timeout=timeout)
    code: grpc.StatusCode = await call.code()
    return code


def guesses(us: Party, count: int) -> list[str]:
    """Return wrong keys: some with an id that is there, some without, some that are nothing of the kind."""
    key = load_keys(us.folder / "keys.json")[0]
    kinds: list[Callable[[], str]] = [
        lambda: f"slk_{key.id}_{secrets.token_hex(32)}",
        lambda: f"slk_{secrets.token_hex(6)}_{secrets.token_hex(32)}",
        lambda: secrets.token_urlsafe(40),
        lambda: "A" * 8000,
    ]
    return [kinds[number % len(kinds)]() for number in range(count)]


async def test_brute_force(triton: FakeTriton, tmp_path: Path, measured: Measured) -> None:
    """A4. A thousand calls with wrong keys, and one with the right one from the same address."""
    row = measured(
        "A4",
        fault="1,000 wrong keys from one address",
        promised="all refused, all but a few at a time as RESOURCE_EXHAUSTED and without a line in the log; "
        "a right key from the same address is let in",
    )
    us = party(tmp_path)
    wrong = guesses(us, 1000)
    async with running(triton.address, us) as gateway, open_channel(gateway.address, us.tls) as channel:
        stub: Any = ImageServiceStub(channel)
        rss, started = gateway.rss_bytes, time.monotonic()
        codes, took = Counter[str](), []
        for guess in wrong:
            began = time.monotonic()
            codes[(await classify(stub, guess)).name] += 1
            took.append(time.monotonic() - began)
        seconds = time.monotonic() - started
        await gateway.check()

        # Twenty at once, one more each second.
        assert 20 <= codes["UNAUTHENTICATED"] <= 21 + seconds
        assert codes.total() == codes["UNAUTHENTICATED"] + codes["RESOURCE_EXHAUSTED"] == len(wrong)
        log = gateway.lines()
        assert sum(line.get("code") == "UNAUTHENTICATED" for line in log) <= codes["UNAUTHENTICATED"]
        assert not any(line.get("code") == "RESOURCE_EXHAUSTED" for line in log)
        text = str(log)
        assert not any(guess in text for guess in wrong)
        grown = gateway.rss_bytes - rss
    assert grown < 32 * MEBI
    row.add("refused", tally(codes))
    row.add("median", f"{statistics.median(took) * 1000:.1f} ms")
    row.add("memory", f"{grown / MEBI:+.1f} MiB")


class SlowTriton(FakeTriton):
    """One inference at a time, each of 2 ms and 4 ms an image, of at most 4 images: 220 images a second."""

    def __init__(self) -> None:
        super().__init__(max_batch_size=4)
        self._one = asyncio.Lock()

    async def ModelInfer(self, request: Any, context: Any) -> service_pb2.ModelInferResponse:
        """Answer after that time."""
        async with self._one:
            num_images = len(request.raw_input_contents[0]) / 784
            await asyncio.sleep(0.002 + 0.004 * num_images)  # what the inference takes
        return await super().ModelInfer(request, context)


async def paced(us: Party, address: str, key: str, *, rate: float, seconds: float) -> tuple[list[float], int]:
    """Call on a fixed schedule; return how long each call took that was answered, and how many were not."""
    took: list[float] = []

    async def one(stub: Any) -> None:
        began = time.monotonic()
        if await classify(stub, key, timeout=10) is grpc.StatusCode.OK:
            took.append(time.monotonic() - began)

    async with open_channel(address, us.tls, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        stub: Any = ImageServiceStub(channel)
        due, calls = time.monotonic(), []
        for _ in range(int(rate * seconds)):
            calls.append(asyncio.create_task(one(stub)))
            due += 1 / rate
            await asyncio.sleep(max(0.0, due - time.monotonic()))  # at fixed times
        await asyncio.gather(*calls)
    return sorted(took), len(calls) - len(took)


async def test_noisy_tenant(tmp_path: Path, measured: Measured) -> None:
    """A7. One key calls at twenty times the rate of another, which is more than there is room for."""
    row = measured(
        "A7",
        fault="one key calls at 20 times the rate of another, more than the model can do, from the same address",
        promised="at least 99 % of the other's calls are answered",
    )
    us, rate = party(tmp_path), 20.0
    noisy_key = add_key(us.folder / "keys.json", "noisy", ["classify"])
    async with (
        SlowTriton() as slow,
        running(slow.address, us, "--max-in-flight", "64", "--max-batch-images", "64") as gateway,
    ):
        alone, _ = await paced(us, gateway.address, us.key, rate=rate, seconds=2)
        (quiet, num_refused), (noisy, num_noisy_refused) = await asyncio.gather(
            paced(us, gateway.address, us.key, rate=rate, seconds=4),
            paced(us, gateway.address, noisy_key, rate=20 * rate, seconds=4),
        )

    # Else there was room for both, and nothing is shown.
    assert num_noisy_refused > 0
    assert num_refused <= 0.01 * (len(quiet) + num_refused)
    row.add("answered", f"{len(quiet)} of {len(quiet) + num_refused}")
    row.add("p99", f"{p99(quiet) * 1000:.0f} ms ({p99(alone) * 1000:.0f} ms alone)")
    row.add("the noisy one's refused", f"{num_noisy_refused} of {num_noisy_refused + len(noisy)}")


def p99(took: list[float]) -> float:
    return took[min(len(took) - 1, int(0.99 * len(took)))]


async def test_secrets_in_output(triton: FakeTriton, tmp_path: Path, measured: Measured) -> None:
    """A8. Log, metrics and answers of a gateway that was called rightly, wrongly, and while its Triton failed."""
    row = measured(
        "A8",
        fault="log, metrics, statuses and the client's errors of right and wrong calls, and while Triton is away",
        promised="no key, no part of one, and no line of a private key in them",
    )
    us, said = party(tmp_path), list[str]()
    other = add_key(us.folder / "keys.json", "other", ["embed"])
    wrong = guesses_of(us)
    async with running(triton.address, us, "--log-level", "debug") as gateway:
        for key in (us.key, other, None, *wrong):
            said += await errors_of(gateway.address, us.tls, key)
        await triton.stop()
        try:
            said += await errors_of(gateway.address, us.tls, us.key)
        finally:
            await triton.start()
        (us.folder / "keys.json").write_text("{")
        said += await errors_of(gateway.address, us.tls, us.key)
        (metrics,) = [line["metrics"] for line in gateway.lines() if line.get("event") == "listening"]
        said.append(await asyncio.to_thread(page, metrics))
    said.append((tmp_path / "gateway.log").read_text())

    secret = [*us.secrets, other, other.split("_")[2], *wrong]
    assert all(len(each) > 20 for each in secret)
    assert len(said) > 5
    assert not [each for each in secret for text in said if each in text]
    row.add("secrets looked for", len(secret))
    row.add("texts", f"{len(said)}, {sum(map(len, said)):,} characters")
    row.add("found", 0)


def guesses_of(us: Party) -> list[str]:
    """Return wrong keys that are told from anything else in a log."""
    return [guess for guess in guesses(us, 8) if guess[0] != "A"]


async def errors_of(address: str, tls: ClientTls, key: str | None) -> list[str]:
    """Return what a client is told in all of its calls, and what gRPC was."""
    said = []
    async with ImageClient(address, tls=tls, api_key=key) as client:
        image = seven()
        for call in (client.classify(image), client.embed(image), client.models(), client.compare(image, image)):
            try:
                await call
            except OverloadedError:
                raise
            except ClientError as error:
                said += [repr(error), repr(error.__cause__)]
        said.append(repr(vars(client)["_diagnosis"]))
    return said


def page(url: str) -> str:
    """Return what Prometheus would read."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=30) as answer:
        text: str = answer.read().decode()
    return text

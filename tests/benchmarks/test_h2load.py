import shutil
from pathlib import Path

import pytest

from benchmarks import empty, frames, h2load
from benchmarks.contest import Pace
from benchmarks.h2load import H2loadError, Load
from benchmarks.sending import Sending, answer_bytes

REPORT = """\
starting benchmark...
Application protocol: h2c

finished in 503.21ms, 1987.24 req/s, 97.20KB/s
requests: 1000 total, 1000 started, 1000 done, 990 succeeded, 10 failed, 10 errored, 0 timeout
status codes: 990 2xx, 0 3xx, 4 4xx, 6 5xx
traffic: 48.91KB (50088) total, 16.94KB (17350) headers (space savings 88.10%), 18.55KB (19000) data
                     min         max         mean         sd        +/- sd
time for request:     3.12ms     61.90ms     31.98ms      4.71ms    88.10%
"""

needs_h2load = pytest.mark.skipif(shutil.which(h2load.PROGRAM) is None, reason="h2load (nghttp2-client) is missing")


def test_report_is_read_with_its_units() -> None:
    report = h2load.parse(REPORT)

    assert report.seconds == pytest.approx(0.50321)
    assert (report.requests, report.succeeded, report.data_bytes) == (1000, 990, 19000)


@pytest.mark.parametrize("text", ["", "starting benchmark...\ncould not connect\n", REPORT.replace("traffic", "t")])
def test_what_is_no_report_is_told(text: str) -> None:
    with pytest.raises(H2loadError, match="did not report"):
        h2load.parse(text)


def test_grpc_calls_that_failed_are_no_answers_though_their_status_is_200() -> None:
    report = h2load.parse(REPORT)

    assert report.answers(20) == 950
    assert report.answers(19) == 990  # never more than there were calls


def test_calls_are_as_many_as_fill_the_time_and_some_for_each_caller() -> None:
    assert h2load.calls_for(2000, 3, 64) == 6000
    assert h2load.calls_for(1, 3, 64) == 256


def test_missing_program_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(H2loadError, match="nghttp2-client"):
        h2load.require()


@needs_h2load
async def test_turn_counts_every_answer_of_a_real_server(tmp_path: Path) -> None:
    body = tmp_path / "body"
    body.write_bytes(frames.framed(b"anything"))

    with empty.empty_server() as server:
        size = await answer_bytes(server.address, empty.METHOD, b"anything")
        load = Load(address=server.address, path=empty.METHOD, body=body, connections=2, streams=2)
        pace = Pace(rounds=1, warm_seconds=0.01, seconds=0.05)
        sending = Sending(load, answer_bytes=size, pace=pace, images=3, servers=[server.process_id])
        turn = await sending()

    assert size == frames.FRAME_BYTES
    assert turn.items >= 3 * 16
    assert sending.failed == 0


@needs_h2load
async def test_calls_to_no_method_are_failed_and_no_items(tmp_path: Path) -> None:
    body = tmp_path / "body"
    body.write_bytes(frames.framed(b""))

    with empty.empty_server() as server:
        load = Load(address=server.address, path="/Empty/Other", body=body, connections=1)
        sending = Sending(load, answer_bytes=5, pace=Pace(rounds=1, warm_seconds=0.01, seconds=0.01))
        turn = await sending()
        with pytest.raises(H2loadError, match="UNIMPLEMENTED"):
            await answer_bytes(server.address, "/Empty/Other", b"")

    assert turn.items == 0
    assert sending.failed >= 4


@needs_h2load
async def test_nobody_at_the_address_is_an_error(tmp_path: Path) -> None:
    body = tmp_path / "body"
    body.write_bytes(b"")
    load = Load(address="127.0.0.1:9", path="/", body=body, connections=1)

    with pytest.raises(H2loadError):
        await h2load.run(load, calls=1, timeout_seconds=60)

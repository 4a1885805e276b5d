import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from streamer.ledger import Ledger, LedgerError, read
from streamer.plan import Plan, Remainder
from tests.streamer.deliveries import NUM_SAMPLES, PLAN, Received, sent, train

ROOT = Path(__file__).parents[2]


def batch(position: int = 0, size: int = 10) -> Received:
    return Received(position, position + size, np.arange(size))


def test_ledger_reads_as_it_was_written(tmp_path: Path) -> None:
    plan = Plan(
        dataset="set", split="test", seed=2**64 - 1, epoch=3, world_size=4, rank=2, batch_size=5,
        remainder=Remainder.DROP, transform="cutout(size=4)", fingerprint=bytes(range(32)),
    )  # fmt: skip
    with Ledger(tmp_path / "ledger") as ledger:
        delivery = ledger.begin(plan, num_samples=200, start_position=40, step=2)
        delivery.record(Received(40, 60, np.arange(50, 55)))
        delivery.commit(60, step=3)
        delivery.record(Received(60, 80, np.arange(70, 75)))

    (account,) = read(tmp_path / "ledger").accounts
    assert (account.plan, account.num_samples, account.start_position, account.step) == (plan, 200, 40, 2)
    assert (account.positions, account.ends, account.sizes) == ([40, 60], [60, 80], [5, 5])
    assert account.committed == [0]
    assert [(mark.position, mark.step) for mark in account.commits] == [(60, 3)]


def test_checksum_is_that_of_little_endian_indices(tmp_path: Path) -> None:
    """The value is that of RFC 3720, B.4, for 32 bytes that count up from 0."""
    indices = np.frombuffer(bytes(range(32)), "<i8").astype(">i8")
    train(tmp_path / "ledger", [Received(0, 4, indices)])

    (account,) = read(tmp_path / "ledger").accounts
    assert account.checksums == [0x46DD794E]


def test_commit_covers_what_was_recorded_up_to_it(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger") as ledger:
        delivery = ledger.begin(PLAN, num_samples=NUM_SAMPLES)
        for received in sent(stop=50):
            delivery.record(received)
        delivery.commit(30)

    assert read(tmp_path / "ledger").accounts[0].committed == [0, 1, 2]


@pytest.mark.parametrize("position", [5, 20, 0])
def test_commit_is_refused_where_no_batch_ends(tmp_path: Path, position: int) -> None:
    with Ledger(tmp_path / "ledger") as ledger:
        delivery = ledger.begin(PLAN, num_samples=NUM_SAMPLES)
        delivery.record(batch())
        with pytest.raises(LedgerError, match=f"position: {position} is not where a batch ended"):
            delivery.commit(position)


@pytest.mark.parametrize(
    ("begin", "words"),
    [
        (lambda ledger: ledger.begin(Plan(dataset="mnist"), num_samples=10), "plan.fingerprint: required"),
        (lambda ledger: ledger.begin(PLAN, num_samples=10, start_position=11), "start_position: 11; 0 to 10"),
        (lambda ledger: ledger.begin(PLAN, num_samples=0), "num_samples: 0; at least 1"),
    ],
)
def test_delivery_that_makes_no_sense_is_refused(tmp_path: Path, begin: Callable[[Ledger], object], words: str) -> None:
    with Ledger(tmp_path / "ledger") as ledger, pytest.raises(LedgerError, match=words):
        begin(ledger)


def test_two_deliveries_in_one_file_are_told_apart(tmp_path: Path) -> None:
    """As when the next epoch is opened before this one is trained on."""
    with Ledger(tmp_path / "ledger") as ledger:
        first, second = (ledger.begin(PLAN, num_samples=NUM_SAMPLES) for _ in range(2))
        first.record(batch(0))
        second.record(batch(10))
        first.commit(10)

    assert [account.committed for account in read(tmp_path / "ledger").accounts] == [[0], []]


def test_threads_that_record_and_commit_tear_no_line(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger") as ledger:
        threads = [threading.Thread(target=record_and_commit, args=(ledger, 500)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    contents = read(tmp_path / "ledger")
    assert [len(account.committed) for account in contents.accounts] == [500] * 4
    assert contents.torn_lines == []


def record_and_commit(ledger: Ledger, count: int) -> None:
    delivery = ledger.begin(PLAN, num_samples=10 * count)
    for number in range(count):
        delivery.record(batch(10 * number))
        delivery.commit(10 * number + 10)


@pytest.mark.parametrize("kept", [1, 20, -1])
def test_torn_last_line_is_reported_and_the_rest_read(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "ledger"
    train(path)
    *lines, last = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines) + last[:kept])

    contents = read(path)
    assert contents.torn_lines == [len(lines) + 1]
    assert len(contents.accounts[0].committed) == 9


def test_ledger_goes_on_after_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    train(path)
    os.truncate(path, path.stat().st_size - 5)
    lines = path.read_bytes().count(b"\n")
    train(path, sent(start=90), start=90)

    contents = read(path)
    assert contents.torn_lines == [lines + 1]
    assert [len(account.committed) for account in contents.accounts] == [9, 1]


@pytest.mark.parametrize("line", [1, 2, 3, 7])
def test_damage_in_the_middle_is_refused(tmp_path: Path, line: int) -> None:
    path = tmp_path / "ledger"
    train(path)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[line - 1] = lines[line - 1][:10] + bytes([lines[line - 1][10] ^ 1]) + lines[line - 1][11:]
    path.write_bytes(b"".join(lines))

    with pytest.raises(LedgerError, match=f"{path}:{line}: damaged"):
        read(path)


def test_line_that_is_missing_is_refused_or_missed(tmp_path: Path) -> None:
    """Without its ``begin`` a batch means nothing."""
    path = tmp_path / "ledger"
    train(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:1] + lines[2:]))

    with pytest.raises(LedgerError, match=f"{path}:2: not a line of a ledger: batch"):
        read(path)


def test_file_that_is_no_ledger_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("first\nsecond\nthird\n")

    with pytest.raises(LedgerError, match="not a ledger"):
        read(tmp_path / "notes")


def test_ledger_is_refused_to_a_second_process(tmp_path: Path) -> None:
    opening = f"from streamer.ledger import Ledger; Ledger({str(tmp_path / 'ledger')!r})"
    with Ledger(tmp_path / "ledger"):
        done = subprocess.run([sys.executable, "-c", opening], cwd=ROOT, capture_output=True, text=True, check=False)

    assert "another process writes to it" in done.stderr


def test_killed_process_leaves_the_file_to_its_successor_while_its_workers_live(tmp_path: Path) -> None:
    script = (
        "import os, sys\n"
        "from streamer.ledger import Ledger\n"
        f"ledger = Ledger({str(tmp_path / 'ledger')!r})\n"
        "worker = os.fork()\n"
        # In one piece, as both write at the same time.
        "os.write(1, f'{worker}\\n'.encode())\n"
        "sys.stdin.read()\n"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        # Each prints a line: the worker is through with its fork.
        worker = max(int(process.stdout.readline()) for _ in range(2))
        process.kill()
        process.wait()
        os.kill(worker, 0)
        Ledger(tmp_path / "ledger").close()


def test_closed_ledger_is_free_whoever_has_the_open_file(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    # As after a fork that Python does not know of.
    kept = os.dup(ledger._descriptor or 0)
    ledger.close()
    Ledger(tmp_path / "ledger").close()
    os.close(kept)


def test_ledger_is_closed_in_what_was_forked(tmp_path: Path) -> None:
    script = (
        "import os\n"
        "from tests.streamer.deliveries import *\n"
        f"ledger = Ledger({str(tmp_path / 'ledger')!r})\n"
        "if not os.fork():\n"
        "    ledger.begin(PLAN, num_samples=10)\n"
        "os.wait()\n"
        "ledger.begin(PLAN, num_samples=10)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 0
    assert "opened by the process that this one was forked from" in done.stderr
    assert len(read(tmp_path / "ledger").accounts) == 1


def test_ledger_in_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="cannot be written: No such file or directory"):
        Ledger(tmp_path / "none" / "ledger")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_full_disk_is_said() -> None:
    with pytest.raises(LedgerError, match="/dev/full: cannot be written: No space left on device"):
        Ledger("/dev/full")


def test_closed_ledger_takes_no_line(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger") as ledger:
        delivery = ledger.begin(PLAN, num_samples=NUM_SAMPLES)
    ledger.close()

    with pytest.raises(LedgerError, match="closed"):
        delivery.record(batch())


def test_killed_process_leaves_all_it_committed(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    script = (
        "import sys\n"
        "from tests.streamer.deliveries import *\n"
        f"ledger = Ledger({str(path)!r})\n"
        "delivery = ledger.begin(PLAN, num_samples=10**9)\n"
        "for batch in sent(PLAN, 10**9):\n"
        "    delivery.record(batch)\n"
        "    delivery.commit(batch.next_position)\n"
        "    print(batch.next_position, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(200)]
        process.send_signal(signal.SIGKILL)
        said += process.stdout.readlines()

    (account,) = read(path).accounts
    assert account.commits[-1].position >= int(said[-1])


def test_exception_while_saving_commits_nothing(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger") as ledger:
        delivery = ledger.begin(PLAN, num_samples=NUM_SAMPLES)
        delivery.record(batch())
        with pytest.raises(OSError, match="full"), delivery.committing(10):
            raise OSError("full")

    (account,) = read(tmp_path / "ledger").accounts
    assert account.committed == []
    assert account.saving is not None


def test_batch_costs_less_than_20_microseconds_and_80_bytes(tmp_path: Path) -> None:
    batches = list(sent(Plan(dataset="mnist", seed=7, batch_size=128, fingerprint=b"f" * 32), 60_000))
    best = float("inf")
    with Ledger(tmp_path / "ledger") as ledger:
        for _ in range(5):
            delivery = ledger.begin(PLAN, num_samples=60_000)
            started = time.perf_counter()
            for received in batches:
                delivery.record(received)
                delivery.commit(received.next_position)
            best = min(best, time.perf_counter() - started)

    assert best / len(batches) < 20e-6
    assert (tmp_path / "ledger").stat().st_size < 5 * 80 * len(batches)

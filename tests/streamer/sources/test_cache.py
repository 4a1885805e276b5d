"""The cache of one process and of several, on a real disk."""

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamer.errors import CacheError
from streamer.sources.cache import BlockCache, Reservation, Room
from streamer.sources.tally import Tally
from tests.streamer.packed import flip

ROOT = Path(__file__).resolve().parents[3]
BOOKS = 9


def block(number: int, size: int = 1000) -> tuple[str, bytes]:
    content = number.to_bytes(4, "little") * (size // 4)
    return hashlib.sha256(content).hexdigest(), content


def keep(cache: BlockCache, number: int, size: int = 1000) -> Room:
    """Take room for a block and publish it, or give the room back where it is not granted."""
    key, content = block(number, size)
    room = Reservation(cache, key, size)
    answer = room.take()
    if answer is Room.GRANTED:
        assert room.publish(memoryview(content))
    return answer


def read(cache: BlockCache, number: int, size: int = 1000, *, check: bool = False) -> bytes | None:
    with cache.reading(block(number, size)[0], check=check) as descriptor:
        return None if descriptor is None else os.pread(descriptor, size, 0)


def size_of(folder: Path) -> int:
    """Bytes of all files, also while others remove some."""
    total = 0
    for name in os.listdir(folder):
        with suppress(FileNotFoundError):
            total += os.stat(folder / name).st_size
    return total


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[BlockCache]:
    """Room for three blocks of 1,000 bytes."""
    cache = BlockCache(tmp_path / "blocks", max_bytes=3000 + BOOKS, tally=Tally())
    yield cache
    cache.close()


def test_published_block_is_read(cache: BlockCache) -> None:
    assert keep(cache, 1) is Room.GRANTED
    assert read(cache, 1, check=True) == block(1)[1]
    assert read(cache, 2) is None
    assert keep(cache, 1) is Room.PRESENT
    assert cache.used_bytes == size_of(cache.folder) == 1000 + BOOKS


def test_room_counts_before_anything_is_written(cache: BlockCache) -> None:
    room = Reservation(cache, block(1)[0], 1000)

    assert room.take() is Room.GRANTED
    assert cache.used_bytes == size_of(cache.folder) == 1000 + BOOKS
    room.release()
    assert cache.used_bytes == size_of(cache.folder) == BOOKS


def test_block_used_longest_ago_goes_first(cache: BlockCache) -> None:
    for number in (1, 2, 3):
        keep(cache, number)
    read(cache, 1)
    keep(cache, 4)

    assert [number for number in (1, 2, 3, 4) if read(cache, number)] == [1, 3, 4]
    assert cache._tally.counts().evictions == 1


def test_block_that_is_being_read_stays(cache: BlockCache) -> None:
    for number in (1, 2, 3):
        keep(cache, number)

    with cache.reading(block(1)[0], check=False), cache.reading(block(2)[0], check=False):
        assert keep(cache, 4) is Room.GRANTED
        assert keep(cache, 5) is Room.GRANTED
        assert [number for number in range(1, 6) if cache.has(block(number)[0])] == [1, 2, 5]


def test_no_room_beside_what_is_being_read_or_downloaded(cache: BlockCache) -> None:
    keep(cache, 1)
    rooms = [Reservation(cache, block(number)[0], 1000) for number in (2, 3)]
    assert [room.take() for room in rooms] == [Room.GRANTED, Room.GRANTED]

    with cache.reading(block(1)[0], check=False):
        assert keep(cache, 4) is Room.NONE
    rooms[0].release()
    assert keep(cache, 4) is Room.GRANTED
    rooms[1].release()


def test_block_larger_than_the_limit_empties_nothing(cache: BlockCache) -> None:
    keep(cache, 1)

    assert keep(cache, 2, size=3004) is Room.NONE
    assert read(cache, 1) == block(1)[1]


def test_flipped_bit_is_found_after_a_restart(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, max_bytes=10_000, tally=Tally())
    keep(cache, 1)
    cache.close()
    path = tmp_path / block(1)[0]
    path.write_bytes(flip(path.read_bytes(), 4321))
    cache = BlockCache(tmp_path, max_bytes=10_000, tally=Tally())

    assert read(cache, 1, check=True) is None
    assert not cache.has(block(1)[0])
    assert cache._tally.counts().checksum_failures == 1
    assert cache.used_bytes == size_of(tmp_path) == BOOKS
    cache.close()


def test_what_a_killed_process_left_unfinished_is_removed(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path\n"
        "from streamer.sources.cache import *; from streamer.sources.tally import Tally\n"
        "cache = BlockCache(Path(sys.argv[1]), max_bytes=10_000, tally=Tally())\n"
        f"print(Reservation(cache, {block(1)[0]!r}, 1000).take()); sys.stdout.flush(); os.kill(os.getpid(), 9)"
    )
    said = subprocess.run([sys.executable, "-c", program, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert "GRANTED" in said.stdout
    assert size_of(tmp_path) == 1000 + BOOKS

    cache = BlockCache(tmp_path, max_bytes=10_000, tally=Tally())
    assert cache.used_bytes == size_of(tmp_path) == BOOKS
    cache.close()


def test_unfinished_file_of_a_killed_process_is_taken_over(cache: BlockCache) -> None:
    """Nobody need start anew for it."""
    (cache.folder / f"{block(1)[0]}.part").write_bytes(bytes(400))
    with cache._changing() as usage:
        usage.bytes += 400

    assert keep(cache, 1) is Room.GRANTED
    assert cache.used_bytes == size_of(cache.folder) == 1000 + BOOKS


def test_count_is_made_anew_after_a_kill_in_the_middle_of_a_change(cache: BlockCache) -> None:
    keep(cache, 1)
    with suppress(KeyboardInterrupt), cache._changing():
        (cache.folder / block(1)[0]).unlink()
        raise KeyboardInterrupt

    assert cache.used_bytes == size_of(cache.folder) == BOOKS


def test_lower_limit_takes_effect_at_the_start(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, max_bytes=10_000, tally=Tally())
    for number in range(9):
        keep(cache, number)
    cache.close()

    cache = BlockCache(tmp_path, max_bytes=2500, tally=Tally())
    assert cache.used_bytes == size_of(tmp_path) == 2000 + BOOKS
    assert [number for number in range(9) if read(cache, number)] == [7, 8]
    cache.close()


def test_second_cache_waits_for_the_one_that_downloads(cache: BlockCache) -> None:
    other = BlockCache(cache.folder, max_bytes=cache.max_bytes, tally=Tally())
    key, content = block(1)
    mine, theirs = Reservation(cache, key, 1000), Reservation(other, key, 1000)

    assert (mine.take(), theirs.take()) == (Room.GRANTED, Room.BUSY)
    mine.publish(memoryview(content))
    assert theirs.take() is Room.PRESENT
    assert read(other, 1, check=True) == content
    other.close()


def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(CacheError, match=f"cannot write to {tmp_path}/file/blocks: Not a directory"):
        BlockCache(tmp_path / "file" / "blocks", max_bytes=1000, tally=Tally())


def test_full_disk_leaves_nothing_behind(cache: BlockCache, monkeypatch: pytest.MonkeyPatch) -> None:
    key, content = block(1)
    room = Reservation(cache, key, 1000)
    room.take()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(OSError, match="No space"):
        room.publish(memoryview(content))
    room.release()
    assert cache.used_bytes == size_of(cache.folder) == BOOKS


Steps = list[tuple[str, int]]


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(st.tuples(st.sampled_from(["keep", "take", "drop", "read", "hold", "let go"]), st.integers(0, 7)))
)
def test_limit_holds_and_held_blocks_stay_whatever_happens(
    tmp_path_factory: pytest.TempPathFactory, steps: Steps
) -> None:
    limit = 3500
    cache = BlockCache(tmp_path_factory.mktemp("blocks"), max_bytes=limit, tally=Tally())
    taken: dict[int, Reservation] = {}
    held: dict[int, AbstractContextManager[int | None]] = {}
    for step, number in steps:
        if step == "keep" and number not in taken:
            keep(cache, number)
        elif step == "take" and number not in taken:
            room = Reservation(cache, block(number)[0], 1000)
            if room.take() is Room.GRANTED:
                taken[number] = room
        elif step == "drop" and number in taken:
            taken.pop(number).release()
        elif step == "read":
            assert read(cache, number, check=True) in (None, block(number)[1])
        elif step == "hold" and number not in held:
            reading = cache.reading(block(number)[0], check=False)
            if reading.__enter__() is not None:
                held[number] = reading
        elif step == "let go" and number in held:
            held.pop(number).__exit__(None, None, None)
        assert cache.used_bytes == size_of(cache.folder) <= limit
        assert all(cache.has(block(one)[0]) for one in held)
    for left in held.values():
        left.__exit__(None, None, None)
    cache.close()


@pytest.mark.parametrize("num_caches", [1, 3])
def test_limit_holds_at_every_moment_under_many_threads(tmp_path: Path, num_caches: int) -> None:
    """Watched both at each change of the folder and from outside."""
    limit, seen, done = 6 * 1000 + BOOKS, [0], threading.Event()
    caches = [BlockCache(tmp_path, max_bytes=limit, tally=Tally()) for _ in range(num_caches)]

    def watch() -> None:
        while not done.is_set():
            seen[0] = max(seen[0], size_of(tmp_path))

    def work(seed: int) -> int:
        wrong = 0
        for number in range(150):
            cache, number = caches[seed % num_caches], (number * (seed + 1)) % 20
            content = read(cache, number, check=number % 2 == 0)
            wrong += content not in (None, block(number)[1])
            if content is None:
                keep(cache, number)
        return wrong

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(8) as threads:
        wrong = sum(threads.map(work, range(8)))
    done.set()
    watcher.join()

    assert wrong == 0
    assert 0 < seen[0] <= limit
    assert caches[0].used_bytes == size_of(tmp_path)
    assert sum(cache._tally.counts().evictions for cache in caches) > 10
    for cache in caches:
        cache.close()

"""
Blocks of objects kept on the local disk, within a number of bytes that is never exceeded.

The folder holds one file a block, named by the SHA-256 of its content, and ``.usage``; any number of processes on
one host may share it (on a local file system: it relies on flock). What they agree on is kept by the kernel, so
that a killed process leaves nothing to clean up but its unfinished files, which the next one to look removes:

- Who counts, makes room, publishes or removes holds the lock on ``.usage`` for as long, mostly microseconds.
- Room is taken before a download begins, by a file of the full size, and this file counts like any other.
- Who reads a block holds a shared lock on its file; a block in use can thus be told from one that may go.
- Who downloads a block holds an exclusive lock on its unfinished file: the others wait instead of downloading too.

The least recently used block goes first; when a file was last used is its modification time. A block's SHA-256 is
compared when it arrives and when a process first uses it.
"""

import enum
import fcntl
import hashlib
import os
import struct
import time
from collections import deque
from collections.abc import Iterator, Set
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock

from streamer.sources.atomic import filling
from streamer.sources.tally import Tally

BLOCKS_FOLDER = "blocks"
"""Within Sluice's cache, for what comes from object storage."""

_USAGE_NAME = ".usage"
# Bytes in all files, and whether someone was interrupted in changing it.
_USAGE = struct.Struct("<q?")
_UNFINISHED = ".part"
_NAME_LENGTH = 64


def shown_bytes(folder: Path) -> int:
    """Return the bytes of all files of a cache, by the books and without waiting for anyone; 0 where there is none."""
    try:
        books = (folder / _USAGE_NAME).read_bytes()
    except OSError:
        return 0
    used, _ = _USAGE.unpack_from(books.ljust(_USAGE.size, b"\0"))
    return int(used)


class Room(enum.Enum):
    """What came of asking for room."""

    GRANTED = enum.auto()
    """The block may be downloaded and published."""
    PRESENT = enum.auto()
    """The block is here already."""
    BUSY = enum.auto()
    """Another process is downloading it."""
    NONE = enum.auto()
    """Nothing that could go is large enough: use the block without keeping it."""


class BlockCache:
    """
    The cache as one process sees it; its methods block, for as long as the disk takes, and may run in any thread.

    Args:
        folder: For this cache alone; made when missing.
        max_bytes: Of all files in it, the unfinished and its own book-keeping included. Where processes name
            different limits, each keeps to its own when it adds.
        tally: Counts evictions and damage.

    Raises:
        CacheError: The folder cannot be made or written to.
    """

    def __init__(self, folder: Path, *, max_bytes: int, tally: Tally) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self._tally = tally
        # flock tells processes apart, not the threads of one.
        self._threads_lock = Lock()
        self._candidates: deque[tuple[int, str]] = deque()
        # Joining paths would cost more than opening files.
        self._prefix = f"{folder}{os.sep}"
        with filling(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._usage_descriptor = os.open(folder / _USAGE_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            with self._changing() as usage:
                usage.bytes = self._scan()
                self._make_room(usage, 0)

    def close(self) -> None:
        """Let go of the folder; what is in it stays."""
        os.close(self._usage_descriptor)

    @property
    def used_bytes(self) -> int:
        """Bytes of all files, by the books."""
        with self._changing() as usage:
            return usage.bytes

    def has(self, key: str) -> bool:
        """Return whether a block is here now; it may go the next moment."""
        return os.path.exists(self._prefix + key)

    @contextmanager
    def reading(self, key: str, *, check: bool) -> Iterator[int | None]:
        """
        Hold a block in place and give a descriptor to read it from, or None where it is not here.

        Args:
            key: SHA-256 of the block.
            check: Compare its content with it first; a damaged block is removed and counts as not here.
        """
        descriptor = self._open(key)
        try:
            if descriptor is not None and check and _sha256_of(descriptor) != key:
                os.close(descriptor)
                descriptor = None
                self._tally.add(checksum_failures=1)
                self.remove(key)
            yield descriptor
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def remove(self, key: str) -> None:
        """Remove a damaged block; who is reading it keeps what he has open."""
        with self._changing() as usage, suppress(FileNotFoundError):
            size = os.stat(self.folder / key).st_size
            os.unlink(self.folder / key)
            usage.bytes -= size

    def _open(self, key: str) -> int | None:
        try:
            descriptor = os.open(self._prefix + key, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        # The lock is refused while the block is being evicted; gone is what had been by the time it was granted.
        if _lock(descriptor, fcntl.LOCK_SH) and os.fstat(descriptor).st_nlink:
            # Another user's block ages as if nobody used it.
            with suppress(PermissionError):
                _touch(descriptor)
            return descriptor
        os.close(descriptor)
        return None

    @contextmanager
    def _changing(self) -> Iterator["_Usage"]:
        """Hold the folder against all other processes and threads, and write down what changed."""
        descriptor = self._usage_descriptor
        with self._threads_lock:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            try:
                used, interrupted = _USAGE.unpack(os.pread(descriptor, _USAGE.size, 0).ljust(_USAGE.size, b"\0"))
                os.pwrite(descriptor, _USAGE.pack(used, True), 0)
                # Whoever was killed in here left the count behind the truth.
                usage = _Usage(self._scan() if interrupted else used)
                yield usage
                os.pwrite(descriptor, _USAGE.pack(usage.bytes, False), 0)
            finally:
                fcntl.flock(descriptor, fcntl.LOCK_UN)

    def _scan(self) -> int:
        """Return the bytes of all files, having removed the unfinished ones that nobody works on."""
        used, found = _USAGE.size, []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    if entry.name.endswith(_UNFINISHED) and _is_abandoned(entry.path):
                        os.unlink(entry.path)
                    elif entry.name != _USAGE_NAME:
                        about = entry.stat(follow_symlinks=False)
                        used += about.st_size
                        if len(entry.name) == _NAME_LENGTH:
                            found.append((about.st_mtime_ns, entry.name))
        self._candidates = deque(sorted(found))
        return used

    def _make_room(
        self, usage: "_Usage", size: int, *, spared: Set[str] = frozenset(), fresh_seconds: float = 0.0
    ) -> bool:
        """Remove blocks until ``size`` bytes fit; return whether they do."""
        used_before = time.time_ns() - int(fresh_seconds * 1e9) if fresh_seconds else None
        fits_at_all = size + _USAGE.size <= self.max_bytes
        for is_last_look in (False, True):
            while fits_at_all and usage.bytes + size > self.max_bytes and self._candidates:
                last_used, name = self._candidates.popleft()
                if name not in spared and (used_before is None or last_used < used_before):
                    self._evict(usage, name, last_used)
            if not fits_at_all or usage.bytes + size <= self.max_bytes:
                return fits_at_all
            if not is_last_look:
                usage.bytes = self._scan()
        return False

    def _evict(self, usage: "_Usage", name: str, last_used: int) -> None:
        """Remove a block, unless it was used since it was looked at, or is being read."""
        with suppress(OSError):
            descriptor = os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC)
            try:
                about = os.fstat(descriptor)
                if about.st_mtime_ns == last_used and _lock(descriptor, fcntl.LOCK_EX):
                    os.unlink(self.folder / name)
                    usage.bytes -= about.st_size
                    self._tally.add(evictions=1)
            finally:
                os.close(descriptor)


class Reservation:
    """
    Room for one block, from :meth:`take` to :meth:`release`; its methods block like the cache's.

    Args:
        cache: Where the block is to be kept.
        key: Its SHA-256.
        size: Its bytes.
        spared: Blocks that are not removed for it.
        fresh_seconds: Blocks used within this time are not removed for it either.
    """

    def __init__(
        self, cache: BlockCache, key: str, size: int, *, spared: Set[str] = frozenset(), fresh_seconds: float = 0.0
    ) -> None:
        self._cache = cache
        self._key = key
        self._size = size
        self._unfinished = cache.folder / f"{key}{_UNFINISHED}"
        self._spared = spared
        self._fresh_seconds = fresh_seconds
        self._descriptor: int | None = None

    def take(self) -> Room:
        """
        Take room, removing other blocks where need be.

        Raises:
            OSError: The disk refuses.
        """
        with self._cache._changing() as usage:
            if self._cache.has(self._key):
                return Room.PRESENT
            with suppress(FileNotFoundError):
                left = os.stat(self._unfinished).st_size
                if not _is_abandoned(self._unfinished):
                    return Room.BUSY
                os.unlink(self._unfinished)
                usage.bytes -= left
            if not self._cache._make_room(usage, self._size, spared=self._spared, fresh_seconds=self._fresh_seconds):
                return Room.NONE
            descriptor = os.open(self._unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            self._descriptor = descriptor
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            os.ftruncate(descriptor, self._size)
            usage.bytes += self._size
            return Room.GRANTED

    def publish(self, content: memoryview) -> bool:
        """
        Write the block and give it its name: others see all of it or nothing.

        Args:
            content: Of the size that was taken, and already compared with its SHA-256.

        Returns:
            Whether it is kept; it is not where there was no room.

        Raises:
            OSError: The disk refuses; nothing is published.
        """
        if self._descriptor is None:
            return False
        written = 0
        while written < self._size:
            written += os.pwrite(self._descriptor, content[written:], written)
        # To the nanosecond; the kernel's own times go in steps of milliseconds.
        _touch(self._descriptor)
        with self._cache._changing():
            # Before it has its name, or its first readers would find it locked.
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            # Nothing is synced: a block that is lost with the power is found by its checksum, and downloaded again.
            os.rename(self._unfinished, self._cache.folder / self._key)
            os.close(self._descriptor)
            self._descriptor = None
        return True

    def release(self) -> None:
        """Give room back that was taken and not filled; else do nothing."""
        if self._descriptor is None:
            return
        with self._cache._changing() as usage:
            with suppress(FileNotFoundError):
                os.unlink(self._unfinished)
                usage.bytes -= os.fstat(self._descriptor).st_size
            os.close(self._descriptor)
            self._descriptor = None


class _Usage:
    """The count of bytes while someone may change it."""

    def __init__(self, count: int) -> None:
        self.bytes = count


def _is_abandoned(path: str | Path) -> bool:
    """Return whether nobody works on an unfinished file; true only while the folder is held."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _lock(descriptor, fcntl.LOCK_EX)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, kind: int) -> bool:
    """Lock a file without waiting; return whether that was possible."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _touch(descriptor: int) -> None:
    now = time.time_ns()
    os.utime(descriptor, ns=(now, now))


def _sha256_of(descriptor: int) -> str:
    size = os.fstat(descriptor).st_size
    return hashlib.sha256(os.pread(descriptor, size, 0)).hexdigest()

"""Files and folders that appear whole or not at all: write, fsync, rename."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from streamer.errors import CacheError


@contextmanager
def filling(folder: Path) -> Iterator[None]:
    """
    Make or fill a folder of the cache inside.

    Raises:
        CacheError: In place of the OSError that ended it.
    """
    try:
        yield
    except OSError as error:
        raise CacheError(folder, error.strerror or str(error)) from error


def write_file(target: Path, content: bytes) -> None:
    """Write a file so that no one ever sees a part of it, also after a crash; replaces an existing one."""
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp's 0600 would hide a shared cache from its other users.
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        # A signal's handler may raise when it has its name already.
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync(target.parent)


def publish_folder(made: Path, folder: Path) -> None:
    """
    Move a finished folder to its place.

    What is there already counts as broken and is removed, unless another process put it there just now.

    Args:
        made: On the same file system; its files are synced.
        folder: Where it goes.
    """
    if folder.exists():
        shutil.rmtree(folder)
    made.chmod(0o755)
    try:
        made.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
    _sync(folder.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

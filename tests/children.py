"""The processes that a process has started."""

import asyncio
import os
from pathlib import Path


def children(process_id: int) -> list[int]:
    """Return the process ids of all that a process has started and that still run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent, *_ = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        if state != "Z" and int(parent) == process_id:
            found.append(int(folder.name))
    return sorted(found)


class Watched:
    """Processes whose end can be waited for, though they are nobody's children here."""

    def __init__(self, process_ids: list[int]) -> None:
        self._descriptors = [os.pidfd_open(each) for each in process_ids]

    async def ended(self) -> None:
        """Wait until all have; the test's own timeout is the limit."""
        loop = asyncio.get_running_loop()
        for descriptor in self._descriptors:
            ended = asyncio.Event()
            loop.add_reader(descriptor, ended.set)
            try:
                await ended.wait()
            finally:
                loop.remove_reader(descriptor)
                os.close(descriptor)

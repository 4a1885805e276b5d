"""The measured part of a turn: after a warm-up, with the CPU time of all who take part. Standard library alone."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """What was done in one turn; CPU times to a hundredth, and 0 where the system has no /proc."""

    items: int
    seconds: float
    reader_cpu_seconds: float
    """Of the reading process and all it started."""
    server_cpu_seconds: float
    """Of the server and all it started; 0 without one."""
    other_cpu_seconds: float
    """Of everything else on the machine: other programs, the idle rest of the benchmark, other virtual machines."""

    @property
    def rate(self) -> float:
        """Items a second."""
        return self.items / self.seconds


@dataclass(slots=True)
class Window:
    """
    Counts items between the end of the warm-up and the end of the turn.

    It opens and closes as an item arrives, so that what is counted took exactly the time that is measured.

    Args:
        warm_seconds: From the first item on, not counted.
        seconds: Counted.
        servers: Processes that work for the reader.
    """

    warm_seconds: float
    seconds: float
    servers: Sequence[int] = ()
    _items: int = 0
    _opens: float = 0.0
    _opened: float = 0.0
    _closes: float = 0.0
    _cpu: tuple[float, ...] = field(default=())
    _turn: Turn | None = None

    def add(self, items: int) -> bool:
        """Count items that have arrived; True once the turn is over."""
        now = time.perf_counter()
        if self._opened:
            self._items += items
            if now >= self._closes:
                self._close(now)
                return True
        elif not self._opens:
            self._opens = now + self.warm_seconds
        elif now >= self._opens:
            self._cpu = self._cpu_seconds()
            self._opened = time.perf_counter()
            self._closes = self._opened + self.seconds
        return False

    @property
    def turn(self) -> Turn:
        """What was done; known once :meth:`add` has said that it is over."""
        assert self._turn is not None
        return self._turn

    def _close(self, now: float) -> None:
        reader, server, machine = (after - before for before, after in zip(self._cpu, self._cpu_seconds(), strict=True))
        self._turn = Turn(
            items=self._items,
            seconds=now - self._opened,
            reader_cpu_seconds=reader,
            server_cpu_seconds=server,
            other_cpu_seconds=max(0.0, machine - reader - server),
        )

    def _cpu_seconds(self) -> tuple[float, ...]:
        return cpu_seconds([os.getpid()]), cpu_seconds(self.servers), machine_cpu_seconds()


def cpu_seconds(processes: Sequence[int]) -> float:
    """Return the CPU time of these processes and of all that they started."""
    return sum(_own_cpu_seconds(each) for each in family(processes))


def family(processes: Sequence[int]) -> list[int]:
    """Return these processes and all that they started, as far as it runs."""
    found = list(processes)
    for each in found:  # grows as it goes
        for listed in Path(f"/proc/{each}/task").glob("*/children"):
            found += map(int, _text(listed).split())
    return found


def _own_cpu_seconds(process: int) -> float:
    # After the name, which may hold blanks: user and system time, and those of children that have ended.
    fields = _text(Path(f"/proc/{process}/stat")).rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / _TICKS if fields else 0.0


def machine_cpu_seconds() -> float:
    """Return the CPU time of everything that runs here, and of other virtual machines in this one's place."""
    fields = _text(Path("/proc/stat")).partition("\n")[0].split()
    # user, nice, system; idle, iowait, irq and softirq are nobody's; steal.
    return sum(map(int, [*fields[1:4], *fields[8:9]])) / _TICKS if fields else 0.0


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # it has ended
        return ""

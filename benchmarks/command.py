"""The command line of a benchmark of several suites: which of them, at what pace, on which cores, and written where."""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.contest import Pace
from benchmarks.report import RESULTS


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """``python -m benchmarks.NAME``, which prints a page, and writes that of a whole run to ``results/NAME.md``."""

    name: str
    suites: Sequence[str]
    full: Pace
    quick: Pace

    def parser(self, description: str | None) -> argparse.ArgumentParser:
        """Return what reads ``only``, ``pace``'s numbers, ``cores``, ``quick`` and ``output``; others may be added."""
        parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{self.name}", description=description)
        parser.add_argument("--only", default=",".join(self.suites), type=self._chosen, help="some of %(default)s")
        parser.add_argument("--rounds", type=int, help=f"turns of each contender (default: {self.full.rounds})")
        parser.add_argument("--seconds", type=float, help=f"length of a turn (default: {self.full.seconds:g})")
        parser.add_argument("--cores", type=int, default=2, help="everything runs on so many (default: %(default)s)")
        parser.add_argument("--quick", action="store_true", help="see that it runs; the figures mean nothing")
        text = f"where to write; default: results/{self.name}.md for a whole run"
        parser.add_argument("--output", type=Path, help=text)
        return parser

    def pace(self, given: argparse.Namespace) -> Pace:
        """Return the pace that is asked for."""
        usual = self.quick if given.quick else self.full
        return Pace(
            rounds=given.rounds or usual.rounds, warm_seconds=usual.warm_seconds, seconds=given.seconds or usual.seconds
        )

    def page(self, given: argparse.Namespace, *, is_whole: bool = True) -> Path | None:
        """Return where the page goes, in a folder that is made; None where it is printed alone."""
        is_whole = is_whole and not given.quick and len(given.only) == len(self.suites)
        page: Path | None = given.output or (RESULTS / f"{self.name}.md" if is_whole else None)
        if page is not None:
            page.parent.mkdir(parents=True, exist_ok=True)
        return page

    def _chosen(self, names: str) -> list[str]:
        wanted = names.split(",")
        if unknown := [name for name in wanted if name not in self.suites]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}; allowed are {', '.join(self.suites)}")
        return [name for name in self.suites if name in wanted]


def take_cores(number: int) -> None:
    """Have this process, and all it starts, run on so many of its cores; on all where the system cannot tell."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:number])


def say(line: str) -> None:
    """Tell how it goes, beside the page."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def plainly_ended(*errors: type[Exception]) -> Iterator[None]:
    """End the program with the message alone of one of these errors, and without any at Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except errors as error:
        raise SystemExit(str(error)) from error

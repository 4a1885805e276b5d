"""A streamer in a process of its own, whose memory can be read."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from sluice.readiness import environment
from streamer.sources import idx

ROOT = Path(__file__).resolve().parents[2]


def write_digits(folder: Path, num_samples: int) -> None:
    """Write noise of MNIST's shape as IDX files."""
    rng = np.random.default_rng(3)
    for prefix, count in (("train", num_samples), ("t10k", 10)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(idx.format_images(images))
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx.format_labels(labels))


class StreamerProcess:
    """
    ``sluice streamer`` on free ports, from ``with`` to its end.

    Args:
        data: A folder of MNIST's four files.
        settings: Others than the defaults.
    """

    def __init__(self, data: Path, **settings: object) -> None:
        self._settings = {"data": data, "port": 0, "metrics_port": 0} | settings
        self._process: subprocess.Popen[bytes] | None = None
        self.address = ""
        self.metrics_url = ""

    def __enter__(self) -> Self:
        options = [f"--{name.replace('_', '-')}={value}" for name, value in self._settings.items()]
        reader, writer = os.pipe()
        with tempfile.TemporaryFile() as log, os.fdopen(reader) as pipe:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sluice", "streamer", *options],
                cwd=ROOT, env=environment(writer), stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(writer,),
            )  # fmt: skip
            os.close(writer)
            self.address = pipe.readline().strip()
            log.seek(0)
            said = log.read().decode()
        shown = re.search(r"http://\S+/metrics", said)
        if not self.address or shown is None:
            self._end()
            raise RuntimeError(said[-2000:])
        self.metrics_url = shown.group()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    @property
    def resident_bytes(self) -> int:
        """How much of its memory is real, as Linux counts it."""
        assert self._process is not None
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        kibibytes = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert kibibytes is not None
        return int(kibibytes.group(1)) * 1024

    def _end(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="package")
def streamer(tiny_mnist: Path) -> Iterator[str]:
    """A streamer of tiny MNIST in a process of its own: grpc.aio wants one event loop in each."""
    arguments = ["streamer", "--port", "0", "--metrics-port", "0", "--data", str(tiny_mnist)]
    command = [sys.executable, "-m", "sluice", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        words = next(line for line in process.stderr if line.startswith("listening on ")).split()
        yield words[2].rstrip(";")
        process.terminate()
        process.communicate(timeout=30)

"""A streamer in a process of its own: grpc.aio wants one event loop in each, and gRPC outlives no fork."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def streaming(datasets: str) -> Iterator[str]:
    """Serve what ``--datasets`` names for as long as the block lasts; gives the address."""
    arguments = ["streamer", "--port", "0", "--metrics-port", "0", "--datasets", datasets]
    # Nobody reads on: a line an RPC would fill the pipe, and the streamer would wait for ever with its next line.
    quiet = {**os.environ, "SLUICE_STREAMER_LOG_LEVEL": "warning"}
    with subprocess.Popen(
        [sys.executable, "-m", "sluice", *arguments], stderr=subprocess.PIPE, text=True, env=quiet
    ) as process:
        assert process.stderr is not None
        words = next(line for line in process.stderr if line.startswith("listening on ")).split()
        try:
            yield words[2].rstrip(";")
        finally:
            process.terminate()
            process.communicate(timeout=60)

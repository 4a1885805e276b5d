"""A line of its own for what takes a line down."""

import os
import signal
import socket
from pathlib import Path

import pytest

from tests.line.processes import free_ports, read_until, start_up

pytestmark = [pytest.mark.triton, pytest.mark.timeout(300), pytest.mark.usefixtures("triton_installed")]


def test_dead_service_is_named_and_restarted_and_ctrl_c_leaves_nothing(tmp_path: Path, tiny_mnist: Path) -> None:
    with start_up(tmp_path, free_ports(), "--data", str(tiny_mnist)) as process:
        addresses = [line.split()[1] for line in read_until(process, "Ctrl-C stops")[-4:-1]]
        for name in ("streamer", "triton"):
            os.kill(child_of(process.pid, name), signal.SIGKILL)

            assert f"{name} died (SIGKILL)" in read_until(process, "died")[-1]
            assert f"{name} is back on" in read_until(process, "is back")[-1]
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)

    assert process.returncode == 0
    assert output.splitlines()[-1] == "stopped"
    for address in addresses:
        host, port = address.rsplit(":", 1)
        with socket.socket() as probe:
            assert probe.connect_ex((host, int(port))) != 0


def test_taken_port_is_named_with_its_option_and_nothing_is_left(tmp_path: Path, tiny_mnist: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ports = {**free_ports(), "streamer": taken.getsockname()[1]}
        with start_up(tmp_path, ports, "--data", str(tiny_mnist)) as process:
            output, _ = process.communicate(timeout=110)

    assert process.returncode == 1
    assert f"127.0.0.1:{ports['streamer']}" in output
    assert "SLUICE_STREAMER_PORT" in output
    assert "Traceback" not in output


def child_of(parent: int, name: str) -> int:
    """Return the process that `sluice up` started for a service."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    commands = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") for pid in children}
    return next(pid for pid, words in commands.items() if name.encode() in words)

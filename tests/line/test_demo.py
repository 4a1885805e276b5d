"""`sluice demo` from end to end, on a data set so small that it takes seconds."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.line.processes import environment

pytestmark = [pytest.mark.triton, pytest.mark.timeout(300), pytest.mark.usefixtures("triton_installed")]


def start_demo(folder: Path, data: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "sluice", "demo", "--minutes", "0.1"],
        cwd=folder, env={**environment(folder), "SLUICE_DATA": str(data)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def left_in(folder: Path) -> list[str]:
    """Command lines of other living processes that work in a folder."""
    lines = []
    for entry in Path("/proc").glob("[0-9]*"):
        if int(entry.name) == os.getpid():
            continue
        try:
            if (entry / "cwd").readlink().is_relative_to(folder):
                lines.append((entry / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return lines


def test_demo_reports_its_accuracy_and_leaves_nothing(tmp_path: Path, tiny_mnist: Path) -> None:
    with start_demo(tmp_path, tiny_mnist) as process:
        output, _ = process.communicate(timeout=200)

    assert process.returncode == 0, output
    assert re.search(r"Accuracy through the gateway: .* \(\d+ of 20\)", output)
    assert (tmp_path / "models" / "mnist" / "1" / "card.json").is_file()
    assert left_in(tmp_path) == []


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGINT, id="SIGINT"),
        # sluice/interruption.py takes both alike, as its own tests show.
        pytest.param(signal.SIGTERM, id="SIGTERM", marks=pytest.mark.slow),
    ],
)
def test_demo_interrupted_in_training_leaves_nothing(tmp_path: Path, small_mnist: Path, number: signal.Signals) -> None:
    with start_demo(tmp_path, small_mnist) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("training "):
                break
        os.kill(process.pid, number)
        output, _ = process.communicate(timeout=60)

    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert left_in(tmp_path) == []
    assert not (tmp_path / "models" / "mnist" / "1").exists()

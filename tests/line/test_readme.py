"""What the README shows, run."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.line.processes import Line

pytestmark = [pytest.mark.triton, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_request_from_python_prints_digit_probability_and_score(line: Line) -> None:
    program = BLOCKS[0].replace("localhost:50051", line.address("gateway"))
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)

    assert re.fullmatch(r"\d [01]\.\d+\n[01]\.\d+\n", done.stdout), done.stderr


async def test_stream_is_read_to_the_end_of_the_epoch(line: Line, capsys: pytest.CaptureFixture[str]) -> None:
    program = BLOCKS[1].replace("localhost:50052", line.address("streamer"))
    code = compile(program, "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    running = eval(code, {})
    assert inspect.iscoroutine(running)
    await running

    assert capsys.readouterr().out.splitlines()[-1] == "(32, 28, 28) (32,) 4000"


def test_plain_loop_reads_to_the_end_of_the_epoch(line: Line, capsys: pytest.CaptureFixture[str]) -> None:
    exec(BLOCKS[2].replace("localhost:50052", line.address("streamer")), {})

    *_, last, report = capsys.readouterr().out.splitlines()
    assert last == "torch.Size([32, 28, 28]) torch.Size([32]) 4000"
    assert "spent waiting for data" in report


def test_commands_of_the_readme_exist(line: Line) -> None:
    text = (ROOT / "README.md").read_text()
    commands = set(re.findall(r"`sluice ([a-z]+)", text))
    missing = [command for command in commands if line.sluice(command, "--help").returncode != 0]

    assert missing == []


def test_targets_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))

    assert set(re.findall(r"[`$] ?make ([a-z-]+)", (ROOT / "README.md").read_text())) <= targets

"""The command line as a user meets it: its words and exit statuses."""

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rpc.settings import SECTIONS, unknown_variables
from serving.settings import TritonSettings
from sluice import commands
from sluice.doctor import examine
from streamer.settings import StreamerSettings

ROOT = Path(__file__).parents[2]


def sluice(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sluice", *arguments],
        cwd=ROOT, env={"PATH": "/usr/bin:/bin", "HOME": str(Path.home()), "COLUMNS": "200", **environment},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        pytest.param(["streamer", "--port", "70000"], 2, "--port = 70000", id="port"),
        pytest.param(
            ["streamer", "--port", "0", "--metrics-port", "0", "--data", "/nowhere"], 1, "no such folder", id="folder"
        ),
        pytest.param(["train", "--recipe", "big"], 2, "known are mnist, smoke", id="recipe"),
        pytest.param(["data", "fetch", "cifar"], 1, "known are fashion-mnist, mnist", id="data set"),
        pytest.param(["classify", "--server", "127.0.0.1:1", "README.md"], 1, "127.0.0.1:1", id="no gateway"),
        pytest.param(["classify"], 2, "files", id="no file"),
    ],
)
def test_mistake_is_one_line_and_a_status(arguments: list[str], status: int, words: str) -> None:
    done = sluice(*arguments)

    assert done.returncode == status
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_misspelt_variable_is_refused() -> None:
    done = sluice("streamer", SLUICE_STREAMER_PROT="1")

    assert done.returncode == 2
    assert "SLUICE_STREAMER_PROT: no such setting" in done.stderr


def test_misspelt_variable_of_no_section_is_told_with_the_one_meant() -> None:
    done = sluice("train", "--print-config", SLUICE_GATWAY_PORT="1")

    assert done.returncode == 0
    assert done.stderr == "warning: SLUICE_GATWAY_PORT: no such setting; did you mean SLUICE_GATEWAY_PORT?\n"


def test_variables_that_options_read_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = sluice("classify", "--help").stdout + (ROOT / "sluice" / "options.py").read_text()
    named = set(re.findall(r'(?:env var: |envvar=")(SLUICE_\w+)', shown))
    for variable in named:
        monkeypatch.setenv(variable, "1")

    assert "SLUICE_API_KEY_FILE" in named
    assert list(unknown_variables(commands.SECTIONS)) == []


def test_classify_speaks_of_classes_as_not_all_are_digits() -> None:
    assert "class and probability" in sluice("classify", "--help").stdout


def test_every_section_may_be_in_the_file() -> None:
    assert {settings.section for settings in commands.SECTIONS} == SECTIONS


@pytest.mark.parametrize(("command", "settings"), [("streamer", StreamerSettings), ("triton", TritonSettings)])
def test_every_setting_is_an_option(command: str, settings: type[StreamerSettings] | type[TritonSettings]) -> None:
    shown = sluice(command, "--help").stdout
    missing = [name for name in settings.model_fields if f"--{name.replace('_', '-')}" not in shown]

    assert missing == []


def test_version_is_the_projects() -> None:
    (version,) = re.findall(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)

    assert sluice("--version").stdout == f"sluice {version}\n"


def test_doctor_names_a_taken_port_and_the_setting_that_changes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("SLUICE_GATEWAY_PORT", str(taken.getsockname()[1]))
        (finding,) = [finding for finding in examine() if finding.name == "port of gateway"]

    assert not finding.ok
    assert finding.remedy is not None
    assert "SLUICE_GATEWAY_PORT" in finding.remedy

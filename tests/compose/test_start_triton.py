"""The start of NVIDIA's Triton, which no CPU machine runs: which models it is told to load."""

import subprocess
from pathlib import Path

from tests.compose.engine import ROOT


def test_models_with_a_version_are_loaded_and_others_are_left(tmp_path: Path) -> None:
    server = tmp_path / "tritonserver"
    server.write_text('#!/bin/sh\nprintf "%s\\n" "$PWD" "$@"\n')
    server.chmod(0o755)
    repository = tmp_path / "models"
    for folder in ("letters/1", "mnist/1", "mnist/12", "new", "staged/.staged-1", "bare/1"):
        (repository / folder).mkdir(parents=True)
    for model in ("letters", "mnist", "new", "staged"):
        (repository / model / "config.pbtxt").touch()
    done = subprocess.run(
        [ROOT / "deploy" / "start-triton", "--log-verbose=1"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "SLUICE_MODEL_REPOSITORY": str(repository)},
        capture_output=True, text=True, check=True, timeout=10,
    )  # fmt: skip
    folder, *words = done.stdout.splitlines()

    assert folder == str(repository)
    assert [word for word in words if word.startswith("--load-model")] == ["--load-model=mnist", "--load-model=letters"]
    assert "--model-control-mode=explicit" in words
    assert words[-1] == "--log-verbose=1"


def test_repository_without_a_model_starts_an_empty_server(tmp_path: Path) -> None:
    server = tmp_path / "tritonserver"
    server.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    server.chmod(0o755)
    (tmp_path / "models").mkdir()
    done = subprocess.run(
        [ROOT / "deploy" / "start-triton"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "SLUICE_MODEL_REPOSITORY": str(tmp_path / "models")},
        capture_output=True, text=True, check=True, timeout=10,
    )  # fmt: skip

    assert "--load-model" not in done.stdout

"""Where and with what a run was made: what it takes, with its config, to make it again."""

import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("sluice", "torch", "numpy", "safetensors", "grpcio", "protobuf")
_GIT_SECONDS = 5.0


def describe(*, seed: int, fingerprints: dict[str, str], device: torch.device) -> dict[str, Any]:
    """
    Return plain values, fit for JSON.

    Args:
        seed: Of the run.
        fingerprints: Hex digests of the data by split, as the streamer gives them.
        device: What it is trained on.
    """
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "commit": _commit(),
        "seed": seed,
        "data": fingerprints,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
    }


def _commit() -> str | None:
    """Return the commit of these sources, with a plus where they were changed since; None where git knows none."""
    here = Path(__file__).parent
    try:
        commit, changes = (
            subprocess.run(
                ["git", *words], cwd=here, capture_output=True, text=True, check=True, timeout=_GIT_SECONDS
            ).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}+" if changes else commit


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

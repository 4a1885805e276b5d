from pathlib import Path

import pytest
from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

ROOT = Path(__file__).resolve().parent.parent


def test_imports_point_in_the_directions_of_pyproject(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)

    status = lint_imports(str(ROOT / "pyproject.toml"), no_cache=True, no_logo=True)

    if status != EXIT_STATUS_SUCCESS:
        pytest.fail(capsys.readouterr().out, pytrace=False)

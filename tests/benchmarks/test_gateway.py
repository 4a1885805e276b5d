from pathlib import Path

import pytest

from benchmarks import gateway


def test_what_is_no_suite_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gateway.main(["--only", "unary,binary"])

    assert "binary" in capsys.readouterr().err


def test_folder_without_a_model_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"model\.pt"):
        gateway.main(["--model", str(tmp_path), "--cores", "256"])

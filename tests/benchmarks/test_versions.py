import json
from pathlib import Path

import pytest

from benchmarks.versions import NoVersionError, newest, version_at


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SLUICE_MODEL_REPOSITORY", str(tmp_path))
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "config.pbtxt").write_text('name: "mnist"\n')
    return tmp_path


def _publish(repository: Path, number: int, precision: str) -> None:
    folder = repository / "mnist" / str(number)
    folder.mkdir()
    (folder / "model.pt").write_bytes(b"")
    (folder / "card.json").write_text(json.dumps({"precision": precision}))


def test_newest_of_a_precision_is_taken(repository: Path) -> None:
    for number, precision in {2: "bfloat16", 9: "bfloat16", 10: "float32"}.items():
        _publish(repository, number, precision)

    assert newest().folder.name == "10"
    assert newest("bfloat16").folder.name == "9"
    assert newest("bfloat16").config == 'name: "mnist"\n'


def test_missing_model_is_told_with_what_makes_one(repository: Path) -> None:
    with pytest.raises(NoVersionError, match="make demo"):
        newest()
    _publish(repository, 1, "float32")
    with pytest.raises(NoVersionError, match="--precision bfloat16"):
        newest("bfloat16")


def test_folder_without_a_model_is_refused(repository: Path) -> None:
    with pytest.raises(NoVersionError, match=r"model\.pt"):
        version_at(repository / "mnist")

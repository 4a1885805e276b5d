from pathlib import Path

import pytest

from training import folders
from training.config import TrainConfig
from training.errors import CheckpointError, TrainingError


def test_runs_begun_in_the_same_second_have_folders_of_their_own(tmp_path: Path) -> None:
    made = {folders.new_folder(tmp_path, TrainConfig(seed=3)) for _ in range(5)}

    assert len(made) == 5
    assert all("-mnist-seed3" in folder.name for folder in made)


def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")

    with pytest.raises(TrainingError, match="seed0: cannot write: Not a directory"):
        folders.new_folder(tmp_path / "runs", TrainConfig())


def test_second_process_in_a_folder_is_refused(tmp_path: Path) -> None:
    with (
        folders.alone(tmp_path),
        pytest.raises(TrainingError, match="another process is training there"),
        folders.alone(tmp_path),
    ):
        pytest.fail("two are there")
    with folders.alone(tmp_path):
        pass


@pytest.mark.parametrize("content", [None, "{}x", '{"future": 1}'])
def test_folder_without_a_config_that_can_be_read_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / folders.CONFIG).write_text(content)

    with pytest.raises(CheckpointError, match=r"no run here|not a config of this version"):
        folders.config_of(tmp_path)


def test_config_reads_back(tmp_path: Path) -> None:
    folders.describe(tmp_path, TrainConfig(seed=5), {"commit": None})

    assert folders.config_of(tmp_path) == TrainConfig(seed=5)

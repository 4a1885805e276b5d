from pathlib import Path

import pytest

from training.errors import PublishError
from training.release.versions import next_version, published, roll_back, withdraw, withdrawn


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Versions 1 to 3, a configuration, and an unfinished one."""
    for name in ("1", "2", "3", ".staged-x"):
        (tmp_path / "mnist" / name).mkdir(parents=True)
    (tmp_path / "mnist" / "config.pbtxt").touch()
    return tmp_path / "mnist"


def test_rollback_takes_the_newest_out_of_sight(model: Path) -> None:
    moved = roll_back(model)

    assert (moved.version, moved.withdrawn, moved.restored) == (2, (3,), False)
    assert (published(model), withdrawn(model), next_version(model)) == ([1, 2], [3], 4)


def test_rollback_to_a_version_withdraws_all_above_it_and_back(model: Path) -> None:
    assert roll_back(model, 1).withdrawn == (2, 3)
    moved = roll_back(model, 3)

    assert (moved.restored, published(model), withdrawn(model)) == (True, [1, 3], [2])


@pytest.mark.parametrize("to", [None, 1, 4])
def test_undone_rollback_leaves_everything_as_it_was(model: Path, to: int | None) -> None:
    (model / ".withdrawn-4").mkdir()
    roll_back(model, to).undo()

    assert (published(model), withdrawn(model)) == ([1, 2, 3], [4])


def test_rollback_to_what_is_not_there_names_what_is(model: Path) -> None:
    withdraw(model, 3)

    with pytest.raises(PublishError, match="no version 7; in sight: 1, 2, withdrawn: 3"):
        roll_back(model, 7)


def test_rollback_without_an_earlier_version_is_refused(model: Path) -> None:
    roll_back(model, 1)

    with pytest.raises(PublishError, match="nothing to roll back to; in sight: 1, withdrawn: 2, 3"):
        roll_back(model)
    with pytest.raises(PublishError, match="in sight: none"):
        roll_back(model.parent / "absent")


def test_rollback_to_a_damaged_version_changes_nothing(model: Path) -> None:
    (model / "2" / "model.pt").write_text("weights")
    (model / "2" / "card.json").write_text('{"digest": "sha256:00"}')

    with pytest.raises(PublishError, match="not what was published"):
        roll_back(model, 2)
    assert published(model) == [1, 2, 3]

from itertools import pairwise
from pathlib import Path

import pytest

from training import overrides
from training.config import TrainConfig
from training.errors import ConfigError

DEFAULT = TrainConfig()


def test_text_becomes_what_its_field_takes() -> None:
    values = overrides.parse(["optim.lr=1e-4", "compile=true", "seed=7", "budget.seconds=none", "augmentation=a|b"])
    config = overrides.overridden(DEFAULT, values)

    assert (config.optim.lr, config.compile, config.seed) == (1e-4, True, 7)
    assert (config.budget.seconds, config.augmentation) == (None, "a|b")


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("optim.lrr=1", r"optim.lrr: no such field; did you mean optim.lr\? known are optim.clip_norm, "),
        ("lr=1", r"lr: no such field; did you mean optim.lr\?"),
        ("optim=1", r"optim: no such field"),
        ("optim.lr=-1", r"optim.lr = -1: input should be greater than 0; allowed is float, above 0, at most 10"),
        ("optim.name=adam", r"optim.name = adam: .*allowed is adamw or sgd"),
        ("optim.clip_norm=-1", r"optim.clip_norm = -1: .*allowed is float or none, above 0"),
        ("seed=", r"seed = : .*allowed is int, at least 0"),
        ("deterministic=true", r"deterministic needs budget.seconds none"),
    ],
)
def test_what_is_not_allowed_is_named(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        overrides.overridden(DEFAULT, overrides.parse([assignment]))


def test_assignment_without_a_value_is_named() -> None:
    with pytest.raises(ConfigError, match=r"--set optim.lr: a field and its value"):
        overrides.parse(["optim.lr"])


def test_misspelt_recipe_is_named_with_the_one_meant() -> None:
    with pytest.raises(ConfigError, match=r"--recipe smok: no such recipe; did you mean smoke\? known are "):
        overrides.recipe("smok")


def test_printed_config_reads_back_as_the_same(tmp_path: Path) -> None:
    config = overrides.overridden(DEFAULT, {"optim.lr": 1e-5, "budget.seconds": None, "augmentation": "a: #b"})
    (tmp_path / "run.yaml").write_text("recipe: smoke\n" + overrides.as_yaml(config))
    recipe, values = overrides.read(tmp_path / "run.yaml")

    assert recipe == "smoke"
    assert overrides.overridden(overrides.recipe("smoke"), values) == config


def test_every_field_is_printed_with_its_meaning() -> None:
    lines = overrides.as_yaml(DEFAULT).splitlines()

    assert max(map(len, lines)) <= 120
    for above, line in pairwise(lines):
        if line.strip() and "#" not in line:
            assert above.lstrip().startswith("# "), line


@pytest.mark.parametrize(
    ("content", "message"), [("a: [", "line 1: not YAML"), ("- 3", "fields and their values"), ("\x00", "not YAML")]
)
def test_file_that_is_no_config_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "run.yaml").write_text(content)

    with pytest.raises(ConfigError, match=f"--config .*run.yaml.*{message}"):
        overrides.read(tmp_path / "run.yaml")


def test_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run.yaml: cannot be read: No such file"):
        overrides.read(tmp_path / "run.yaml")

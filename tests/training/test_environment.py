import json
import sys

import pytest
import torch

from training import environment


def test_description_says_what_made_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["sluice", "train", "--set", "augmentation=shift(pixels=2)|noise(std=1)"])
    described = json.loads(
        json.dumps(environment.describe(seed=3, fingerprints={"train": "ab"}, device=torch.device("cpu")))
    )

    assert described["command"] == "sluice train --set 'augmentation=shift(pixels=2)|noise(std=1)'"
    assert described["versions"]["torch"] == torch.__version__
    assert (described["seed"], described["data"]) == (3, {"train": "ab"})


def test_commit_is_left_open_where_there_is_no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")

    assert environment.describe(seed=0, fingerprints={}, device=torch.device("cpu"))["commit"] is None

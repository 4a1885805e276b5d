"""``sluice keys``: what its user sees."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rpc.keys import Keyring, load_keys
from rpc.settings import SettingsError
from sluice.commands import app


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SLUICE_GATEWAY_KEYS_FILE", str(tmp_path / "keys.json"))
    return tmp_path / "keys.json"


def keys(*words: str) -> str:
    return CliRunner().invoke(app, ["keys", *words], catch_exceptions=False).output


def test_key_is_printed_once_and_opens(path: Path) -> None:
    printed = keys("add", "camera", "--scopes", "classify, embed", "--days", "30")

    assert Keyring(path).find(printed.strip()).scopes == frozenset({"classify", "embed"})
    listed = keys("list")
    assert re.fullmatch(
        r"camera\t[0-9a-f]{12}\tclassify,embed\tmade \d{4}-\d\d-\d\d\texpires \d{4}-\d\d-\d\d\n", listed
    )
    assert printed.strip() not in listed


def test_removed_key_is_gone(path: Path) -> None:
    keys("add", "camera", "--scopes", "classify")
    keys("remove", "camera")

    assert load_keys(path) == ()


def test_scope_that_is_not_there_is_named(path: Path) -> None:
    with pytest.raises(SettingsError, match="no scope 'clasify'; allowed are classify, compare, embed, models, triton"):
        keys("add", "camera", "--scopes", "clasify")
    assert not path.exists()


def test_without_a_file_it_says_how_to_name_one() -> None:
    with pytest.raises(SettingsError, match=r"--file, or for the gateway too with SLUICE_GATEWAY_KEYS_FILE"):
        keys("list")

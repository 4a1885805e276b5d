"""API keys in their file."""

import json
import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from rpc import keys
from rpc.keys import KeyRefusedError, Keyring, add_key, load_keys, remove_key
from rpc.settings import SettingsError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Let the time pass after which a keyring looks at its file again."""

    def pass_time() -> None:
        monkeypatch.setattr(keys, "_LOOK_SECONDS", -1.0)

    return pass_time


def test_key_opens_until_it_is_removed(path: Path, later: Callable[[], None]) -> None:
    text = add_key(path, "camera", ["classify"])
    keyring = Keyring(path)
    assert (keyring.find(text).name, keyring.find(text).scopes) == ("camera", frozenset({"classify"}))

    remove_key(path, "camera")
    later()
    with pytest.raises(KeyRefusedError, match="not known"):
        keyring.find(text)


def test_new_key_opens_without_a_restart(path: Path, later: Callable[[], None]) -> None:
    add_key(path, "first", ["classify"])
    keyring = Keyring(path)
    text = add_key(path, "second", ["embed"])
    later()

    assert keyring.find(text).name == "second"


def test_file_holds_no_key_and_is_its_owners_alone(path: Path) -> None:
    text = add_key(path, "camera", ["classify"])

    secret = text.split("_")[2]
    assert len(secret) == 64
    assert secret not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "an API key is needed"),
        ("", "no API key"),
        ("hello", "no API key"),
        ("slk_" + "0" * 12 + "_" + "0" * 63, "no API key"),
        ("slk_" + "0" * 12 + "_" + "0" * 64 + "\n", "no API key"),
        ("slk_" + "0" * 12 + "_" + "0" * 8192, "no API key"),
        ("slk_" + "é" * 12 + "_" + "0" * 64, "no API key"),
        ("slk_../../etc_" + "0" * 64, "no API key"),
        ("slk_" + "0" * 12 + "_" + "0" * 64, "not known here"),
    ],
)
def test_what_is_no_key_is_refused(path: Path, text: str | None, said: str) -> None:
    add_key(path, "camera", ["classify"])
    with pytest.raises(KeyRefusedError, match=said):
        Keyring(path).find(text)


def test_wrong_secret_and_wrong_id_are_answered_alike(path: Path) -> None:
    text = add_key(path, "camera", ["classify"])
    keyring, said = Keyring(path), set()
    _, number, secret = text.split("_")
    for wrong in (f"slk_{number}_{secret[::-1]}", f"slk_{number[::-1]}_{secret}"):
        with pytest.raises(KeyRefusedError) as refused:
            keyring.find(wrong)
        said.add(str(refused.value))

    assert said == {"the API key is not known here"}


def test_expired_key_says_since_when(path: Path) -> None:
    text = add_key(path, "camera", ["classify"], lifetime=timedelta(days=-1))
    with pytest.raises(KeyRefusedError, match=f"expired on {datetime.now(UTC) - timedelta(days=1):%Y-%m-%d}"):
        Keyring(path).find(text)


@pytest.mark.parametrize("content", [None, "{", '{"keys": [{"name": "x"}]}'], ids=["gone", "no json", "no key"])
def test_file_that_cannot_be_used_leaves_the_old_keys_and_one_line(
    path: Path, later: Callable[[], None], content: str | None
) -> None:
    text = add_key(path, "camera", ["classify"])
    keyring = Keyring(path)
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    later()

    with capture_logs() as logs:
        assert [keyring.find(text).name for _ in range(3)] == ["camera"] * 3
    assert [entry["event"] for entry in logs] == ["new keys not used, the old ones go on"]
    with pytest.raises(SettingsError, match=f"keys_file = {path}: "):
        Keyring(path)


def test_error_in_the_file_does_not_repeat_what_is_in_it(path: Path) -> None:
    path.write_text(json.dumps({"keys": [{"name": "x", "sha256": "SECRET"}]}))
    with pytest.raises(SettingsError) as failed:
        load_keys(path)

    assert "keys.0." in str(failed.value)
    assert "SECRET" not in repr(failed.value)
    assert failed.value.__cause__ is None


def test_names_are_plain_and_unique(path: Path) -> None:
    add_key(path, "camera", ["classify"])
    with pytest.raises(SettingsError, match="has a key of that name already"):
        add_key(path, "camera", ["classify"])
    with pytest.raises(SettingsError, match="allowed are letters"):
        add_key(path, "two words", ["classify"])
    with pytest.raises(SettingsError, match="no key of that name; there are camera"):
        remove_key(path, "lamp")


def test_keys_added_at_the_same_time_are_all_there(path: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda number: add_key(path, f"key{number}", ["classify"]), range(24)))

    keyring = Keyring(path)
    assert sorted(keyring.find(text).name for text in made) == sorted(f"key{number}" for number in range(24))


def test_file_that_a_server_may_read_stays_so(path: Path) -> None:
    add_key(path, "camera", ["classify"])
    path.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(path, 10001, 10001)
    before = path.stat()

    remove_key(path, "camera")

    after = path.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)


def test_link_to_the_file_stays_a_link(path: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    path.symlink_to(tmp_path / "real" / "keys.json")
    add_key(path, "camera", ["classify"])

    assert path.is_symlink()
    assert load_keys(tmp_path / "real" / "keys.json")

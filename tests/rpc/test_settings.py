from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import Field
from pydantic_settings import SettingsConfigDict

from rpc.settings import Settings, SettingsError, cache_folder, load, unknown_variables


class PumpSettings(Settings):
    """A section of its own for these tests."""

    model_config = SettingsConfigDict(env_prefix="SLUICE_PUMP_")
    section: ClassVar[str] = "pump"

    port: int = Field(50051, ge=0, le=65535)
    """Port to listen on."""
    data: Path | None = Field(None, validation_alias="SLUICE_DATA")
    """A folder."""


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for variable in ("SLUICE_CONFIG", "SLUICE_DATA", "SLUICE_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_options_outweigh_environment_outweighs_file(empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = [load(PumpSettings).port]
    (empty_folder / "sluice.toml").write_text("[pump]\nport = 1\n")
    seen.append(load(PumpSettings).port)
    monkeypatch.setenv("SLUICE_PUMP_PORT", "2")
    seen.append(load(PumpSettings).port)
    seen.append(load(PumpSettings, port=3).port)

    assert seen == [50051, 1, 2, 3]


def test_option_that_was_not_given_changes_nothing() -> None:
    assert load(PumpSettings, port=None).port == 50051


def test_shared_variable_sets_the_field_it_is_named_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_DATA", "/data")

    assert load(PumpSettings).data == Path("/data")
    assert load(PumpSettings, data=Path("/other")).data == Path("/other")


def test_value_out_of_range_names_the_option() -> None:
    with pytest.raises(SettingsError, match=r"--port = 70000: .*65535"):
        load(PumpSettings, port=70000)


def test_value_out_of_range_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_PUMP_PORT", "many")

    with pytest.raises(SettingsError, match=r"SLUICE_PUMP_PORT = 'many': .*integer"):
        load(PumpSettings)


def test_value_out_of_range_names_the_place_in_the_file(empty_folder: Path) -> None:
    (empty_folder / "sluice.toml").write_text("[pump]\nport = -1\n")

    with pytest.raises(SettingsError, match=r"\[pump\] port = -1"):
        load(PumpSettings)


def test_misspelt_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_PUMP_PROT", "1")

    with pytest.raises(SettingsError, match=r"SLUICE_PUMP_PROT: no such setting; known are .*SLUICE_PUMP_PORT"):
        load(PumpSettings)


def test_misspelt_field_in_the_file_is_refused(empty_folder: Path) -> None:
    (empty_folder / "sluice.toml").write_text("[pump]\nprot = 1\n")

    with pytest.raises(SettingsError, match=r"\[pump\] prot: no such setting"):
        load(PumpSettings)


def test_misspelt_section_of_the_file_is_refused(empty_folder: Path) -> None:
    (empty_folder / "sluice.toml").write_text("[pump]\nport = 1\n[gatway]\nport = 2\n")

    with pytest.raises(SettingsError, match=r"\[gatway\]: no such section; known are \[gateway\], \[streamer\]"):
        load(PumpSettings)


def test_variable_that_nothing_reads_is_told_with_the_one_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PMUP_PORT", "PUMP_PORT", "DATA", "CONFIG", "CACHE", "API_KEY", "BUILD_NETWORK", "XYZZY"):
        monkeypatch.setenv(f"SLUICE_{name}", "secret")

    assert list(unknown_variables([PumpSettings])) == [
        "SLUICE_PMUP_PORT: no such setting; did you mean SLUICE_PUMP_PORT?",
        "SLUICE_XYZZY: no such setting",
    ]


def test_file_that_is_not_toml_is_named(empty_folder: Path) -> None:
    (empty_folder / "sluice.toml").write_text("[pump")

    with pytest.raises(SettingsError, match=r"sluice.toml: not TOML"):
        load(PumpSettings)


def test_named_file_that_is_missing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_CONFIG", "elsewhere.toml")

    with pytest.raises(SettingsError, match=r"there is no file elsewhere.toml"):
        load(PumpSettings)


def test_cache_follows_its_own_variable_then_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    from_xdg = cache_folder()
    monkeypatch.setenv("SLUICE_CACHE", "/own")

    assert (from_xdg, cache_folder()) == (Path("/xdg/sluice"), Path("/own"))

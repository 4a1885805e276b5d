from pathlib import Path

import pytest

from rpc.settings import SettingsError, load
from streamer.settings import StreamerSettings


def test_environment_names_are_those_of_the_readme(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLUICE_DATA", str(tmp_path))
    monkeypatch.setenv("SLUICE_STREAMER_PORT", "1234")

    settings = load(StreamerSettings)
    assert (settings.data, settings.port) == (tmp_path, 1234)


@pytest.mark.parametrize("option", ["port", "max_batch_samples", "max_message_bytes", "max_streams", "drain_seconds"])
def test_value_out_of_range_names_the_setting(option: str) -> None:
    with pytest.raises(SettingsError, match=f"--{option.replace('_', '-')} = -1: input should be"):
        load(StreamerSettings, **{option: -1})

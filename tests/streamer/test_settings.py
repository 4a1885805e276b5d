from pathlib import Path

import pytest

from rpc.cores import num_cores
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


def test_datasets_are_names_with_or_without_a_place() -> None:
    settings = load(StreamerSettings, datasets="mnist, letters = s3://bucket/letters,own=/data/own")
    assert settings.places == {"mnist": None, "letters": "s3://bucket/letters", "own": "/data/own"}


@pytest.mark.parametrize(
    ("datasets", "told"),
    [("mnist,,own=/x", "NAME or NAME=PLACE"), ("=x", "NAME or NAME="), ("a,a=/x", "each data set once")],
)
def test_datasets_that_make_no_sense_are_refused(datasets: str, told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        load(StreamerSettings, datasets=datasets)


def test_folder_is_of_one_known_data_set_or_has_a_folder_for_each(tmp_path: Path) -> None:
    alone = load(StreamerSettings, datasets="mnist,own=/data/own", data=tmp_path)
    assert alone.places == {"mnist": str(tmp_path), "own": "/data/own"}

    several = load(StreamerSettings, datasets="mnist,fashion-mnist", data=tmp_path)
    assert several.places == {"mnist": str(tmp_path / "mnist"), "fashion-mnist": str(tmp_path / "fashion-mnist")}


@pytest.mark.parametrize("workers", [-1, 257])
def test_number_of_workers_is_bounded(workers: int) -> None:
    with pytest.raises(SettingsError, match=f"--workers = {workers}: input should be"):
        load(StreamerSettings, workers=workers)


def test_no_number_of_workers_is_one_for_each_core() -> None:
    assert load(StreamerSettings, workers=0).num_workers == num_cores()
    assert load(StreamerSettings).num_workers == 1

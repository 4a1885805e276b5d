import asyncio
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from sluice.training import TrainOptions, configure
from sluice.tune import SEARCHES, TuneOptions, begin, best_command, describe, resume, show, streamed
from streamer.client import DatasetInfo, SampleClient
from streamer.errors import DataError, UnreachableError
from training.errors import SearchError
from training.overrides import recipe
from training.search.logbook import Logbook, Trial, parse
from training.search.space import Range


def test_nothing_given_is_a_whole_search() -> None:
    search = describe(TuneOptions())

    assert (search.name, search.dataset, search.recipe, search.budget.trials) == ("mnist", "mnist", "mnist", 20)
    assert "optim.lr" in search.space.names()


def test_options_are_laid_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "search.yaml"
    file.write_text("dataset: fashion-mnist\nbudget: {trials: 3, epochs: 4}\nfixed: {model.dropout: 0.2}\n")
    options = TuneOptions(file=file, trials=5, vary=["optim.lr=1e-4..1e-2,log"], fixed=["ema.decay=0.999"])
    search = describe(options)

    assert (search.name, search.budget.trials, search.budget.epochs) == ("fashion-mnist", 5, 4)
    assert search.space.root == {"optim.lr": Range(low=1e-4, high=1e-2, log=True)}
    assert search.fixed["model.dropout"] == 0.2
    assert search.fixed["ema.decay"] == "0.999"


def test_folder_names_the_data_set_and_the_search(tmp_path: Path) -> None:
    search = describe(TuneOptions(data=tmp_path / "My Shoes"))

    assert (search.dataset, search.name, search.data) == ("my-shoes", "my-shoes", tmp_path / "My Shoes")


def test_unusable_option_is_named_and_nothing_is_made() -> None:
    with pytest.raises(SearchError, match=r"sluice tune: budget.trials: .*greater than or equal to 1"):
        begin(TuneOptions(trials=0), cluster=None, report=print)
    with pytest.raises(SearchError, match=r"optim\.rate: no such field"):
        begin(TuneOptions(vary=["optim.rate=1..2"]), cluster=None, report=print)

    assert not SEARCHES.exists()


def test_best_prints_a_line_that_train_takes() -> None:
    search = parse({"name": "shoes", "dataset": "shoes", "budget": {"epochs": 3}}, source="test")
    values = dict(search.space.extremes())
    trial = Trial(number=1, id="t1", values=values, state="finished", scores={3: 0.9})
    Logbook.create(SEARCHES / "shoes", search).write_trials((trial,))
    words = shlex.split(best_command("shoes"))
    assignments = tuple(word for before, word in pairwise(words) if before == "--set")
    config = configure(
        TrainOptions(
            recipe="mnist", streamer=None, seed=None, epochs=3, minutes=None, lr=None, triton=None,
            assignments=assignments,
        )
    )  # fmt: skip

    assert words[:6] == ["sluice", "train", "--recipe", "mnist", "--epochs", "3"]
    assert (config.name, config.data.dataset, config.optim.lr) == ("shoes", "shoes", values["optim.lr"])
    assert config.augmentation == values["augmentation"] != recipe("mnist").augmentation


def test_best_trains_on_the_folder_that_was_searched(tmp_path: Path) -> None:
    search = describe(TuneOptions(data=tmp_path / "My Shoes"))
    trial = Trial(number=1, id="t1", values={}, state="finished", scores={8: 0.9})
    Logbook.create(SEARCHES / search.name, search).write_trials((trial,))

    assert f" --data '{tmp_path}/My Shoes' --set name=my-shoes " in best_command("my-shoes")


def test_folder_that_cannot_be_named_to_a_streamer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SearchError, match=r"data: .*a,b: a folder with a comma"):
        describe(TuneOptions(data=tmp_path / "a,b"))


def test_search_is_shown_while_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    search = parse({"name": "shoes", "space": {"optim.lr": {"low": 1, "high": 2}}}, source="test")
    trial = Trial(number=1, id="t1", values={"optim.lr": 1.5}, state="running", scores={1: 0.25})
    Logbook.create(SEARCHES / "shoes", search).write_trials((trial,))
    show("shoes", as_json=True)
    (entry,) = json.loads(capsys.readouterr().out)
    show("shoes", as_json=False)

    assert (entry["score"], entry["epoch"], entry["state"]) == (0.25, 1, "running")
    assert "25.00%" in capsys.readouterr().out
    assert (SEARCHES / "shoes" / "trials.csv").is_file()


@pytest.mark.parametrize("ask", [best_command, lambda name: resume(name, cluster=None, report=print)])
def test_unknown_search_is_named(ask: Callable[[str], object]) -> None:
    with pytest.raises(SearchError, match="boots: there is no search of this name"):
        ask("boots")


def test_search_starts_a_streamer_with_its_folder_and_ends_it(tiny_mnist: Path) -> None:
    told: list[str] = []
    search = parse({"name": "tiny", "dataset": "tiny", "data": tiny_mnist}, source="test")
    with streamed(search, host=None, report=told.append) as address:
        assert asyncio.run(_names(address)) == ["tiny"]

    assert told == [f"streamer {address}, for this search; its log is .sluice/logs/search-tiny-streamer.log"]
    with pytest.raises(UnreachableError):
        asyncio.run(_names(address))


def test_trials_share_a_streamer_that_runs(tiny_mnist: Path) -> None:
    own = parse({"name": "tiny", "dataset": "tiny", "data": tiny_mnist}, source="test")
    with streamed(own, host=None, report=print) as address:
        shared = parse({"name": "two", "dataset": "tiny", "streamer": address}, source="test")
        with streamed(shared, host=None, report=print) as found:
            assert found == address


def test_folder_without_data_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    search = parse({"name": "empty", "dataset": "empty", "data": tmp_path / "empty"}, source="test")
    with pytest.raises(DataError, match="empty"), streamed(search, host=None, report=print):
        pass


def test_folder_of_pictures_is_streamed_as_the_network_takes_them(tmp_path: Path) -> None:
    for number in range(20):
        path = tmp_path / "shoes" / ("boot", "high heel")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30 + number, 40)).save(path)
    told: list[str] = []
    search = describe(TuneOptions(data=tmp_path / "shoes"))
    with streamed(search, host=None, report=told.append) as address:
        (info,) = asyncio.run(_datasets(address))

    assert told[0].startswith(f"{tmp_path}/shoes: 20 images become 28x28 grey; sizes are 40x30 to 40x49 pixels")
    assert info.class_names == ("boot", "high heel")
    assert [(split.name, split.num_samples, tuple(split.image_shape)) for split in info.splits.values()] == [
        ("train", 18, (28, 28)),
        ("test", 2, (28, 28)),
    ]


def test_word_behind_a_folder_is_no_part_of_its_name(tmp_path: Path) -> None:
    search = describe(TuneOptions(data=tmp_path / "Road Signs:center"))

    assert (search.dataset, search.data) == ("road-signs", tmp_path / "Road Signs:center")


def test_missing_ray_is_named_with_what_brings_it(monkeypatch: pytest.MonkeyPatch, tiny_mnist: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SearchError, match=r"pip install '\.\[tune\]'"):
        begin(TuneOptions(data=tiny_mnist), cluster=None, report=print)

    assert not SEARCHES.exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_search_goes_on_and_names_its_winner(tiny_mnist: Path) -> None:
    pytest.importorskip("ray", reason="a search needs Ray: pip install 'sluice[tune]'")
    begin_words = ["--data", str(tiny_mnist), "--name", "tiny", "--trials", "3", "--epochs", "2", "--concurrency", "1"]
    command = [sys.executable, "-m", "sluice", "tune"]
    with subprocess.Popen([*command, *begin_words], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        first = next((line for line in process.stderr if line.startswith("trial ")), "")
        process.kill()
    kept = [trial for trial in Logbook(SEARCHES / "tiny").trials() if trial.is_over]
    resumed = subprocess.run([*command, "resume", "tiny"], stderr=subprocess.PIPE, text=True, timeout=600, check=False)
    trials = Logbook(SEARCHES / "tiny").trials()

    assert first.startswith("trial 1 finished after 2 epochs"), first
    assert resumed.returncode == 0, resumed.stderr
    assert [trial.state in ("finished", "stopped") for trial in trials] == [True] * 3
    assert trials[: len(kept)] == tuple(kept)
    assert best_command("tiny").startswith("sluice train --recipe mnist --epochs 2")
    assert not list(SEARCHES.glob("tiny/trials/*/checkpoints"))


async def _names(address: str) -> list[str]:
    return [info.name for info in await _datasets(address)]


async def _datasets(address: str) -> list[DatasetInfo]:
    async with SampleClient(address) as client:
        await client.wait_ready(timeout_seconds=1)
        return await client.datasets()

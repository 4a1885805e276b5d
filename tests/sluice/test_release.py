import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import torch

from rpc.settings import SettingsError, cache_folder
from serving.control import TritonControl
from serving.errors import ServingError
from serving.installation import install
from serving.triton import EmbeddedTriton
from sluice.release import ExportOptions, PublishOptions, RollbackOptions, export, publish, rollback
from sluice.route import RouteOptions, run
from tests.serving.conftest import free_ports, on_free_ports, scripted
from training.errors import PublishError
from training.model import Network, ServedNetwork
from training.release import manifest
from training.release.export import answers
from training.release.golden import Golden
from training.release.publish import Card, DatasetCard, triton_config
from training.release.versions import published, withdrawn

real = [pytest.mark.triton, pytest.mark.asyncio(loop_scope="module")]


@pytest.fixture(scope="module")
def images_golden() -> Golden:
    return Golden.of(ServedNetwork(Network()))


def write_version(folder: Path, golden: Golden, *, name: str, seed: int, golden_seed: int | None = None) -> Path:
    """Make a small model with the outputs of the large one, as `sluice export` would."""
    folder.mkdir(parents=True)
    scripted(seed).save(str(folder / "model.pt"))
    expected = scripted(seed if golden_seed is None else golden_seed)
    Golden(golden.images, *answers(expected, golden.images, torch.device("cpu"))).save(folder / "golden.safetensors")
    card = Card(
        model=name,
        version=int(folder.name) if folder.name.isdecimal() else 0,
        created="2026-01-01T00:00:00+00:00",
        class_names=list("0123456789"),
        digest=f"sha256:{manifest.sha256(folder / 'model.pt')}",
        metrics={"accuracy": 0.9, "num_samples": 1000.0},
        dataset=DatasetCard(name="mnist", num_train=1, fingerprint=""),
    )
    (folder / "card.json").write_text(card.model_dump_json(by_alias=True))
    manifest.write(folder, model=name, version=card.version)
    return folder


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty one, with no Triton where the settings put it."""
    monkeypatch.setenv("SLUICE_MODEL_REPOSITORY", str(tmp_path / "models"))
    monkeypatch.setenv("SLUICE_TRITON_GRPC_PORT", str(free_ports()["grpc_port"]))
    return tmp_path / "models"


def test_publish_and_rollback_without_a_triton_say_what_serves_them(
    repository: Path, tmp_path: Path, images_golden: Golden
) -> None:
    source = write_version(tmp_path / "export", images_golden, name="mnist", seed=1)
    said = [publish(PublishOptions(source=source), report=lambda line: None) for _ in range(2)]
    back = rollback(RollbackOptions(model="mnist"), report=lambda line: None)

    assert said[1] == "mnist version 2: float32, 90.00% of 1000 images right; `sluice up` serves it"
    assert back == (
        "mnist version 1 is the newest; `sluice up` serves it; withdrawn: 2; `sluice rollback mnist --to 2` undoes this"
    )
    assert (published(repository / "mnist"), withdrawn(repository / "mnist")) == ([1], [2])


def test_triton_that_was_named_and_is_not_there_leaves_the_rollback_undone(
    repository: Path, images_golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sluice.release._LOAD_SECONDS", 0.2)
    for version in ("1", "2"):
        write_version(repository / "mnist" / version, images_golden, name="mnist", seed=1)

    with pytest.raises(ServingError, match=r"127\.0\.0\.1:1 is not live"):
        rollback(RollbackOptions(model="mnist", triton="127.0.0.1:1"), report=lambda line: None)
    assert published(repository / "mnist") == [1, 2]


def test_rollback_of_an_unknown_model_is_refused(repository: Path) -> None:
    with pytest.raises(PublishError, match="absent: nothing to roll back to"):
        rollback(RollbackOptions(model="absent"), report=lambda line: None)


def test_export_into_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(SettingsError, match="holds files already"):
        export(ExportOptions(run=tmp_path, out=tmp_path), report=lambda line: None)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def triton(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[str, Path]]:
    """Its address and its repository."""
    folder = tmp_path_factory.mktemp("models")
    settings = on_free_ports(model_repository=folder, log_file=folder.parent / "triton.log", intra_op_threads=1)
    async with EmbeddedTriton(settings, await install(cache_folder(), print)) as running:
        yield running.address, folder


class TestInTriton:
    """One real server; each test has a model of its own in it."""

    pytestmark = real

    @pytest.fixture(autouse=True)
    def in_its_repository(self, triton: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SLUICE_MODEL_REPOSITORY", str(triton[1]))

    async def test_published_version_gives_its_golden_answers_there(
        self, triton: tuple[str, Path], tmp_path: Path, images_golden: Golden
    ) -> None:
        source = write_version(tmp_path / "export", images_golden, name="good", seed=1)
        options = PublishOptions(source=source, triton=triton[0])
        said = await asyncio.to_thread(publish, options, report=lambda line: None)

        assert said.endswith(f"loaded by Triton at {triton[0]}")
        async with TritonControl(triton[0]) as control:
            assert await control.versions("good") == [1]

    async def test_version_that_answers_differently_there_is_withdrawn(
        self, triton: tuple[str, Path], tmp_path: Path, images_golden: Golden, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        address, folder = triton
        first = write_version(tmp_path / "first", images_golden, name="other", seed=1)
        second = write_version(tmp_path / "second", images_golden, name="other", seed=2, golden_seed=1)
        # What this machine would have noticed by itself, a server elsewhere has to show.
        monkeypatch.setattr("training.release.publish.require_alike", lambda folder, card: None)
        await asyncio.to_thread(publish, PublishOptions(source=first, triton=address), report=lambda line: None)

        with pytest.raises(ServingError, match=r"version 2 is withdrawn: other version 2 in Triton: .* differ"):
            await asyncio.to_thread(publish, PublishOptions(source=second, triton=address), report=lambda line: None)
        assert withdrawn(folder / "other") == [2]
        async with TritonControl(address) as control:
            assert await control.versions("other") == [1]

    async def test_rollback_to_what_triton_cannot_load_changes_nothing(
        self, triton: tuple[str, Path], images_golden: Golden
    ) -> None:
        address, folder = triton
        model = folder / "stays"
        write_version(model / "2", images_golden, name="stays", seed=1)
        (model / "1").mkdir()
        (model / "1" / "model.pt").write_text("made by hand, and badly")
        (model / "config.pbtxt").write_text(triton_config("stays", 10).replace("num_versions: 3", "num_versions: 1"))
        async with TritonControl(address) as control:
            await control.load("stays")

            options = RollbackOptions(model="stays", triton=address)
            with pytest.raises(ServingError, match="no TorchScript"):
                await asyncio.to_thread(rollback, options, report=lambda line: None)
            assert published(model) == [1, 2]
            assert await control.versions("stays") == [2]

    async def test_version_of_a_route_is_loaded_and_stays_however_old(
        self, triton: tuple[str, Path], tmp_path: Path, images_golden: Golden
    ) -> None:
        address, folder = triton
        for version in range(1, 5):
            write_version(folder / "old" / str(version), images_golden, name="old", seed=1)
        (folder / "old" / "config.pbtxt").write_text(triton_config("old", 10))
        async with TritonControl(address) as control:
            await control.load("old")
            assert await control.versions("old") == [2, 3, 4]
            options = RouteOptions(model="old", default=1, triton=address)
            await asyncio.to_thread(run, options, report=lambda line: None)
            assert await control.versions("old") == [1, 2, 3, 4]

            told: list[str] = []
            source = write_version(tmp_path / "export", images_golden, name="old", seed=1)
            await asyncio.to_thread(publish, PublishOptions(source=source, triton=address), report=told.append)
            assert await control.versions("old") == [1, 3, 4, 5]
            assert "version 5 is published and loaded; old is routed to 1: `sluice route old --default 5`" in told

from collections.abc import Callable
from pathlib import Path

import pytest

from serving.soundness import inspect
from tests.serving.conftest import add_model, flip_a_bit, seal


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Five versions of a model whose configuration serves the newest three."""
    add_model(tmp_path, "mnist")
    for version in range(1, 6):
        (tmp_path / "mnist" / str(version)).mkdir()
        (tmp_path / "mnist" / str(version) / "model.pt").write_bytes(bytes([version]) * 100)
        seal(tmp_path, "mnist", version)
    return tmp_path


def truncate(folder: Path) -> None:
    (folder / "model.pt").write_bytes((folder / "model.pt").read_bytes()[:-1])


def swap(folder: Path) -> None:
    (folder / "model.pt").write_bytes((folder.parent / "3" / "model.pt").read_bytes())


def swap_whole(folder: Path) -> None:
    for file in folder.iterdir():
        file.write_bytes((folder.parent / "3" / file.name).read_bytes())


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, "99 bytes, by its manifest 100"),
        (lambda folder: flip_a_bit(folder / "model.pt"), "SHA-256 differs"),
        (lambda folder: flip_a_bit(folder / "golden.safetensors"), "golden.safetensors: not what"),
        (swap, "SHA-256 differs"),
        (swap_whole, "that of mnist version 3"),
        (lambda folder: (folder / "model.pt").unlink(), "model.pt: missing"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "no JSON"),
        (lambda folder: (folder / "manifest.json").write_text("{}"), "that of None version None"),
    ],
    ids=["truncated", "flipped", "golden", "swapped", "swapped whole", "missing", "half a manifest", "empty manifest"],
)
def test_version_that_is_not_what_was_published_is_named(
    repository: Path, damage: Callable[[Path], object], words: str
) -> None:
    damage(repository / "mnist" / "4")
    found = inspect(repository, "mnist")

    assert found.sound == (3, 5)
    assert words in found.damaged[4]


def test_only_what_triton_would_load_is_read(repository: Path) -> None:
    flip_a_bit(repository / "mnist" / "1" / "model.pt")

    assert inspect(repository, "mnist").sound == (3, 4, 5)


def test_version_from_before_manifests_is_held_to_its_card(repository: Path) -> None:
    folder = repository / "mnist" / "5"
    (folder / "manifest.json").unlink()
    assert inspect(repository, "mnist").damaged == {}

    (folder / "card.json").write_text('{"digest": "sha256:00"}')
    assert "not what was published" in inspect(repository, "mnist").damaged[5]


def test_versions_that_callers_are_routed_to_are_kept_however_old(repository: Path) -> None:
    assert inspect(repository, "mnist").is_as_configured
    (repository / "mnist.route.json").write_text('{"default": 4, "canary": {"1": 0.1, "9": 0.1}}')
    found = inspect(repository, "mnist", also=[2])

    assert (found.sound, found.kept, found.is_as_configured) == ((1, 2, 3, 4, 5), (1, 2), False)
    assert inspect(repository, "mnist").kept == (1,)

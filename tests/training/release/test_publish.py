import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gateway.models import Card as GatewayCard
from imaging.framing import Manner
from training.errors import ExportError, ManifestError, PromotionError, PublishError
from training.model import Network
from training.release import manifest
from training.release.publish import Card, DatasetCard, Draft, publish, publish_export, triton_config, write

ROOT = Path(__file__).parents[3]
METRICS = {"accuracy": 0.99, "num_samples": 10_000.0}
DATASET = DatasetCard(name="mnist", num_train=4000, fingerprint="00")
DRAFT = Draft(name="mnist", class_names=[str(label) for label in range(10)], metrics=METRICS, dataset=DATASET)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A version without a number."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("exports") / "export"
    write(Network(), folder, DRAFT)
    return folder


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Path:
    """The same, to be changed; what stays shares its bytes."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in exported.iterdir():
        (folder / file.name).hardlink_to(file)
    return folder


def rewrite(folder: Path, **fields: object) -> None:
    """Change the card as its writer would have, manifest included."""
    card = json.loads((folder / "card.json").read_text())
    (folder / "card.json").unlink()
    (folder / "card.json").write_text(json.dumps(card | fields))
    (folder / "manifest.json").unlink()
    manifest.write(folder, model="mnist", version=0)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_version_holds_weights_card_golden_answers_and_manifest(tmp_path: Path, exported: Path) -> None:
    card = publish_export(exported, tmp_path)
    version = tmp_path / "mnist" / "1"

    assert names(version) == ["card.json", "golden.safetensors", "manifest.json", "model.pt"]
    assert Card.read(version) == card
    assert card.digest == f"sha256:{manifest.sha256(version / 'model.pt')}"
    manifest.verify(version, model="mnist", version=1)


def test_network_is_published_without_an_export_of_ones_own(tmp_path: Path) -> None:
    card = publish(
        Network(5), tmp_path, name="letters", class_names=list("abcde"), metrics=METRICS, dataset=DATASET, temperature=2
    )

    assert (card.model, card.version, card.metrics["temperature"]) == ("letters", 1, 2)
    assert names(tmp_path / "letters") == ["1", "config.pbtxt"]


def test_card_says_how_images_are_framed(tmp_path: Path) -> None:
    draft = replace(DRAFT, manner=Manner("light_on_dark", "stretch"), class_names=["Hüte", "T-shirt/top"])
    write(Network(2), tmp_path / "export", draft)
    read = GatewayCard.model_validate_json((tmp_path / "export" / "card.json").read_bytes())

    assert (read.polarity, read.framing, read.class_names) == ("light_on_dark", "stretch", ("Hüte", "T-shirt/top"))


def test_gateway_reads_every_field_of_the_card(exported: Path) -> None:
    written = json.loads((exported / "card.json").read_text())
    read = GatewayCard.model_validate(written).model_dump(mode="json", by_alias=True)

    assert set(written) == set(read)
    assert {name: read[name] for name in ("schema", "class_names", "digest", "metrics")} == {
        name: written[name] for name in ("schema", "class_names", "digest", "metrics")
    }


def test_versions_count_up_from_the_highest_there_ever_was(tmp_path: Path, exported: Path) -> None:
    (tmp_path / "mnist" / "3").mkdir(parents=True)
    (tmp_path / "mnist" / ".withdrawn-7").mkdir()

    assert [publish_export(exported, tmp_path).version for _ in range(2)] == [8, 9]


def test_failed_export_leaves_no_version_and_no_litter(tmp_path: Path) -> None:
    network = Network()
    with torch.no_grad():
        network.output.bias.fill_(float("nan"))
    with pytest.raises(ExportError):
        publish(network, tmp_path, name="mnist", class_names=DRAFT.class_names, metrics={}, dataset=DATASET)

    assert names(tmp_path / "mnist") == ["config.pbtxt"]


def test_worse_version_is_refused_with_the_numbers_and_forced(tmp_path: Path, exported: Path, copied: Path) -> None:
    rewrite(copied, metrics={"accuracy": 0.95, "num_samples": 10_000})
    publish_export(exported, tmp_path)

    with pytest.raises(PromotionError, match=r"mnist version 1: accuracy 0\.9500, .* 0\.9900: worse by 0\.0400"):
        publish_export(copied, tmp_path)
    assert publish_export(copied, tmp_path, force=True).version == 2


def truncate(path: Path) -> bytes:
    return path.read_bytes()[:-100]


def flip(path: Path) -> bytes:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    return bytes(content)


@pytest.mark.parametrize("file", ["model.pt", "golden.safetensors", "card.json"])
@pytest.mark.parametrize("damage", [truncate, flip, lambda path: b"another's"], ids=["truncated", "flipped", "swapped"])
def test_damaged_export_is_refused(tmp_path: Path, copied: Path, file: str, damage: Callable[[Path], bytes]) -> None:
    content = damage(copied / file)
    (copied / file).unlink()
    (copied / file).write_bytes(content)

    with pytest.raises(ManifestError, match=f"{file}: "):
        publish_export(copied, tmp_path)
    assert not (tmp_path / "mnist").exists()


def test_export_for_another_device_is_refused_with_both_named(tmp_path: Path, copied: Path) -> None:
    rewrite(copied, device="cuda/NVIDIA H100", precision="float16")

    with pytest.raises(PublishError, match=r"made in float16 for cuda/NVIDIA H100, and this is cpu/"):
        publish_export(copied, tmp_path)


def test_export_that_no_longer_gives_its_golden_answers_is_refused(tmp_path: Path, copied: Path) -> None:
    other = tmp_path / "other"
    write(Network(), other, DRAFT)
    (other / "golden.safetensors").unlink()
    (other / "golden.safetensors").hardlink_to(copied / "golden.safetensors")
    rewrite(other)

    with pytest.raises(ExportError, match=r"model\.pt: embedding differ|model\.pt: probabilities differ"):
        publish_export(other, tmp_path)


def test_other_number_of_classes_under_a_name_in_use_is_refused(tmp_path: Path, exported: Path) -> None:
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "config.pbtxt").write_text(triton_config("mnist", 5))

    with pytest.raises(PublishError, match="has 5 classes, and this network 10: publish it under another name"):
        publish_export(exported, tmp_path)


def test_folder_without_a_manifest_is_no_export(tmp_path: Path) -> None:
    with pytest.raises(PublishError, match=r"no manifest\.json here; `sluice export`"):
        publish_export(tmp_path, tmp_path)


def test_operators_config_is_kept_and_the_name_can_be_changed(tmp_path: Path, exported: Path) -> None:
    config = tmp_path / "digits" / "config.pbtxt"
    config.parent.mkdir()
    config.write_text("tuned")
    card = publish_export(exported, tmp_path, name="digits")

    assert config.read_text() == "tuned"
    manifest.verify(tmp_path / "digits" / "1", model="digits", version=card.version)


def test_repository_that_is_a_file_is_named(tmp_path: Path, exported: Path) -> None:
    (tmp_path / "mnist").write_text("")

    with pytest.raises(PublishError, match="mnist: cannot write"):
        publish_export(exported, tmp_path)


def test_committed_config_is_what_publishing_writes() -> None:
    committed = (ROOT / "model_repository" / "mnist" / "config.pbtxt").read_text()

    assert committed == triton_config("mnist", 10)

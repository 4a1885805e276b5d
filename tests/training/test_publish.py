import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gateway.models import Card as GatewayCard
from training import publish as module
from training.errors import ExportError, PublishError
from training.model import Network
from training.publish import Card, DatasetCard, publish, triton_config

ROOT = Path(__file__).parents[2]
Publish = Callable[[], Card]


@pytest.fixture
def publish_once(tmp_path: Path) -> Publish:
    torch.manual_seed(0)
    network = Network()

    def once() -> Card:
        return publish(
            network,
            tmp_path,
            name="mnist",
            class_names=[str(label) for label in range(10)],
            metrics={"test_accuracy": 0.5},
            dataset=DatasetCard(name="mnist", num_train=4000, fingerprint="00"),
        )

    return once


def test_version_holds_weights_and_card(tmp_path: Path, publish_once: Publish) -> None:
    card = publish_once()
    version = tmp_path / "mnist" / "1"

    assert sorted(entry.name for entry in version.iterdir()) == ["card.json", "model.pt"]
    assert json.loads((version / "card.json").read_text())["class_names"] == card.class_names
    assert card.digest.startswith("sha256:")


def test_gateway_reads_every_field_of_the_card(tmp_path: Path, publish_once: Publish) -> None:
    publish_once()
    written = json.loads((tmp_path / "mnist" / "1" / "card.json").read_text())
    read = GatewayCard.model_validate(written).model_dump(mode="json", by_alias=True)

    assert set(written) == set(read)
    assert {name: read[name] for name in ("schema", "class_names", "digest", "metrics")} == {
        name: written[name] for name in ("schema", "class_names", "digest", "metrics")
    }


def test_versions_count_up_from_the_highest(tmp_path: Path, publish_once: Publish) -> None:
    (tmp_path / "mnist" / "7").mkdir(parents=True)

    assert [publish_once().version, publish_once().version] == [8, 9]


def test_failed_export_leaves_no_version_and_no_litter(
    tmp_path: Path, publish_once: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(network: Network, path: Path) -> None:
        path.write_bytes(b"half")
        raise ExportError("disk full")

    monkeypatch.setattr(module, "export", fail)
    with pytest.raises(ExportError):
        publish_once()

    assert [entry.name for entry in (tmp_path / "mnist").iterdir()] == ["config.pbtxt"]


def test_operators_config_is_kept(tmp_path: Path, publish_once: Publish) -> None:
    config = tmp_path / "mnist" / "config.pbtxt"
    config.parent.mkdir()
    config.write_text("tuned")
    publish_once()

    assert config.read_text() == "tuned"


def test_repository_that_is_a_file_is_named(tmp_path: Path, publish_once: Publish) -> None:
    (tmp_path / "mnist").write_text("")

    with pytest.raises(PublishError, match="mnist: cannot write"):
        publish_once()


def test_committed_config_is_what_publishing_writes() -> None:
    committed = (ROOT / "model_repository" / "mnist" / "config.pbtxt").read_text()

    assert committed == triton_config("mnist", 10)

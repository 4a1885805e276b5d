from pathlib import Path

import pytest
import torch

from training.errors import ExportError
from training.export import export
from training.model import Network, ServedNetwork


def load(path: Path) -> torch.jit.ScriptModule:
    module: torch.jit.ScriptModule = torch.jit.load(str(path))  # type: ignore[no-untyped-call]  # so in torch's stubs
    return module


def test_torchscript_and_eager_agree(tmp_path: Path) -> None:
    torch.manual_seed(1)
    network = Network(dropout=0.5).train()
    export(network, tmp_path / "model.pt")
    loaded = load(tmp_path / "model.pt")
    image = torch.randint(0, 256, (16, 1, 28, 28), dtype=torch.uint8)
    with torch.inference_mode():
        probabilities, embedding = ServedNetwork(network)(image)
        scripted_probabilities, scripted_embedding = loaded(image)

    torch.testing.assert_close(scripted_probabilities, probabilities, atol=1e-5, rtol=0)
    torch.testing.assert_close(scripted_embedding, embedding, atol=1e-5, rtol=0)


def test_forward_takes_one_argument_called_image(tmp_path: Path) -> None:
    """Libtorch finds Triton's input by this name."""
    export(Network(), tmp_path / "model.pt")
    schema = load(tmp_path / "model.pt").forward.schema  # type: ignore[attr-defined]  # so in torch's stubs

    assert [argument.name for argument in schema.arguments] == ["self", "image"]


def test_export_of_weights_that_are_not_finite_is_refused(tmp_path: Path) -> None:
    network = Network()
    with torch.no_grad():
        network.output.bias.fill_(float("nan"))

    with pytest.raises(ExportError, match="probabilities differ"):
        export(network, tmp_path / "model.pt")

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from training.errors import ExportError
from training.model import Network, ServedNetwork, fold
from training.release import export as module
from training.release.export import Examples, Export, answers, export, load_served
from training.release.golden import TOLERANCES, Golden
from training.release.precision import Precision, by_speed, device_name

CPU = torch.device("cpu")
Exported = Callable[[Precision], tuple[Path, Export]]


@pytest.fixture(scope="module")
def network() -> Network:
    """With every aid to training in it, as it comes out of a run."""
    torch.manual_seed(1)
    trained = Network(dropout=0.5, batch_norm=True)
    for name, tensor in trained.named_buffers():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5) if name.endswith("var") else tensor.normal_(0, 0.1)
    with torch.no_grad():
        trained.output.weight *= 30  # sure of itself, as a trained one is
    return trained.eval()


@pytest.fixture(scope="module")
def examples(network: Network) -> Examples:
    """Images that the network is sure of, with the class that it gives them."""
    random = np.random.default_rng(0)
    images = (random.integers(0, 256, (300, 28, 28)) * random.uniform(0, 1, (300, 1, 1))).astype(np.uint8)
    with torch.inference_mode():
        probabilities, _ = ServedNetwork(network)(torch.from_numpy(images[:, None]))
    second, first = probabilities.sort(dim=1).values[:, -2:].T
    surest = (first - second).argsort(descending=True)[:60]
    return Examples(images[surest], probabilities.argmax(dim=1).numpy()[surest])


@pytest.fixture(scope="module")
def exported(network: Network, examples: Examples, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Each precision exported once."""

    @cache
    def once(precision: Precision) -> tuple[Path, Export]:
        folder = tmp_path_factory.mktemp(precision)
        return folder, export(network, folder, precision=precision, examples=examples, device=CPU)

    return once


def test_file_answers_like_the_network_with_its_norms(exported: Exported, network: Network, examples: Examples) -> None:
    folder, _ = exported("float32")
    images = examples.images[:16, None]
    with torch.inference_mode():
        expected = torch.softmax(network(torch.from_numpy(images).float() / 255), dim=1).numpy()
    probabilities, embeddings = answers(load_served(folder / "model.pt", CPU), images, CPU)

    np.testing.assert_allclose(probabilities, expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_served_graph_is_the_given_network_layer_by_layer(exported: Exported, precision: Precision) -> None:
    module = torch.jit.load(str(exported(precision)[0] / "model.pt"))  # type: ignore[no-untyped-call]  # so in torch
    nodes = [node.kind() for node in module.inlined_graph.nodes()]
    kinds = [kind.removeprefix("aten::") for kind in nodes if kind.startswith("aten::")]
    layers = ("conv2d", "linear", "relu", "max_pool2d", "cat", "softmax")

    assert [kinds.count(layer) for layer in layers] == [5, 3, 7, 3, 1, 1]
    # What else there is scales pixels, lays out memory and brings embeddings to unit length.
    assert set(kinds) - set(layers) <= {
        "to",
        "div",
        "contiguous",
        "flatten",
        "linalg_vector_norm",
        "norm",
        "clamp_min",
        "expand_as",
    }
    # Libtorch finds Triton's input by this name.
    assert [argument.name for argument in module.forward.schema.arguments] == ["self", "image"]


def test_folded_equals_unfolded(network: Network) -> None:
    image = torch.rand(8, 1, 28, 28)
    with torch.inference_mode():
        torch.testing.assert_close(fold(network)(image), network(image), atol=1e-4, rtol=1e-5)


def test_temperature_divides_logits_and_leaves_the_network_as_it_is(tmp_path: Path, network: Network) -> None:
    images = np.random.default_rng(1).integers(0, 256, (8, 1, 28, 28), np.uint8)
    with torch.inference_mode():
        logits = network(torch.from_numpy(images).float() / 255)
    export(network, tmp_path, temperature=2.0)
    probabilities, _ = answers(load_served(tmp_path / "model.pt", CPU), images, CPU)

    np.testing.assert_allclose(probabilities, torch.softmax(logits / 2, dim=1).numpy(), atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(network(torch.from_numpy(images).float() / 255), logits, atol=0, rtol=0)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_is_for_this_device_and_answers_in_float32(exported: Exported, precision: Precision) -> None:
    folder, made = exported(precision)
    probabilities, embedding = load_served(folder / "model.pt", CPU)(torch.zeros(1, 1, 28, 28, dtype=torch.uint8))

    assert (made.precision, made.device, made.accuracy_change) == (precision, device_name(CPU), 0)
    assert {probabilities.dtype, embedding.dtype} == {torch.float32}
    assert (folder / "model.pt").stat().st_size < 60e6, "half of what float32 takes"


def test_auto_takes_the_fastest_that_keeps_the_accuracy(
    tmp_path: Path, network: Network, examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = [("bfloat16", 4000.0), ("float16", 3000.0), ("float32", 1000.0)]
    monkeypatch.setattr(module, "measure", lambda made, device: {name: {1: 1.0, 64: rate} for name, rate in order})
    monkeypatch.setattr(module, "TOLERANCES", {**TOLERANCES, "bfloat16": 0.0})
    exported = export(network, tmp_path, precision="auto", examples=examples, device=CPU)

    assert exported.precision == "float16"
    assert "differ" in exported.passed_over["bfloat16"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["golden.safetensors", "model.pt"]


def test_precision_that_is_slower_with_a_lone_image_is_not_tried() -> None:
    rates = {"float32": {1: 100.0, 64: 1000.0}, "bfloat16": {1: 90.0, 64: 4000.0}, "float16": {1: 96.0, 64: 1100.0}}

    assert by_speed(rates) == ["float16", "float32"]  # type: ignore[arg-type]  # literals as keys


def test_precision_that_changes_the_accuracy_is_refused_with_the_number(
    tmp_path: Path, network: Network, examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ACCURACY_GATE", -1.0)

    with pytest.raises(ExportError, match=r"bfloat16: accuracy changes by \+0\.000 points on 60 images"):
        export(network, tmp_path, precision="bfloat16", examples=examples, device=CPU)


def test_precision_without_images_to_judge_it_by_is_refused(tmp_path: Path, network: Network) -> None:
    with pytest.raises(ExportError, match="labelled images are needed"):
        export(network, tmp_path, precision="auto")


def test_int8_is_refused_by_name(tmp_path: Path, network: Network) -> None:
    with pytest.raises(ExportError, match=r"int8 is not offered.*allowed are auto"):
        export(network, tmp_path, precision="int8")


def test_golden_answers_hold_real_images(exported: Exported, examples: Examples) -> None:
    golden = Golden.load(exported("float32")[0] / "golden.safetensors")

    assert len(golden.images) == 64
    np.testing.assert_array_equal(golden.images[16:, 0], examples.images[:48])
    assert golden.differences(golden.probabilities, golden.embeddings, 0.0) == ""


@pytest.mark.parametrize(
    ("change", "words"),
    [(2e-5, "probabilities differ"), (float("nan"), "probabilities differ")],
    ids=["off", "not a number"],
)
def test_golden_answers_differ(network: Network, change: float, words: str) -> None:
    golden = Golden.of(ServedNetwork(network))
    changed = golden.probabilities.copy()
    changed[3, 4] += change

    assert words in golden.differences(changed, golden.embeddings, 1e-5)


@pytest.mark.parametrize(("lead", "words"), [(0.1, ""), (0.3, "1 of 1 images get another class")])
def test_another_class_counts_where_the_lead_was_clear(lead: float, words: str) -> None:
    embeddings = np.zeros((1, 500), np.float32)
    golden = Golden(np.zeros((1, 1, 28, 28), np.uint8), np.array([[0.3 + lead, 0.3]], np.float32), embeddings)
    # Both within the tolerance, and the other way round.
    found = np.array([[0.3 + lead / 2 - 0.01, 0.3 + lead / 2 + 0.01]], np.float32)

    assert golden.differences(found, embeddings, 0.2) == words


def test_export_of_weights_that_are_not_finite_is_refused(tmp_path: Path) -> None:
    network = Network()
    with torch.no_grad():
        network.output.bias.fill_(float("nan"))

    with pytest.raises(ExportError, match="probabilities differ"):
        export(network, tmp_path)

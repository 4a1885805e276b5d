import pytest
import torch
from torch import nn

from training.model import Network, ServedNetwork, fold

# Output shape of every named layer, channels first, as the network is given.
SHAPES = {
    "conv1": (32, 28, 28),
    "conv2_1": (64, 14, 14),
    "conv2_2": (64, 14, 14),
    "conv3_1": (256, 7, 7),
    "conv3_2": (256, 7, 7),
    "fc1": (1000,),
    "fc2": (500,),
    "output": (10,),
}


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    return Network().eval()


@pytest.mark.parametrize(("name", "shape"), SHAPES.items())
def test_layer_has_the_given_output_shape(network: Network, name: str, shape: tuple[int, ...]) -> None:
    seen: list[torch.Size] = []
    layer: nn.Module = getattr(network, name)
    handle = layer.register_forward_hook(lambda _layer, _inputs, output: seen.append(output.shape))
    network(torch.rand(3, 1, 28, 28))
    handle.remove()

    assert seen == [(3, *shape)]


def test_both_second_branches_read_the_same_pooled_input(network: Network) -> None:
    inputs: dict[str, torch.Tensor] = {}
    handles = [
        getattr(network, name).register_forward_pre_hook(
            lambda _layer, given, name=name: inputs.__setitem__(name, given[0])
        )
        for name in ("conv2_1", "conv2_2", "fc1")
    ]
    network(torch.rand(2, 1, 28, 28))
    for handle in handles:
        handle.remove()

    assert inputs["conv2_1"] is inputs["conv2_2"]
    assert inputs["conv2_1"].shape == (2, 32, 14, 14)
    assert inputs["fc1"].shape == (2, 512 * 7 * 7)


def test_number_of_parameters(network: Network) -> None:
    assert sum(parameter.numel() for parameter in network.parameters()) == 25_927_246


def test_every_convolution_is_3x3(network: Network) -> None:
    kernels = {layer.kernel_size for layer in network.modules() if isinstance(layer, nn.Conv2d)}

    assert kernels == {(3, 3)}


def test_served_probabilities_sum_to_one_and_embeddings_have_unit_length(network: Network) -> None:
    image = torch.randint(0, 256, (5, 1, 28, 28), dtype=torch.uint8)
    with torch.inference_mode():
        probabilities, embedding = ServedNetwork(network)(image)

    assert probabilities.shape == (5, 10)
    assert embedding.shape == (5, 500)
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(5))
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(5))


def test_served_network_scales_bytes_to_the_unit_range(network: Network) -> None:
    image = torch.randint(0, 256, (4, 1, 28, 28), dtype=torch.uint8)
    with torch.inference_mode():
        probabilities, _ = ServedNetwork(network)(image)
        expected = torch.softmax(network(image.float() / 255), dim=1)

    torch.testing.assert_close(probabilities, expected)


@pytest.mark.parametrize("is_shared", [False, True], ids=["one process", "GPUs"])
def test_folded_network_answers_alike_and_is_the_given_one(network: Network, is_shared: bool) -> None:
    torch.manual_seed(1)
    trained = Network(batch_norm=True, dropout=0.5)
    if is_shared:
        nn.SyncBatchNorm.convert_sync_batchnorm(trained)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    with torch.no_grad():
        for layer in trained.modules():
            if isinstance(layer, nn.BatchNorm2d | nn.SyncBatchNorm):
                for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
                    assert tensor is not None
                    tensor.uniform_(0.5, 1.5)
    folded = fold(trained)
    image = torch.rand(8, 1, 28, 28)
    with torch.inference_mode():
        torch.testing.assert_close(folded(image), trained.eval()(image), atol=1e-5, rtol=1e-5)

    assert folded.state_dict().keys() == network.state_dict().keys()
    assert {type(layer) for layer in folded.modules()} == {Network, nn.Conv2d, nn.Linear, nn.Identity}
    assert not folded.training


def test_folding_leaves_the_network_in_training_as_it_was() -> None:
    trained = Network(batch_norm=True).train()
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    fold(trained)

    assert trained.training
    assert trained.conv1.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained.state_dict().items())

"""Weights packed for oneDNN: the same answers from other layers."""

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from serving.backends.pytorch.preparation import prepared

CPU = torch.device("cpu")
PACKED = {"mkldnn::_convolution_pointwise", "mkldnn::_linear_pointwise"}
PLAIN = {"aten::conv2d", "aten::linear", "aten::relu"}
HALVES = {
    torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
    torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
}


@pytest.fixture(autouse=True)
def torchscript() -> Iterator[None]:
    with warnings.catch_warnings():
        # torch announces the end of TorchScript at each use.
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


@pytest.fixture(params=HALVES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    dtype: torch.dtype = request.param
    if not HALVES[dtype]():
        pytest.skip(f"oneDNN does not run {dtype} on this CPU")
    return dtype


class Digits(nn.Module):
    """One of each layer, with steps, groups and padding that are told apart."""

    def __init__(self, padding: int | str = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, stride=1 if isinstance(padding, str) else 2, padding=padding, groups=2)
        self.second = nn.Conv2d(8, 8, 3, dilation=2, bias=False)
        self.third = nn.Linear(8, 16)
        self.last = nn.Linear(16, 3, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        hidden = self.second(torch.relu(self.first(image))).mean((2, 3))
        both = self.third(hidden)
        logits: Tensor = self.last(torch.relu(both) + both)
        return logits


def frozen(module: nn.Module, dtype: torch.dtype) -> torch.jit.ScriptModule:
    served: torch.jit.ScriptModule = torch.jit.freeze(torch.jit.script(module.to(dtype).eval()))
    return served


def layers(module: torch.jit.ScriptModule) -> set[str]:
    return {node.kind() for node in module.graph.nodes()} & (PACKED | PLAIN)


@pytest.mark.parametrize("num_images", [1, 7, 64])
def test_packed_layers_answer_as_before(dtype: torch.dtype, num_images: int) -> None:
    torch.manual_seed(0)
    plain, packed = (frozen(module, dtype) for module in [Digits()] * 2)
    images = torch.randn(num_images, 4, 16, 16, dtype=dtype)

    packed = prepared(packed, CPU)

    with torch.inference_mode():
        torch.testing.assert_close(packed(images), plain(images))
    # The ReLU whose input another layer needs stays, the other went into its convolution.
    assert layers(packed) == PACKED | {"aten::relu"}
    assert len(packed.graph.findAllNodes("aten::relu")) == 1


def test_padding_in_words_is_left_to_torch(dtype: torch.dtype) -> None:
    packed = prepared(frozen(Digits(padding="same"), dtype), CPU)

    assert "aten::conv2d" in layers(packed)
    assert packed(torch.zeros(2, 4, 16, 16, dtype=dtype)).shape == (2, 3)

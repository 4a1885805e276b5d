"""
What a model goes through between its file and its first request: frozen, and packed for the CPU that runs it.

Triton's backend has a copy of this file beside its own; exports are measured and checked after the same treatment.
It imports nothing of ours.
"""

from collections.abc import Sequence
from typing import Any

import torch

HALVES = (torch.bfloat16, torch.float16)

# Weights are laid out for batches of about this size; others find the same layout, and would be reordered if not.
_ROWS = 64


def prepared(module: Any, device: torch.device) -> Any:
    """
    Return TorchScript as it serves: frozen, on the CPU its weights packed for oneDNN once and not at each request.

    Half-precision layers answer bit for bit as before, in batches of 8 in less than half the time
    (``benchmarks/results/export.md``).

    Args:
        module: Loaded on ``device``, never called; it may be changed.
        device: Where it will run.
    """
    # What was frozen before it was saved has lost this attribute.
    if hasattr(module, "training"):
        module = torch.jit.freeze(module.eval())
    if device.type != "cpu":
        return module
    dtypes = {weight.dtype for weight in _weights(module)}
    if not dtypes.intersection(HALVES):
        # Half again as many images a second in batches of 64. Halves would lose by it: it parts a linear layer in two.
        return torch.jit.optimize_for_inference(module)
    for dtype in dtypes.intersection(HALVES):
        if _is_fast(dtype):
            _pack(module, dtype)
    return module


def _weights(frozen: Any) -> list[torch.Tensor]:
    nodes = [node for node in frozen.graph.nodes() if node.kind() == "prim::Constant" and node.hasAttribute("value")]
    return [node.t("value") for node in nodes if node.kindOf("value") == "t"]


def _is_fast(dtype: torch.dtype) -> bool:
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}[dtype]
    # Operators without a promise, those of torch's own compiler: another torch may have other ones.
    known = all(hasattr(torch.ops.mkldnn, operator) for operator in (name, *_PACKED.values()))
    return known and bool(getattr(torch.ops.mkldnn, name)())


_PACKED = {"aten::linear": "_linear_pointwise", "aten::conv2d": "_convolution_pointwise"}


def _pack(module: Any, dtype: torch.dtype) -> None:
    """
    Give each layer its weights as oneDNN wants them, and the ReLU behind it into the bargain.

    What torch's compiler does when it freezes a model (torch/_inductor/fx_passes/mkldnn_fusion.py), for TorchScript:
    without it oneDNN reorders the weights, 50 MB of them in the widest layer, at every call.
    """
    graph = module.graph
    for layer in [node for node in graph.nodes() if node.kind() in _PACKED]:
        image, weight, bias, *rest = layer.inputs()
        values = [_value(argument) for argument in rest]
        content = weight.toIValue()
        if content is None or content.dtype != dtype or any(_is_unfit(value) for value in values):
            continue
        graph.setInsertPoint(layer)
        relu = _only_relu_behind(layer)
        # A convolution has its stride before its padding, and here behind it.
        arguments = [image, _constant(graph, _reordered(content, values)), bias, *rest[1::-1], *rest[2:]]
        # One activation, without numbers to it and without a variant.
        arguments += [graph.insertConstant("relu" if relu else "none"), _no_numbers(graph), graph.insertConstant("")]
        packed = graph.create(f"mkldnn::{_PACKED[layer.kind()]}", arguments, 1)
        graph.insertNode(packed)
        _replace(layer if relu is None else relu, packed)
        if relu is not None:
            layer.destroy()


def _value(argument: Any) -> Any:
    node = argument.node()
    if node.kind() == "prim::ListConstruct":
        return [item.toIValue() for item in node.inputs()]
    return argument.toIValue()


def _is_unfit(value: Any) -> bool:
    """Tell whether a layer's argument is unknown before it runs, or names its padding in words."""
    return not isinstance(value, int) and not (isinstance(value, list) and all(isinstance(one, int) for one in value))


def _reordered(weight: torch.Tensor, arguments: Sequence[Any]) -> torch.Tensor:
    if weight.dim() == 2:
        packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
        return packed
    stride, padding, dilation, groups = arguments
    packed = torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, dilation, groups, None)
    return packed


def _only_relu_behind(layer: Any) -> Any:
    users = [use.user for use in layer.output().uses()]
    return users[0] if len(users) == 1 and users[0].kind() == "aten::relu" else None


def _constant(graph: Any, packed: torch.Tensor) -> Any:
    node = graph.create("prim::ConstantMKLDNNTensor")
    node.t_("value", packed)
    graph.insertNode(node)
    node.output().setType(torch._C.TensorType.get())
    return node.output()


def _no_numbers(graph: Any) -> Any:
    node = graph.create("prim::ListConstruct", [], 1)
    graph.insertNode(node)
    node.output().setType(torch._C.ListType(torch._C.OptionalType(torch._C.NumberType.get())))
    return node.output()


def _replace(old: Any, new: Any) -> None:
    new.output().setType(old.output().type())
    old.output().replaceAllUsesWith(new.output())
    old.destroy()

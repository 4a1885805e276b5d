"""
TorchScript in the embedded Triton, under the naming rules of libtorch's backend in NVIDIA's image.

Triton reads this file from a copy beside its Python backend, in an interpreter of its own, one for each model
instance: of ours it imports what lies in the same folder, and nothing else.
"""

import hashlib
import json
import os
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import triton_python_backend_utils as pb_utils
from preparation import prepared  # type: ignore[import-not-found]  # a folder in Triton's path, no package

# What libtorch's backend can hold; it also takes List[str], which an image model has no use for.
DTYPES = {
    "TYPE_BOOL": torch.bool,
    "TYPE_UINT8": torch.uint8,
    "TYPE_INT8": torch.int8,
    "TYPE_INT16": torch.int16,
    "TYPE_INT32": torch.int32,
    "TYPE_INT64": torch.int64,
    "TYPE_FP16": torch.float16,
    "TYPE_FP32": torch.float32,
    "TYPE_FP64": torch.float64,
}


class ContractError(ValueError):
    """``config.pbtxt`` and the TorchScript module disagree; the message names the tensor and both sides."""


class DamageError(ValueError):
    """The file is not what was published."""


def require_published(path: str) -> None:
    """
    Compare a version's weights with its ``manifest.json``, or with the digest in its ``card.json`` if it has none.

    TorchScript is a program: what somebody else put there must not run. A version without either file passes.

    Raises:
        DamageError: The file is not what was published, or the manifest cannot be read.
    """
    folder, name = os.path.split(path)
    try:
        expected = _published_digest(folder, name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamageError(f"{folder}: manifest.json or card.json is damaged: {error!r}") from error
    if expected is None:
        return
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise DamageError(f"{path} is not what was published: its SHA-256 begins {found[:8]}, not {expected[:8]}")


def _published_digest(folder: str, name: str) -> str | None:
    try:
        with open(os.path.join(folder, "manifest.json"), "rb") as file:
            return str(json.load(file)["files"][name]["sha256"])
    except FileNotFoundError:
        pass
    try:
        with open(os.path.join(folder, "card.json"), "rb") as file:
            digest = json.load(file).get("digest")
    except FileNotFoundError:
        return None
    return str(digest).removeprefix("sha256:") if digest else None


def argument_order(arguments: Sequence[str], inputs: Sequence[str]) -> list[str]:
    """
    Return the configuration's inputs in the order of ``forward``'s arguments.

    One convention holds for all of them: names of arguments, else ``<name>__<index>``, else the order given.

    Source: ``ValidateInputs`` and ``GetNamingConvention`` in src/libtorch.cc of Triton's pytorch_backend, r24.10.

    Args:
        arguments: Names of ``forward``'s arguments without ``self``.
        inputs: Names in the order of ``config.pbtxt``, each once.

    Raises:
        ContractError: Their numbers differ, or the indices are not 0..n-1, each once.
    """
    if len(arguments) != len(inputs):
        raise ContractError(
            f"configuration expects {len(inputs)} inputs ({', '.join(inputs)}), "
            f"model provides {len(arguments)} ({', '.join(arguments)})"
        )
    if set(inputs) <= set(arguments):
        return list(arguments)
    indices = _indices(inputs)
    if indices is None:
        return list(inputs)
    # libtorch writes past its arguments here, or leaves one empty.
    if sorted(indices) != list(range(len(inputs))):
        raise ContractError(f"the indices of inputs {', '.join(inputs)} have to be 0 to {len(inputs) - 1}, each once")
    return [name for _, name in sorted(zip(indices, inputs, strict=True))]


def result_positions(outputs: Sequence[str], num_results: int) -> list[int]:
    """
    Return where in ``forward``'s result each output of the configuration lies.

    By ``<name>__<index>`` if all names are of that form, else by the order given; fewer outputs than results are fine.

    Source: ``ValidateOutputs`` and ``ProcessRequests`` in src/libtorch.cc of Triton's pytorch_backend, r24.10, which
    finds a position out of range only when the first request runs.

    Args:
        outputs: Names in the order of ``config.pbtxt``.
        num_results: Tensors that ``forward`` returns, 1 for a lone one.

    Raises:
        ContractError: An output lies beyond the results.
    """
    indices = _indices(outputs)
    positions = list(range(len(outputs))) if indices is None else indices
    for name, position in zip(outputs, positions, strict=True):
        if position >= num_results:
            raise ContractError(
                f"output '{name}' refers to position {position} of the model's results, which has {num_results}"
            )
    return positions


def _indices(names: Sequence[str]) -> list[int] | None:
    indices = []
    for name in names:
        _, separator, index = name.partition("__")
        if not separator or not set(index) <= set("0123456789"):
            return None
        indices.append(int(index or 0))  # libtorch reads "name__" as position 0
    return indices


def forward_arguments(schema: Any) -> list[str] | None:
    """
    Return the names of ``forward``'s arguments, None where it takes one dictionary of tensors.

    Raises:
        ContractError: An argument is neither a tensor nor that lone dictionary.
    """
    arguments = [argument for argument in schema.arguments if argument.type.kind() != "ClassType"]
    if [str(argument.type) for argument in arguments] == ["Dict[str, Tensor]"]:
        return None
    for argument in arguments:
        if argument.type.kind() != "TensorType":
            raise ContractError(
                f"forward's argument '{argument.name}' is of type {argument.type}; "
                "served are Tensor arguments or one Dict[str, Tensor]"
            )
    return [argument.name for argument in arguments]


def num_results(schema: Any) -> int:
    """
    Return how many tensors ``forward`` returns.

    Raises:
        ContractError: It returns something else than a tensor or a tuple of tensors.
    """
    returned = schema.returns[0].type
    parts = returned.elements() if returned.kind() == "TupleType" else [returned]
    if any(part.kind() != "TensorType" for part in parts):
        raise ContractError(f"forward returns {returned}; served are a Tensor or a tuple of them")
    return len(parts)


class TritonPythonModel:
    """One instance of one version; Triton calls its methods from a single thread."""

    def initialize(self, args: dict[str, str]) -> None:
        """
        Load the version's TorchScript and agree with ``config.pbtxt`` on names and types.

        Raises:
            TritonModelException: The file cannot be loaded, or does not fit the configuration.
        """
        config = json.loads(args["model_config"])
        try:
            self._load(config, args)
        except (ContractError, RuntimeError, ValueError, OSError) as error:
            raise pb_utils.TritonModelException(
                f"unable to load model '{config['name']}': {_last_line(error)}"
            ) from error

    def _load(self, config: dict[str, Any], args: dict[str, str]) -> None:
        inputs = {entry["name"]: entry["data_type"] for entry in config["input"]}
        self._dtypes = {entry["name"]: entry["data_type"] for entry in config["output"]}
        for name, data_type in [*inputs.items(), *self._dtypes.items()]:
            if data_type not in DTYPES:
                raise ContractError(f"'{name}' has data type {data_type}; served are {', '.join(DTYPES)}")
        _limit_threads(config)
        self._batches = config["max_batch_size"] > 0
        self._device = _device(args["model_instance_kind"], args["model_instance_device_id"])
        file = config.get("default_model_filename") or "model.pt"
        path = os.path.join(args["model_repository"], args["model_version"], file)
        if not os.path.isfile(path):
            raise ContractError(f"there is no file {path}")
        require_published(path)
        with warnings.catch_warnings():
            # TorchScript is what is served here; torch announces its end at each use.
            warnings.simplefilter("ignore", DeprecationWarning)
            try:
                module = torch.jit.load(path, map_location=self._device)  # type: ignore[no-untyped-call]  # so in torch
            except RuntimeError as error:
                raise ContractError(f"{path} is no TorchScript: {_last_line(error)}") from error
            arguments = forward_arguments(module.forward.schema)
            self._takes_dictionary = arguments is None
            self._inputs = list(inputs) if arguments is None else argument_order(arguments, list(inputs))
            positions = result_positions(list(self._dtypes), num_results(module.forward.schema))
            self._positions = dict(zip(self._dtypes, positions, strict=True))
            self._module = prepared(module, self._device)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer all requests from one forward pass; a pass that fails gives each of them an error to answer."""
        if self._batches:
            return self._answer(requests)
        return [response for request in requests for response in self._answer([request])]

    def _answer(self, requests: list[Any]) -> list[Any]:
        try:
            batch = [_gather(requests, name) for name in self._inputs]
            results = self._forward(batch)
            wanted = {name for request in requests for name in request.requested_output_names()}
            outputs = {name: self._output(name, results) for name in self._dtypes if name in wanted}
            if len(requests) == 1:
                return [_respond(requests[0], outputs)]
            return self._split(requests, outputs)
        except Exception as error:
            # Raised through, it would reach callers with its stack trace.
            pb_utils.Logger.log_error(traceback.format_exc())
            failure = pb_utils.TritonError(f"PyTorch execute failure: {_last_line(error)}")
            return [pb_utils.InferenceResponse(output_tensors=[], error=failure) for _ in requests]

    def _forward(self, batch: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        tensors = [tensor.to(self._device) for tensor in batch]
        with torch.inference_mode():
            if self._takes_dictionary:
                results = self._module(dict(zip(self._inputs, tensors, strict=True)))
            else:
                results = self._module(*tensors)
        return (results,) if isinstance(results, torch.Tensor) else tuple(results)

    def _output(self, name: str, results: tuple[torch.Tensor, ...]) -> torch.Tensor:
        tensor = results[self._positions[name]]
        expected = DTYPES[self._dtypes[name]]
        if tensor.dtype != expected:
            provided = next((known for known, dtype in DTYPES.items() if dtype == tensor.dtype), str(tensor.dtype))
            raise ContractError(
                f"configuration expects datatype {self._dtypes[name]} for output '{name}', model provides {provided}"
            )
        if tensor.dim() == 0:
            raise ContractError(f"output '{name}' is a scalar; it needs at least one dimension")
        return tensor.cpu().contiguous()

    def _split(self, requests: list[Any], outputs: dict[str, torch.Tensor]) -> list[Any]:
        sizes = [_tensor(request, self._inputs[0]).shape()[0] for request in requests]
        for name, output in outputs.items():
            if output.shape[0] != sum(sizes):
                raise ContractError(f"output '{name}' has {output.shape[0]} rows for a batch of {sum(sizes)}")
        responses, start = [], 0
        for request, size in zip(requests, sizes, strict=True):
            rows = slice(start, start + size)
            responses.append(_respond(request, {name: output[rows] for name, output in outputs.items()}))
            start += size
        return responses


def _tensor(request: Any, name: str) -> Any:
    return pb_utils.get_input_tensor_by_name(request, name)


# Tensors pass through DLPack, never through NumPy: this version's stub was built for NumPy 1, and under NumPy 2 it
# takes every item for 0 bytes wide, so that inputs read as zeros and outputs leave empty, without an error.


def _gather(requests: list[Any], name: str) -> torch.Tensor:
    parts = [torch.utils.dlpack.from_dlpack(_tensor(request, name)) for request in requests]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _respond(request: Any, outputs: dict[str, torch.Tensor]) -> Any:
    wanted = request.requested_output_names()
    # In the configuration's order: what is wanted comes as a set, in another order in each process.
    tensors = [pb_utils.Tensor.from_dlpack(name, output) for name, output in outputs.items() if name in wanted]
    return pb_utils.InferenceResponse(tensors)


def _device(kind: str, index: str) -> torch.device:
    if kind == "CPU":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", int(index))
    if kind == "GPU":
        pb_utils.Logger.log_warn("the instance is meant for a GPU, and this torch sees none: it runs on the CPU")
    return torch.device("cpu")


def _limit_threads(config: dict[str, Any]) -> None:
    # libtorch's own parameter outweighs what the server was started with (OMP_NUM_THREADS).
    given = config.get("parameters", {}).get("INTRA_OP_THREAD_COUNT")
    if given is not None:
        torch.set_num_threads(int(given["string_value"]))


def _last_line(error: Exception) -> str:
    """The line of a TorchScript error that says what happened; the lines before it are its stack."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__

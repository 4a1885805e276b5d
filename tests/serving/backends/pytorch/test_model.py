"""The backend without Triton: naming, agreement with the configuration, and what a batch answers."""

import importlib.util
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from serving.installation import BACKEND


class TritonModelException(Exception):
    pass


class TritonError(Exception):
    def message(self) -> str:
        return str(self)


class Logger:
    log_error = log_warn = staticmethod(lambda text: None)


class BackendTensor:
    def __init__(self, name: str, content: Tensor) -> None:
        self.name, self.content = name, content

    @staticmethod
    def from_dlpack(name: str, content: Tensor) -> "BackendTensor":
        assert content.is_contiguous()
        assert content.device.type == "cpu"
        return BackendTensor(name, content)

    def shape(self) -> list[int]:
        return list(self.content.shape)

    def __dlpack__(self, **options: Any) -> Any:
        return self.content.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.content.__dlpack_device__()


class InferenceResponse:
    def __init__(self, output_tensors: list[BackendTensor], error: TritonError | None = None) -> None:
        self.outputs = {tensor.name: tensor.content for tensor in output_tensors}
        self.error = error


class Request:
    def __init__(self, inputs: dict[str, Tensor], wanted: set[str]) -> None:
        self.inputs, self.wanted = inputs, wanted

    def requested_output_names(self) -> set[str]:
        return self.wanted


class BackendUtilities(ModuleType):
    """Stands in for the module that Triton's stub brings; tensors pass through DLPack, as under NumPy 2 they must."""

    TritonModelException = TritonModelException
    TritonError = TritonError
    Logger = Logger
    Tensor = BackendTensor
    InferenceResponse = InferenceResponse

    @staticmethod
    def get_input_tensor_by_name(request: Request, name: str) -> BackendTensor:
        return BackendTensor(name, request.inputs[name])


@pytest.fixture(scope="module")
def backend() -> Any:
    sys.modules["triton_python_backend_utils"] = BackendUtilities("triton_python_backend_utils")
    sys.path.insert(0, str(BACKEND))
    try:
        spec = importlib.util.spec_from_file_location("served_model", BACKEND / "model.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(BACKEND))
        del sys.modules["triton_python_backend_utils"]


class Halves(nn.Module):
    """Two results that tell which is which: the image plus 1 and the image times 2, both FP32."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return image.float() + 1, image.float() * 2


class Lone(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return image.float()


class Difference(nn.Module):
    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return first.float() - second.float()


class Dictionary(nn.Module):
    def forward(self, tensors: dict[str, Tensor]) -> Tensor:
        return tensors["a"].float() - tensors["b"].float()


class Largest(nn.Module):
    """Its index is INT64, as argmax gives it; libtorch's classic."""

    def forward(self, image: Tensor) -> Tensor:
        return image.argmax(dim=1)


class Picky(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        if int(image.max()) > 100:
            raise ValueError("too bright")
        return image.float()


class Scalar(nn.Module):
    def forward(self, image: Tensor) -> float:
        return 1.0


class Counted(nn.Module):
    def forward(self, image: Tensor, count: int) -> Tensor:
        return image.float() * count


class Summed(nn.Module):
    """Forgets the batch."""

    def forward(self, image: Tensor) -> Tensor:
        return image.float().sum(dim=0, keepdim=True)


Serve = Callable[..., Any]


@pytest.fixture
def serve(backend: Any, tmp_path: Path) -> Serve:
    """Script a module, save it as a version and initialize the backend with a configuration."""

    def initialized(module: nn.Module, *, inputs: list[str], outputs: list[str], **config: Any) -> Any:
        (tmp_path / "1").mkdir(exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            torch.jit.script(module).save(str(tmp_path / "1" / "model.pt"))  # type: ignore[no-untyped-call]  # so in torch
        data_type = config.pop("output_type", "TYPE_FP32")
        full = {
            "name": "small",
            "max_batch_size": 8,
            "default_model_filename": "model.pt",
            "input": [{"name": name, "data_type": "TYPE_UINT8"} for name in inputs],
            "output": [{"name": name, "data_type": data_type} for name in outputs],
            **config,
        }
        model = backend.TritonPythonModel()
        model.initialize(
            {
                "model_config": json.dumps(full),
                "model_instance_kind": "CPU",
                "model_instance_device_id": "0",
                "model_repository": str(tmp_path),
                "model_version": "1",
            }
        )
        return model

    return initialized


def rows(*values: int) -> Tensor:
    return torch.tensor([[value, 0] for value in values], dtype=torch.uint8)


@pytest.mark.parametrize(
    ("arguments", "inputs", "order"),
    [
        (["a", "b"], ["b", "a"], ["a", "b"]),  # names of arguments
        (["a", "b"], ["x__1", "y__0"], ["y__0", "x__1"]),  # positions
        (["a", "b"], ["x__", "y__1"], ["x__", "y__1"]),  # nothing behind __ reads as 0
        (["a", "b"], ["y", "x"], ["y", "x"]),  # order of the configuration
        (["a", "b"], ["b", "x__0"], ["b", "x__0"]),  # one that fits neither spoils both conventions
        (["a", "b"], ["x__1", "y__first"], ["x__1", "y__first"]),
        (["a__1", "b__0"], ["b__0", "a__1"], ["a__1", "b__0"]),  # a name outweighs a position
        (["a", "b"], ["x__1__0", "y__0"], ["x__1__0", "y__0"]),  # split at the first __: "1__0" is no number
    ],
)
def test_inputs_find_their_arguments(backend: Any, arguments: list[str], inputs: list[str], order: list[str]) -> None:
    assert backend.argument_order(arguments, inputs) == order


@pytest.mark.parametrize("inputs", [["x__0", "y__0"], ["x__1", "y__2"]])
def test_input_positions_that_leave_an_argument_out_are_refused(backend: Any, inputs: list[str]) -> None:
    with pytest.raises(backend.ContractError, match="0 to 1, each once"):
        backend.argument_order(["a", "b"], inputs)


@pytest.mark.parametrize(
    ("outputs", "positions"),
    [
        (["p__0", "e__1"], [0, 1]),
        (["e__1", "p__0"], [1, 0]),
        (["e__1"], [1]),  # fewer than there are
        (["p", "e"], [0, 1]),
        (["p__0", "e"], [0, 1]),  # one without a position spoils them for all
        (["e__1", "p__x"], [0, 1]),
    ],
)
def test_outputs_find_their_results(backend: Any, outputs: list[str], positions: list[int]) -> None:
    assert backend.result_positions(outputs, 2) == positions


def test_output_beyond_the_results_is_refused_at_load(serve: Serve) -> None:
    with pytest.raises(TritonModelException, match=r"'e__2' refers to position 2.*has 2"):
        serve(Halves(), inputs=["image"], outputs=["e__2"])


def test_wrong_number_of_inputs_is_refused_at_load(serve: Serve) -> None:
    with pytest.raises(TritonModelException, match=r"expects 1 inputs .* provides 2"):
        serve(Difference(), inputs=["first"], outputs=["o__0"])


@pytest.mark.parametrize(
    ("module", "inputs", "message"),
    [(Scalar(), ["image"], "forward returns float"), (Counted(), ["image", "count"], "'count' is of type int")],
)
def test_types_that_are_no_tensors_are_refused_at_load(
    serve: Serve, module: nn.Module, inputs: list[str], message: str
) -> None:
    with pytest.raises(TritonModelException, match=message):
        serve(module, inputs=inputs, outputs=["o__0"])


def test_data_type_that_torch_lacks_is_refused_at_load(serve: Serve) -> None:
    with pytest.raises(TritonModelException, match="'o__0' has data type TYPE_STRING"):
        serve(Lone(), inputs=["image"], outputs=["o__0"], output_type="TYPE_STRING")


def test_damaged_file_is_refused_with_its_models_name(serve: Serve, tmp_path: Path) -> None:
    with pytest.raises(TritonModelException, match="unable to load model 'small'"):
        serve(Lone(), inputs=["image"], outputs=["o__0"], default_model_filename="absent.pt")


def test_requests_share_one_pass_and_get_their_own_rows(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    model = serve(Halves(), inputs=["image"], outputs=["more__0", "twice__1"])
    both = {"more__0", "twice__1"}
    passes = []
    forward = model._forward

    def counted(batch: list[Tensor]) -> Any:
        passes.append(len(batch[0]))
        return forward(batch)

    monkeypatch.setattr(model, "_forward", counted)

    first, second = model.execute([Request({"image": rows(1, 2)}, both), Request({"image": rows(3)}, both)])

    assert passes == [3]
    assert first.outputs["more__0"].tolist() == [[2, 1], [3, 1]]
    assert first.outputs["twice__1"].tolist() == [[2, 0], [4, 0]]
    assert second.outputs["twice__1"].tolist() == [[6, 0]]


def test_each_request_gets_only_what_it_asked_for(serve: Serve) -> None:
    model = serve(Halves(), inputs=["image"], outputs=["twice__1", "more__0"])

    responses = model.execute([Request({"image": rows(1)}, {"more__0"}), Request({"image": rows(5)}, {"twice__1"})])

    assert [set(response.outputs) for response in responses] == [{"more__0"}, {"twice__1"}]
    assert responses[1].outputs["twice__1"].tolist() == [[10, 0]]


@pytest.mark.parametrize("inputs", [["second", "first"], ["x__1", "y__0"]])
def test_named_inputs_reach_their_arguments(serve: Serve, inputs: list[str]) -> None:
    model = serve(Difference(), inputs=inputs, outputs=["o__0"])

    (response,) = model.execute([Request({inputs[0]: rows(1), inputs[1]: rows(9)}, {"o__0"})])

    assert response.outputs["o__0"].tolist() == [[8, 0]]


def test_dictionary_is_keyed_by_the_configurations_names(serve: Serve) -> None:
    model = serve(Dictionary(), inputs=["b", "a"], outputs=["o"])

    (response,) = model.execute([Request({"a": rows(9), "b": rows(1)}, {"o"})])

    assert response.outputs["o"].tolist() == [[8, 0]]


def test_wrong_data_type_is_named_with_both_sides(serve: Serve) -> None:
    model = serve(Largest(), inputs=["image"], outputs=["digit__0"])

    (response,) = model.execute([Request({"image": rows(1)}, {"digit__0"})])

    assert "expects datatype TYPE_FP32 for output 'digit__0', model provides TYPE_INT64" in response.error.message()


def test_failing_pass_answers_every_request_and_the_next_one_works(serve: Serve) -> None:
    model = serve(Picky(), inputs=["image"], outputs=["o__0"])

    failed = model.execute([Request({"image": rows(200)}, {"o__0"}), Request({"image": rows(1)}, {"o__0"})])
    (good,) = model.execute([Request({"image": rows(1)}, {"o__0"})])

    assert [response.error.message() for response in failed] == [
        "PyTorch execute failure: builtins.ValueError: too bright"
    ] * 2
    assert good.outputs["o__0"].tolist() == [[1, 0]]


def test_result_without_a_row_for_each_image_is_an_error(serve: Serve) -> None:
    model = serve(Summed(), inputs=["image"], outputs=["o__0"])

    responses = model.execute([Request({"image": rows(1)}, {"o__0"}), Request({"image": rows(2)}, {"o__0"})])

    assert all("1 rows for a batch of 2" in response.error.message() for response in responses)


def test_model_without_batches_runs_each_request_alone(serve: Serve) -> None:
    model = serve(Summed(), inputs=["image"], outputs=["o__0"], max_batch_size=0)

    responses = model.execute([Request({"image": rows(1, 2)}, {"o__0"}), Request({"image": rows(5)}, {"o__0"})])

    assert [response.outputs["o__0"].tolist() for response in responses] == [[[3, 0]], [[5, 0]]]


def test_module_that_was_frozen_before_is_served(serve: Serve, tmp_path: Path) -> None:
    serve(Lone(), inputs=["image"], outputs=["o__0"])
    path = str(tmp_path / "1" / "model.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        frozen = torch.jit.freeze(torch.jit.load(path).eval())  # type: ignore[no-untyped-call]  # so in torch
    frozen.save(str(tmp_path / "1" / "frozen.pt"))

    model = serve(Lone(), inputs=["image"], outputs=["o__0"], default_model_filename="frozen.pt")

    (response,) = model.execute([Request({"image": rows(4)}, {"o__0"})])
    assert response.outputs["o__0"].tolist() == [[4, 0]]


def test_thread_count_of_the_configuration_holds(serve: Serve) -> None:
    before = torch.get_num_threads()
    try:
        serve(
            Lone(),
            inputs=["image"],
            outputs=["o__0"],
            parameters={"INTRA_OP_THREAD_COUNT": {"string_value": str(before + 1)}},
        )

        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("manifest.json", {"files": {"model.pt": {"sha256": "00"}}}),
        ("manifest.json", {"files": {}}),
        ("card.json", {"digest": "sha256:00"}),
    ],
    ids=["manifest", "manifest without it", "card"],
)
def test_weights_other_than_published_are_refused(
    backend: Any, tmp_path: Path, file: str, content: dict[str, Any]
) -> None:
    (tmp_path / "model.pt").write_bytes(b"weights")
    backend.require_published(str(tmp_path / "model.pt"))
    (tmp_path / file).write_text(json.dumps(content))

    with pytest.raises(backend.DamageError, match=r"not what was published|is damaged"):
        backend.require_published(str(tmp_path / "model.pt"))

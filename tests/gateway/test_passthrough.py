import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from gateway import passthrough
from gateway.admission import Admission
from tests.gateway.echo import EchoTriton
from tests.gateway.passing import MAX_ANSWER_BYTES, Passing, Readiness, passing_through

CODE = grpc.StatusCode
MOST = 150


@pytest.fixture
async def triton() -> AsyncIterator[EchoTriton]:
    async with EchoTriton() as server:
        yield server


@pytest.fixture
def admission() -> Admission:
    return Admission(MOST, 1 << 20)


@pytest.fixture
def readiness() -> Readiness:
    return Readiness()


@pytest.fixture
async def passing(triton: EchoTriton, admission: Admission, readiness: Readiness) -> AsyncIterator[Passing]:
    async with passing_through(triton.address, admission, readiness) as server:
        yield server


@pytest.fixture
async def stub(passing: Passing) -> AsyncIterator[Any]:
    """Of Triton's protocol at the gateway."""
    async with grpc.aio.insecure_channel(passing.address) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def asking(shape: tuple[int, ...] = (1, 3), **fields: Any) -> Any:
    """Return a request to ``echo`` with one float32 tensor of that shape."""
    request = service_pb2.ModelInferRequest(**{"model_name": "echo", "id": "seven", **fields})
    request.inputs.add(name="any", datatype="FP32", shape=shape)
    request.raw_input_contents.append(np.arange(abs(np.prod(shape)), dtype=np.float32).tobytes())
    return request


async def refusal(call: Any) -> Any:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await call
    return failed.value


async def in_flight(admission: Admission, num_images: int) -> None:
    """Wait until so many are in flight."""
    async with asyncio.timeout(30):
        while admission.num_images != num_images:  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(0.01)


async def idle(admission: Admission) -> None:
    """Wait until nothing is in flight: a place is given back a moment after the answer to it."""
    await in_flight(admission, 0)


class TestVersion:
    """Of a request that names none."""

    async def test_routed_version_is_asked(self, stub: Any, triton: EchoTriton, readiness: Readiness) -> None:
        triton.models["echo"] = [1, 2, 3]
        readiness.routed = {"echo": [2]}
        await stub.ModelInfer(asking())
        await stub.ModelInfer(asking(model_version="3"))

        assert [request.model_version for request in triton.requests] == ["2", "3"]

    @pytest.mark.parametrize("is_streamed", [False, True])
    async def test_next_best_answers_when_it_has_just_gone(
        self, stub: Any, triton: EchoTriton, readiness: Readiness, admission: Admission, is_streamed: bool
    ) -> None:
        readiness.routed = {"echo": [3, 2, 1]}
        if is_streamed:
            (answer,) = [one async for one in stub.ModelStreamInfer(iter([asking()]))]
            assert answer.error_message == ""
        else:
            await stub.ModelInfer(asking())

        assert [request.model_version for request in triton.requests] == ["3", "2", "1"]
        await idle(admission)

    async def test_version_that_the_caller_named_is_not_found_when_it_has_gone(
        self, stub: Any, triton: EchoTriton, readiness: Readiness
    ) -> None:
        readiness.routed = {"echo": [1]}
        refused = await refusal(stub.ModelInfer(asking(model_version="3")))

        assert refused.code() is grpc.StatusCode.NOT_FOUND
        assert len(triton.requests) == 1


class TestInfer:
    async def test_request_and_answer_pass_unchanged(self, stub: Any, triton: EchoTriton) -> None:
        request = asking((2, 3), model_version="1")
        request.parameters["timeout"].int64_param = 5_000_000
        request.parameters["sequence_id"].string_param = "é"
        request.inputs.add(name="words", datatype="BYTES", shape=[2, 1]).contents.bytes_contents.extend([b"a", b"\xff"])

        answer = await stub.ModelInfer(request)

        assert triton.requests == [request]
        assert (answer.model_name, answer.id) == ("echo", "seven")
        assert answer.raw_output_contents == request.raw_input_contents
        assert [list(output.shape) for output in answer.outputs] == [[2, 3], [2, 1]]

    async def test_batch_above_the_models_is_refused_before_triton(self, stub: Any, triton: EchoTriton) -> None:
        error = await refusal(stub.ModelInfer(asking((65, 3))))

        assert (error.code(), error.details()) == (
            CODE.INVALID_ARGUMENT,
            "[request id: seven] inference request batch-size must be <= 64 for 'echo'",
        )
        assert triton.requests == []

    async def test_batch_is_taken_once_the_model_was_loaded_for_it(self, stub: Any, triton: EchoTriton) -> None:
        await stub.ModelInfer(asking((64, 3)))
        triton.max_batch_size = 65
        await stub.ModelInfer(asking((65, 3)))

        assert triton.methods == ["ModelConfig"] * 2

    async def test_model_is_asked_for_once_for_many_calls(self, stub: Any, triton: EchoTriton) -> None:
        await asyncio.gather(*(stub.ModelInfer(asking()) for _ in range(20)))

        assert triton.methods == ["ModelConfig"]

    async def test_config_is_asked_for_again_when_old(
        self, stub: Any, triton: EchoTriton, admission: Admission, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await stub.ModelInfer(asking((5, 3)))
        monkeypatch.setattr(passthrough, "_FRESH_SECONDS", -1.0)
        triton.max_batch_size = 0
        async with asyncio.timeout(30):
            while admission.num_admitted % 5 == 0:
                await stub.ModelInfer(asking((5, 3)))

        assert len(triton.methods) > 1

    @pytest.mark.parametrize(("max_batch_size", "shape", "expected"), [(64, (5, 3), 5), (0, (5, 3), 1), (64, (), 1)])
    async def test_admission_counts_the_batch(
        self, stub: Any, triton: EchoTriton, admission: Admission, max_batch_size: int, shape: Any, expected: int
    ) -> None:
        triton.max_batch_size = max_batch_size
        await stub.ModelInfer(asking(shape))

        assert admission.num_admitted == expected

    async def test_calls_beyond_the_limit_are_refused_with_pushback(
        self, stub: Any, triton: EchoTriton, admission: Admission
    ) -> None:
        triton.gate.clear()
        calls = [stub.ModelInfer(asking((50, 3))) for _ in range(2)]
        await triton.arrivals(2)
        assert admission.num_bytes >= 2 * 50 * 3 * 4
        errors = [await refusal(stub.ModelInfer(asking((64, 3)))) for _ in range(2)]
        triton.gate.set()
        await asyncio.gather(*calls)

        assert {error.code() for error in errors} == {CODE.RESOURCE_EXHAUSTED}
        assert all(int(dict(error.trailing_metadata())["grpc-retry-pushback-ms"]) > 0 for error in errors)
        await idle(admission)

    async def test_batch_that_can_never_be_admitted_is_not_told_to_try_again(
        self, stub: Any, triton: EchoTriton
    ) -> None:
        triton.max_batch_size = 1000
        error = await refusal(stub.ModelInfer(asking((MOST + 1, 3))))

        assert error.code() is CODE.INVALID_ARGUMENT
        assert error.details() == "inputs[0].shape: a batch of 151; the gateway takes at most 150"

    @pytest.mark.parametrize("field", ["inputs", "outputs"])
    async def test_shared_memory_is_refused(self, stub: Any, triton: EchoTriton, field: str) -> None:
        request = asking()
        request.outputs.add(name="any")
        getattr(request, field)[0].parameters["shared_memory_region"].string_param = "triton_python_backend"
        error = await refusal(stub.ModelInfer(request))

        assert error.code() is CODE.INVALID_ARGUMENT
        assert error.details().startswith(f"{field}[0].parameters: shared_memory: ")
        assert triton.requests == []

    @pytest.mark.parametrize("leave", ["deadline", "cancel"])
    async def test_caller_that_leaves_is_not_felt_by_triton(
        self, stub: Any, passing: Passing, triton: EchoTriton, admission: Admission, leave: str
    ) -> None:
        await stub.ModelInfer(asking())
        triton.gate.clear()
        call = stub.ModelInfer(asking((7, 3)), timeout=1 if leave == "deadline" else 60)
        await triton.arrivals(2)
        if leave == "cancel":
            call.cancel()
        with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)):
            await call
        await passing.guard.wait_idle()

        assert (triton.num_cancelled, admission.num_images) == (0, 7)
        triton.gate.set()
        await idle(admission)
        assert triton.num_cancelled == 0

    async def test_model_that_is_known_not_to_answer_is_refused_at_once(
        self, stub: Any, triton: EchoTriton, readiness: Readiness
    ) -> None:
        readiness.models["echo"] = False
        error = await refusal(stub.ModelInfer(asking()))

        assert (error.code(), error.details()) == (CODE.UNAVAILABLE, "echo does not answer now; try again")
        assert triton.requests == []

    async def test_wait_is_bounded_for_a_caller_without_a_deadline(
        self, triton: EchoTriton, admission: Admission, readiness: Readiness
    ) -> None:
        triton.gate.clear()
        async with (
            passing_through(triton.address, admission, readiness, timeout_seconds=0.1) as passing,
            grpc.aio.insecure_channel(passing.address) as channel,
        ):
            error = await refusal(service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(asking()))

        assert (error.code(), error.details()) == (CODE.DEADLINE_EXCEEDED, "no answer from the model in time")

    @pytest.mark.parametrize(
        ("fields", "code", "words"),
        [
            ({"model_name": ""}, CODE.NOT_FOUND, "Request for unknown model: '' is not found"),
            ({"model_name": "none"}, CODE.NOT_FOUND, "Request for unknown model: 'none' is not found"),
            ({"model_name": "x" * 20_000}, CODE.INVALID_ARGUMENT, "refused, in words too long to pass on"),
            ({"model_name": "/etc/x"}, CODE.NOT_FOUND, "no such model or version is ready"),
            ({"model_version": "7"}, CODE.NOT_FOUND, "'echo' version 7 is not at ready state"),
        ],
        ids=["empty", "unknown", "long", "path", "version"],
    )
    async def test_unknown_model_is_told_in_tritons_words(self, stub: Any, fields: Any, code: Any, words: str) -> None:
        error = await refusal(stub.ModelInfer(asking(**fields)))

        assert error.code() is code
        assert words in error.details()

    @pytest.mark.parametrize(
        ("failure", "code", "words", "is_failure"),
        [
            ((CODE.INVALID_ARGUMENT, "unexpected shape for input 'x/y'"), CODE.INVALID_ARGUMENT, "for input 'x/y'", 0),
            ((CODE.UNIMPLEMENTED, "decoupled"), CODE.UNIMPLEMENTED, "decoupled", 0),
            ((CODE.INVALID_ARGUMENT, "é" * 1200), CODE.INVALID_ARGUMENT, "é" * 1000, 0),
            ((CODE.INVALID_ARGUMENT, "bad\n\nAt:\n  /m/model.py(3)"), CODE.INVALID_ARGUMENT, "does not take", 0),
            ((CODE.INTERNAL, "secret"), CODE.INTERNAL, "failed to run the model", 1),
            ((CODE.UNKNOWN, "secret"), CODE.INTERNAL, "failed to run the model", 1),
            ((CODE.UNAVAILABLE, "secret"), CODE.UNAVAILABLE, "cannot be reached", 1),
            ((CODE.UNAVAILABLE, "Exceeds maximum queue size"), CODE.RESOURCE_EXHAUSTED, "queue is full", 0),
            ((CODE.UNAVAILABLE, "Request timeout expired"), CODE.RESOURCE_EXHAUSTED, "is over", 0),
        ],
    )
    async def test_tritons_error_reaches_the_caller_without_its_insides(
        self, stub: Any, triton: EchoTriton, readiness: Readiness, failure: Any, code: Any, words: str, is_failure: int
    ) -> None:
        triton.failure = failure
        error = await refusal(stub.ModelInfer(asking()))

        assert error.code() is code
        assert words in error.details()
        assert len(error.details().encode()) <= 2000
        assert "secret" not in error.details()
        assert "model.py" not in error.details()
        assert readiness.num_failures == is_failure
        assert ("grpc-retry-pushback-ms" in dict(error.trailing_metadata())) == (code is CODE.RESOURCE_EXHAUSTED)

    async def test_answer_larger_than_the_channel_takes_is_told(self, stub: Any) -> None:
        error = await refusal(stub.ModelInfer(asking((1, MAX_ANSWER_BYTES // 4))))

        assert error.code() is CODE.RESOURCE_EXHAUSTED
        assert "ask for less at once" in error.details()

    async def test_triton_that_is_gone_is_unavailable_and_found_again(self, stub: Any, triton: EchoTriton) -> None:
        await stub.ModelInfer(asking())
        await triton.stop()
        error = await refusal(stub.ModelInfer(asking()))
        await triton.start()

        assert (error.code(), error.details()) == (
            CODE.UNAVAILABLE,
            "the inference server cannot be reached; try again",
        )
        async with asyncio.timeout(60):
            while (code := await stub.ModelInfer(asking()).code()) is CODE.UNAVAILABLE:
                pass  # each turn is a request
        assert code is CODE.OK


class TestTurns:
    """Of inferences beyond those that a model has at Triton."""

    @pytest.fixture(autouse=True)
    def one_by_one(self, triton: EchoTriton) -> None:
        """Have a model that does not gather requests."""
        triton.gathers = False

    async def test_flood_waits_here_and_not_at_triton(
        self, stub: Any, triton: EchoTriton, admission: Admission
    ) -> None:
        triton.gate.clear()
        calls = [asyncio.ensure_future(stub.ModelInfer(asking())) for _ in range(50)]
        await triton.arrivals(passthrough._PER_INSTANCE)
        await in_flight(admission, 50)
        assert len(triton.requests) == passthrough._PER_INSTANCE
        triton.gate.set()
        await asyncio.gather(*calls)

        assert len(triton.requests) == 50
        await idle(admission)

    @pytest.mark.parametrize("is_streamed", [False, True])
    async def test_caller_that_leaves_before_its_turn_never_comes_to_triton(
        self, stub: Any, passing: Passing, triton: EchoTriton, admission: Admission, is_streamed: bool
    ) -> None:
        triton.gate.clear()
        calls = [asyncio.ensure_future(stub.ModelInfer(asking())) for _ in range(passthrough._PER_INSTANCE)]
        await triton.arrivals(passthrough._PER_INSTANCE)
        call = stub.ModelStreamInfer(iter([asking()] * 3)) if is_streamed else stub.ModelInfer(asking())
        await in_flight(admission, passthrough._PER_INSTANCE + (3 if is_streamed else 1))
        call.cancel()
        await in_flight(admission, passthrough._PER_INSTANCE)
        triton.gate.set()
        await asyncio.gather(*calls)

        assert len(triton.requests) == passthrough._PER_INSTANCE

    async def test_call_that_cannot_be_answered_in_time_is_refused(
        self, stub: Any, triton: EchoTriton, admission: Admission
    ) -> None:
        triton.gate.clear()
        slow = asyncio.ensure_future(stub.ModelInfer(asking()))
        await triton.arrivals(1)
        await asyncio.sleep(0.5)  # is how long an inference takes
        triton.gate.set()
        await slow
        triton.gate.clear()
        calls = [asyncio.ensure_future(stub.ModelInfer(asking())) for _ in range(140)]
        await in_flight(admission, 140)
        # Behind 35 rounds of half a second.
        error = await refusal(stub.ModelInfer(asking(), timeout=10))
        triton.gate.set()
        await asyncio.gather(*calls)

        assert error.code() is CODE.RESOURCE_EXHAUSTED
        assert "the deadline is in" in error.details()
        assert len(triton.requests) == 141

    async def test_call_whose_time_is_over_in_its_turn_is_dropped(
        self, triton: EchoTriton, admission: Admission, readiness: Readiness
    ) -> None:
        triton.gate.clear()
        async with (
            passing_through(triton.address, admission, readiness, timeout_seconds=0.5) as passing,
            grpc.aio.insecure_channel(passing.address) as channel,
        ):
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            calls = [stub.ModelInfer(asking()) for _ in range(passthrough._PER_INSTANCE)]
            await triton.arrivals(passthrough._PER_INSTANCE)
            error = await refusal(stub.ModelInfer(asking()))
            codes = [await call.code() for call in calls]

        assert {error.code(), *codes} == {CODE.DEADLINE_EXCEEDED}
        # What is at Triton keeps its place, what was not there has none.
        assert admission.num_images == passthrough._PER_INSTANCE


class TestStream:
    async def test_answers_come_in_order_and_one_failure_ends_no_other(self, stub: Any) -> None:
        requests = [asking(id="a"), asking(model_name="none", id="b"), asking((65, 3), id="c"), asking((2, 3), id="d")]
        answers = [answer async for answer in stub.ModelStreamInfer(iter(requests))]

        assert [answer.infer_response.id for answer in answers] == ["a", "b", "c", "d"]
        assert [answer.error_message for answer in answers] == [
            "",
            "Request for unknown model: 'none' is not found",
            "[request id: c] inference request batch-size must be <= 64 for 'echo'",
            "",
        ]
        assert answers[3].infer_response.raw_output_contents == requests[3].raw_input_contents
        assert answers[3].infer_response.parameters["triton_final_response"].bool_param

    async def test_answer_comes_while_the_stream_stays_open(self, stub: Any) -> None:
        call = stub.ModelStreamInfer()
        await call.write(asking(id="first"))
        answer = await call.read()
        await call.done_writing()

        assert answer.infer_response.id == "first"
        assert await call.read() is grpc.aio.EOF

    async def test_reading_ahead_is_bounded(self, stub: Any, triton: EchoTriton, admission: Admission) -> None:
        triton.gate.clear()
        call = stub.ModelStreamInfer(asking(id=str(index)) for index in range(30))
        await triton.arrivals(passthrough._READ_AHEAD)
        assert admission.num_images == passthrough._READ_AHEAD
        triton.gate.set()

        assert [answer.infer_response.id async for answer in call] == [str(index) for index in range(30)]
        assert len(triton.requests) == 30

    async def test_caller_that_leaves_a_stream_is_not_felt_by_triton(
        self, stub: Any, passing: Passing, triton: EchoTriton, admission: Admission
    ) -> None:
        triton.gate.clear()
        call = stub.ModelStreamInfer(asking() for _ in range(30))
        await triton.arrivals(passthrough._READ_AHEAD)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call.read()
        await passing.guard.wait_idle()

        assert admission.num_images == passthrough._READ_AHEAD
        assert not [task for task in asyncio.all_tasks() if "ModelStreamInfer" in str(task.get_coro())]
        triton.gate.set()
        await idle(admission)
        assert triton.num_cancelled == 0

    async def test_bytes_that_are_no_request_end_the_stream_after_what_came_before(self, passing: Passing) -> None:
        messages = [asking(id="good").SerializeToString(), b"\xff"]
        async with grpc.aio.insecure_channel(passing.address) as channel:
            call: Any = channel.stream_stream(
                f"/{passthrough.SERVICE}/ModelStreamInfer",
                response_deserializer=service_pb2.ModelStreamInferResponse.FromString,
            )(iter(messages))
            first = await call.read()
            error = await refusal(call.read())

        assert first.infer_response.id == "good"
        assert error.code() is CODE.INVALID_ARGUMENT


class TestControl:
    async def test_gateway_is_live_without_triton(self, stub: Any, triton: EchoTriton) -> None:
        await triton.stop()

        assert (await stub.ServerLive(service_pb2.ServerLiveRequest())).live
        assert not (await stub.ModelReady(service_pb2.ModelReadyRequest(name="echo"))).ready

    async def test_readiness_is_what_was_proven(self, stub: Any, triton: EchoTriton, readiness: Readiness) -> None:
        mnist = service_pb2.ModelReadyRequest(name="mnist", version="1")
        server = service_pb2.ServerReadyRequest()
        assert (await stub.ModelReady(mnist)).ready
        assert (await stub.ServerReady(server)).ready
        readiness.models["mnist"] = False

        assert not (await stub.ModelReady(mnist)).ready
        assert not (await stub.ServerReady(server)).ready

    @pytest.mark.parametrize(("name", "is_ready"), [("echo", True), ("none", False)])
    async def test_triton_is_asked_of_models_that_are_not_proven(self, stub: Any, name: str, is_ready: bool) -> None:
        assert (await stub.ModelReady(service_pb2.ModelReadyRequest(name=name, version="x"))).ready is is_ready

    async def test_metadata_offers_what_is_not_refused(self, stub: Any) -> None:
        metadata = await stub.ServerMetadata(service_pb2.ServerMetadataRequest())

        assert (metadata.name, metadata.version) == ("triton", "2.51.0")
        assert list(metadata.extensions) == ["classification", "model_repository", "statistics"]

    async def test_questions_about_a_model_are_passed_on(self, stub: Any) -> None:
        metadata = await stub.ModelMetadata(service_pb2.ModelMetadataRequest(name="mnist"))
        config = await stub.ModelConfig(service_pb2.ModelConfigRequest(name="mnist"))
        statistics = await stub.ModelStatistics(service_pb2.ModelStatisticsRequest(name="mnist"))
        error = await refusal(stub.ModelConfig(service_pb2.ModelConfigRequest(name="none")))

        assert list(metadata.inputs[0].shape) == [-1, 1, 28, 28]
        assert config.config.max_batch_size == 64
        assert statistics.model_stats[0].inference_count == 0
        assert (error.code(), error.details()) == (CODE.NOT_FOUND, "Request for unknown model: 'none' is not found")

    @pytest.mark.parametrize(
        ("reason", "shown"),
        [("unloaded", "unloaded"), ("bad\n\nAt:\n  /srv/model.py(3)", "it does not load; Triton's log says why")],
    )
    async def test_index_shows_no_insides(self, stub: Any, triton: EchoTriton, reason: str, shown: str) -> None:
        triton.reason = reason
        index = await stub.RepositoryIndex(service_pb2.RepositoryIndexRequest())

        assert {model.name: model.reason for model in index.models} == {"mnist": "", "echo": "", "broken": shown}

    @pytest.mark.parametrize(
        ("method", "remedy"),
        [
            ("RepositoryModelLoad", "sluice publish"),
            ("RepositoryModelUnload", "sluice publish"),
            ("SystemSharedMemoryStatus", "raw_input_contents"),
            ("SystemSharedMemoryRegister", "raw_input_contents"),
            ("SystemSharedMemoryUnregister", "raw_input_contents"),
            ("CudaSharedMemoryStatus", "raw_input_contents"),
            ("CudaSharedMemoryRegister", "raw_input_contents"),
            ("CudaSharedMemoryUnregister", "raw_input_contents"),
            ("TraceSetting", "where Triton is started"),
            ("LogSettings", "where Triton is started"),
        ],
    )
    async def test_management_is_refused(self, stub: Any, method: str, remedy: str) -> None:
        error = await refusal(getattr(stub, method)(getattr(service_pb2, f"{method}Request")()))

        assert error.code() is CODE.PERMISSION_DENIED
        assert remedy in error.details()

    def test_no_method_is_left_to_the_generated_base(self) -> None:
        left = [method.name for method in passthrough.DESCRIPTOR.methods if method.name not in vars(
            passthrough.PassthroughServicer
        )]  # fmt: skip

        assert left == []


@pytest.mark.parametrize(
    "words",
    [
        "see /opt/model.py",
        "./m/1/model.pt",
        "at 0x7f00aa00",
        "in dense.cc:12",
        "Traceback",
        "a\nb",
        "s3://x",
        "1.2.3.4:8",
    ],
)
def test_words_that_tell_of_insides_are_not_shown(words: str) -> None:
    assert passthrough._shown(words) is None


@pytest.mark.parametrize(
    "words",
    [
        "failed to get model version from specified version string 'abc' (details: stol), version should be an "
        "integral value > 0",
        "[request id: <id_unknown>] unexpected shape for input 'conv/image:0' for model 'm'. Expected [-1,1,28,28], "
        "got [1,1,27,28]. See the model configuration docs for more info on max_batch_size.",
        "ModelInfer RPC doesn't support models with decoupled transaction policy",
    ],
)
def test_words_about_a_request_are_shown(words: str) -> None:
    assert passthrough._shown(words) == words

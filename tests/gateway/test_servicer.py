import asyncio
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from numpy.typing import NDArray
from PIL import Image

from gateway.server import GatewayServer
from gateway.settings import GatewaySettings
from protos.gateway.v1 import image_service_pb2 as pb
from protos.gateway.v1 import image_service_pb2_grpc
from rpc.budget import parse
from tests.gateway.fake_triton import FakeTriton, confident, label_of, normalised
from tests.scraping import becomes, value

INVALID = grpc.StatusCode.INVALID_ARGUMENT


def png(pixels: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def picture(pixels: NDArray[np.uint8], **fields: Any) -> pb.Image:
    return pb.Image(encoded=png(pixels), **fields)


async def refusal(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await call
    return failed.value.code(), failed.value.details() or ""


async def test_classify_answers_with_the_best_classes(stub: Any, triton: FakeTriton, digit: NDArray[np.uint8]) -> None:
    triton.answer = lambda images: np.array([[0, 0.1, 0, 0.2, 0, 0, 0, 0.6, 0.1, 0]], np.float32)
    response = await stub.Classify(pb.ClassifyRequest(image=picture(digit), top_k=4))

    assert [one.label for one in response.top] == [7, 3, 1, 8]
    assert [one.name for one in response.top] == ["7", "3", "1", "8"]
    assert response.top[0] == response.prediction
    assert response.prediction.probability == pytest.approx(0.6)
    assert (response.model, response.model_version) == ("mnist", 1)
    assert np.array_equal(triton.received[-1][0], digit)


async def test_classify_lists_one_class_unless_asked_for_more(stub: Any, digit: NDArray[np.uint8]) -> None:
    response = await stub.Classify(pb.ClassifyRequest(image=picture(digit)))

    assert [one.label for one in response.top] == [label_of(digit)]


# Bad input: each its status and a message that names the field; the next good request succeeds.

TRUNCATED = png(np.eye(28, dtype=np.uint8) * 255)[:-20]


@pytest.mark.parametrize(
    ("request_", "code", "message"),
    [
        (pb.ClassifyRequest(), INVALID, "image: missing; give encoded or raw"),
        (
            pb.ClassifyRequest(image=pb.Image(polarity=pb.POLARITY_LIGHT_ON_DARK)),
            INVALID,
            "image: missing; give encoded or raw",
        ),
        (
            pb.ClassifyRequest(image=pb.Image(encoded=b"")),
            INVALID,
            "image.encoded: empty; accepted are PNG, JPEG, BMP, GIF, WebP, TIFF, PGM",
        ),
        (
            pb.ClassifyRequest(image=pb.Image(encoded=np.random.default_rng(0).bytes(500))),
            INVALID,
            "image.encoded: not a readable image: unknown format or damaged header; accepted are PNG, JPEG",
        ),
        (
            pb.ClassifyRequest(image=pb.Image(encoded=np.random.default_rng(0).bytes(200_000))),
            INVALID,
            "image.encoded: not a readable image: unknown format or damaged header; accepted are PNG, JPEG",
        ),
        (
            pb.ClassifyRequest(image=pb.Image(encoded=TRUNCATED)),
            INVALID,
            "image.encoded: not a readable image: image file is truncated",
        ),
        (
            pb.ClassifyRequest(image=pb.Image(raw=pb.RawImage(height=28, width=28, pixels=bytes(783)))),
            INVALID,
            "image.raw.pixels: 783 bytes; 28x28 with 1 channel takes 784",
        ),
        (
            pb.ClassifyRequest(image=pb.Image(encoded=b"x", polarity=7)),  # type: ignore[arg-type]  # no such member
            INVALID,
            "image.polarity: 7; allowed are 0 (POLARITY_UNSPECIFIED), 1 (POLARITY_LIGHT_ON_DARK), 2",
        ),
        (
            pb.ClassifyRequest(image=pb.Image(encoded=b"x", framing=9)),  # type: ignore[arg-type]  # no such member
            INVALID,
            "image.framing: 9; allowed are 0 (FRAMING_UNSPECIFIED), 1 (FRAMING_CENTER), 2",
        ),
        (
            pb.ClassifyRequest(image=picture(np.eye(28, dtype=np.uint8)), top_k=11),
            INVALID,
            "top_k: 11; mnist has 10 classes, allowed are 0..10",
        ),
        (
            pb.ClassifyRequest(image=picture(np.eye(28, dtype=np.uint8)), model_version=-1),
            grpc.StatusCode.NOT_FOUND,
            "model_version: mnist has no version -1; served are 1",
        ),
        (
            pb.ClassifyRequest(image=picture(np.eye(28, dtype=np.uint8)), model="resnet"),
            grpc.StatusCode.NOT_FOUND,
            "model: no model 'resnet'; loaded are mnist",
        ),
        (
            pb.ClassifyRequest(image=picture(np.eye(28, dtype=np.uint8)), model_version=9),
            grpc.StatusCode.NOT_FOUND,
            "model_version: mnist has no version 9; served are 1",
        ),
    ],
)
async def test_bad_request_names_its_field_and_the_next_succeeds(
    stub: Any, digit: NDArray[np.uint8], request_: pb.ClassifyRequest, code: grpc.StatusCode, message: str
) -> None:
    refused_code, details = await refusal(stub.Classify(request_))
    assert refused_code is code
    assert details.startswith(message)

    good = await stub.Classify(pb.ClassifyRequest(image=picture(digit)))
    assert good.prediction.label == label_of(digit)


async def test_png_cut_anywhere_never_gets_an_answer(stub: Any, digit: NDArray[np.uint8]) -> None:
    data = png(digit)
    cuts = range(1, len(data), 7)
    calls = [stub.Classify(pb.ClassifyRequest(image=pb.Image(encoded=data[:cut]))) for cut in cuts]

    assert {(await refusal(call))[0] for call in calls} == {INVALID}


@pytest.mark.parametrize(
    ("num_images", "message"),
    [(0, "images: 0 images; allowed are 1..1024"), (1025, "images: 1025 images; allowed are 1..1024")],
)
async def test_batch_of_a_size_not_allowed(stub: Any, digit: NDArray[np.uint8], num_images: int, message: str) -> None:
    request = pb.ClassifyBatchRequest(images=[picture(digit)] * num_images)
    assert await refusal(stub.ClassifyBatch(request)) == (INVALID, message)

    good = await stub.ClassifyBatch(pb.ClassifyBatchRequest(images=[picture(digit)]))
    assert good.results[0].prediction.label == label_of(digit)


@pytest.mark.parametrize(
    ("fields", "code", "message"),
    [
        ({"top_k": 11}, INVALID, "top_k: 11;"),
        ({"model_version": -3}, grpc.StatusCode.NOT_FOUND, "model_version: mnist has no version -3"),
        ({"model": "x" * 10_000}, grpc.StatusCode.NOT_FOUND, "model: no model 'xxx"),
        ({"model_version": 4}, grpc.StatusCode.NOT_FOUND, "model_version: mnist has no version 4"),
    ],
)
async def test_bad_batch_names_its_field(
    stub: Any, digit: NDArray[np.uint8], fields: dict[str, Any], code: grpc.StatusCode, message: str
) -> None:
    refused_code, details = await refusal(
        stub.ClassifyBatch(pb.ClassifyBatchRequest(images=[picture(digit)], **fields))
    )
    assert refused_code is code
    assert details.startswith(message)
    assert len(details) < 200


async def test_unreadable_image_fails_alone_in_its_batch(stub: Any, triton: FakeTriton) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (100, 28, 28), np.uint8)
    images = [picture(one, polarity=pb.POLARITY_LIGHT_ON_DARK) for one in pixels]
    bad = {0: pb.Image(), 40: pb.Image(encoded=b"no"), 99: pb.Image(raw=pb.RawImage(height=1, width=0))}
    for index, image in bad.items():
        images[index] = image
    response = await stub.ClassifyBatch(pb.ClassifyBatchRequest(images=images, top_k=2))

    assert len(response.results) == 100
    for index, result in enumerate(response.results):
        if index in bad:
            assert result.code == INVALID.value[0]
            assert result.error.startswith(f"images[{index}]")
            assert not result.HasField("prediction")
        else:
            assert (result.code, result.error) == (0, "")
            assert result.prediction.label == label_of(pixels[index])
            assert len(result.top) == 2
    assert response.results[99].error == "images[99].raw.width: 0; allowed are 1..4096"


async def test_batch_of_unreadable_images_asks_nothing_of_triton(stub: Any, triton: FakeTriton) -> None:
    def count() -> int:
        return sum(image.any() for images in triton.received for image in images)

    response = await stub.ClassifyBatch(pb.ClassifyBatchRequest(images=[pb.Image(encoded=b"no")] * 3))

    assert [result.code for result in response.results] == [3, 3, 3]
    assert count() == 0


async def test_large_image_is_decoded_beside_the_loop(stub: Any, digit: NDArray[np.uint8]) -> None:
    big = np.kron(digit, np.ones((40, 40), np.uint8))
    noisy = np.random.default_rng(0).integers(0, 3, big.shape, np.uint8) + (big // 2)
    for pixels in (big, noisy):
        response = await stub.Classify(pb.ClassifyRequest(image=picture(pixels)))
        assert response.model == "mnist"


async def test_card_decides_what_a_request_leaves_open(
    stub: Any, triton: FakeTriton, tmp_path: Path, digit: NDArray[np.uint8]
) -> None:
    folder = tmp_path / "mnist" / "2"
    folder.mkdir(parents=True)
    names = [f"class {index}" for index in range(10)]
    (folder / "card.json").write_text(json.dumps({"polarity": "dark_on_light", "class_names": names}))
    triton.models["mnist"].append(2)
    response = await stub.Classify(pb.ClassifyRequest(image=picture(digit), model_version=2))
    assert response.prediction.name == f"class {label_of(255 - digit)}"

    as_asked = picture(digit, polarity=pb.POLARITY_LIGHT_ON_DARK)
    response = await stub.Classify(pb.ClassifyRequest(image=as_asked, model_version=2))
    assert response.prediction.name == f"class {label_of(digit)}"


async def test_list_models_tells_what_is_ready_now(stub: Any, triton: FakeTriton) -> None:
    triton.models = {"mnist": [1, 3, 2], "other": [5]}
    first, second = (await stub.ListModels(pb.ListModelsRequest())).models

    assert (first.name, list(first.versions), first.default_version, first.is_default) == ("mnist", [3, 2, 1], 3, True)
    assert list(first.class_names) == list("0123456789")
    assert (second.name, second.is_default) == ("other", False)


# Embed and Compare

METHODS = [
    pb.SIMILARITY_METHOD_EMBEDDING_COSINE,
    pb.SIMILARITY_METHOD_PIXEL_COSINE,
    pb.SIMILARITY_METHOD_SSIM,
]


async def test_embed_answers_with_the_models_vector(stub: Any, triton: FakeTriton, digit: NDArray[np.uint8]) -> None:
    response = await stub.Embed(pb.EmbedRequest(image=picture(digit)))

    np.testing.assert_array_equal(response.vector, normalised(digit[np.newaxis])[0])
    assert (response.model, response.model_version) == ("mnist", 1)
    assert [output.name for output in triton.requests[-1].outputs] == ["embedding__1"]


async def test_both_images_of_a_comparison_leave_in_one_request(
    stub: Any, triton: FakeTriton, digit: NDArray[np.uint8]
) -> None:
    turned = np.ascontiguousarray(digit.T)
    response = await stub.Compare(pb.CompareRequest(first=picture(digit), second=picture(turned)))

    (images,) = [images for images in triton.received if len(images) == 2]
    np.testing.assert_array_equal(images, [digit, turned])
    first, second = normalised(np.stack((digit, turned)))
    assert response.score == pytest.approx(first @ second, abs=1e-6)
    assert response.method == pb.SIMILARITY_METHOD_EMBEDDING_COSINE
    assert not response.HasField("same_class_probability")
    assert (response.model, response.model_version) == ("mnist", 1)


@pytest.mark.parametrize("method", METHODS, ids=pb.SimilarityMethod.Name)
async def test_equal_images_score_one_and_order_does_not_matter(
    stub: Any, digit: NDArray[np.uint8], method: pb.SimilarityMethod.ValueType
) -> None:
    async def score(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> float:
        request = pb.CompareRequest(first=picture(first), second=picture(second), method=method)
        response = await stub.Compare(request)
        assert response.method == method
        return float(response.score)

    turned = np.ascontiguousarray(digit.T)
    assert await score(digit, digit) == 1.0
    assert await score(digit, turned) == pytest.approx(await score(turned, digit), abs=1e-6)
    assert await score(digit, turned) < 0.999


async def test_comparing_pixels_asks_no_model(stub: Any, triton: FakeTriton, digit: NDArray[np.uint8]) -> None:
    triton.failure = grpc.StatusCode.INTERNAL, "the model is broken"
    for method in METHODS[1:]:
        request = pb.CompareRequest(first=picture(digit), second=picture(digit), method=method)
        assert (await stub.Compare(request)).score == 1.0


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"first": None}, "first: missing; give encoded or raw"),
        ({"second": None}, "second: missing; give encoded or raw"),
        ({"second": pb.Image()}, "second: missing; give encoded or raw"),
        ({"second": pb.Image(encoded=b"hello")}, "second.encoded: not a readable image"),
        ({"second": pb.Image(raw=pb.RawImage(height=2, width=2, pixels=b"123"))}, "second.raw.pixels: 3 bytes"),
        ({"first": pb.Image(encoded=TRUNCATED)}, "first.encoded: "),
        ({"method": 9}, "method: 9; allowed are 0 (SIMILARITY_METHOD_UNSPECIFIED)"),
    ],
)
async def test_bad_comparison_names_the_field_and_the_next_one_succeeds(
    stub: Any, digit: NDArray[np.uint8], change: dict[str, Any], told: str
) -> None:
    good: dict[str, Any] = {"first": picture(digit), "second": picture(digit)}
    code, details = await refusal(stub.Compare(pb.CompareRequest(**(good | change))))
    assert code is INVALID
    assert details.startswith(told)

    assert (await stub.Compare(pb.CompareRequest(**good))).score == 1.0


async def test_model_without_embedding_is_named_and_still_compares_pixels(
    stub: Any, triton: FakeTriton, digit: NDArray[np.uint8]
) -> None:
    triton.embed = None
    triton.models["plain"] = [3]
    pair: dict[str, Any] = {"first": picture(digit), "second": picture(digit), "model": "plain"}
    lacks = "plain version 3 gives no embedding (embedding__1)"
    assert await refusal(stub.Embed(pb.EmbedRequest(image=picture(digit), model="plain"))) == (
        INVALID,
        f"model: {lacks}",
    )
    assert await refusal(stub.Compare(pb.CompareRequest(**pair))) == (
        INVALID,
        f"method: {lacks}; allowed are PIXEL_COSINE and SSIM",
    )
    assert (await stub.Compare(pb.CompareRequest(method=pb.SIMILARITY_METHOD_SSIM, **pair))).score == 1.0


@pytest.mark.parametrize("factor", [np.float32(2), np.float32(np.nan)])
async def test_embedding_that_is_not_of_unit_length_is_internal(
    stub: Any, triton: FakeTriton, digit: NDArray[np.uint8], factor: np.float32
) -> None:
    triton.embed = lambda images: normalised(images) * factor
    told = await refusal(stub.Compare(pb.CompareRequest(first=picture(digit), second=picture(digit.T.copy()))))
    assert told == (grpc.StatusCode.INTERNAL, "the model did not answer with vectors of unit length")


# Upstream


@pytest.mark.parametrize(
    ("answer", "name"),
    [
        (lambda images: confident(images) * np.nan, "NaN"),
        (lambda images: confident(images) * 2, "sum"),
        (lambda images: confident(images)[:, :9], "shape"),
    ],
)
async def test_poisoned_answer_is_internal_and_not_passed_on(
    stub: Any, triton: FakeTriton, digit: NDArray[np.uint8], answer: Any, name: str
) -> None:
    triton.answer = answer
    code, details = await refusal(stub.Classify(pb.ClassifyRequest(image=picture(digit))))
    assert code is grpc.StatusCode.INTERNAL
    assert details == "the model did not answer with probabilities that sum to 1"

    code, _ = await refusal(stub.ClassifyBatch(pb.ClassifyBatchRequest(images=[picture(digit)] * 3)))
    assert code is grpc.StatusCode.INTERNAL


async def test_explicit_version_that_went_away_is_not_found(
    stub: Any, triton: FakeTriton, digit: NDArray[np.uint8]
) -> None:
    triton.failure = grpc.StatusCode.UNAVAILABLE, "Request for unknown model: 'mnist' version 1 is not at ready state"
    code, details = await refusal(stub.Classify(pb.ClassifyRequest(image=picture(digit), model_version=1)))
    assert (code, details) == (grpc.StatusCode.NOT_FOUND, "model_version: mnist has no version 1 ready")


async def test_default_version_that_went_away_is_worth_another_try(
    stub: Any, triton: FakeTriton, digit: NDArray[np.uint8]
) -> None:
    triton.failure = grpc.StatusCode.UNAVAILABLE, "Request for unknown model: 'mnist' version 1 is not at ready state"
    code, details = await refusal(stub.Classify(pb.ClassifyRequest(image=picture(digit))))
    assert (code, details) == (grpc.StatusCode.UNAVAILABLE, "the model is being replaced; try again")


@pytest.mark.parametrize("method", ["Classify", "Embed"])
async def test_default_version_that_went_away_is_answered_by_the_next(
    stub: Any, triton: FakeTriton, digit: NDArray[np.uint8], method: str
) -> None:
    triton.models["mnist"] = [1, 2]
    await stub.ListModels(pb.ListModelsRequest())
    triton.models["mnist"] = [1]
    request = {"Classify": pb.ClassifyRequest, "Embed": pb.EmbedRequest}[method](image=picture(digit))

    assert (await getattr(stub, method)(request)).model_version == 1


async def test_callers_deadline_ends_the_call_and_not_the_inference(
    stub: Any, triton: FakeTriton, digit: NDArray[np.uint8]
) -> None:
    triton.gate.clear()
    code, _ = await refusal(stub.Classify(pb.ClassifyRequest(image=picture(digit)), timeout=0.2))
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    triton.gate.set()

    await stub.Classify(pb.ClassifyRequest(image=picture(digit)))
    assert triton.num_cancelled == 0


# Overload and callers who leave


@pytest.fixture
async def narrow_stub(settings: GatewaySettings) -> AsyncIterator[Any]:
    """To a gateway that takes one image at a time."""
    narrow = settings.model_copy(update={"max_in_flight": 1, "max_batch_images": 1})
    async with GatewayServer(narrow) as gateway, grpc.aio.insecure_channel(gateway.address) as channel:
        yield image_service_pb2_grpc.ImageServiceStub(channel)


async def eventually(stub: Any, request: pb.ClassifyRequest) -> pb.ClassifyResponse:
    """Try again as often as the server's pushback says; any other error has none."""
    while True:
        try:
            response: pb.ClassifyResponse = await stub.Classify(request)
        except grpc.aio.AioRpcError as error:
            await asyncio.sleep(int(pushback(error)) / 1000)
        else:
            return response


def pushback(error: grpc.aio.AioRpcError) -> str:
    return str(dict(error.trailing_metadata() or ())["grpc-retry-pushback-ms"])


def retry_info(error: grpc.aio.AioRpcError) -> RetryInfo:
    """Read google.rpc.RetryInfo as a client in any language does."""
    status = Status.FromString(dict(error.trailing_metadata() or ())["grpc-status-details-bin"])
    info = RetryInfo()
    assert status.details[0].Unpack(info)
    assert (status.code, status.message) == (error.code().value[0], error.details())
    return info


async def test_call_beyond_the_bound_is_refused_at_once_with_pushback(
    narrow_stub: Any, triton: FakeTriton, digit: NDArray[np.uint8]
) -> None:
    request = pb.ClassifyRequest(image=picture(digit))
    triton.gate.clear()
    first = narrow_stub.Classify(request)
    await triton.arrival_of(digit)

    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await narrow_stub.Classify(request)
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert 10 <= int(pushback(refused.value)) <= 5000
    assert retry_info(refused.value).retry_delay.ToMilliseconds() == int(pushback(refused.value))

    triton.gate.set()
    assert (await first).prediction.label == label_of(digit)
    assert (await eventually(narrow_stub, request)).prediction.label == label_of(digit)


async def test_cancelled_caller_leaves_its_inference_running_and_its_place_taken(
    narrow_stub: Any, triton: FakeTriton, digit: NDArray[np.uint8]
) -> None:
    request = pb.ClassifyRequest(image=picture(digit))
    triton.gate.clear()
    call = narrow_stub.Classify(request)
    await triton.arrival_of(digit)
    call.cancel()
    code, _ = await refusal(narrow_stub.Classify(request))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED

    triton.gate.set()
    assert (await eventually(narrow_stub, request)).prediction.label == label_of(digit)
    assert triton.num_cancelled == 0


async def test_upstream_timeout_bounds_a_caller_without_deadline(
    settings: GatewaySettings, triton: FakeTriton, digit: NDArray[np.uint8]
) -> None:
    impatient = settings.model_copy(update={"upstream_timeout_seconds": 0.1})
    triton.gate.clear()
    async with GatewayServer(impatient) as gateway, grpc.aio.insecure_channel(gateway.address) as channel:
        stub = image_service_pb2_grpc.ImageServiceStub(channel)
        refused = await refusal(stub.Classify(pb.ClassifyRequest(image=picture(digit))))
        triton.gate.set()

    assert refused == (grpc.StatusCode.DEADLINE_EXCEEDED, "no answer from the model within 0.1 s")
    assert triton.num_cancelled == 0


# A long conversation


def streamed(number: int, image: pb.Image, **fields: Any) -> pb.ClassifyStreamRequest:
    return pb.ClassifyStreamRequest(id=number, request=pb.ClassifyRequest(image=image, **fields))


async def test_stream_answers_each_image_under_its_id_and_bad_ones_in_their_place(
    stub: Any, triton: FakeTriton
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (300, 28, 28), np.uint8)
    call = stub.ClassifyStream()
    for number, image in enumerate(images):
        bad = number % 100 == 7
        await call.write(
            streamed(
                number, pb.Image(encoded=b"no image") if bad else picture(image, polarity=pb.POLARITY_LIGHT_ON_DARK)
            )
        )
    await call.write(streamed(300, picture(images[0]), model="no-such"))
    await call.done_writing()
    answers = {response.id: response async for response in call}

    assert len(answers) == 301
    for number, image in enumerate(images):
        result = answers[number].result
        if number % 100 == 7:
            assert (result.code, result.error[:14]) == (grpc.StatusCode.INVALID_ARGUMENT.value[0], "image.encoded:")
        else:
            assert (result.code, result.prediction.label, answers[number].model_version) == (0, label_of(image), 1)
    assert answers[300].result.code == grpc.StatusCode.NOT_FOUND.value[0]
    assert await call.code() is grpc.StatusCode.OK


async def test_stream_whose_answers_nobody_takes_is_not_read_any_further(
    settings: GatewaySettings, triton: FakeTriton
) -> None:
    narrow = settings.model_copy(update={"stream_window": 4})
    async with GatewayServer(narrow) as gateway, grpc.aio.insecure_channel(gateway.address) as channel:
        stub: Any = image_service_pb2_grpc.ImageServiceStub(channel)
        await becomes(1, gateway.metrics_url, "gateway_serving")
        triton.gate.clear()
        call = stub.ClassifyStream()
        for number in range(50):
            await call.write(streamed(number, picture(np.full((28, 28), number, np.uint8))))
        await becomes(4, gateway.metrics_url, "gateway_images_in_flight")
        async with asyncio.timeout(5):
            # A later call is answered after whatever was read before it.
            await stub.ListModels(pb.ListModelsRequest())
        assert value(gateway.metrics_url, "gateway_images_admitted_total") == 4
        triton.gate.set()
        await call.done_writing()
        assert sorted([response.id async for response in call]) == list(range(50))


async def test_stream_that_is_cancelled_leaves_no_place_taken(
    gateway: GatewayServer, stub: Any, triton: FakeTriton, digit: NDArray[np.uint8]
) -> None:
    triton.gate.clear()
    call = stub.ClassifyStream()
    await call.write(streamed(0, picture(digit)))
    await triton.arrival_of(digit)
    call.cancel()
    triton.gate.set()

    await becomes(0, gateway.metrics_url, "gateway_images_in_flight")
    assert (await stub.Classify(pb.ClassifyRequest(image=picture(digit)))).prediction.label == label_of(digit)


async def test_stream_waits_for_room_where_a_call_is_sent_away(
    settings: GatewaySettings, digit: NDArray[np.uint8]
) -> None:
    narrow = settings.model_copy(update={"max_in_flight": 2, "max_batch_images": 2})
    async with GatewayServer(narrow) as gateway, grpc.aio.insecure_channel(gateway.address) as channel:
        stub: Any = image_service_pb2_grpc.ImageServiceStub(channel)
        call = stub.ClassifyStream()
        for number in range(20):
            await call.write(streamed(number, picture(np.full((28, 28), number, np.uint8))))
        await call.done_writing()

        assert [response.result.code async for response in call] == [0] * 20


# Where the time went


async def test_answer_comes_with_its_id_and_where_its_time_went(stub: Any, digit: NDArray[np.uint8]) -> None:
    call = stub.Classify(pb.ClassifyRequest(image=picture(digit)), metadata=[("x-request-id", "abc-1")])
    await call
    told = dict(await call.trailing_metadata())
    timing = parse(told["server-timing"])

    assert told["x-request-id"] == "abc-1"
    assert list(timing) == ["admission", "decode", "coalesce", "upstream", "batch", "total"]
    assert timing["batch"] == 1
    assert sum(timing[stage] for stage in ("admission", "decode", "coalesce", "upstream")) <= timing["total"] + 0.1


async def test_refusal_comes_with_an_id_too(stub: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.Classify(pb.ClassifyRequest(image=pb.Image(encoded=b"no")))

    assert dict(refused.value.trailing_metadata() or ())["x-request-id"]

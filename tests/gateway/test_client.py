import asyncio
import io
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from numpy.typing import NDArray
from PIL import Image

from gateway.client import (
    Classification,
    Comparison,
    DeadlineError,
    ImageClient,
    ImageError,
    InvalidInputError,
    Model,
    ModelNotFoundError,
    ModelUnavailableError,
    OverloadedError,
    ServerError,
    ServerUnreachableError,
)
from gateway.server import GatewayServer
from gateway.settings import GatewaySettings
from rpc.health import Health
from tests.gateway.fake_triton import FakeTriton, label_of, normalised

MODES = ("LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F")


@pytest.fixture
def file(digit: NDArray[np.uint8], tmp_path: Path) -> Path:
    path = tmp_path / "seven.png"
    Image.fromarray(digit).save(path)
    return path


@pytest.fixture
def data(file: Path) -> bytes:
    return file.read_bytes()


async def test_classify_takes_every_kind_of_image(
    client: ImageClient, file: Path, data: bytes, digit: NDArray[np.uint8]
) -> None:
    kinds: list[Any] = [
        file,
        str(file),
        data,
        bytearray(data),
        digit,
        digit[:, :, np.newaxis],
        np.repeat(digit[:, :, np.newaxis], 3, axis=2),
        np.asfortranarray(digit),
        Image.open(file),
        *(Image.fromarray(digit).convert(mode) for mode in MODES),
        Image.fromarray(digit.astype(np.uint16) * 257),
    ]
    for kind in kinds:
        answer = await client.classify(kind)
        assert (answer.label, answer.name) == (label_of(digit), str(label_of(digit)))
        assert answer.probability == pytest.approx(0.91)
        assert (answer.model, answer.version, len(answer.top)) == ("mnist", 1, 1)


async def test_compare_takes_two_kinds_of_images_and_tells_its_method(
    client: ImageClient, data: bytes, digit: NDArray[np.uint8]
) -> None:
    assert await client.compare(data, digit) == Comparison(1.0, "embedding_cosine", None, "mnist", 1)
    assert (await client.compare(data, digit, method="ssim")).method == "ssim"
    assert (await client.compare(data, digit.T)).score < 1


async def test_compare_names_the_image_that_is_bad(client: ImageClient, data: bytes) -> None:
    with pytest.raises(InvalidInputError, match=r"^second\.encoded: not a readable image"):
        await client.compare(data, b"hello")
    with pytest.raises(InvalidInputError, match=r"^method: 'psnr'; allowed are unspecified, embedding_cosine"):
        await client.compare(data, data, method="psnr")  # type: ignore[arg-type]  # the point


async def test_embed_returns_the_models_vector(client: ImageClient, data: bytes, digit: NDArray[np.uint8]) -> None:
    embedding = await client.embed(data)

    np.testing.assert_array_equal(embedding.vector, normalised(digit[np.newaxis])[0])
    assert (embedding.vector.dtype, embedding.model, embedding.version) == (np.dtype(np.float32), "mnist", 1)


async def test_pillow_image_is_turned_like_its_file(
    client: ImageClient, triton: FakeTriton, digit: NDArray[np.uint8]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = io.BytesIO()
    Image.fromarray(digit).rotate(90).save(data, "PNG", exif=exif)
    await client.classify(data.getvalue())
    await client.classify(Image.open(data))

    assert len([images for images in triton.received if np.array_equal(images[0], digit)]) == 2


async def test_options_reach_the_gateway(client: ImageClient, triton: FakeTriton, digit: NDArray[np.uint8]) -> None:
    triton.models["other"] = [1, 5]
    wide = np.kron(digit, np.ones((2, 3), np.uint8))
    answer = await client.classify(
        255 - wide, model="other", version=5, top_k=3, polarity="dark_on_light", framing="stretch"
    )

    assert (answer.model, answer.version, len(answer.top)) == ("other", 5, 3)
    assert answer.label == label_of(digit)
    assert answer.top[0].label == answer.label


async def test_batch_is_answered_in_order_with_errors_in_their_place(client: ImageClient, file: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (1100, 28, 28), np.uint8)
    given: list[Any] = [*images]
    given[3], given[700], given[1099] = b"no image", b"no image", file
    answers = await client.classify_batch(given, polarity="light_on_dark")

    assert len(answers) == 1100
    for index, (image, answer) in enumerate(zip(images, answers, strict=True)):
        if index in (3, 700):
            assert isinstance(answer, ImageError)
            assert answer.index == index
            assert "not a readable image" in str(answer)
        elif index != 1099:
            assert isinstance(answer, Classification)
            assert answer.label == label_of(image)


async def test_image_above_the_message_limit_fails_alone_in_its_batch(settings: GatewaySettings) -> None:
    images = np.random.default_rng(0).integers(0, 256, (20, 28, 28), np.uint8)
    given: list[Any] = [*images]
    given[13] = np.zeros((100, 100), np.uint8)
    small = settings.model_copy(update={"max_message_bytes": 4096})
    async with GatewayServer(small) as gateway, ImageClient(gateway.address) as client:
        await client.wait_ready()
        answers = await client.classify_batch(given, polarity="light_on_dark")
        for index, (image, answer) in enumerate(zip(images, answers, strict=True)):
            if index == 13:
                assert isinstance(answer, ImageError)
                assert answer.index == 13
                assert "refused the request's size" in str(answer)
            else:
                assert isinstance(answer, Classification)
                assert answer.label == label_of(image)


async def test_empty_batch_has_no_answers(client: ImageClient) -> None:
    assert await client.classify_batch([]) == []


async def test_models_are_listed(client: ImageClient, triton: FakeTriton) -> None:
    triton.models = {"mnist": [2, 7]}

    assert await client.models() == [Model("mnist", (7, 2), 7, tuple("0123456789"), True)]


async def test_missing_file_is_a_missing_file(client: ImageClient) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        await client.classify(Path("nowhere.png"))


@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        (b"no", {}, "image.encoded: not a readable image"),
        (np.zeros((28, 28)), {}, r"image: an array of float64 with shape \(28, 28\); allowed is uint8"),
        (np.zeros(784, np.uint8), {}, r"with shape \(784,\)"),
        (np.zeros((0, 28), np.uint8), {}, r"image\.raw\.height: 0; allowed are 1\.\.4096"),
        (3, {}, "image: int; allowed are a path"),
        (b"no", {"polarity": "dark"}, "polarity: 'dark'; allowed are unspecified, light_on_dark, dark_on_light"),
        (b"no", {"framing": "fit"}, "framing: 'fit'; allowed are unspecified, center, stretch"),
        (b"no", {"top_k": -1}, "top_k: -1; allowed is 0 or more"),
        (b"no", {"top_k": 11}, "top_k: 11; mnist has 10 classes"),
        (b"no", {"version": -1}, "version: -1; allowed is 0 or more"),
    ],
)
async def test_bad_input_is_named(client: ImageClient, image: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        await client.classify(image, **options)


async def test_unknown_model_and_version(client: ImageClient, digit: NDArray[np.uint8]) -> None:
    with pytest.raises(ModelNotFoundError, match="no model 'resnet'; loaded are mnist"):
        await client.classify(digit, model="resnet")
    with pytest.raises(ModelNotFoundError, match="mnist has no version 8; served are 1"):
        await client.classify_batch([digit], version=8)


async def test_no_gateway_says_address_and_what_to_check() -> None:
    async with ImageClient("127.0.0.1:1") as client:
        with pytest.raises(
            ServerUnreachableError, match=r"no gateway answers at 127\.0\.0\.1:1: .*`sluice up`"
        ) as failed:
            await client.models(timeout_seconds=5)
        assert isinstance(failed.value.__cause__, grpc.aio.AioRpcError)
        with pytest.raises(ServerUnreachableError, match=r"no connection within 0\.1 s"):
            await client.wait_ready(timeout_seconds=0.1)


async def test_wait_ready_says_what_is_missing(gateway: GatewayServer, triton: FakeTriton) -> None:
    triton.models = {}
    async with ImageClient(gateway.address) as client:
        with pytest.raises(ModelUnavailableError, match=r"no inference worked within 0\.3 s"):
            await client.wait_ready(timeout_seconds=0.3)


async def test_wait_ready_sees_a_gateway_that_comes_later(settings: GatewaySettings, digit: NDArray[np.uint8]) -> None:
    async with GatewayServer(settings) as gateway:
        address = gateway.address
    async with ImageClient(address) as client:
        waiting = asyncio.create_task(client.wait_ready())
        await asyncio.sleep(0)  # the first attempt is on its way
        port = int(address.rpartition(":")[2])
        async with GatewayServer(settings.model_copy(update={"port": port})):
            await waiting
            assert (await client.classify(digit)).label == label_of(digit)


async def test_deadline_is_told(client: ImageClient, triton: FakeTriton, digit: NDArray[np.uint8]) -> None:
    triton.gate.clear()
    with pytest.raises(DeadlineError, match=r"no answer from 127.* within 0.2 s; raise timeout_seconds"):
        await client.classify(digit, timeout_seconds=0.2)
    triton.gate.set()


async def test_unavailable_is_tried_again(client: ImageClient, triton: FakeTriton, digit: NDArray[np.uint8]) -> None:
    triton.failure = grpc.StatusCode.UNAVAILABLE, "Socket closed"

    call = asyncio.create_task(client.classify(digit))
    await triton.arrival_of(digit)
    triton.failure = None

    assert (await call).label == label_of(digit)


async def test_failing_model_is_a_server_error(
    client: ImageClient, triton: FakeTriton, digit: NDArray[np.uint8]
) -> None:
    triton.failure = grpc.StatusCode.INTERNAL, "Traceback"
    with pytest.raises(ServerError, match="the inference server failed to run the model"):
        await client.classify(digit)


async def test_overload_says_when_to_try_again(
    settings: GatewaySettings, triton: FakeTriton, digit: NDArray[np.uint8]
) -> None:
    narrow = settings.model_copy(update={"max_in_flight": 1, "max_batch_images": 1})
    async with GatewayServer(narrow) as gateway, ImageClient(gateway.address) as client:
        await client.wait_ready()
        triton.gate.clear()
        first = asyncio.create_task(client.classify(digit))
        await triton.arrival_of(digit)
        with pytest.raises(OverloadedError) as refused:
            await client.classify(digit)
        triton.gate.set()

        assert 0.01 <= refused.value.retry_after_seconds <= 5
        assert (await first).label == label_of(digit)


async def test_limit_of_concurrent_calls_is_an_overload() -> None:
    server = grpc.aio.server(maximum_concurrent_rpcs=1)
    health_pb2_grpc.add_HealthServicer_to_server(Health([""]), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        async with grpc.aio.insecure_channel(address) as channel, ImageClient(address) as client:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            await watch.read()
            with pytest.raises(OverloadedError, match="no more calls now: Concurrent RPC limit exceeded") as refused:
                await client.wait_ready()
            watch.cancel()
    finally:
        await server.stop(None)

    assert refused.value.retry_after_seconds == 1


async def test_calls_to_this_machine_take_no_proxy(
    gateway: GatewayServer, dead_proxy: None, digit: NDArray[np.uint8]
) -> None:
    async with ImageClient(gateway.address) as client:
        await client.wait_ready()
        assert (await client.classify(digit)).label == label_of(digit)


async def test_cancelling_a_call_cancels_it_at_the_gateway(
    settings: GatewaySettings, triton: FakeTriton, digit: NDArray[np.uint8]
) -> None:
    """Were it not cancelled there, the drain would wait for it."""
    patient = settings.model_copy(update={"drain_seconds": 30, "upstream_timeout_seconds": 60})
    async with GatewayServer(patient) as gateway, ImageClient(gateway.address) as client:
        await client.wait_ready()
        triton.gate.clear()
        call = asyncio.create_task(client.classify(digit, timeout_seconds=60))
        await triton.arrival_of(digit)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        async with asyncio.timeout(5):
            await gateway.grpc_server.stop(30)
        triton.gate.set()


async def test_closed_client_says_how_to_use_it(digit: NDArray[np.uint8]) -> None:
    with pytest.raises(RuntimeError, match="async with ImageClient"):
        await ImageClient().classify(digit)

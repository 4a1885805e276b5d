"""End to end, on a real Triton: trained over the stream, asked through the gateway."""

import asyncio
import io
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from gateway.client import Classification, ImageClient, ModelNotFoundError
from serving.control import TritonControl
from tests.line.processes import Line, Split
from tests.pairs import share_ordered_right
from tests.scraping import shown

pytestmark = [pytest.mark.triton, pytest.mark.timeout(300)]


def encoded(image: npt.NDArray[np.uint8], kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind)
    return buffer.getvalue()


def test_line_without_a_model_comes_up_and_says_how_to_make_one(running_line: Line) -> None:
    names = [line.split()[0] for line in running_line.printed[-4:]]

    assert names == ["triton", "streamer", "gateway", "no"]
    assert "sluice train" in running_line.printed[-1]


def test_up_says_where_the_metrics_are(running_line: Line) -> None:
    (said,) = [line for line in running_line.printed if line.startswith("metrics")]
    urls = said.removeprefix("metrics").split(", ")

    for url, service in zip(urls, ("gateway", "streamer"), strict=True):
        assert f"{service}_build_info" in shown(url.strip())


async def test_real_digits_are_classified_through_the_gateway(line: Line, digits: Split) -> None:
    pngs = [encoded(image, "PNG") for image in digits.images]
    async with ImageClient(line.address("gateway")) as client:
        answers = await client.classify_batch(pngs)
    labels = [answer.label if isinstance(answer, Classification) else -1 for answer in answers]

    # One epoch of 4,000 images; 0.1 is chance.
    assert np.mean(np.array(labels) == digits.labels) > 0.8


async def test_png_and_raw_pixels_get_the_same_answer_and_jpeg_nearly(line: Line, digits: Split) -> None:
    image = digits.images[0]
    async with ImageClient(line.address("gateway")) as client:
        png, raw, jpeg = [
            await client.classify(given) for given in (encoded(image, "PNG"), image, encoded(image, "JPEG"))
        ]

    assert png == raw
    assert jpeg.label == png.label
    assert jpeg.probability == pytest.approx(png.probability, abs=0.1)


async def test_triton_answers_as_torchscript_does(line: Line, digits: Split) -> None:
    images = digits.images[:64, None]
    async with TritonControl(line.address("triton-grpc")) as control:
        probabilities, embeddings = await control.infer("mnist", images)
    path = line.folder / "models" / "mnist" / "1" / "model.pt"
    module = torch.jit.load(str(path))  # type: ignore[no-untyped-call]  # so in torch's stubs
    with torch.inference_mode():
        expected_probabilities, expected_embeddings = module(torch.tensor(images))

    np.testing.assert_allclose(probabilities, expected_probabilities.numpy(), atol=1e-5)
    np.testing.assert_allclose(embeddings, expected_embeddings.numpy(), atol=1e-5)


async def test_calls_at_once_are_run_in_batches(line: Line, digits: Split) -> None:
    async with TritonControl(line.address("triton-grpc")) as control:
        before = await control.statistics("mnist")
        await asyncio.gather(*(control.infer("mnist", image[None, None]) for image in digits.images[:64]))
        # Triton counts a batch a moment after it has answered it; the gateway's probe may have come in between.
        async with asyncio.timeout(30):
            while (after := await control.statistics("mnist")).inferences < before.inferences + 64:
                pass  # each turn is a request
    inferences, executions = after.inferences - before.inferences, after.executions - before.executions

    assert executions < inferences / 3


async def test_pictures_of_one_digit_are_more_alike_than_of_two(line: Line, digits: Split) -> None:
    # One epoch of 4,000 images; 0.5 is chance. The containers' test asks more of the whole recipe.
    assert await share_ordered_right(line.address("gateway"), digits.images, digits.labels) > 0.85


def test_compare_prints_the_score_and_names_the_file_that_is_bad(line: Line, digits: Split, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    good.write_bytes(encoded(digits.images[0], "PNG"))
    bad.write_bytes(b"not a picture")
    server = ("--server", line.address("gateway"))
    assert line.sluice("compare", *server, str(good), str(good)).stdout.startswith("1.0000  (embedding cosine, mnist")

    done = line.sluice("compare", *server, str(good), str(bad))
    assert (done.returncode, done.stdout) == (1, "")
    assert f"{bad}: not a readable image" in done.stderr
    done = line.sluice("compare", *server, "gone.png", str(good))
    assert "gone.png" in done.stderr


@pytest.mark.parametrize("ask", [{"model": "cifar"}, {"version": 77}], ids=["model", "version"])
async def test_what_is_not_served_is_named_and_the_next_request_succeeds(
    line: Line, digits: Split, ask: dict[str, str | int]
) -> None:
    async with ImageClient(line.address("gateway")) as client:
        with pytest.raises(ModelNotFoundError, match=str(next(iter(ask.values())))):
            await client.classify(digits.images[0], **ask)  # type: ignore[arg-type]  # one of two keywords

        assert (await client.classify(digits.images[0])).model == "mnist"


def test_classify_prints_one_line_a_file_and_fails_for_the_unreadable(
    line: Line, digits: Split, tmp_path: Path
) -> None:
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    good.write_bytes(encoded(digits.images[0], "PNG"))
    bad.write_bytes(b"not a picture")
    done = line.sluice("classify", "--json", "--server", line.address("gateway"), str(good), str(bad), "gone.png")
    rows = [json.loads(row) for row in done.stdout.splitlines()]

    assert done.returncode == 1
    assert [Path(row["file"]).name for row in rows] == ["good.png", "bad.png", "gone.png"]
    assert 0 <= rows[0]["label"] <= 9
    assert "not a readable image" in rows[1]["error"]
    assert "No such file" in rows[2]["error"]


@pytest.mark.slow
async def test_version_trained_while_serving_is_routed_to(line: Line, digits: Split) -> None:
    version = (await asyncio.to_thread(line.train, "--seed", "1"))["version"]
    async with ImageClient(line.address("gateway")) as client:
        async with asyncio.timeout(30):
            while (await client.classify(digits.images[0])).version != version:
                pass  # each turn is a request
        (model,) = await client.models()

        assert model.versions[:2] == (version, version - 1)
        assert (await client.classify(digits.images[0], version=version - 1)).version == version - 1

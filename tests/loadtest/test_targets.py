import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from loadtest.errors import CallError, NoImagesError
from loadtest.images import Sample
from loadtest.tally import BAD_ANSWER, Verdict
from loadtest.targets import KINDS, Kind, Target, make
from protos.gateway.v1 import image_service_pb2 as pb


def target_of(kind: Kind, samples: list[Sample], *, batch_size: int = 3, model: str = "mnist", seed: int = 0) -> Target:
    return make(kind, samples, image_format="raw", model=model, batch_size=batch_size, seed=seed)


def names_of(samples: list[Sample], images: list[pb.Image]) -> list[str]:
    names = {sample.pixels.tobytes(): sample.name for sample in samples}
    return [names[image.raw.pixels] for image in images]


def test_classify_goes_through_every_image(samples: list[Sample]) -> None:
    target = target_of("classify", samples)
    requests = [pb.ClassifyRequest.FromString(target.request(number)) for number in range(40)]
    sent = names_of(samples, [request.image for request in requests])

    assert {request.model for request in requests} == {"mnist"}
    assert sorted(sent[:20]) == sorted(sample.name for sample in samples)
    assert sent[:20] == sent[20:]


@pytest.mark.parametrize(("said", "right"), [("true", 1), ("false", 0)])
def test_class_is_judged(said: str, right: int, samples: list[Sample]) -> None:
    target = target_of("classify", samples)
    (name,) = names_of(samples, [pb.ClassifyRequest.FromString(target.request(27)).image])
    label = int(name) if said == "true" else (int(name) + 1) % 10
    answer = pb.ClassifyResponse(prediction=pb.Prediction(label=label), model="mnist", model_version=2)

    assert target.judge(27, answer.SerializeToString()) == Verdict(images=1, judged=1, right=right)
    assert target.model_of(answer.SerializeToString()) == "mnist version 2"


def test_class_without_a_number_is_judged_by_name() -> None:
    target = target_of("classify", [Sample(np.zeros((28, 28), np.uint8), "seven", None)])
    answers = [pb.ClassifyResponse(prediction=pb.Prediction(label=7, name=name)) for name in ("seven", "7")]

    assert [target.judge(0, answer.SerializeToString()).right for answer in answers] == [1, 0]


def test_batch_is_joined_from_its_images(samples: list[Sample]) -> None:
    target = target_of("classify-batch", samples)
    requests = [pb.ClassifyBatchRequest.FromString(target.request(number)) for number in range(20)]
    sent = [name for request in requests for name in names_of(samples, list(request.images))]

    assert {(request.model, len(request.images)) for request in requests} == {("mnist", 3)}
    assert sorted(sent) == sorted(3 * [sample.name for sample in samples])


def test_image_that_failed_alone_is_not_judged(samples: list[Sample]) -> None:
    target = target_of("classify-batch", samples)
    names = names_of(samples, list(pb.ClassifyBatchRequest.FromString(target.request(5)).images))
    results = [pb.ClassifyResult(prediction=pb.Prediction(label=int(name))) for name in names]
    results[1] = pb.ClassifyResult(code=3, error="images[1]: broken")
    results[2].prediction.label += 1
    answer = pb.ClassifyBatchResponse(results=results).SerializeToString()

    assert target.judge(5, answer) == Verdict(images=3, judged=2, right=1, refused=1)


def test_pairs_take_turns_between_one_class_and_two(samples: list[Sample]) -> None:
    target = target_of("compare", samples)
    requests = [pb.CompareRequest.FromString(target.request(number)) for number in range(200)]
    pairs = [names_of(samples, [request.first, request.second]) for request in requests]

    assert all((first == second) == (number % 2 == 0) for number, (first, second) in enumerate(pairs))
    assert all(request.first != request.second for request in requests)
    assert len({request.SerializeToString() for request in requests}) > 50


def test_scores_are_told_apart_by_pair(samples: list[Sample]) -> None:
    target = target_of("compare", samples)
    answer = pb.CompareResponse(score=0.5).SerializeToString()

    assert target.judge(4, answer) == Verdict(images=2, same_score=0.5)
    assert target.judge(5, answer) == Verdict(images=2, different_score=0.5)


def test_triton_gets_one_tensor(samples: list[Sample]) -> None:
    target = target_of("triton", samples)
    request = service_pb2.ModelInferRequest.FromString(target.request(1))
    (pixels,) = request.raw_input_contents
    (tensor,) = request.inputs

    assert (request.model_name, [output.name for output in request.outputs]) == ("mnist", ["probabilities__0"])
    assert (tensor.name, tensor.datatype, list(tensor.shape)) == ("image", "UINT8", [3, 1, 28, 28])
    assert set(zip(*[iter(pixels)] * 784, strict=True)) <= {tuple(sample.pixels.tobytes()) for sample in samples}


def test_most_probable_class_is_tritons_answer(samples: list[Sample]) -> None:
    target = target_of("triton", samples)
    request = service_pb2.ModelInferRequest.FromString(target.request(1))
    labels = {sample.pixels.tobytes(): sample.label or 0 for sample in samples}
    pixels = request.raw_input_contents[0]
    rows = np.full((3, 10), 0.05, "<f4")
    rows[range(3), [labels[pixels[start : start + 784]] for start in (0, 784, 1568)]] = 0.5
    rows[2] = rows[2, ::-1]
    answer = service_pb2.ModelInferResponse(raw_output_contents=[rows.tobytes()]).SerializeToString()

    assert target.judge(1, answer) == Verdict(images=3, judged=3, right=2)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_answer_is_a_code_of_its_own(kind: Kind, samples: list[Sample]) -> None:
    with pytest.raises(CallError) as failed:
        target_of(kind, samples).judge(0, b"\xff\xff")

    assert failed.value.code == BAD_ANSWER


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        ("classify-batch", pb.ClassifyBatchResponse(results=[pb.ClassifyResult()] * 2)),
        ("triton", service_pb2.ModelInferResponse()),
        ("triton", service_pb2.ModelInferResponse(raw_output_contents=[bytes(4 * 29)])),
    ],
)
def test_answer_for_fewer_images_is_a_code_of_its_own(
    kind: Kind, answer: pb.ClassifyBatchResponse, samples: list[Sample]
) -> None:
    with pytest.raises(CallError) as failed:
        target_of(kind, samples).judge(0, answer.SerializeToString())

    assert failed.value.code == BAD_ANSWER


@pytest.mark.parametrize("kind", KINDS)
def test_seed_names_the_order(kind: Kind, samples: list[Sample]) -> None:
    first, again, other = (target_of(kind, samples, seed=seed) for seed in (1, 1, 2))

    assert [first.request(number) for number in range(10)] == [again.request(number) for number in range(10)]
    assert [first.request(number) for number in range(10)] != [other.request(number) for number in range(10)]


@pytest.mark.parametrize(
    ("kind", "sample", "words"),
    [
        ("triton", Sample(np.zeros((28, 28), np.uint8), "seven", None), "name the folders 0, 1, 2"),
        ("triton", Sample(np.zeros((30, 28), np.uint8), "7", 7), "28x28"),
        ("compare", Sample(np.zeros((28, 28), np.uint8), "7", 7), "images of two classes"),
    ],
)
def test_images_that_do_not_fit_are_refused(kind: Kind, sample: Sample, words: str) -> None:
    with pytest.raises(NoImagesError, match=words):
        target_of(kind, [sample, sample])

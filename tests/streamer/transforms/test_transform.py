"""Transforms as text, and what they promise: the same bytes for a sample, always and everywhere."""

import contextlib
import hashlib
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from numpy.typing import NDArray

from streamer.errors import InvalidPlanError, TransformError
from streamer.transforms.draws import Draws
from streamer.transforms.parameters import Choice, Kind, Number, PerChannel, Spreads, Whole, parameters_of
from streamer.transforms.steps import PixelStep, Preset, known, register, sine_cosine
from streamer.transforms.transform import MAX_LENGTH, MAX_STEPS, Transform, parse

DOCS = Path(__file__).resolve().parents[3] / "docs" / "transforms.md"
SHAPE = (28, 28)

# Bytes once sent under a name stay: whoever changes them makes a preset of another name, or a step of another name.
GOLDEN = {
    "augment-v1": "a21ba356ccd9f15f",
    "augment-v1(rotate=10,shift=2)": "a21ba356ccd9f15f",
    "augment-v1(elastic=1.5,cutout=8)": "b6d61d06dec95725",
    "pad(pixels=4)|crop(height=28,width=28)": "d4c77d0e67543289",
    "rotate(degrees=30)|elastic(pixels=3,spacing=5)|scale(percent=20)": "73ec29e752755889",
    "mirror|shift(pixels=2)": "6569f67546bcd150",
    "noise(std=12)|cutout(pixels=9,fill=128,probability=0.5)": "fc36a93c3a2aff1b",
    "normalise(mean=0.1307,std=0.3081)": "f16ac778cd42f31d",
    "noise(std=3)|normalise(dtype=float16)": "2f645434df300b38",
}


def digest(spec: str) -> str:
    """Of what becomes of fixed images, made without any random numbers of a library."""
    row, column, number = np.ogrid[:28, :28, :100]
    images = ((row * 31 + column * 17 + row * column * (number % 7) + number * 13) % 256).astype(np.uint8)
    batch = np.ascontiguousarray(images.transpose(2, 0, 1))
    result = parse(spec, image_shape=SHAPE).apply(batch, np.arange(50, 150), seed=2026, epoch=3)
    return hashlib.sha256(result.tobytes()).hexdigest()[:16]


SINE_COSINE = "03d308a39de6f3a3"


def sine_cosine_digest() -> str:
    """Of many values: pixels would show a difference in the last place for one sample in millions."""
    return hashlib.sha256(np.stack(sine_cosine(np.arange(-200_000, 200_000) / 1024)).tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("spec", GOLDEN)
def test_published_bytes_stay_as_they_are(spec: str) -> None:
    assert digest(spec) == GOLDEN[spec]


def test_angles_stay_as_they_are() -> None:
    assert sine_cosine_digest() == SINE_COSINE


def test_bytes_are_the_same_on_a_lesser_processor() -> None:
    """NumPy does its arithmetic in other ways there; what is left out are all its faster ones."""
    features = "AVX2 FMA3 AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX512_SPR X86_V3 X86_V4"
    code = (
        "from test_transform import *\n"
        "assert {spec: digest(spec) for spec in GOLDEN} == GOLDEN\n"
        "assert sine_cosine_digest() == SINE_COSINE\n"
    )
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])

    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env={**os.environ, "NPY_DISABLE_CPU_FEATURES": features, "PYTHONPATH": path},
    )


@pytest.fixture(scope="module")
def images() -> NDArray[np.uint8]:
    """Sixty images of random pixels."""
    return np.random.default_rng(5).integers(0, 256, (60, *SHAPE), dtype=np.uint8)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_bytes_are_the_same_however_samples_are_put_into_batches(
    data: st.DataObject, images: NDArray[np.uint8]
) -> None:
    transform = parse("augment-v1(elastic=2,cutout=7)|noise(std=4)", image_shape=SHAPE)
    indices = np.arange(60) * 1_000_003
    whole = transform.apply(images, indices, seed=7, epoch=2)
    order = np.array(data.draw(st.permutations(range(60))))
    cuts = sorted(data.draw(st.sets(st.integers(1, 59), max_size=8)))

    for part in np.split(order, cuts):
        np.testing.assert_array_equal(transform.apply(images[part], indices[part], seed=7, epoch=2), whole[part])


def test_samples_differ_with_index_epoch_and_seed(images: NDArray[np.uint8]) -> None:
    transform = parse("augment-v1", image_shape=SHAPE)
    same = np.repeat(images[:1], 50, axis=0)

    def made(seed: int | None, epoch: int) -> list[bytes]:
        return [image.tobytes() for image in transform.apply(same, np.arange(50), seed=seed, epoch=epoch)]

    assert len({*made(1, 0), *made(1, 1), *made(2, 0), *made(None, 0)}) == 200
    assert made(None, 0) == made(0, 0)


def test_images_given_are_not_written_to(images: NDArray[np.uint8]) -> None:
    read_only = images.copy()
    read_only.flags.writeable = False

    for name, term in known().items():
        required = [parameter.name for parameter in parameters_of(term).values() if parameter.is_required]
        spec = f"{name}({','.join(f'{parameter}=5' for parameter in required)})"
        parse(spec, image_shape=SHAPE).apply(read_only, np.arange(60), seed=1, epoch=0)

    np.testing.assert_array_equal(read_only, images)


@pytest.mark.parametrize(
    ("spec", "shape", "dtype"),
    [
        ("", SHAPE, "uint8"),
        ("augment-v1", SHAPE, "uint8"),
        ("pad(pixels=2)|crop(height=30,width=31)", (30, 31), "uint8"),
        ("crop(height=20,width=24)|normalise", (20, 24), "float32"),
        ("normalise(dtype=float16)", SHAPE, "float16"),
    ],
)
def test_shape_and_type_are_what_comes_out(spec: str, shape: tuple[int, ...], dtype: str) -> None:
    transform = parse(spec, image_shape=SHAPE)

    for count in (0, 1, 3):
        result = transform.apply(np.zeros((count, *SHAPE), np.uint8), np.arange(count), seed=1, epoch=0)

        assert (result.shape, result.dtype) == ((count, *shape), np.dtype(dtype))
        assert result.flags.c_contiguous
    assert (transform.image_shape, transform.dtype) == (shape, np.dtype(dtype))
    assert transform.sample_bytes == result[0].nbytes


def test_strided_images_are_taken_too(images: NDArray[np.uint8]) -> None:
    for spec in ("", "augment-v1", "normalise"):
        transform = parse(spec, image_shape=SHAPE)
        every_other = transform.apply(images[::2], np.arange(30), seed=1, epoch=0)

        assert every_other.flags.c_contiguous
        np.testing.assert_array_equal(every_other, transform.apply(images[::2].copy(), np.arange(30), seed=1, epoch=0))


def test_images_of_another_shape_or_type_are_refused() -> None:
    transform = parse("augment-v1", image_shape=SHAPE)

    wrong: list[NDArray[Any]] = [
        *(np.zeros((2, 28, 27), np.uint8), np.zeros((3, *SHAPE), np.uint8), np.zeros((2, *SHAPE), np.int8))
    ]
    for images in wrong:
        with pytest.raises(ValueError, match="expected uint8 of shape"):
            transform.apply(images, np.arange(2), seed=1, epoch=0)


ERRORS = [
    ("spin(degrees=3)", "there is no 'spin'; known are crop, pad, shift, rotate"),
    ("rotate(angle=3)", "rotate: there is no parameter 'angle'; known are degrees (X (-X to X) or LOW..HIGH within"),
    ("rotate(degrees)", "there is no parameter 'degrees'"),
    ("rotate", "rotate: degrees is missing; allowed is X (-X to X) or LOW..HIGH within -180 to 180 degrees"),
    ("rotate(degrees=181)", "rotate: degrees is '181'; allowed is"),
    ("rotate(degrees=5..4)", "degrees is '5..4'"),
    ("rotate(degrees=nan)", "degrees is 'nan'"),
    ("rotate(degrees=inf)", "degrees is 'inf'"),
    ("rotate(degrees=1e99)", "degrees is '1e99'"),
    ("rotate(degrees=)", "degrees is ''"),
    ("rotate(degrees=٣)", "degrees is '٣'"),
    ("rotate(degrees=__import__('os'))", "a step is written name(parameter=value,...)"),
    ("rotate(degrees=1,degrees=1)", "rotate: degrees is given twice"),
    ("scale(percent=95)", "scale: percent is '95'; allowed is X (-X to X) or LOW..HIGH within -90 to 900 percent"),
    ("pad(pixels=1.5)", "pad: pixels is '1.5'; allowed is 0 to 1024 pixels, whole"),
    ("noise(std=-1)", "noise: std is '-1'; allowed is 0 to 128 grey levels"),
    ("crop(height=29,width=3)", "crop: 29 x 3 do not fit into images of 28 x 28"),
    ("crop(height=9,width=9,at=left)", "crop: at is 'left'; allowed is random or centre"),
    ("normalise(mean=0.1:0.2)", "normalise: mean has 2 numbers for 1 channel"),
    ("normalise(std=0)", "normalise: std is '0'; allowed is 0.001 to 100"),
    ("normalise|rotate(degrees=3)", "rotate follows normalise, which must be the last step"),
    ("pad(pixels=1000)|pad(pixels=1000)", "2028 x 2028 to 4028 x 4028; 2048 pixels are allowed"),
    ("augment-v2", "there is no 'augment-v2'; known are"),
    ("rotate(degrees=1)||shift(pixels=1)", "step 2 is ''"),
    ("rotate(degrees=1", "step 1 is 'rotate(degrees=1'"),
    ("rotate(degrees=1))", "step 1 is"),
    ("|".join(["pad(pixels=0)"] * (MAX_STEPS + 1)), f"{MAX_STEPS + 1} steps; {MAX_STEPS} are allowed"),
    ("|".join(["augment-v1"] * 6), "36 steps; 32 are allowed"),
    (" " * (MAX_LENGTH + 1), f"{MAX_LENGTH + 1} characters; {MAX_LENGTH} are allowed"),
]


@pytest.mark.parametrize(("spec", "problem"), ERRORS)
def test_what_is_wrong_with_a_text_is_said(spec: str, problem: str) -> None:
    with pytest.raises(InvalidPlanError, match=re.escape(problem)) as refused:
        parse(spec, image_shape=SHAPE)

    assert refused.value.field == "plan.transform"
    assert str(refused.value).startswith("plan.transform: ")
    assert len(str(refused.value)) < 1000


@settings(deadline=None)
@given(st.text(max_size=40) | st.text("rotate(degs=1.|,-)en", max_size=40))
def test_no_text_does_harm(spec: str) -> None:
    with contextlib.suppress(InvalidPlanError):
        parse(spec, image_shape=SHAPE)


@pytest.mark.parametrize(
    ("spec", "canonical"),
    [
        ("", ""),
        ("  ", ""),
        (" rotate ( degrees = +10.0 ) | shift(pixels=-2..2)", "rotate(degrees=10)|shift(pixels=2)"),
        ("rotate(degrees=-10..20)", "rotate(degrees=-10..20)"),
        ("shift(pixels=-0)", "shift(pixels=0)"),
        ("scale(percent=.5)", "scale(percent=0.5)"),
        ("scale(percent=1e1)", "scale(percent=10)"),
        ("elastic(spacing=7,pixels=1.50)", "elastic(pixels=1.5)"),
        ("normalise()", "normalise"),
        ("augment-v1(shift=2,rotate=10)", "augment-v1"),
        ("augment-v1(cutout=8,rotate=15)", "augment-v1(rotate=15,cutout=8)"),
    ],
)
def test_each_transform_has_one_normal_form(spec: str, canonical: str) -> None:
    transform = parse(spec, image_shape=SHAPE)

    assert transform.canonical == canonical
    assert parse(canonical, image_shape=SHAPE) == transform


def texts(kind: Kind[object]) -> st.SearchStrategy[str]:
    """Texts that a kind may or may not allow, often at its ends."""
    if isinstance(kind, Choice):
        return st.sampled_from(kind.allowed.split(" or "))
    numbers = st.floats(-1100, 1100).map(repr) | st.integers(-200, 1100).map(str) | st.floats(-1, 1).map(repr)
    if isinstance(kind, Spreads):
        return numbers | st.tuples(numbers, numbers).map("..".join)
    if isinstance(kind, PerChannel):
        return numbers | st.tuples(numbers, numbers, numbers).map(":".join)
    assert isinstance(kind, Number | Whole)
    return numbers


@st.composite
def specs(draw: st.DrawFn) -> str:
    """Chains of steps with some of their parameters given."""
    terms = []
    for name in draw(st.lists(st.sampled_from(sorted(known())), max_size=4)):
        declared = parameters_of(known()[name])
        given_ones = [key for key in declared if declared[key].is_required or draw(st.booleans())]
        values = ",".join(f"{key}={draw(texts(declared[key].kind))}" for key in given_ones)
        terms.append(f"{name}({values})")
    return "|".join(terms)


@settings(deadline=None, max_examples=300)
@given(specs())
def test_normal_form_reads_back_as_the_same_transform(spec: str) -> None:
    try:
        transform = parse(spec, image_shape=(64, 48, 3))
    except InvalidPlanError:
        return

    again = parse(transform.canonical, image_shape=(64, 48, 3))
    assert again == transform
    assert again.canonical == transform.canonical


def test_every_step_and_parameter_is_in_the_docs() -> None:
    page = DOCS.read_text()
    for name, term in known().items():
        assert f"### `{name}`" in page
        assert (term.__doc__ or "").strip().splitlines()[0] in page
        for parameter in parameters_of(term).values():
            default = "required" if parameter.is_required else f"`{parameter.kind.format(parameter.default)}`"
            row = f"| `{parameter.name}` | {parameter.kind.allowed} | {default} | {parameter.meaning} |"
            assert row in page, f"{name}: {row}"


def test_every_example_in_the_docs_reads() -> None:
    examples = re.findall(r'transform="([^"]*)"', DOCS.read_text())

    assert len(examples) >= 3
    for spec in examples:
        parse(spec, image_shape=SHAPE)


def test_presets_have_as_many_steps_whatever_their_parameters() -> None:
    for term in known().values():
        if issubclass(term, Preset):
            zeros = {name: parameter.kind.parse("0") for name, parameter in parameters_of(term).items()}
            assert [type(step) for step in term().steps()] == [type(step) for step in term(**zeros).steps()]


@dataclass(frozen=True)
class Explode(PixelStep):
    """Fails for images that begin with 13."""

    name = "explode"
    cost_nanoseconds = 1000.0

    def apply(self, images: NDArray[np.uint8], draws: Draws, place: int) -> NDArray[np.generic]:
        if (images[:, 0, 0] == 13).any():
            raise RuntimeError("thirteen")
        return images


def test_a_sample_that_fails_is_named() -> None:
    transform = Transform((Explode(),), SHAPE)
    images = np.zeros((10, *SHAPE), np.uint8)
    images[6, 0, 0] = 13

    with pytest.raises(TransformError, match=r"^sample 1006: explode failed: RuntimeError: thirteen$") as failed:
        transform.apply(images, np.arange(1000, 1010), seed=1, epoch=0)

    assert failed.value.index == 1006
    assert isinstance(failed.value.__cause__, RuntimeError)


def test_a_name_is_given_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamer.transforms.steps._known", dict(known()))
    register(Explode)
    register(Explode)

    assert parse("explode", image_shape=SHAPE) == Transform((Explode(),), SHAPE)
    with pytest.raises(ValueError, match="already is a transform named 'rotate'"):
        register(type("Other", (Explode,), {"name": "rotate"}))


@pytest.mark.parametrize(
    ("spec", "kept"),
    [
        ("crop(height=10,width=10,at=centre)|pad(pixels=9)", slice(9, 19)),
        ("shift(pixels=5..5)|pad(pixels=5)|shift(pixels=-10..-10)", slice(0, 23)),
    ],
)
def test_what_was_cut_off_or_moved_out_does_not_come_back_in_a_frame(spec: str, kept: slice) -> None:
    ones = np.full((1, 28, 28), 255, np.uint8)
    out = parse(spec, image_shape=(28, 28)).apply(ones, np.array([3]), seed=1, epoch=0)[0]

    expected = np.zeros(out.shape, np.uint8)
    expected[kept, kept] = 255
    np.testing.assert_array_equal(out, expected)

"""The report from whole, partial and damaged folders; that it reads well is for eyes."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.errors import TrainingError
from training.evaluation import record, report
from training.evaluation.corruptions import CORRUPTIONS, SEVERITIES
from training.evaluation.evaluate import Corrupted, Detection, Predictions, Sample, judge
from training.evaluation.record import Calibration, Mistake, Picture, Record

NAMES = ["<b>$x^{</b>", 'Trouser & "co"', "zwölf", "c"]


class Page(HTMLParser):
    """What a browser would fetch and show."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.rows = re.findall(r"<tr><th[^>]*>([^<]*)</th><td>([^<]*)</td></tr>", path.read_text())
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "srcset", "href")]
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def evaluation() -> Record:
    draws = np.random.default_rng(0)
    logits_NK = draws.normal(size=(60, 4)).astype(np.float32)
    predictions = Predictions(
        logits_NK=logits_NK, embedding_ND=np.empty((60, 0), np.float32), label_N=draws.integers(0, 3, 60)
    )
    raw, served = (judge(predictions, num_classes=4, temperature=temperature) for temperature in (1, 2))
    image = draws.integers(0, 256, (28, 28), np.uint8)
    corrupted = [Corrupted(name, level, 0.9 - 0.1 * level) for name in CORRUPTIONS for level in SEVERITIES]
    mistake = Sample(index=7, label=0, predicted=1, probability=0.9876, image_HW=image)
    return Record(
        created=record.now(),
        subject="runs/one",
        kind="checkpoint",
        device="cpu",
        dataset="clothes",
        split="test",
        fingerprint="00ff",
        class_names=NAMES,
        num_samples=60,
        accuracy=served.accuracy,
        accuracy_interval=served.accuracy_interval,
        confusion=served.confusion.tolist(),
        classes=record.class_rows(served, NAMES),
        served=Calibration.of(served),
        raw=Calibration.of(raw),
        fitted_on="train[90%:]",
        corruptions=record.corruption_rows(corrupted),
        corrupted_samples=60,
        example=Picture.of(image),
        outliers=record.outlier_rows([Detection("noise", "energy", 60, 50, 0.98765, 0.125)]),
        mistakes=[Mistake.of(mistake)] * 3,
        samples_per_second=1234.5,
        notes=["noise stands in."],
    )


def plain() -> Record:
    """Return an evaluation without corrupted images, which take the longest to draw."""
    return evaluation().model_copy(update={"corruptions": [], "example": None, "mistakes": []})


def whole(folder: Path, found: Record | None = None) -> Path:
    steps = [
        {"step": step, "loss": 1 / step, "accuracy": 1 - 1 / step, "lr": 0.001, "samples_per_second": 4321.0}
        for step in range(1, 20)
    ]
    lines = [*steps, {"step": 19, "validation_loss": 0.1, "validation_accuracy": 0.9}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 20, "lo')
    (folder / "config.json").write_text(json.dumps({"name": "one", "optim": {"lr": 0.05, "clip_norm": None}}))
    (folder / "environment.json").write_text(json.dumps({"versions": {"torch": "2.0"}, "data": {"train": "abc"}}))
    record.write(found or evaluation(), folder / "evaluation.json")
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a whole run."""
    return report.write(whole(tmp_path_factory.mktemp("whole")))


def test_page_of_a_whole_run_has_all_parts_in_it(written: Path) -> None:
    page = Page(written)
    words = " ".join(page.text.split())

    assert page.open == []
    assert len(page.sources) == 2 * 7
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    for said in (
        *NAMES,
        "train[90%:]",
        "4,321 samples",
        "0.9877",
        "noise stands in.",
    ):
        assert said in words
    assert "Not measured" not in words
    assert ("optim.clip_norm", "none") in page.rows
    assert ("versions.torch", "2.0") in page.rows


def test_pictures_lie_beside_it_for_both_surroundings(written: Path) -> None:
    pictures = {path.name: Image.open(path) for path in (written.parent / "figures").iterdir()}
    names = {"curves", "speed", "confusion", "reliability", "corruptions", "corruption-examples", "mistakes"}

    assert pictures.keys() == {f"{name}{kind}.png" for name in names for kind in ("", "-dark")}
    assert {image.getpixel((0, 0))[0] > 128 for name, image in pictures.items() if "dark" not in name} == {True}  # type: ignore[index]  # RGBA
    assert {image.getpixel((0, 0))[0] > 128 for name, image in pictures.items() if "dark" in name} == {False}  # type: ignore[index]  # RGBA


def test_page_needs_nothing_from_elsewhere(written: Path) -> None:
    text = written.read_text()

    assert not re.search(r"https?:|<script|<link|@import|url\(", re.sub(r"base64,[\w+/=]+", "", text))


def test_run_that_nobody_evaluated_has_its_curves(tmp_path: Path) -> None:
    (whole(tmp_path) / "evaluation.json").unlink()
    page = Page(report.write(tmp_path))

    assert len(page.sources) == 2 * 2
    assert "Training: 4,321 samples a second." in page.text


def test_each_part_without_data_is_a_sentence(tmp_path: Path) -> None:
    page = Page(report.write(tmp_path))
    words = " ".join(page.text.split())

    assert page.open == page.sources == []
    for said in (
        "there is no metrics.jsonl",
        "sluice evaluate with this folder",
        "Nothing was measured.",
        "there is no config.json here",
        "there is no environment.json here",
    ):
        assert said in words


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\n\x00"])
def test_damaged_file_is_named_and_the_rest_is_there(tmp_path: Path, content: bytes) -> None:
    for name in ("evaluation.json", "config.json", "environment.json"):
        (whole(tmp_path) / name).write_bytes(content)
        run = report.read(tmp_path)

        assert [name in note for note in run.notes] == [True]
        assert len(run.steps) == 19


def test_lines_that_are_none_are_passed_over(tmp_path: Path) -> None:
    lines = ['{"step": 1, "loss": 2}', "", "[1]", '{"step": "x", "loss": 1}', '{"loss": 1}', '{"step": 2, "loss": NaN}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))

    assert report.read(tmp_path).steps == [{"step": 1, "loss": 2}]


def test_many_classes_fit(tmp_path: Path) -> None:
    few = plain()
    names = [f"a class with a long name {label}" for label in range(300)]
    rows = [few.classes[0].model_copy(update={"name": name}) for name in names]
    many = {"class_names": names, "classes": rows, "confusion": np.eye(300, dtype=int).tolist()}
    record.write(few.model_copy(update=many), tmp_path / "evaluation.json")
    text = Page(report.write(tmp_path)).text

    assert "200 more classes are in evaluation.json." in text
    assert "There was none." in text  # no mistake


def test_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    kept = evaluation()
    record.write(kept, tmp_path / "evaluation.json")

    assert record.read(tmp_path / "evaluation.json") == kept
    assert json.loads((tmp_path / "evaluation.json").read_text())["schema"] == 1
    assert kept.classes[3].recall is None  # no sample of it
    assert kept.corruption_accuracy == pytest.approx(0.6)


def test_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="nowhere: no folder to report on"):
        report.write(tmp_path / "nowhere")

"""Random bytes, led by what code they reach: no crash, no hang, no growing memory."""

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from protos.gateway.v1 import image_service_pb2 as pb
from tests.digits import FORMATS, encoded, seven

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="atheris is not installed: it has no wheel for this Python"
)

ROOT = Path(__file__).resolve().parents[2]
# Of a single input, on a machine ten times slower than most.
_HANG_SECONDS = 25
_RSS_MEBI = 1024
# What caches and a larger corpus take, at most, in the second half of a run.
_GROWTH_MEBI = 64
_RSS = re.compile(r"rss: (\d+)Mb")


def image_seeds() -> Iterator[bytes]:
    digit = Image.fromarray(seven())
    for kind in FORMATS:
        yield encoded(digit, kind)
    for mode in ("1", "P", "LA", "RGBA", "I;16"):
        yield encoded(digit.convert(mode))
    yield encoded(digit, "JPEG", progressive=True)
    for compression in ("tiff_lzw", "tiff_deflate", "packbits"):
        yield encoded(digit, "TIFF", compression=compression)
    yield b"P2 4 2 15\n# no colour\n0 1 2 3 4 5 6 7\n"


def request_seeds() -> Iterator[bytes]:
    image = pb.Image(encoded=encoded(Image.fromarray(seven())))
    raw = pb.Image(raw=pb.RawImage(height=28, width=28, pixels=seven().tobytes()), polarity=pb.POLARITY_DARK_ON_LIGHT)
    requests = {
        "Classify": pb.ClassifyRequest(image=raw, model="mnist", top_k=3),
        "ClassifyBatch": pb.ClassifyBatchRequest(images=[image, pb.Image(), raw]),
        "ClassifyStream": pb.ClassifyStreamRequest(id=7, request=pb.ClassifyRequest(image=image)),
        "Embed": pb.EmbedRequest(image=image, model_version=1),
        "Compare": pb.CompareRequest(first=image, second=raw, method=pb.SIMILARITY_METHOD_SSIM),
        "ListModels": pb.ListModelsRequest(),
    }
    methods = [method.name for method in pb.DESCRIPTOR.services_by_name["ImageService"].methods]
    for name, request in requests.items():
        yield bytes((methods.index(name),)) + request.SerializeToString()


@pytest.mark.parametrize("seconds", [5, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize("target", ["image_path", "request_bytes"])
@pytest.mark.timeout(600)
def test_fuzzing_finds_nothing(target: str, seconds: int, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(image_seeds() if target == "image_path" else request_seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)
    options = {
        "max_total_time": seconds, "timeout": _HANG_SECONDS, "rss_limit_mb": _RSS_MEBI, "max_len": 4096,
        "artifact_prefix": f"{tmp_path}/", "print_final_stats": 1,
    }  # fmt: skip
    arguments = [str(corpus), *(f"-{name}={value}" for name, value in options.items())]
    ended = subprocess.run(
        [sys.executable, "-m", f"tests.fuzz.{target}", *arguments],
        cwd=ROOT, capture_output=True, text=True, errors="replace", timeout=500,
    )  # fmt: skip

    assert ended.returncode == 0, ended.stderr[-4000:]
    rss = [int(mebi) for mebi in _RSS.findall(ended.stderr)]
    assert len(rss) > 2, ended.stderr[-4000:]
    assert rss[-1] - rss[len(rss) // 2] <= _GROWTH_MEBI

"""
The model in BentoML, with its batching; runs in that peer's environment: ``on_bentoml.py MODEL PORT THREADS``.

Source: the pages "Adaptive batching" and "Define input and output types" of its documentation.
"""

import os
import sys
from pathlib import Path
from typing import Any

import bentoml  # type: ignore[import-not-found]  # in its environment alone
import numpy as np
import torch
from PIL import Image

MAX_BATCH_SIZE = 64
MAX_LATENCY_MS = 1000

_MODEL, _THREADS = "BENCHMARK_MODEL", "BENCHMARK_THREADS"


@bentoml.service(workers=1, traffic={"timeout": 60})
class Digits:
    """PNG in a form's field ``images`` in, its class out."""

    def __init__(self) -> None:
        torch.set_num_threads(int(os.environ[_THREADS]))
        self._model: Any = torch.jit.load(os.environ[_MODEL]).eval()  # type: ignore[no-untyped-call]  # so in torch

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH_SIZE, max_latency_ms=MAX_LATENCY_MS)  # type: ignore[untyped-decorator]  # unknown here
    def classify(self, images: list[Image.Image]) -> list[int]:
        """Run the model on images of several callers."""
        batch_NHW = np.stack([np.asarray(image.convert("L")) for image in images])
        with torch.inference_mode():
            labels: list[int] = self._model(torch.from_numpy(batch_NHW)[:, None])[0].argmax(1).tolist()
        return labels


if __name__ == "__main__":
    file, port, threads = sys.argv[1:]
    os.environ.update({_MODEL: file, _THREADS: threads, "BENTOML_DO_NOT_TRACK": "True"})
    here = Path(__file__)
    serve = ["serve", f"{here.stem}:Digits", "--working-dir", str(here.parent), "--host", "127.0.0.1", "--port", port]
    os.execv(sys.executable, [sys.executable, "-m", "bentoml", *serve])

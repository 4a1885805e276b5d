"""
The model in Ray Serve, with its batching; runs in that peer's environment: ``on_ray.py MODEL PORT THREADS``.

Source: the pages "Dynamic Request Batching" and "Performance Tuning" of its documentation.
"""

import io
import signal
import sys
from typing import Any

import numpy as np
import ray
import torch
from PIL import Image
from ray import serve
from starlette.requests import Request

MAX_BATCH_SIZE = 64
BATCH_SECONDS = 0.005
# Twice as many as there are callers: by default a replica takes 5, and could form no larger batch.
MAX_ONGOING = 128


@serve.deployment(num_replicas=1, max_ongoing_requests=MAX_ONGOING)
class Digits:
    """PNG as the body in, its class out."""

    def __init__(self, model: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._model: Any = torch.jit.load(model).eval()  # type: ignore[no-untyped-call]  # so in torch

    @serve.batch(max_batch_size=MAX_BATCH_SIZE, batch_wait_timeout_s=BATCH_SECONDS)
    async def classify(self, pngs: list[bytes]) -> list[int]:
        """Run the model on images of several callers."""
        batch_NHW = np.stack([np.asarray(Image.open(io.BytesIO(png)).convert("L")) for png in pngs])
        with torch.inference_mode():
            labels: list[int] = self._model(torch.from_numpy(batch_NHW)[:, None])[0].argmax(1).tolist()
        return labels

    async def __call__(self, request: Request) -> dict[str, int]:
        """Answer."""
        label: Any = self.classify(await request.body())
        return {"label": await label}


if __name__ == "__main__":
    file, port, threads = sys.argv[1:]
    stops = {signal.SIGTERM, signal.SIGINT}
    # Never one that runs here already.
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
    serve.run(Digits.bind(file, int(threads)))  # type: ignore[attr-defined]  # the decorator makes it one
    signal.pthread_sigmask(signal.SIG_BLOCK, stops)
    signal.sigwait(stops)
    ray.shutdown()

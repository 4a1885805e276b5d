"""
The model in LitServe, with its batching; runs in that peer's environment: ``on_litserve.py MODEL PORT THREADS``.

Source: the pages "Batching" and "LitAPI" of its documentation.
"""

import base64
import io
import sys
from collections.abc import Sequence
from typing import Any

import litserve as ls  # type: ignore[import-not-found]  # in its environment alone
import numpy as np
import torch
from fastapi import Request
from numpy.typing import NDArray
from PIL import Image

MAX_BATCH_SIZE = 64
BATCH_SECONDS = 0.005


class Digits(ls.LitAPI):  # type: ignore[misc]  # unknown here
    """PNG as base64 in JSON in, its class out."""

    def __init__(self, model: str, threads: int) -> None:
        super().__init__(max_batch_size=MAX_BATCH_SIZE, batch_timeout=BATCH_SECONDS)
        self._file = model
        self._threads = threads

    def setup(self, device: str) -> None:
        """Load the model, in the process that runs it."""
        torch.set_num_threads(self._threads)
        self._model: Any = torch.jit.load(self._file, map_location=device).eval()  # type: ignore[no-untyped-call]  # so in torch

    def decode_request(self, request: Request) -> NDArray[np.uint8]:
        """Read the image."""
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(request["image"]))).convert("L"))

    def batch(self, inputs: Sequence[NDArray[np.uint8]]) -> torch.Tensor:
        """Lay images behind each other."""
        return torch.from_numpy(np.stack(inputs))[:, None]

    def predict(self, image_N1HW: torch.Tensor) -> list[int]:
        """Run the model."""
        with torch.inference_mode():
            labels: list[int] = self._model(image_N1HW)[0].argmax(1).tolist()
        return labels

    def unbatch(self, output: list[int]) -> list[int]:
        """Give each its own."""
        return output

    def encode_response(self, output: int) -> dict[str, int]:
        """Answer."""
        return {"label": output}


if __name__ == "__main__":
    file, port, threads = sys.argv[1:]
    server = ls.LitServer(Digits(file, int(threads)), accelerator="cpu", workers_per_device=1, fast_queue=True)
    server.run(host="127.0.0.1", port=int(port), log_level="warning", generate_client_file=False)

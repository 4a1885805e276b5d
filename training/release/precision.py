"""In which arithmetic a network can be served, and which is fastest on this machine."""

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from training.model import IMAGE_SIZE

Precision = Literal["float32", "bfloat16", "float16"]
"""What a version can be served in."""

Choice = Literal["auto", "float32", "bfloat16", "float16", "int8"]
"""What can be asked for; int8 is refused, with the reason."""

DTYPES: Mapping[Precision, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

NO_INT8 = (
    "int8 is not offered: torch's quantization of TorchScript is deprecated and about to be removed, and what takes "
    "its place makes no TorchScript; allowed are auto, float32, bfloat16 and float16"
)

ANY_DEVICE = "any"
"""What a card says of a version that runs everywhere alike."""

BATCH_SIZES = (1, 64)
"""Where a candidate is measured: a lone image, and the largest batch that Triton forms."""

Served = Callable[[Tensor], tuple[Tensor, Tensor]]
Rates = Mapping[int, float]
"""Images a second by batch size."""

_ROUNDS = 5
_TURN_SECONDS = 0.05
# Slower by less than this is noise.
_NOISE = 0.05
# Decide what a processor does with 16-bit numbers by itself; torch's names, on x86 and on Arm.
_CPU_FEATURES = (
    "avx2",
    "avx512_f",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "amx_fp16",
    "neon_fp16",
    "arm_bf16",
    "sve",
)


def device_name(device: torch.device) -> str:
    """Return what a card says of a version made for ``device``; machines that run it alike have the same name."""
    if device.type == "cuda":
        return f"cuda/{torch.cuda.get_device_name(device)}"
    able = torch.cpu.get_capabilities()
    return "+".join([f"cpu/{platform.machine()}", *(name for name in _CPU_FEATURES if able.get(name))])


def measure(candidates: Mapping[Precision, Served], device: torch.device) -> dict[Precision, Rates]:
    """Return the rates of each candidate, medians of turns taken in a circle: machines are shared and noisy."""
    images = {
        size: torch.zeros((size, 1, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8, device=device) for size in BATCH_SIZES
    }
    seen: dict[tuple[Precision, int], list[float]] = {}
    with torch.inference_mode():
        # The first turn compiles.
        for number in range(_ROUNDS + 1):
            for precision, candidate in candidates.items():
                for size, image in images.items():
                    rate = _turn(candidate, image)
                    if number:
                        seen.setdefault((precision, size), []).append(rate)
    return {name: {size: statistics.median(seen[name, size]) for size in BATCH_SIZES} for name in candidates}


def by_speed(rates: Mapping[Precision, Rates]) -> Sequence[Precision]:
    """
    Return the candidates worth a try: the fastest in a large batch first, float32 last.

    One that is slower than float32 with a lone image, or in a large batch, is none.
    """
    base = rates["float32"]
    worthwhile = [
        name
        for name, rate in rates.items()
        if name != "float32" and all(rate[size] >= (1 - _NOISE) * base[size] for size in BATCH_SIZES)
    ]
    largest = max(BATCH_SIZES)
    return [*sorted(worthwhile, key=lambda name: -rates[name][largest]), "float32"]


def _turn(candidate: Served, image: Tensor) -> float:
    done = 0
    started = time.perf_counter()
    while (elapsed := time.perf_counter() - started) < _TURN_SECONDS or done == 0:
        candidate(image)
        done += len(image)
        if image.is_cuda:
            torch.cuda.synchronize(image.device)
    return done / elapsed

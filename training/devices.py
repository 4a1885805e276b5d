"""What the training runs on, and the arithmetic that is fast there."""

import os

import torch

from training.config import Precision


def device_of_choice() -> torch.device:
    """Return the GPU where torch sees one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def is_half(precision: Precision, device: torch.device) -> bool:
    """Return whether the step computes in bfloat16: asked for, or left to us and the processor is made for it."""
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # Without one of the two, bfloat16 on a CPU is slower than float32.
    able = torch.cpu.get_capabilities()
    return bool(able.get("amx_bf16") or able.get("avx512_bf16"))


def make_deterministic() -> None:
    """Have torch refuse what does not repeat to the bit, for the rest of this process."""
    # Read when cuBLAS starts, which has not happened yet; without it torch refuses matrix products on a GPU.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False

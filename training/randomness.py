"""The random generators that a run may draw from: seeded together, and kept in its checkpoints."""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed(number: int) -> None:
    """Seed the generators of Python, NumPy and torch, on all devices."""
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)


def seed_rank(number: int, *, rank: int, step: int) -> None:
    """Seed the generators of a rank other than the first: its own numbers, and others than before a restart."""
    words = np.random.SeedSequence([number, rank, step]).generate_state(2)
    seed(int(words[0]) << 32 | int(words[1]))


def tensors() -> dict[str, Tensor]:
    """Return the states of torch's generators: ``cpu`` and, where torch has drawn on GPUs, ``cuda0`` and so on."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda{number}": state for number, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def values() -> dict[str, Any]:
    """Return the states of Python's and NumPy's generators: plain values, fit for JSON."""
    legacy: Any = np.random.get_state(legacy=False)
    legacy["state"]["key"] = legacy["state"]["key"].tolist()
    version, numbers, gauss = random.getstate()
    return {"python": [version, list(numbers), gauss], "numpy": legacy}


def restore(tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Set all generators to what :func:`tensors` and :func:`values` gave; a GPU that is not here is passed over."""
    torch.set_rng_state(tensors["cpu"])
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            if f"cuda{number}" in tensors:
                torch.cuda.set_rng_state(tensors[f"cuda{number}"], number)
    version, numbers, gauss = values["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(values["numpy"] | {"state": {**values["numpy"]["state"]}})

"""From a trained network to ``model.pt``, the TorchScript that Triton serves."""

import warnings
from pathlib import Path

import torch

from training.errors import ExportError
from training.model import IMAGE_SIZE, Network, ServedNetwork

TOLERANCE = 1e-5
"""Largest difference allowed between TorchScript and the network it was made from."""


def export(network: Network, path: Path) -> None:
    """
    Write ``network`` as TorchScript: uint8 image in, probabilities and unit-length embedding out.

    The file is read back and compared with the network before this returns.

    Args:
        network: Any device; the file holds float32 weights for the CPU and loads on any device.
        path: Written anew; its folder exists.

    Raises:
        ExportError: The file answers differently by more than :data:`TOLERANCE`.
    """
    served = ServedNetwork(network.cpu().float()).eval()
    with warnings.catch_warnings():
        # TorchScript is what Triton's libtorch serves; torch announces its end at each use.
        warnings.filterwarnings("ignore", message=".*torch.jit.*", category=DeprecationWarning)
        torch.jit.script(served).save(str(path))  # type: ignore[no-untyped-call]  # so in torch's stubs
        loaded = torch.jit.load(str(path))  # type: ignore[no-untyped-call]
    image = torch.randint(0, 256, (8, 1, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8)
    with torch.inference_mode():
        for name, ours, theirs in zip(("probabilities", "embedding"), served(image), loaded(image), strict=True):
            difference = (ours - theirs).abs().max().item()
            if not difference <= TOLERANCE:  # also refuses NaN
                raise ExportError(
                    f"{path}: {name} differ from the network's by {difference:.2g}, allowed is {TOLERANCE}"
                )

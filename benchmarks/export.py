"""
``python -m benchmarks.export``: the exported model in each precision beside plain float32 TorchScript.

Weights are random: speed does not depend on them. What precision does to accuracy is judged at every export.
"""

import statistics
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.interleaved import Spread
from benchmarks.report import RATES, RESULTS, figures, met, publish, surroundings, table
from training.devices import device_of_choice
from training.model import IMAGE_SIZE, Network, ServedNetwork
from training.release.export import load_served, save
from training.release.precision import BATCH_SIZES, DTYPES, Served, by_speed, device_name

ROUNDS = 7
SECONDS = 0.5
PLAIN = "plain"
UNPACKED = "bfloat16, as saved"
SIZES = (1, 8, 16, 32, 64)
"""Images in a batch; those between the ends are what a gateway puts together."""
ASKED = {1: 1.0, 64: 3.0}
"""Rate of what ``auto`` takes over that of plain float32, by batch size."""

Rates = Mapping[str, Mapping[int, list[float]]]
"""Images a second of each turn, by contender and batch size."""


class Plain(nn.Module):
    """The network as one would serve it without further thought."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the served network does."""
        features_ND = self.network.features(image.float() / 255.0)
        return F.softmax(self.network.output(features_ND), dim=1), F.normalize(features_ND, dim=1)


def main() -> None:
    """Measure, print and write ``benchmarks/results/export.md``."""
    device = device_of_choice()
    torch.manual_seed(0)
    network = Network().eval()
    contenders = {PLAIN: plain(network, device), UNPACKED: unpacked(network, device)}
    contenders |= {name: served(network, name, device) for name in DTYPES}
    publish(report(measure(contenders, device), device), RESULTS / "export.md")


def plain(network: Network, device: torch.device) -> Served:
    """Return frozen float32 TorchScript in torch's own memory layout."""
    with warnings.catch_warnings():
        # torch announces the end of TorchScript at each use.
        warnings.filterwarnings("ignore", message=".*torch.jit.*", category=DeprecationWarning)
        frozen: Served = torch.jit.freeze(torch.jit.script(Plain(network).to(device).eval()))
    return frozen


def served(network: Network, precision: str, device: torch.device) -> Served:
    """Return the export in a precision, read back and prepared as Triton's backend does it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        save(ServedNetwork(network, dtype=getattr(torch, precision)), path)
        return load_served(path, device)


def unpacked(network: Network, device: torch.device) -> Served:
    """Return the export in bfloat16 as it is in its file, whose weights oneDNN lays out anew at every call."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.*", category=DeprecationWarning)
        path = Path(folder) / "model.pt"
        save(ServedNetwork(network, dtype=torch.bfloat16), path)
        loaded: Served = torch.jit.load(path, map_location=device)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return loaded


def measure(contenders: Mapping[str, Served], device: torch.device) -> Rates:
    """Give each contender its turn, with each batch size, again and again; the first round does not count."""
    images = {size: torch.zeros((size, 1, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8, device=device) for size in SIZES}
    rates: dict[str, dict[int, list[float]]] = {name: {size: [] for size in images} for name in contenders}
    with torch.inference_mode():
        for number in range(ROUNDS + 1):
            for name, contender in contenders.items():
                for size, image in images.items():
                    rate = turn(contender, image)
                    if number:
                        rates[name][size].append(rate)
    return rates


def turn(contender: Served, image: Tensor) -> float:
    """Work for a while; return images a second."""
    done = 0
    started = time.perf_counter()
    while time.perf_counter() - started < SECONDS:
        contender(image)
        if image.is_cuda:
            torch.cuda.synchronize()
        done += len(image)
    return done / (time.perf_counter() - started)


def report(rates: Rates, device: torch.device) -> str:
    """Return the tables."""
    medians = {name: {size: statistics.median(seen) for size, seen in of.items()} for name, of in rates.items()}
    taken = by_speed({name: {size: medians[name][size] for size in BATCH_SIZES} for name in DTYPES})[0]
    lines = [
        "# The exported model",
        "",
        surroundings("python -m benchmarks.export", ("torch",)),
        f"Device {device_name(device)}, {torch.get_num_threads()} threads; {ROUNDS} turns of {SECONDS:g} s each, taken "
        "in a circle. `plain` is frozen float32 TorchScript in torch's own memory layout; the others are exports, as "
        f"Triton's backend runs them, but for `{UNPACKED}`, which is not prepared for it. `--precision auto` would "
        f"take {taken}, were it to pass its accuracy gate.",
        "",
    ]
    for size in SIZES:
        header = (f"batches of {size}: images", *RATES, "factor, median", "lowest", "highest", "asked")
        lines += [table(header, (_row(rates, name, size, is_taken=name == taken) for name in rates)), ""]
    return "\n".join(lines)


def _row(rates: Rates, name: str, size: int, *, is_taken: bool) -> list[str]:
    pairs = zip(rates[name][size], rates[PLAIN][size], strict=True)
    factor = Spread.of([ours / theirs for ours, theirs in pairs])
    asked = met(factor.median, least=ASKED[size]) if is_taken and size in ASKED else ""
    return [name, *figures(Spread.of(rates[name][size])), *figures(factor, 2), asked]


if __name__ == "__main__":
    main()

"""One rank of several that takes samples of its own through norms, and prints what these have counted."""

import json

import torch

from training.model import Network
from training.ranks import gathered

if __name__ == "__main__":
    with gathered() as ranks:
        torch.manual_seed(0)
        network = Network(10, batch_norm=True).train()
        forward = ranks.spread(network)
        torch.manual_seed(ranks.rank)
        for number in range(3):
            # As many as the other rank has, one less, none.
            forward(torch.rand(2 - number * ranks.rank, 1, 28, 28)).sum().backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        buffers = {name: buffer.tolist() for name, buffer in network.named_buffers()}
        # Kept under its former name, too.
        print(json.dumps({"sent": getattr(forward, "broadcast_buffers", None), "buffers": buffers}))

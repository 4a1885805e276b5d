import itertools

import pytest
import torch

from benchmarks.augmenting import WAYS


@pytest.fixture
def blob() -> torch.Tensor:
    """A soft spot off the centre: edges would tell more of rounding than of geometry."""
    rows, columns = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    return (255 * torch.exp(-((rows - 10) ** 2 + (columns - 17) ** 2) / 20)).to(torch.uint8)


@pytest.mark.parametrize(("first", "second"), [*itertools.combinations(WAYS, 2)])
def test_ways_give_the_same_image(blob: torch.Tensor, first: str, second: str) -> None:
    to_old = [0.95, 0.2, -1.5, -0.1, 1.05, 2.25]

    difference = WAYS[first](blob, to_old).int() - WAYS[second](blob, to_old).int()

    assert difference.abs().max() <= 4


@pytest.mark.parametrize("way", WAYS)
def test_map_goes_from_new_pixels_to_old_ones(blob: torch.Tensor, way: str) -> None:
    moved = WAYS[way](blob, [1, 0, 3, 0, 1, -2])

    assert torch.equal(moved[2:, :-3], blob[:-2, 3:])

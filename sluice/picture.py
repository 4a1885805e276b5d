"""Digits and tables for a terminal."""

import numpy as np
import numpy.typing as npt
from rich.table import Table
from rich.text import Text

_SHADES = " .:-=+*#%@"


def digit(image: npt.NDArray[np.uint8], *, colour: bool) -> Text:
    """
    Draw an image two pixels a character: grey half blocks in colour, shades of ASCII without.

    Args:
        image: uint8 [H, W], ink bright on dark.
        colour: Whether the terminal shows true colours.
    """
    rows = image[: len(image) // 2 * 2].reshape(-1, 2, image.shape[1])  # [H/2, 2, W]
    if not colour:
        levels = rows.max(axis=1).astype(int) * (len(_SHADES) - 1) // 255
        return Text("\n".join("".join(_SHADES[level] for level in row) for row in levels))
    text = Text()
    for number, (upper, lower) in enumerate(rows):
        if number:
            text.append("\n")
        for above, below in zip(upper.tolist(), lower.tolist(), strict=True):
            text.append("▀", style=f"rgb({above},{above},{above}) on rgb({below},{below},{below})")
    return text


def confusion(counts: npt.NDArray[np.int64], names: list[str]) -> Table:
    """
    Return a table of counts, rows true and columns predicted classes; zeros are left blank.

    Args:
        counts: [K, K].
        names: By class, K of them.
    """
    table = Table(box=None)
    table.add_column("", style="bold", justify="right")
    for name in names:
        table.add_column(name, justify="right", header_style="bold")
    for name, row in zip(names, counts.tolist(), strict=True):
        table.add_row(name, *("" if count == 0 else str(count) for count in row))
    return table

"""
Feed bytes to the image path: ``python -m tests.fuzz.image_path FOLDER_OF_SEEDS -max_total_time=60``.

Options are libFuzzer's. Whatever is not an image has to be refused as such, and whatever is one has to be framed.
"""

import importlib
import sys
import warnings
from typing import Any

import numpy as np

atheris: Any = importlib.import_module("atheris")  # has no types, and no wheel for every Python

with atheris.instrument_imports(include=["gateway", "imaging", "PIL"]):
    from gateway.errors import InvalidImageError
    from gateway.images import Limits, open_encoded
    from imaging.framing import Manner

LIMITS = Limits(max_bytes=1 << 20, max_pixels=1 << 20)
MANNERS = (Manner(), Manner("light_on_dark", "center"), Manner("dark_on_light", "stretch"))


def one(data: bytes) -> None:
    """Frame one file in every manner, or have it refused."""
    try:
        for manner in MANNERS:
            framed = open_encoded(data, LIMITS).frame(manner)
            assert framed.shape == (28, 28)
            assert framed.dtype == np.uint8
    except InvalidImageError as error:
        if error.field != "encoded" or " at 0x" in error.reason:
            raise AssertionError(str(error)) from error


if __name__ == "__main__":
    # Of a server these go nowhere.
    warnings.simplefilter("ignore")
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()

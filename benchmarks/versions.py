"""The model that is measured: a version in the model repository, or a folder like one."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from rpc.settings import load
from serving.settings import TritonSettings

MODEL = "mnist"
PRECISIONS = ("bfloat16", "float32")

_NUMBER = re.compile(r"[1-9][0-9]*")


class NoVersionError(RuntimeError):
    """There is no such model to measure; the message says how to make one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Version:
    """A folder with ``model.pt`` and ``card.json``, and ``config.pbtxt`` beside it."""

    folder: Path
    precision: str
    """As its card says."""

    @property
    def file(self) -> Path:
        """The TorchScript."""
        return self.folder / "model.pt"

    @property
    def config(self) -> str:
        """What Triton is told about the model."""
        return (self.folder.parent / "config.pbtxt").read_text()


def version_at(folder: Path) -> Version:
    """
    Return the version in a folder, whatever its model is called.

    Raises:
        NoVersionError: There is none.
    """
    for needed in (folder / "model.pt", folder / "card.json", folder.parent / "config.pbtxt"):
        if not needed.is_file():
            raise NoVersionError(f"{folder} is no version of a model: there is no {needed}")
    return Version(
        folder=folder.resolve(), precision=json.loads((folder / "card.json").read_text()).get("precision", "float32")
    )


def newest(precision: str | None = None) -> Version:
    """
    Return the newest version of the model in the repository that the settings name.

    Args:
        precision: In which it has to be; None takes any.

    Raises:
        NoVersionError: There is none.
    """
    model = load(TritonSettings).model_repository / MODEL
    numbers = [int(entry.name) for entry in model.glob("*") if _NUMBER.fullmatch(entry.name)]
    for number in sorted(numbers, reverse=True):
        version = version_at(model / str(number))
        if precision in (None, version.precision):
            return version
    if precision is None:
        raise NoVersionError(f"no model to measure in {model}: `make demo` or `sluice train` makes one, or --model")
    raise NoVersionError(
        f"no model in {precision} in {model}: `sluice publish RUN --precision {precision}` makes one, or --{precision}"
    )

"""Exit 0 when this environment already holds a torch that pyproject.toml accepts, so that it is kept."""

import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
wanted = next(
    requirement
    for requirement in map(Requirement, project["optional-dependencies"]["training"])
    if requirement.name == "torch"
)
try:
    installed = version("torch")
except PackageNotFoundError:
    sys.exit(1)
sys.exit(0 if wanted.specifier.contains(installed) else 1)

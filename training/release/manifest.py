"""
What a version's folder has to hold, byte for byte: ``manifest.json`` over the other files.

It tells damage and mix-ups, not forgery: whoever may write the folder may write the manifest. Standard library only,
so that whoever serves can check without what training needs.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from training.errors import ManifestError

MODEL, CARD, GOLDEN, MANIFEST = "model.pt", "card.json", "golden.safetensors", "manifest.json"
FILES = (MODEL, CARD, GOLDEN)
"""What a manifest covers."""


def sha256(path: Path) -> str:
    """Return the hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(folder: Path, *, model: str, version: int) -> None:
    """
    Write the manifest of a folder that holds all of :data:`FILES`.

    Args:
        folder: Of the version, or where it is put together.
        model: Name of the model.
        version: 0 for one that has no number yet.
    """
    files = {name: {"sha256": sha256(folder / name), "bytes": (folder / name).stat().st_size} for name in FILES}
    content = {"schema": 1, "model": model, "version": version, "files": files}
    (folder / MANIFEST).write_text(json.dumps(content, indent=2) + "\n")


def verify(folder: Path, *, model: str | None = None, version: int | None = None) -> None:
    """
    Check every file of a version against what was written down about it.

    A version without a manifest, from before there were any or made by hand, is held to the digest in its card; one
    without either passes.

    Args:
        folder: Of the version.
        model: Name that it has to be of; none takes any.
        version: Number that it has to be of; none takes any.

    Raises:
        ManifestError: Names the first file that is missing or differs, or whose version this is instead.
        OSError: A file cannot be read.
    """
    if not (folder / MANIFEST).exists():
        _verify_by_card(folder)
        return
    content = _read(folder / MANIFEST)
    meant = content.get("model"), content.get("version")
    if (model, version) != (None, None) and meant != (model, version):
        raise ManifestError(f"{folder}: its manifest is that of {meant[0]} version {meant[1]}")
    files = content.get("files")
    if not isinstance(files, dict) or not set(FILES) <= set(files):
        raise ManifestError(f"{folder / MANIFEST}: does not name all of {', '.join(FILES)}")
    for name, expected in files.items():
        _verify_file(folder / name, expected)


def _verify_by_card(folder: Path) -> None:
    if (folder / CARD).exists() and (digest := _read(folder / CARD).get("digest")):
        _verify_file(folder / MODEL, {"sha256": str(digest).removeprefix("sha256:")})


def _verify_file(path: Path, expected: Any) -> None:
    if not path.is_file():
        raise ManifestError(f"{path}: missing, though the manifest names it")
    found = path.stat().st_size
    if (size := expected.get("bytes", found)) != found:
        raise ManifestError(f"{path}: {found} bytes, by its manifest {size}")
    if sha256(path) != expected.get("sha256"):
        raise ManifestError(f"{path}: not what was published: its SHA-256 differs from the manifest's")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ManifestError(f"{path}: no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ManifestError(f"{path}: no JSON object")
    return content

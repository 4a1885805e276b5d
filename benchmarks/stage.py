"""What the benchmarks of the streamer read from: the same samples in files, from a streamer, and from a bare server."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks import digits, reading
from benchmarks.bare import bare_server, write_recording
from rpc.settings import load
from sluice.line import streamer_service
from sluice.ports import settings_with_free_ports
from sluice.supervisor import Supervisor
from streamer.settings import StreamerSettings
from streamer.sources.datasets import cached
from streamer.sources.declarations import declaration_of
from streamer.sources.idx import unpack

BATCH_SIZE = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """Where things are."""

    folder: Path
    """Temporary."""
    data: Path
    """Folder of MNIST's IDX files, unpacked."""
    data_name: str
    """What they are, in words."""
    num_train: int
    streamer: str
    streamer_process: int
    bare: str
    bare_process: int


@asynccontextmanager
async def stage(folder: Path, *, num_train: int, num_test: int) -> AsyncIterator[Stage]:
    """
    Write the data, and run both servers until this is left.

    Args:
        folder: For everything that is written.
        num_train: Samples to make up where ``SLUICE_DATA`` names no folder with MNIST.
        num_test: Likewise, for the other split.

    Raises:
        sluice.supervisor.ServiceError: The streamer did not get ready.
        streamer.errors.DataError: The files that ``SLUICE_DATA`` names are no good.
    """
    data = folder / "data"
    data.mkdir()
    name = f"{num_train:,} samples made up, of MNIST's size"
    if not _copy(data):
        digits.write_mnist(data, num_train=num_train, num_test=num_test)
    else:
        name = "MNIST"
        num_train = digits.NUM_TRAIN
    settings = settings_with_free_ports().model_copy(update={"data": data, "logs": folder / "logs"})
    async with Supervisor(settings.logs, print) as supervisor:
        streamer = await supervisor.start(streamer_service(settings))
        batches, samples = folder / "batches", folder / "samples"
        write_recording(batches, await reading.record_batches(streamer, BATCH_SIZE))
        write_recording(samples, await reading.record_samples(streamer))
        with bare_server({reading.BATCH_METHOD: batches, reading.SEED_METHOD: samples}) as bare:
            yield Stage(
                folder=folder,
                data=data,
                data_name=name,
                num_train=num_train,
                streamer=streamer,
                streamer_process=supervisor.pid("streamer"),
                bare=bare.address,
                bare_process=bare.process_id,
            )


def _copy(data: Path) -> bool:
    """Unpack the files that the environment names into ``data``; False where it names none."""
    settings = load(StreamerSettings)
    if settings.data is None:
        return False
    files = cached("mnist", data=settings.data, cache=settings.cache)
    assert files is not None  # a folder that is named is never passed over
    for split, names in declaration_of("mnist").names.items():
        for source, name in ((files.splits[split].images, names.images), (files.splits[split].labels, names.labels)):
            (data / name).write_bytes(unpack(source.read_bytes(), file=str(source)))
    return True

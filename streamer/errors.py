"""
What can go wrong between a data set's files and a reader, by cause.

:class:`DataError` and its kin are for whoever runs the streamer, :class:`PlanError` for whoever sent a
request, :class:`ReaderError` for whoever reads. Each message says what is wrong, where, and what is allowed.
"""

from collections.abc import Iterable
from pathlib import Path


class StreamerError(Exception):
    """Base of everything raised here on purpose."""

    @property
    def public(self) -> str:
        """What a reader is told: the message, without where things lie on the streamer and behind it."""
        return str(self)


class DataError(StreamerError):
    """
    A file of a data set is not what it should be.

    Attributes:
        file: The file at fault.
        expected: What it should hold.
        found: What it holds.
    """

    def __init__(self, file: Path | str, *, expected: str, found: str, remedy: str = "") -> None:
        self.file = Path(file)
        self.expected = expected
        self.found = found
        self._folder = str(file).rpartition("/")[0]
        super().__init__(f"{file}: expected {expected}, found {found}" + (f"; {remedy}" if remedy else ""))

    @property
    def public(self) -> str:
        """The message with the file's name alone: a reader can name it to whoever runs the streamer."""
        return str(self).replace(f"{self._folder}/", "") if self._folder else str(self)


class DataLossError(DataError):
    """
    Bytes of a data set are not those that were written, and no other copy of them can be had.

    Attributes:
        place: The file or object at fault, as a path or URL.
        first_byte: Where the damaged range begins in it.
        last_byte: Where it ends, inclusive.
    """

    def __init__(self, place: Path | str, first_byte: int, last_byte: int, *, expected: str, found: str) -> None:
        super().__init__(f"{place}, bytes {first_byte}-{last_byte}", expected=expected, found=found)
        self.file = Path(place)
        self.place = str(place)
        self.first_byte = first_byte
        self.last_byte = last_byte


class StorageError(StreamerError):
    """
    The object storage refused, or did not answer in time.

    Attributes:
        place: URL of the object.
        is_refusal: True where asking again is of no use: no such object, or no right to it.
    """

    def __init__(self, place: str, problem: str, *, is_refusal: bool = False) -> None:
        self.place = place
        self.is_refusal = is_refusal
        super().__init__(f"{place}: {problem}")

    @property
    def public(self) -> str:
        """The object's name alone: the problem is told in words of the storage's, addresses among them."""
        name = self.place.rpartition("/")[2]
        return f"{name}: cannot be read{'' if self.is_refusal else ' at the moment'}; the streamer's log says why"


class NoObjectError(StorageError):
    """There is no such object, or no such bucket."""

    def __init__(self, place: str, problem: str) -> None:
        super().__init__(place, problem, is_refusal=True)


class MirrorError(StreamerError):
    """One source of a data set gave no usable file; the next one is tried."""

    def __init__(self, source: str, problem: str) -> None:
        self.source = source
        self.problem = problem
        super().__init__(f"{source}: {problem}")


class NoDataError(StreamerError):
    """No source has the data set; the message lists what was tried and how to give a folder."""

    def __init__(self, name: str, attempts: Iterable[MirrorError]) -> None:
        self.attempts = tuple(attempts)
        tried = "; ".join(str(attempt) for attempt in self.attempts)
        super().__init__(
            f"data set {name}: no source has it ({tried}); "
            "set SLUICE_DATA to a folder that holds its four IDX files, or try again when online"
        )


class CacheError(StreamerError):
    """
    The cache cannot be written to.

    Attributes:
        folder: The one that was to be filled.
    """

    def __init__(self, folder: Path, problem: str) -> None:
        self.folder = folder
        super().__init__(
            f"cannot write to {folder}: {problem}; the cache needs a folder of yours with room, set SLUICE_CACHE to one"
        )


class PlanError(StreamerError):
    """A request cannot be served as it stands."""


class UnknownDatasetError(PlanError):
    """No data set of that name."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        self.name = name
        super().__init__(f"dataset: there is no {name[:64]!r}; known are {', '.join(sorted(known)) or 'none'}")


class InvalidPlanError(PlanError):
    """A field of the request is missing or out of range; ``field`` names it."""

    def __init__(self, field: str, problem: str) -> None:
        self.field = field
        super().__init__(f"{field}: {problem}")


class DamagedRequestError(PlanError):
    """A request is not the one that its reader sent."""

    def __init__(self, *, sent: str, found: str) -> None:
        super().__init__(
            f"request: CRC-32C is {found}, its reader says {sent[:16]!r}: it was damaged on its way; send it again"
        )


class PositionError(PlanError):
    """A stream was asked for beyond its end."""

    def __init__(self, field: str, value: int, length: int) -> None:
        self.field = field
        super().__init__(f"{field}: {value} lies past the end; 0 to {length} are allowed")


class FingerprintMismatchError(PlanError):
    """The reader pinned other data than this streamer serves."""


class TooManyStreamsError(PlanError):
    """All streams this replica may serve at once are taken."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        super().__init__(
            f"this streamer serves {limit} streams at once and all are taken; "
            "close one, ask another replica, or raise SLUICE_STREAMER_MAX_STREAMS there"
        )


class TransformError(StreamerError):
    """
    A transform failed on a sample.

    Attributes:
        index: The sample's in its split.
        problem: What happened.
    """

    def __init__(self, index: int, problem: str) -> None:
        self.index = index
        self.problem = problem
        super().__init__(f"sample {index}: {problem}")


class IdleReaderError(PlanError):
    """A reader did nothing for longer than its stream is kept for it."""

    def __init__(self, awaited: str, idle_seconds: float) -> None:
        super().__init__(f"no {awaited} within {idle_seconds:g} s; open the stream again at the batch you need next")


class GoingAwayError(PlanError):
    """The replica drains, and the reader has not begun."""

    def __init__(self) -> None:
        super().__init__("this replica is going away; open the stream on another")


class TransformPoolError(StreamerError):
    """The processes that transform samples are gone, or do not start or answer."""


class ReaderError(StreamerError):
    """Reading from a streamer failed."""


class UnreachableError(ReaderError):
    """Nothing usable answers at the address, or it stopped answering for longer than the reader waits."""

    def __init__(self, address: str, problem: str) -> None:
        self.address = address
        super().__init__(
            f"no streamer answers at {address}: {problem}; "
            "check that `sluice streamer` runs there and that host and port are right"
        )


class RefusedError(ReaderError):
    """
    The streamer answered, and refused.

    Attributes:
        status: Name of the gRPC status, e.g. ``NOT_FOUND``.
    """

    def __init__(self, address: str, status: str, message: str) -> None:
        self.address = address
        self.status = status
        super().__init__(f"the streamer at {address} refused ({status}): {message}")


class DataChangedError(RefusedError):
    """The streamer serves other data than the reader began with: its cursor means nothing there."""


class SampleCorruptError(ReaderError):
    """A batch arrived damaged or out of place, time and again; ``position`` is where it begins."""

    def __init__(self, address: str, position: int, problem: str) -> None:
        self.address = address
        self.position = position
        super().__init__(f"the streamer at {address}: batch at position {position}: {problem}")

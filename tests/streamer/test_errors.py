"""What readers are told of errors, and what stays with whoever runs the streamer."""

import pytest

from streamer.errors import DataError, DataLossError, NoObjectError, PositionError, StorageError, StreamerError


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            DataError("/srv/own/a.records", expected="a readable file", found="[Errno 5] I/O: '/srv/own/a.records'"),
            "a.records: expected a readable file, found [Errno 5] I/O: 'a.records'",
        ),
        (
            DataLossError("s3://bucket/own/a.records", 3, 9, expected="SHA-256 1a", found="2b"),
            "a.records, bytes 3-9: expected SHA-256 1a, found 2b",
        ),
        (
            StorageError("s3://bucket/own/a.records", "connect error for url http://10.0.0.1:8333/bucket"),
            "a.records: cannot be read at the moment; the streamer's log says why",
        ),
        (
            NoObjectError("s3://bucket/own/a.records", "404 http://10.0.0.1:8333/bucket"),
            "a.records: cannot be read; the streamer's log says why",
        ),
        (DataError("a.records", expected="1/2", found="2/2"), "a.records: expected 1/2, found 2/2"),
        (PositionError("start", 7, 5), "start: 7 lies past the end; 0 to 5 are allowed"),
    ],
    ids=["file", "bytes", "storage", "refusal", "no folder", "request"],
)
def test_readers_are_told_names_and_no_places(error: StreamerError, told: str) -> None:
    assert error.public == told

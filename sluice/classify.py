"""``sluice classify``: files in, one line each out."""

import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from gateway.client import Classification, ClientError, ClientTls, ImageClient

_BATCH = 64
# The file's name says it better.
_PLACE_IN_BATCH = re.compile(r"^images\[\d+\](\.\w+)?: ")


async def run(
    files: Sequence[Path],
    *,
    server: str,
    model: str,
    as_json: bool,
    verbose: bool = False,
    tls: ClientTls | None = None,
    api_key: str | None = None,
) -> bool:
    """
    Print class and probability for each file, in order; return whether any failed.

    Args:
        files: Images, asked 64 at a time.
        server: Address of the gateway.
        model: Empty is the gateway's default.
        as_json: A JSON object a line.
        verbose: Tell on standard error where the time of each call went at the gateway.
        tls: How to know the gateway.
        api_key: To show it.

    Raises:
        gateway.client.ClientError: The gateway cannot be asked at all.
    """
    failed = False
    async with ImageClient(server, tls=tls, api_key=api_key) as client:
        for batch in _batches(files):
            unreadable = {path: error for path in batch if (error := _why_unreadable(path)) is not None}
            asked = [path for path in batch if path not in unreadable]
            answers = dict(zip(asked, await client.classify_batch(asked, model=model) if asked else [], strict=True))
            for path in batch:
                answer = unreadable.get(path) or answers[path]
                failed |= isinstance(answer, str | ClientError)
                _print(path, answer, as_json=as_json)
            if verbose:
                _print_timings(answers.values())
    return failed


def _print_timings(answers: Iterable[Classification | ClientError]) -> None:
    timings = {
        answer.timing.request_id: answer.timing
        for answer in answers
        if isinstance(answer, Classification) and answer.timing is not None
    }
    for request_id, timing in timings.items():
        stages = ", ".join(f"{stage} {value:.2f} ms" for stage, value in timing.milliseconds.items())
        print(f"call {request_id}: {stages}; left in a batch of {timing.num_shared}", file=sys.stderr)


def _print(path: Path, answer: Classification | ClientError | str, *, as_json: bool) -> None:
    if isinstance(answer, Classification):
        row = {
            "file": str(path),
            "label": answer.label,
            "name": answer.name,
            "probability": answer.probability,
            "model": answer.model,
            "version": answer.version,
        }
        print(json.dumps(row) if as_json else f"{path}: {answer.name} ({answer.probability:.1%})")
        return
    reason = _PLACE_IN_BATCH.sub("", str(answer))
    if as_json:
        print(json.dumps({"file": str(path), "error": reason}))
    else:
        print(f"{path}: {reason}", file=sys.stderr)


def _why_unreadable(path: Path) -> str | None:
    try:
        with path.open("rb"):
            return None
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _batches(files: Sequence[Path]) -> Iterator[Sequence[Path]]:
    for start in range(0, len(files), _BATCH):
        yield files[start : start + _BATCH]

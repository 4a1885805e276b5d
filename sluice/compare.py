"""``sluice compare``: two files in, how alike they are out."""

import json
import re
from dataclasses import asdict
from pathlib import Path

from gateway.client import ClientTls, ImageClient, InvalidInputError, SimilarityMethod

# The file's name says it better.
_PLACE = re.compile(r"^(first|second)(\.\w+)*: ")


async def run(
    first: Path,
    second: Path,
    *,
    server: str,
    model: str,
    method: SimilarityMethod,
    as_json: bool,
    tls: ClientTls | None = None,
    api_key: str | None = None,
) -> None:
    """
    Print the score of two images and how it was found.

    Raises:
        gateway.client.ClientError: A file is no image, which is named, or the gateway cannot answer.
        OSError: A file cannot be read.
    """
    async with ImageClient(server, tls=tls, api_key=api_key) as client:
        try:
            comparison = await client.compare(first, second, model=model, method=method)
        except InvalidInputError as error:
            place = _PLACE.match(str(error))
            if place is None:
                raise
            path = {"first": first, "second": second}[place[1]]
            raise InvalidInputError(f"{path}: {str(error)[place.end() :]}") from error
    if as_json:
        print(json.dumps({"first": str(first), "second": str(second), **asdict(comparison)}))
        return
    how = comparison.method.replace("_", " ")
    print(f"{comparison.score:.4f}  ({how}, {comparison.model} version {comparison.version})")

"""Commands that make and remove the API keys of a gateway."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer

from gateway.settings import GatewaySettings
from rpc.settings import SettingsError, load, variable_of

KeysFile = Annotated[
    Path | None, typer.Option("--file", help="The keys file; by default the one in the gateway's settings.")
]


def add(
    name: Annotated[str, typer.Argument(help="Whose key it is, for logs and fair shares.")],
    scopes: Annotated[
        str, typer.Option(help="What it opens, with commas between: classify, compare, embed, models, triton.")
    ],
    days: Annotated[
        int | None, typer.Option(min=1, max=36_500, help="Days until it expires; by default never.")
    ] = None,
    file: KeysFile = None,
) -> None:
    """Make a key and print it, once: the file keeps only what tells it from others. Servers take it within a second."""
    from rpc.keys import add_key

    lifetime = None if days is None else timedelta(days=days)
    print(add_key(file or _configured(), name, _known(scopes), lifetime=lifetime))


def list_keys(file: KeysFile = None) -> None:
    """Print name, id, scopes, and when each key was made and expires."""
    from rpc.keys import load_keys

    now = datetime.now(UTC)
    for key in load_keys(file or _configured()):
        ends = "never expires" if key.expires is None else f"expires {key.expires:%Y-%m-%d}"
        if key.expires is not None and key.expires <= now:
            ends = f"expired {key.expires:%Y-%m-%d}"
        print(f"{key.name}\t{key.id}\t{','.join(sorted(key.scopes))}\tmade {key.created:%Y-%m-%d}\t{ends}")


def remove(
    name: Annotated[str, typer.Argument(help="The key's name, as `sluice keys list` prints it.")], file: KeysFile = None
) -> None:
    """Remove a key: servers refuse it within a second."""
    from rpc.keys import remove_key

    remove_key(file or _configured(), name)


def _known(scopes: str) -> set[str]:
    from gateway.scopes import SCOPES

    given = {scope.strip() for scope in scopes.split(",")}
    unknown = sorted(given.difference(SCOPES))
    if unknown:
        raise SettingsError(f"--scopes {scopes}: no scope {unknown[0]!r}; allowed are {', '.join(SCOPES)}")
    return given


def _configured() -> Path:
    path = load(GatewaySettings).keys_file
    if path is None:
        raise SettingsError(
            f"there is no keys file: name it with --file, or for the gateway too with "
            f"{variable_of(GatewaySettings, 'keys_file')}"
        )
    return path

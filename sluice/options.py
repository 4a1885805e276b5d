"""
Options that several commands have, and every setting as one.

A section's fields are the one place that names its settings.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import typer

from rpc.settings import Settings, load, variable_of
from sluice.access import KEY_VARIABLE, Access

AnySettings = TypeVar("AnySettings", bound=Settings)

StreamerAddress = Annotated[
    str | None, typer.Option(help="Address of the streamer, host:port; by default where its settings put it.")
]
GatewayAddress = Annotated[
    str | None, typer.Option(help="Address of the gateway, host:port; by default where its settings put it.")
]
LoadingTriton = Annotated[
    str | None, typer.Option(help="Triton to load the new version, host:port; by default one that answers here.")
]
TellsTriton = Annotated[bool, typer.Option(help="Whether to have a Triton load the new version.")]
JsonObject = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
_ACCESS: dict[str, Any] = {
    "tls": Annotated[
        bool,
        typer.Option("--tls", envvar="SLUICE_TLS", help="TLS, trusting the system's authorities where none is given."),
    ],
    "tls_ca": Annotated[
        Path | None,
        typer.Option("--tls-ca", envvar="SLUICE_TLS_CA", help="PEM file of the authorities to trust; means --tls."),
    ],
    "tls_cert": Annotated[
        Path | None,
        typer.Option("--tls-cert", envvar="SLUICE_TLS_CERT", help="PEM file of the own certificate; means --tls."),
    ],
    "tls_key": Annotated[
        Path | None, typer.Option("--tls-key", envvar="SLUICE_TLS_KEY", help="PEM file of that certificate's key.")
    ],
    "tls_server_name": Annotated[
        str | None,
        typer.Option(
            "--tls-server-name", envvar="SLUICE_TLS_SERVER_NAME", help="Name in the gateway's certificate; means --tls."
        ),
    ],
    "api_key_file": Annotated[
        Path | None,
        typer.Option(
            "--api-key-file", envvar="SLUICE_API_KEY_FILE", help=f"File of the API key; {KEY_VARIABLE} may hold it too."
        ),
    ],
}
# As in training.release.precision, which imports torch.
Precision = Literal["auto", "float32", "bfloat16", "float16", "int8"]


def with_options(
    settings: type[AnySettings],
) -> Callable[[Callable[[AnySettings], None]], Callable[..., None]]:
    """
    Turn ``run(settings)`` into a command with one option for each field of ``settings``.

    Raises:
        rpc.settings.SettingsError: When the command runs; names what cannot be used.
    """

    def decorate(run: Callable[[AnySettings], None]) -> Callable[..., None]:
        def command(**options: Any) -> None:
            run(load(settings, **options))

        command.__doc__ = run.__doc__
        command.__name__ = run.__name__
        command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # what typer reads
            [_parameter(settings, name) for name in settings.model_fields]
        )
        return command

    return decorate


def with_access(run: Callable[..., None]) -> Callable[..., None]:
    """Turn ``run(..., access)``, which asks a gateway, into a command with the options for TLS and API key."""
    own = [each for each in inspect.signature(run).parameters.values() if each.name != "access"]

    def command(**options: Any) -> None:
        access = Access(**{name: options.pop(name) for name in _ACCESS})
        run(**options, access=access)

    command.__doc__ = run.__doc__
    command.__name__ = run.__name__
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # what typer reads
        [
            *(each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own),
            *(
                inspect.Parameter(
                    name, inspect.Parameter.KEYWORD_ONLY, default=False if name == "tls" else None, annotation=option
                )
                for name, option in _ACCESS.items()
            ),
        ]
    )
    return command


def _parameter(settings: type[Settings], name: str) -> inspect.Parameter:
    field = settings.model_fields[name]
    # A default that a factory makes depends on the environment, which nobody reads at import.
    default = "" if field.default_factory is not None or field.default is None else f"; {field.default}"
    words = f"{inspect.cleandoc(field.description or '').replace('``', '')} [{variable_of(settings, name)}{default}]"
    option = typer.Option(f"--{name.replace('_', '-')}", help=words, show_default=False)
    annotation: Any = Annotated[_without_none(field.annotation) | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _without_none(annotation: Any) -> Any:
    """Return ``T`` of ``T | None``: an option that is not given is None already."""
    if get_origin(annotation) in (Union, UnionType):
        (only,) = [member for member in get_args(annotation) if member is not type(None)]
        return only
    return annotation

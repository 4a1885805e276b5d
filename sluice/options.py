"""
Options that several commands have, and every setting as one.

A section's fields are the one place that names its settings.
"""

import inspect
from collections.abc import Callable
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import typer

from rpc.settings import Settings, load, variable_of

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

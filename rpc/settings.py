"""
Settings of one process: file, environment, options, from low to high weight.

A section of ``sluice.toml`` (``[gateway]``, ``[streamer]``, ...) is one subclass of :class:`Settings`; the same
field is ``SLUICE_<SECTION>_<FIELD>`` in the environment and ``--field`` on the command line.
"""

import difflib
import os
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import ValidationError
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

CONFIG_VARIABLE = "SLUICE_CONFIG"
DEFAULT_CONFIG = Path("sluice.toml")

SECTIONS = frozenset({"gateway", "streamer", "triton", "up"})
"""Tables of the file: all processes read the same one, each its own table of it."""

_PREFIX = "SLUICE_"
# Read elsewhere: by clients, by compose.yaml, and between a service and its supervisor.
_NO_SETTINGS = frozenset(
    (
        *("CONFIG", "CACHE", "BIND", "BUILD_NETWORK", "READY_FD", "PARENT_PID"),
        *("API_KEY", "API_KEY_FILE", "TLS", "TLS_CA", "TLS_CERT", "TLS_KEY", "TLS_SERVER_NAME"),
    )
)

AnySettings = TypeVar("AnySettings", bound="Settings")


class SettingsError(ValueError):
    """A setting is unknown, malformed or out of range; the message names it and what is allowed."""


class Settings(BaseSettings):
    """Frozen settings of one section; build with :func:`load`, or by hand in tests."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        populate_by_name=True,
        env_ignore_empty=True,
        use_attribute_docstrings=True,
    )

    section: ClassVar[str]
    """Table of ``sluice.toml`` that holds these settings."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Weigh options over environment over file; read nothing else."""
        table = _table_of_file(cls.section)
        return init_settings, env_settings, InitSettingsSource(settings_cls, init_kwargs=table)


def load(settings: type[AnySettings], **options: Any) -> AnySettings:
    """
    Read one section from file and environment and lay ``options`` over it.

    Args:
        settings: The section to build.
        options: Command-line values by field name; ``None`` means not given.

    Raises:
        SettingsError: Names every unusable setting, where it came from and what is allowed.
    """
    _refuse_unknown_variables(settings)
    try:
        return settings(**{name: value for name, value in options.items() if value is not None})
    except ValidationError as error:
        lines = [_explain(settings, problem, options) for problem in error.errors()]
        raise SettingsError("; ".join(lines)) from error


def unknown_variables(sections: Iterable[type[Settings]]) -> Iterator[str]:
    """
    Give a line for each variable ``SLUICE_...`` of the environment that nothing reads, with the one that may be meant.

    Args:
        sections: All there are.
    """
    settings = {variable_of(section, field) for section in sections for field in section.model_fields}
    known = _NO_SETTINGS | {variable.removeprefix(_PREFIX) for variable in settings}
    for variable in sorted(os.environ):
        name = variable.upper().removeprefix(_PREFIX)
        if variable.upper().startswith(_PREFIX) and name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            yield f"{variable}: no such setting" + (f"; did you mean {_PREFIX}{nearest[0]}?" if nearest else "")


def cache_folder() -> Path:
    """Return where downloads are kept: ``SLUICE_CACHE``, else ``sluice`` in the user's cache folder (XDG)."""
    if given := os.environ.get("SLUICE_CACHE"):
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sluice"


def variable_of(settings: type[Settings], field: str) -> str:
    """Return the environment variable that sets ``field``."""
    alias = settings.model_fields[field].validation_alias
    if isinstance(alias, str):
        return alias
    return f"{settings.model_config.get('env_prefix', '')}{field}".upper()


def _table_of_file(section: str) -> dict[str, Any]:
    given = os.environ.get(CONFIG_VARIABLE)
    path = Path(given) if given else DEFAULT_CONFIG
    if not path.is_file():
        if given:
            raise SettingsError(f"{CONFIG_VARIABLE}: there is no file {path}")
        return {}
    try:
        content = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: not TOML: {error}") from error
    if unknown := sorted(content.keys() - SECTIONS - {section}):
        known = ", ".join(f"[{name}]" for name in sorted(SECTIONS))
        raise SettingsError(f"{path}: [{unknown[0]}]: no such section; known are {known}")
    table = content.get(section, {})
    if not isinstance(table, dict):
        raise SettingsError(f"{path}: [{section}] has to be a table")
    return table


def _refuse_unknown_variables(settings: type[Settings]) -> None:
    """A misspelt variable that is silently ignored costs its owner an afternoon."""
    prefix = str(settings.model_config.get("env_prefix", "")).upper()
    known = {variable_of(settings, field) for field in settings.model_fields}
    for variable in os.environ:
        if prefix and variable.upper().startswith(prefix) and variable.upper() not in known:
            raise SettingsError(f"{variable}: no such setting; known are {', '.join(sorted(known))}")


def _explain(settings: type[Settings], problem: Any, options: dict[str, Any]) -> str:
    field = str(problem["loc"][0]) if problem["loc"] else "?"
    if problem["type"] == "extra_forbidden":
        known = ", ".join(sorted(settings.model_fields))
        return f"[{settings.section}] {field}: no such setting; known are {known}"
    by_name = {variable_of(settings, name): name for name in settings.model_fields}
    field = by_name.get(field, field)
    variable = variable_of(settings, field) if field in settings.model_fields else field
    if options.get(field) is not None:
        place = f"--{field.replace('_', '-')}"
    elif variable in os.environ:
        place = variable
    else:
        place = f"[{settings.section}] {field}"
    return f"{place} = {problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"

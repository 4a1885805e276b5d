"""
API keys: who may call, and what; a file holds what tells a right key, not the key.

A key is ``slk_<id>_<secret>`` with a secret of 256 random bits. Of it the file keeps a SHA-256, which is fast: slow
hashes protect secrets that people choose, by making each guess dear; of 2**256 equally likely ones nobody guesses one
at any speed, and a slow hash at each call would be a way to keep the server busy.
"""

import fcntl
import hashlib
import hmac
import os
import re
import secrets
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import structlog
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from rpc.settings import SettingsError

log = structlog.get_logger(__name__)

_SETTING = "keys_file"
_ID_BYTES, _SECRET_BYTES = 6, 32
_KEY = re.compile(rf"slk_([0-9a-f]{{{2 * _ID_BYTES}}})_[0-9a-f]{{{2 * _SECRET_BYTES}}}")
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
# A file that has changed is noticed after so long; a look at each call would be a system call at each.
_LOOK_SECONDS = 1.0
# What is compared for an id that is not there, so that both take as long.
_NO_DIGEST = "0" * 64


class KeyRefusedError(Exception):
    """The key is missing, garbled, unknown or expired; the text may be shown to the caller."""


class Key(BaseModel):
    """What is kept of one key."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    name: str = Field(pattern=_NAME)
    """Whose it is: in logs, and for fair shares."""
    id: str = Field(pattern=rf"^[0-9a-f]{{{2 * _ID_BYTES}}}$")
    """Public part of the key, by which it is found."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Of the whole key, in hexadecimal."""
    scopes: frozenset[str]
    """What it opens."""
    created: AwareDatetime
    expires: AwareDatetime | None = None
    """None is never."""


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    keys: tuple[Key, ...] = ()


class Keyring:
    """
    The keys of a file, for a server; belongs to one thread.

    The file is read again when it has changed, noticed within a second. Once it is gone or cannot be used, the keys
    that were read last go on, and the log says so once.

    Args:
        path: The file.

    Raises:
        SettingsError: It is not there or cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = _stamp(path)
        self._keys = {key.id: key for key in load_keys(path)}
        self._looked = time.monotonic()

    def find(self, text: str | None) -> Key:
        """
        Return the key that a caller gave.

        Args:
            text: What the caller gave, anything; None is nothing.

        Raises:
            KeyRefusedError: It opens nothing.
        """
        self._look()
        if text is None:
            raise KeyRefusedError("an API key is needed, as metadata `authorization: Bearer slk_...`")
        parsed = _KEY.fullmatch(text)
        if parsed is None:
            raise KeyRefusedError("what was given is no API key; it looks like slk_..., and all of it is needed")
        key = self._keys.get(parsed[1])
        is_right = hmac.compare_digest(_digest(text), key.sha256 if key is not None else _NO_DIGEST)
        if key is None or not is_right:
            raise KeyRefusedError("the API key is not known here")
        if key.expires is not None and key.expires <= datetime.now(UTC):
            raise KeyRefusedError(f"the API key expired on {key.expires.astimezone(UTC):%Y-%m-%d %H:%M} UTC")
        return key

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = {key.id: key for key in load_keys(self._path)}
        except SettingsError as error:
            log.warning("new keys not used, the old ones go on", error=str(error))
        else:
            log.info("keys read again", num_keys=len(self._keys))


def load_keys(path: Path) -> tuple[Key, ...]:
    """
    Return the keys in a file, oldest first.

    Raises:
        SettingsError: It is not there or cannot be used.
    """
    try:
        return _File.model_validate_json(path.read_bytes()).keys
    except FileNotFoundError:
        raise SettingsError(f"{_SETTING} = {path}: there is no such file; `sluice keys add` makes one") from None
    except OSError as error:
        raise SettingsError(f"{_SETTING} = {path}: cannot be read: {error.strerror}") from error
    except ValidationError as error:
        problem = error.errors(include_input=False)[0]
        place = ".".join(map(str, problem["loc"])) or "file"
        raise SettingsError(f"{_SETTING} = {path}: {place}: {problem['msg']}") from None


def add_key(path: Path, name: str, scopes: Iterable[str], *, lifetime: timedelta | None = None) -> str:
    """
    Make a key, add it to the file, which is made where there is none, and return it; it is kept nowhere.

    Args:
        path: The file.
        name: Letters, digits, ``.``, ``_`` and ``-``, up to 64; not yet in the file.
        scopes: What it opens.
        lifetime: How long it is valid; None is for ever.

    Raises:
        SettingsError: The name cannot be used, or the file.
        OSError: The file cannot be written.
    """
    if re.match(_NAME, name) is None:
        raise SettingsError(f"name {name!r}: allowed are letters, digits, '.', '_' and '-', up to 64 of them")
    text = f"slk_{secrets.token_hex(_ID_BYTES)}_{secrets.token_hex(_SECRET_BYTES)}"
    now = datetime.now(UTC).replace(microsecond=0)
    with _locked(path):
        keys = load_keys(path) if path.exists() else ()
        if any(key.name == name for key in keys):
            raise SettingsError(f"name {name}: {path} has a key of that name already; choose another, or remove it")
        key = Key(
            name=name,
            id=text.split("_")[1],
            sha256=_digest(text),
            scopes=frozenset(scopes),
            created=now,
            expires=None if lifetime is None else now + lifetime,
        )
        _save(path, (*keys, key))
    return text


def remove_key(path: Path, name: str) -> None:
    """
    Take a key out of the file: servers refuse it within a second.

    Raises:
        SettingsError: No key has that name, or the file cannot be used.
        OSError: The file cannot be written.
    """
    with _locked(path):
        keys = load_keys(path)
        rest = tuple(key for key in keys if key.name != name)
        if rest == keys:
            known = ", ".join(key.name for key in keys) or "none"
            raise SettingsError(f"name {name}: {path} has no key of that name; there are {known}")
        _save(path, rest)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Change a file as the only one; its folder is locked, as the file itself is replaced."""
    folder = os.open(path.absolute().parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _take_after(path: Path, descriptor: int) -> None:
    """Give a file the owner and mode of the one that it is to replace: whoever could read that reads on."""
    try:
        old = path.stat()
    except FileNotFoundError:
        return
    new = os.fstat(descriptor)
    if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
        try:
            os.fchown(descriptor, old.st_uid, old.st_gid)
        except OSError as error:
            raise SettingsError(
                f"{path} belongs to user {old.st_uid}, group {old.st_gid}, and would not any more: "
                "run this as its owner or as root"
            ) from error
    os.fchmod(descriptor, stat.S_IMODE(old.st_mode))


def _save(path: Path, keys: tuple[Key, ...]) -> None:
    """Replace the file in one step; one that was there keeps owner and mode, a new one is for its owner's eyes."""
    # Where it is a link, what it leads to is replaced, and the link stays.
    path = path.resolve()
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w") as file:
            _take_after(path, file.fileno())
            file.write(_File(keys=keys).model_dump_json(indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise

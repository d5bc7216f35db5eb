"""What both stores of files do: paths, temporary files, syncing, decoding, and what OSError means."""

from __future__ import annotations

import errno
import os
import pwd
import re
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TypeVar

from ..errors import (
    CorruptSessionError,
    NotFoundError,
    OutcomeUnknownError,
    PermissionDeniedError,
    StoreFullError,
    UnavailableError,
)
from ..interrupts import raise_interruption, suppress
from ..model.asset import SessionAsset

__all__ = [
    "LEFTOVER_NS",
    "PRIVATE",
    "SUFFIX",
    "AnyPath",
    "decode_session",
    "discard",
    "expanded",
    "open_at_once",
    "synced",
    "temporaries",
    "temporary_in",
    "translated",
    "write_new",
]

A = TypeVar("A", bound=SessionAsset)
AnyPath = str | os.PathLike[str]

SUFFIX: Final = ".json"
PRIVATE: Final = 0o600
"""The mode of what is the user's alone."""
LEFTOVER_NS: Final = 3600 * 10**9
"""So old is a temporary file of a writer that is no more."""

_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp")
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def expanded(path: AnyPath) -> Path:
    """Return the path, in which ~/ at the start is the home folder; as in orcs, any other ~ is a name like others."""
    text = os.fspath(path)
    if not text.startswith("~/"):
        return Path(text)
    home = os.environ.get("HOME")
    if not home:
        try:
            home = pwd.getpwuid(os.getuid()).pw_dir
        except KeyError:
            raise ValueError("~/ is no folder: HOME is not set, and the user has no entry in passwd") from None
    return Path(home, text.removeprefix("~/"))


def decode_session(kind: type[A], id: str, data: bytes) -> A:
    """Decode a session's file.

    Raises:
        CorruptSessionError: it can't be decoded, or another session is in it.
        VersionIncompatibleError: it is of another version of the schema.

    """
    try:
        asset = kind.from_json(data)
    except CorruptSessionError as error:
        field = error.field
    else:
        if asset.id == id:
            return asset
        field = "id"
    raise CorruptSessionError(id, field)


def open_at_once(path: str, flags: int) -> int:
    """Open a file as `open` does, but never wait for a pipe's writer."""
    return os.open(path, flags | os.O_NONBLOCK)


def temporary_in(folder: Path) -> Path:
    """Return a name for a new temporary file.

    It is not named after a session: the longest ids leave no room. orcs skips names with a leading dot.
    """
    return folder / f".{uuid.uuid4().hex}.tmp"


def temporaries(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """List the temporary files in a folder, those of living writers too."""
    for name in filter(_TEMPORARY.fullmatch, os.listdir(folder)):  # noqa: PTH208  # names are enough
        status = None
        with suppress(OSError):  # another is faster, or it is not ours
            status = os.lstat(folder / name)
        if status is not None:
            yield folder / name, status


def write_new(path: Path, data: bytes, mode: int = 0o666) -> os.stat_result:
    """Write and sync a new file, with this mode as far as the umask has it; return its status.

    If that fails it may be there in part.
    """
    with open(path, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return os.fstat(file.fileno())


def discard(paths: Sequence[Path]) -> None:
    """Delete files, as far as that can be done. An empty path is none."""
    for path in paths:
        if path.name:
            with suppress(OSError):
                path.unlink()


@contextmanager
def synced(path: Path, id: str | None = None) -> Iterator[None]:
    """Sync a folder after a change in it. It is opened first: what can't be synced is not begun.

    Raises:
        OutcomeUnknownError: it is changed, but that may not survive a power failure.

    """
    with translated(id):
        folder = os.open(path, os.O_RDONLY)
    try:
        with translated(id):
            yield
        try:
            os.fsync(folder)
        except OSError as error:
            raise_interruption(error)
            if error.errno != errno.EINVAL:  # a file system that has no such thing
                raise OutcomeUnknownError(f"the folder could not be synced: {error.strerror}") from error
    finally:
        os.close(folder)


@contextmanager
def translated(id: str | None = None) -> Iterator[None]:
    """Turn OSError into StorageError; with an id, a missing file means that this session is absent."""
    try:
        yield
    except OSError as error:
        raise_interruption(error)
        if isinstance(error, FileNotFoundError) and id is not None:
            raise NotFoundError(id) from None
        if isinstance(error, IsADirectoryError) and id is not None:
            raise CorruptSessionError(id) from error
        message = f"{error.strerror or type(error).__name__}: {error.filename or 'the session folder'}"
        if error.errno in _DENIED:
            raise PermissionDeniedError(message) from error
        if error.errno in _FULL:
            raise StoreFullError(message) from error
        raise UnavailableError(message) from error

"""orcs' own files: one ``<id>.json`` for each session in a folder."""

from __future__ import annotations

import builtins
import errno
import logging
import os
import pwd
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from stat import S_ISREG
from typing import Generic, NamedTuple, TypeVar

from ..errors import (
    CorruptSessionError,
    NotFoundError,
    OutcomeUnknownError,
    PermissionDeniedError,
    StorageError,
    StoreFullError,
    UnavailableError,
)
from ..interrupts import raise_interruption
from ..model.asset import SessionAsset
from ..model.filters import Filters
from ..model.ids import check_id
from ..model.meta import SessionMeta

__all__ = ["AnyPath", "Folder", "Unreadable"]

A = TypeVar("A", bound=SessionAsset)
AnyPath = str | os.PathLike[str]

_log = logging.getLogger("orcs_redis")

_SUFFIX = ".json"
_LEFTOVER = re.compile(r"\.[0-9a-f]{32}\.tmp")
_LEFTOVER_NS = 3600 * 10**9  # so old is a temporary file of a writer that is no more
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Unreadable(NamedTuple):
    """A file that `list` could not read, and why."""

    path: Path
    error: StorageError


class Folder(Generic[A]):
    """Sessions as orcs' files in a folder, for threads and processes at once.

    A file is written beside the old one, synced and renamed over it: a reader sees one or the other whole.
    """

    def __init__(self, path: AnyPath, asset_type: type[A]) -> None:
        self.path = _expanded(path)
        self._type = asset_type
        self.unreadable: builtins.list[Unreadable] = []  # at the last `list`
        self._has_tidied = False
        with _translated():
            self.path.mkdir(parents=True, exist_ok=True)

    def load(self, id: str) -> A:
        """Read a session; NotFoundError if it is absent."""
        return self._read(check_id(id))[0]

    def list(self, filters: Filters) -> builtins.list[SessionMeta]:
        """List the sessions that can be read, the last updated first; `unreadable` has the others."""
        metas, unreadable = [], []
        with _translated():
            names = [file.name for file in self.path.iterdir()]
        for name in sorted(names, reverse=True):
            if name.startswith(".") or not name.endswith(_SUFFIX):
                continue
            try:
                asset, modified_ns = self._read(check_id(name.removesuffix(_SUFFIX)))
            except NotFoundError:
                continue  # deleted since
            except StorageError as error:
                unreadable.append(Unreadable(self.path / name, error))
                _log.warning("session file %r left out of the list: %s", str(self.path / name), error)
            else:
                modified = datetime.fromtimestamp(modified_ns / 1e9, UTC)
                metas.append(SessionMeta.from_asset(asset, modified_ns, modified))
        self.unreadable = unreadable
        metas.sort(key=lambda meta: (meta.updated_at, meta.id), reverse=True)
        return [*filter(filters.match, metas)]

    def delete(self, id: str) -> None:
        """Delete a session; NotFoundError if it is absent."""
        with self._changing(check_id(id)):
            self._file(id).unlink()

    def exists(self, id: str) -> bool:
        """Return whether there is such a session."""
        with suppress(NotFoundError), _translated(check_id(id)):
            self._file(id).stat()
            return True
        return False

    def _file(self, id: str) -> Path:
        return self.path / (id + _SUFFIX)

    def encode(self, asset: A) -> tuple[str, bytes]:
        """Return the id, and what its file is to hold."""
        return check_id(asset.id), asset.to_json().encode()

    def write(self, id: str, data: bytes) -> int:
        """Write a file; return its modification time in ns.

        Raises:
            OutcomeUnknownError: it is written, but may not survive a power failure.

        """
        # Not named after the session: the longest ids leave no room. orcs skips names with a leading dot.
        temporary = self.path / f".{uuid.uuid4().hex}.tmp"
        with self._changing():
            try:
                with open(temporary, "xb") as file:  # noqa: PTH123  # a name is enough
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                    modified = os.fstat(file.fileno()).st_mtime_ns
                self._tidy(modified)
                os.replace(temporary, self._file(id))  # noqa: PTH105
            except BaseException:
                with suppress(OSError):
                    temporary.unlink()
                raise
        return modified

    def _tidy(self, now: int) -> None:
        """Remove, once, what writers that were killed have left; `now` is by the file system's clock, in ns."""
        if self._has_tidied:
            return
        self._has_tidied = True
        for name in filter(_LEFTOVER.fullmatch, os.listdir(self.path)):  # noqa: PTH208  # names are enough
            try:
                # A writer that is alive but was stopped for so long fails, and says so.
                if os.stat(self.path / name).st_mtime_ns < now - _LEFTOVER_NS:  # noqa: PTH116
                    os.unlink(self.path / name)  # noqa: PTH108
            except OSError as error:  # another is faster, or it is not ours
                raise_interruption(error)

    @contextmanager
    def _changing(self, id: str | None = None) -> Iterator[None]:
        """Sync the folder after a change in it. It is opened first: what can't be synced is not begun."""
        with _translated(id):
            folder = os.open(self.path, os.O_RDONLY)
        try:
            with _translated(id):
                yield
            try:
                os.fsync(folder)
            except OSError as error:
                raise_interruption(error)
                if error.errno != errno.EINVAL:  # a file system that has no such thing
                    raise OutcomeUnknownError(f"the folder could not be synced: {error.strerror}") from error
        finally:
            os.close(folder)

    def _read(self, id: str) -> tuple[A, int]:
        with _translated(id), open(self._file(id), "rb", opener=_open_at_once) as file:
            status = os.fstat(file.fileno())
            if not S_ISREG(status.st_mode):
                raise CorruptSessionError(id)
            data = file.read()
        try:
            asset = self._type.from_json(data)
        except CorruptSessionError as error:
            field = error.field
        else:
            if asset.id == id:
                return asset, status.st_mtime_ns
            field = "id"
        raise CorruptSessionError(id, field)


def _expanded(path: AnyPath) -> Path:
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


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe would wait for its writer


@contextmanager
def _translated(id: str | None = None) -> Iterator[None]:
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

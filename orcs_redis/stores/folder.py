"""orcs' own files: one ``<id>.json`` for each session in a folder."""

from __future__ import annotations

import builtins
import logging
import os
from datetime import UTC, datetime
from pathlib import Path
from stat import S_ISREG
from typing import Generic, NamedTuple, TypeVar

from ..errors import CorruptSessionError, NotFoundError, StorageError
from ..interrupts import suppress
from ..model.asset import SessionAsset
from ..model.filters import Filters
from ..model.ids import check_id
from ..model.meta import SessionMeta
from .disk import (
    LEFTOVER_NS,
    SUFFIX,
    AnyPath,
    decode_session,
    expanded,
    open_at_once,
    synced,
    temporaries,
    temporary_in,
    translated,
    write_new,
)

__all__ = ["Folder", "Unreadable"]

A = TypeVar("A", bound=SessionAsset)

_log = logging.getLogger("orcs_redis")


class Unreadable(NamedTuple):
    """A file that `list` could not read, and why."""

    path: Path
    error: StorageError


class Folder(Generic[A]):
    """Sessions as orcs' files in a folder, for threads and processes at once.

    A file is written beside the old one, synced and renamed over it: a reader sees one or the other whole.
    """

    def __init__(self, path: AnyPath, asset_type: type[A]) -> None:
        self.path = expanded(path)
        self._type = asset_type
        self.unreadable: builtins.list[Unreadable] = []  # at the last `list`
        self._has_tidied = False
        with translated():
            self.path.mkdir(parents=True, exist_ok=True)

    def load(self, id: str) -> A:
        """Read a session; NotFoundError if it is absent."""
        return self._read(check_id(id))[0]

    def list(self, filters: Filters) -> builtins.list[SessionMeta]:
        """List the sessions that can be read, the last updated first; `unreadable` has the others."""
        metas, unreadable = [], []
        with translated():
            names = [file.name for file in self.path.iterdir()]
        for name in sorted(names, reverse=True):
            if name.startswith(".") or not name.endswith(SUFFIX):
                continue
            try:
                asset, modified_ns = self._read(check_id(name.removesuffix(SUFFIX)))
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
        with synced(self.path, check_id(id)):
            self._file(id).unlink()

    def exists(self, id: str) -> bool:
        """Return whether there is such a session."""
        with suppress(NotFoundError), translated(check_id(id)):
            self._file(id).stat()
            return True
        return False

    def _file(self, id: str) -> Path:
        return self.path / (id + SUFFIX)

    def encode(self, asset: A) -> tuple[str, bytes]:
        """Return the id, and what its file is to hold."""
        return check_id(asset.id), asset.to_json().encode()

    def write(self, id: str, data: bytes) -> int:
        """Write a file; return its modification time in ns.

        Raises:
            OutcomeUnknownError: it is written, but may not survive a power failure.

        """
        temporary = temporary_in(self.path)
        with synced(self.path):
            try:
                modified = write_new(temporary, data).st_mtime_ns
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
        for path, status in temporaries(self.path):
            # A writer that is alive but was stopped for so long fails, and says so.
            if status.st_mtime_ns < now - LEFTOVER_NS:
                with suppress(OSError):  # another is faster, or it is not ours
                    path.unlink()

    def _read(self, id: str) -> tuple[A, int]:
        with translated(id), open(self._file(id), "rb", opener=open_at_once) as file:
            status = os.fstat(file.fileno())
            if not S_ISREG(status.st_mode):
                raise CorruptSessionError(id)
            data = file.read()
        return decode_session(self._type, id, data), status.st_mtime_ns

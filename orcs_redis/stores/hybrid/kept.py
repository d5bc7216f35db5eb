"""Kept copies: versions that were overwritten or deleted, or lost, with the reason, for some time.

A copy is a file in a folder of its session's, named after the moment, the side and the content. A note beside it has
what the name has no room for; it is there first, so it reserves the name.
"""

from __future__ import annotations

import builtins
import os
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, cast

import msgspec

from ...errors import CorruptSessionError, InvalidIdError, StorageError, UnavailableError
from ...interrupts import raise_interruption, suppress
from ...model.ids import check_id
from ..disk import LEFTOVER_NS, PRIVATE, SUFFIX, discard, synced, temporary_in, translated, write_new
from .exchange import move
from .reading import digest_of, file_digest, id_in, read_whole
from .results import Kept, SideName

__all__ = ["KeptCopies", "drop_note"]

_TRIES: Final = 5
_DAY: Final = 86400
_COPIES: Final = 20  # so many are kept of a session
_COPY: Final = re.compile(r"(\d{8}T\d{6}\.\d{6}Z)-(here|there)-[0-9a-f]{8}\.json")
_STAMP: Final = "%Y%m%dT%H%M%S.%fZ"
_NOTE: Final = ".note"


class _Note(msgspec.Struct):
    """What a copy's name has no room for: the id as it is, which a file system may spell otherwise, and the reason."""

    id: str
    why: str


class KeptCopies:
    """The copies in a folder of a hybrid store's own.

    Args:
        home: the folder; the copies are in ``kept`` there, which is made.
        file_of: says where a session's file is.

    """

    def __init__(self, home: Path, file_of: Callable[[str], Path]) -> None:
        self._home = home
        self._folder = home / "kept"
        self._file_of = file_of
        self._folder.mkdir(mode=0o700, exist_ok=True)

    def keep(self, id: str, side: SideName, data: bytes, why: str) -> Path:
        """Keep a copy of what is about to be lost; return where. What is kept already gets no second copy.

        Beyond 20 copies of a session the oldest are deleted.
        """
        digest = file_digest(data)
        with translated():
            if (known := self._known_copy(check_id(id), side, digest)) is not None:
                os.utime(known)  # it is as good as new to `prune`
                return known
            temporary = temporary_in(self._home)
            try:
                write_new(temporary, data, PRIVATE)
                copy = self.new_copy(id, side, digest, why)
                self._file_copy(temporary, copy)
            except BaseException:
                discard([temporary])
                raise
            for _, _, surplus in self._aged_copies(copy.parent)[_COPIES:]:
                _drop(surplus)
        return copy

    def list(self, id: str | None = None) -> builtins.list[Kept]:
        """List the copies, of one session or of all, the newest first."""
        with translated():
            folders = self._folders() if id is None else [self._folder / check_id(id)]
            found = [_kept(copy) for folder in folders for copy in self._copies_in(folder)]
        found = [copy for copy in found if id is None or copy.id == id]
        return sorted(found, key=lambda copy: (copy.at, copy.path), reverse=True)

    def read(self, path: Path) -> bytes:
        """Read a kept copy.

        Raises:
            ValueError: the path is none of a kept copy.
            NotFoundError: there is none any more.

        """
        path = path.absolute()
        folder = path.parent
        if folder.parent != self._folder or folder.name.startswith(".") or not _is_copy(path.name):
            raise ValueError("the path is none of a kept copy")
        with translated(folder.name):
            return read_whole(path, folder.name).data

    def prune(self, days: float, per_session: int = _COPIES, total_bytes: int = 2**30) -> None:
        """Delete copies that are older than so many days, and the oldest ones beyond these limits."""
        now = time.time()
        rest = []
        with translated():
            folders = self._folders()
            for folder in folders:
                for place, (kept_at, size, copy) in enumerate(self._aged_copies(folder)):
                    if place >= per_session or kept_at < now - days * _DAY:
                        _drop(copy)
                    else:
                        rest.append((kept_at, size, copy))
            total = 0
            for _, size, copy in sorted(rest, reverse=True):
                total += size
                if total > total_bytes:
                    _drop(copy)
            for folder in folders:
                self._clear(folder)

    def _aged_copies(self, folder: Path) -> builtins.list[tuple[float, int, Path]]:
        """Return when each copy in a folder was kept last, and its size; the newest first."""
        return sorted(filter(None, map(_aged, self._copies_in(folder))), reverse=True)

    def _folders(self) -> builtins.list[Path]:
        return [folder for folder in self._folder.iterdir() if not folder.name.startswith(".")]

    def _copies_in(self, folder: Path) -> builtins.list[Path]:
        with suppress(FileNotFoundError, NotADirectoryError):
            return [folder / name for name in os.listdir(folder) if _is_copy(name)]  # noqa: PTH208  # names are enough
        return []

    def _known_copy(self, id: str, side: SideName, digest: bytes) -> Path | None:
        for copy in self._copies_in(self._folder / id):
            if copy.name.endswith(f"-{side}-{digest.hex()[:8]}{SUFFIX}") and digest_of(copy) == digest:
                return copy
        return None

    def _clear(self, folder: Path) -> None:
        """Delete old notes without a copy, and the folder if nothing is left. A new note's copy is yet to come."""
        with suppress(OSError):
            for note in folder.glob(f"*{_NOTE}"):
                is_old = time.time_ns() - note.stat().st_mtime_ns > LEFTOVER_NS
                if is_old and not note.with_suffix(SUFFIX).exists():
                    discard([note])
            folder.rmdir()

    def new_copy(self, id: str, side: SideName, digest: bytes, why: str) -> Path:
        """Return where a copy is to be put; its note is there already, and reserves the name."""
        note = msgspec.json.encode(_Note(id, why))
        at = datetime.now(UTC)
        folder = self._folder / check_id(id)
        with translated():
            for _ in range(_TRIES):
                copy = folder / f"{at.strftime(_STAMP)}-{side}-{digest.hex()[:8]}{SUFFIX}"
                try:
                    folder.mkdir(mode=0o700, exist_ok=True)
                    write_new(copy.with_suffix(_NOTE), note, PRIVATE)
                except FileExistsError as error:  # another thread's, of the same microsecond
                    raise_interruption(error)
                    at += timedelta(microseconds=1)
                except FileNotFoundError as error:  # the folder was empty, and is deleted
                    raise_interruption(error)
                else:
                    with synced(self._folder):  # the folder may be new
                        return copy
        raise UnavailableError(f"no name for a copy: {folder}")

    def _file_copy(self, source: Path, copy: Path) -> None:
        try:
            with synced(copy.parent):
                move(source, copy)
        except BaseException:
            if not copy.exists():
                drop_note(copy)
            raise

    def salvage(self, path: Path, why: str) -> None:
        """Move a file that may be the only one of a session's version into kept; delete it if it is no session."""
        try:
            data = read_whole(path, "").data
            id = check_id(id_in(data))
        except (msgspec.DecodeError, RecursionError, CorruptSessionError, InvalidIdError):
            discard([path])
            return
        digest = file_digest(data)
        if digest == digest_of(self._file_of(id)) or self._known_copy(id, "here", digest) not in (None, path):
            discard([path])
            return
        path.chmod(PRIVATE)
        self._file_copy(path, self.new_copy(id, "here", digest, why))


def drop_note(copy: Path) -> None:
    """Delete a copy's note: there will be no copy."""
    discard([copy.with_suffix(_NOTE)])


def _drop(copy: Path) -> None:
    discard([copy, copy.with_suffix(_NOTE)])


def _parsed(name: str) -> tuple[datetime, SideName]:
    """Return when a copy was made, and of which side; ValueError if it is no copy's name."""
    match = _COPY.fullmatch(name)
    if match is None:
        raise ValueError("not the name of a kept copy")
    return datetime.strptime(match[1], _STAMP).replace(tzinfo=UTC), cast(SideName, match[2])


def _is_copy(name: str) -> bool:
    with suppress(ValueError):
        _parsed(name)
        return True
    return False


def _kept(copy: Path) -> Kept:
    at, side = _parsed(copy.name)
    note = _Note(copy.parent.name, "")
    with suppress(OSError, StorageError, msgspec.DecodeError):
        note = msgspec.json.decode(read_whole(copy.with_suffix(_NOTE), "").data, type=_Note)
    return Kept(note.id, side, at, note.why, copy)


def _aged(copy: Path) -> tuple[float, int, Path] | None:
    """Return when a copy was kept last, and its size; None if it is gone."""
    with suppress(OSError):
        status = copy.lstat()
        return max(_parsed(copy.name)[0].timestamp(), status.st_mtime), status.st_size, copy
    return None

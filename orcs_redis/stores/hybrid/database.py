"""A SQLite file: opening, versions, transactions, what errors mean. What is damaged is moved aside."""

from __future__ import annotations

import fcntl
import logging
import os
import sqlite3
import threading
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal, TypeVar

import msgspec

from ...errors import LayoutError, PermissionDeniedError, StorageError, StoreFullError, UnavailableError
from ...interrupts import raise_interruption
from ..disk import PRIVATE, translated

__all__ = ["Database", "decoding", "signed", "unsigned"]

T = TypeVar("T")

_log = logging.getLogger("orcs_redis")
_BUSY_SECONDS: Final = 10.0
_WORD: Final = 2**64
# The last one comes of a message of SQLite that quotes the file.
_REFUSALS: Final = (sqlite3.Error, msgspec.MsgspecError, zlib.error, UnicodeDecodeError)


class _DamagedError(UnavailableError):
    """The database was damaged. It was moved aside."""


class Database(ABC):
    """A SQLite file of which all is in memory that is asked for often; for all threads, over one connection.

    A subclass says what is in it, and has that in memory: it is loaded again before a call if others have written.
    """

    def __init__(self, path: Path, version: int) -> None:
        self._path = path
        self._version = version  # of the tables
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._closed = False
        self._known_version = -1  # of the database as others left it
        self._inode: tuple[int, int] | None = None  # with its device
        self.generation = 0  # changes when what is in memory does

    @abstractmethod
    def _create(self, db: sqlite3.Connection) -> None:
        """Make the tables."""

    @abstractmethod
    def _read_constants(self, db: sqlite3.Connection) -> None:
        """Read what stays as it was created."""

    @abstractmethod
    def _load(self, db: sqlite3.Connection) -> None:
        """Read what is to be in memory."""

    @abstractmethod
    def _clear(self) -> None:
        """Forget what is in memory."""

    def _begin(self) -> None:
        """Open it for the first time; what is damaged is replaced."""
        try:
            self.refresh()
        except _DamagedError:  # it was moved aside
            self.refresh()

    def close(self) -> None:
        """Close it. Later calls raise UnavailableError."""
        with self._lock:
            self._closed = True
            if self._connection is not None:
                with suppress(sqlite3.Error):  # another process is using it
                    # Not `execute`: that frees a single page.
                    self._connection.executescript("PRAGMA busy_timeout = 0; PRAGMA incremental_vacuum")
                self._connection.close()
                self._connection = None

    def refresh(self) -> None:
        """Take over what other processes have noted."""
        self._run(lambda _: None)

    def _run(
        self,
        call: Callable[[sqlite3.Connection], T],
        kind: Literal["DEFERRED", "IMMEDIATE"] | None = None,
        after: Callable[[sqlite3.Connection], object] = lambda _: None,
    ) -> T:
        """Call a function with what others have left, and another one after it.

        Args:
            call: the first.
            kind: of its transaction; None: it needs none, since one statement is all it executes.
            after: the second.

        """
        with self._lock, translated(), self._translated():
            if self._closed:
                raise UnavailableError("the store is closed")
            db = self._connected()
            try:
                if kind is None and self._known_version == _data_version(db):
                    return call(db)
                with _transaction(db, kind or "DEFERRED"):
                    if self._known_version != (version := _data_version(db)):
                        self._load(db)
                        self.generation += 1
                        self._known_version = version
                    result = call(db)
                after(db)
            except BaseException:
                self._known_version = -1  # what is in memory may be other than what is noted
                raise
        return result

    def _write(
        self, call: Callable[[sqlite3.Connection], object], remember: Callable[[sqlite3.Connection], object]
    ) -> None:
        """Call a function that writes; then, before any other thread comes, what does the same in memory."""
        with self._lock:
            self._run(call, "IMMEDIATE", remember)
            self.generation += 1

    def _connected(self) -> sqlite3.Connection:
        if self._connection is not None and _inode(self._path) != self._inode:  # another process moved it aside
            self._connection.close()
            self._connection = None
        if self._connection is None:
            with _alone(self._path.parent):
                self._connection = self._open()
            self._known_version = -1
        return self._connection

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn SQLite's errors into ours. What is damaged is moved aside: the next call begins anew."""
        try:
            yield
        except _REFUSALS as error:
            raise_interruption(error)
            if isinstance(error, (sqlite3.ProgrammingError, sqlite3.InterfaceError)):
                raise  # says nothing about the file
            match getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF:
                case sqlite3.SQLITE_FULL:
                    raise StoreFullError(f"no space left: {self._path}") from error
                case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_PERM | sqlite3.SQLITE_AUTH | sqlite3.SQLITE_CANTOPEN:
                    raise PermissionDeniedError(f"{error}: {self._path}") from error
                case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB | sqlite3.SQLITE_FORMAT | sqlite3.SQLITE_ERROR:
                    raise self._move_aside() from error
            raise UnavailableError(f"{error}: {self._path}") from error

    def _move_aside(self) -> StorageError:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        aside = self._path.with_name(f"{self._path.name}.damaged-{stamp}")
        with _alone(self._path.parent):
            is_first = _inode(self._path) == self._inode  # else another process has done it
            for suffix in ("", "-wal", "-shm") if is_first else ():
                with suppress(FileNotFoundError):
                    self._path.with_name(self._path.name + suffix).rename(aside.with_name(aside.name + suffix))
        self._clear()
        self.generation += 1
        if is_first:
            text = "%s was damaged and is now %s: what was common with the shared store is forgotten"
            _log.warning(text, self._path, aside)
        return _DamagedError(f"{self._path} was damaged: it was moved aside, and the next sync is a first one")

    def _open(self) -> sqlite3.Connection:
        new = not self._path.exists()
        connection = sqlite3.connect(self._path, _BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        self._inode = _inode(self._path)
        try:
            if new:
                os.chmod(self._path, PRIVATE)  # noqa: PTH101  # it is open already
            if self._check_version(connection) == 0:
                connection.execute("PRAGMA page_size = 8192")
                connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            with _transaction(connection, "IMMEDIATE"):
                if self._check_version(connection) == 0:
                    self._create(connection)
                    connection.execute(f"PRAGMA user_version = {self._version}")
            self._read_constants(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _check_version(self, db: sqlite3.Connection) -> int:
        version: int = db.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, self._version):
            raise LayoutError(f"{self._path} is of version {version}, not {self._version}")
        return version


@contextmanager
def decoding() -> Iterator[None]:
    """Take for damage what can't be taken apart."""
    try:
        yield
    except (TypeError, ValueError, LookupError, StopIteration) as error:
        raise_interruption(error)
        raise sqlite3.DatabaseError(f"it makes no sense: {type(error).__name__}") from error


def signed(number: int) -> int:
    """Return a number that SQLite can keep: the same modulo 2 to the power of 64."""
    return (number + _WORD // 2) % _WORD - _WORD // 2


def unsigned(number: int) -> int:
    """Return the number, from 0 to 2 to the power of 64, that was kept so."""
    return number % _WORD


def _data_version(db: sqlite3.Connection) -> int:
    """Return a number that changes when others have written."""
    version: int = db.execute("PRAGMA data_version").fetchone()[0]
    return version


@contextmanager
def _transaction(db: sqlite3.Connection, kind: Literal["DEFERRED", "IMMEDIATE"]) -> Iterator[None]:
    if db.in_transaction:  # two signals in a row have left it
        db.execute("ROLLBACK")
    try:
        db.execute(f"BEGIN {kind}")
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:  # a full disk ends it by itself
            db.execute("ROLLBACK")
        raise


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep others from opening a file of the folder, or moving it aside, meanwhile."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)  # a child of this process may have it open, too
        os.close(fd)


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino

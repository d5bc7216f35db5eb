"""What a folder remembers, in SQLite: what was last common of each session, and what was last found on both sides.

Of contents it has digests only. A table has one kind of writer: `file` whoever reads files (it is a cache), `session`
the round, of which there is one at a time, `removal` the calls of the API. So nobody overwrites what another noted.
"""

from __future__ import annotations

import fcntl
import itertools
import logging
import os
import sqlite3
import threading
import uuid
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeVar

import msgspec

from ...errors import LayoutError, PermissionDeniedError, StorageError, StoreFullError, UnavailableError
from ...interrupts import raise_interruption
from ...model.asset import SessionAsset
from ...model.encoding import attempt
from ...model.parts import Digests, Entry, digests
from ..disk import translated
from .planner import Base, Pending, content_digest
from .reading import Signature

__all__ = ["FileMeta", "Journal", "Record", "Remote", "Removal", "Row", "Seen"]

T = TypeVar("T")

_log = logging.getLogger("orcs_redis")
_VERSION: Final = 1
_BUSY_SECONDS: Final = 10.0
_SIZE: Final = 16  # of a digest
_UUID_LENGTH: Final = 36
_WORD: Final = 2**64
# The last one comes of a message of SQLite that quotes the file.
_REFUSALS: Final = (sqlite3.Error, msgspec.MsgspecError, zlib.error, UnicodeDecodeError)
_TABLES: Final = """
CREATE TABLE remote (
    one INTEGER PRIMARY KEY CHECK (one = 1), incarnation BLOB, namespace TEXT, revisions BLOB, last_sync REAL,
    defaults BLOB
);
CREATE TABLE file (
    id TEXT PRIMARY KEY, inode INTEGER, size INTEGER, modified_ns INTEGER, changed_ns INTEGER, looked_ns INTEGER,
    digest BLOB, meta BLOB, reason TEXT
) WITHOUT ROWID;
CREATE TABLE session (
    id TEXT PRIMARY KEY, base_digest BLOB, base_revision INTEGER, base_operation BLOB, there_revision INTEGER,
    there_origin BLOB, there_meta BLOB, has_pending INTEGER, reason TEXT, parts TEXT
);
CREATE TABLE base (session INTEGER PRIMARY KEY, parts BLOB);
CREATE TABLE pending (session INTEGER PRIMARY KEY, version BLOB);
CREATE TABLE removal (id TEXT PRIMARY KEY, deleted INTEGER, turns BLOB) WITHOUT ROWID;
"""


class FileMeta(NamedTuple):
    """What a list shows of a file; times in milliseconds since 1970."""

    name: str | None
    project_path: str | None
    created_at_ms: int
    updated_at_ms: int
    turn_count: int
    labels: dict[str, str]


class Seen(NamedTuple):
    """What was found in a file when it was last read."""

    signature: Signature
    looked_ns: int
    digest: bytes = b""  # of the content; b"": it can't be read
    meta: FileMeta | None = None
    reason: str = ""  # why it can't be read


class Row(NamedTuple):
    """What is known of a session without its parts."""

    base_digest: bytes | None = None  # None: there is no base
    base_revision: int = 0
    base_operation: bytes = b""
    there_revision: int = 0  # as last heard; 0: it is not there
    there_origin: bytes = b""
    there_meta: bytes = b""  # of a session that is not here
    has_pending: bool = False
    reason: str = ""  # of a conflict
    parts: tuple[str, ...] = ()  # that collide

    @property
    def is_same_there(self) -> bool:
        """Whether what was last heard of the shared store is the base's revision."""
        return self.has_revision(self.there_revision, self.there_origin)

    def has_revision(self, revision: int, origin: bytes) -> bool:
        """Whether the base has this revision. After a restore a revision can come twice, of other stores."""
        return 0 < self.base_revision == revision and self.base_operation[: len(origin)] == origin


class Record(NamedTuple):
    """All that is known of a session."""

    row: Row
    base: Base | None
    pending: Pending | None

    @classmethod
    def of(cls, base: Base | None, pending: Pending | None, row: Row) -> Record:
        """Make a record of a base, what is pending, and of a row all else."""
        if base is None:
            row = row._replace(base_digest=None, base_revision=0, base_operation=b"")
        else:
            row = row._replace(base_digest=base.digest, base_revision=base.revision, base_operation=base.operation)
        return cls(row._replace(has_pending=pending is not None), base, pending)


class Removal(NamedTuple):
    """What was removed through the API since the base: the session, turns by their ids."""

    deleted: bool
    turns: frozenset[str]


class Remote(NamedTuple):
    """The shared store that the bases are of: its incarnation, and the revisions that its partitions had reached."""

    incarnation: bytes
    namespace: str
    revisions: dict[int, int]  # by the numbers of the partitions
    last_sync: float | None  # seconds since 1970


class _DamagedError(UnavailableError):
    """The database was damaged. It was moved aside."""


class Journal:
    """The file `state.db`; for all threads of a process, over one connection."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._closed = False
        self._version = -1  # of the database as others left it
        self._inode: tuple[int, int] | None = None  # with its device
        self._defaults: dict[str, bytes] = {}  # digests of the parts of an empty session
        self._names = b""  # theirs, as a dictionary to compress names with
        self.seen: dict[str, Seen] = {}
        self.rows: dict[str, Row] = {}
        self.removals: dict[str, Removal] = {}
        self.generation = 0  # changes when any of these does
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

    def read_remote(self) -> Remote | None:
        """The shared store that the bases are of; None: there are none yet."""

        def read(db: sqlite3.Connection) -> Remote | None:
            with _decoding():
                _, incarnation, namespace, revisions, last_sync, _ = db.execute("SELECT * FROM remote").fetchone()
                if incarnation is None:
                    return None
                return Remote(incarnation, namespace, msgspec.msgpack.decode(revisions, type=dict[int, int]), last_sync)

        return self._run(read)

    def records(self, ids: Iterable[str]) -> dict[str, Record]:
        """Return all that is known of sessions."""

        def read(db: sqlite3.Connection) -> dict[str, Record]:
            found = {}
            for id in ids:
                row = self.rows.get(id)
                if row is None:
                    continue
                with _decoding():
                    parts, pending = db.execute(_DETAILS, (id,)).fetchone()
                    base = waiting = None
                    if row.base_digest is not None:
                        base = Base(self._unpack(parts), row.base_digest, row.base_revision, row.base_operation)
                        if content_digest(base.parts) != base.digest:
                            raise ValueError("not the parts of this base")
                    if pending is not None:
                        waiting = msgspec.msgpack.decode(zlib.decompress(pending), type=Pending)
                found[id] = Record(row, base, waiting)
            return found

        return self._run(read, "DEFERRED")

    def note_seen(self, found: Mapping[str, Seen | None]) -> None:
        """Note what was found in files; None: there is none."""
        if not found:
            return

        def write(db: sqlite3.Connection) -> None:
            gone = [(id,) for id, seen in found.items() if seen is None and id in self.seen]
            values = [
                (
                    id,
                    *map(_signed, seen.signature),
                    _signed(seen.looked_ns),
                    seen.digest,
                    None if seen.meta is None else msgspec.msgpack.encode(seen.meta),
                    seen.reason,
                )
                for id, seen in found.items()
                if seen is not None
            ]
            db.executemany("DELETE FROM file WHERE id = ?", gone)
            db.executemany("INSERT OR REPLACE INTO file VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", values)

        def remember(_: sqlite3.Connection) -> None:
            for id, seen in found.items():
                _put(self.seen, id, seen)

        self._write(write, remember)

    def note(
        self,
        records: Mapping[str, Record | None] = {},  # it is not changed
        rows: Mapping[str, Row] = {},  # it is not changed
        remote: Remote | None = None,
        back: Mapping[str, Collection[str]] = {},  # it is not changed
    ) -> None:
        """Note what is known of sessions, in one transaction.

        Args:
            records: all that is known; None: the session is forgotten. A base ends what was removed before it.
            rows: what was heard of the shared store, and conflicts; base and pending remain as they are.
            remote: the shared store that the bases are of; None: as it was.
            back: ids of turns that the files lacked, since they were removed: those that a base has again are back.

        """
        if not records and not rows and remote is None:
            return
        removals: dict[str, Removal | None] = {}
        known: dict[str, Row] = {}

        def write(db: sqlite3.Connection) -> None:
            for id, row in rows.items():
                known[id] = _with_base_of(self.rows.get(id, Row()), row)
                _upsert(db, id, known[id])
            for id, record in records.items():
                if record is None:
                    _forget(db, id)
                    removals[id] = None
                    continue
                number = _upsert(db, id, record.row)
                parts = None if record.base is None else self._pack(record.base.parts)
                pending = None if record.pending is None else zlib.compress(msgspec.msgpack.encode(record.pending), 1)
                _set_details(db, "base", number, parts)
                _set_details(db, "pending", number, pending)
            self._end_removals(db, records, removals, back)
            if remote is not None:
                _note_remote(db, remote)

        def remember(_: sqlite3.Connection) -> None:
            self.rows.update(known)
            for id, record in records.items():
                _put(self.rows, id, None if record is None else record.row)
            for id, removal in removals.items():
                _put(self.removals, id, removal)

        self._write(write, remember)

    def _end_removals(
        self,
        db: sqlite3.Connection,
        records: Mapping[str, Record | None],
        removals: dict[str, Removal | None],
        back: Mapping[str, Collection[str]],
    ) -> None:
        """Forget what was removed before a new base, but for what is being removed at this moment."""
        for id in records.keys() & self.removals.keys():
            record = records[id]
            if record is not None and (record.base is None or record.row.base_digest == self._base_digest(id)):
                continue
            before = self.removals[id]
            left = frozenset[str]()
            if record is not None and record.base is not None:
                left = before.turns.difference(back.get(id, ()))
                left &= {key for key, _ in record.base.parts.lists.get("history.turns", [])}
            db.execute("DELETE FROM removal WHERE id = ?", (id,))
            removals[id] = None
            if left:
                removals[id] = Removal(before.deleted, left)
                values = id, int(before.deleted), msgspec.msgpack.encode(sorted(left))
                db.execute("INSERT INTO removal VALUES (?, ?, ?)", values)

    def _base_digest(self, id: str) -> bytes | None:
        row = self.rows.get(id)
        return None if row is None else row.base_digest

    def note_removal(self, id: str, turns: Collection[str], *, deleted: bool = False) -> None:
        """Note what is about to be removed through the API, beside what was before."""
        found: list[Removal] = []

        def write(db: sqlite3.Connection) -> None:
            row = db.execute("SELECT turns FROM removal WHERE id = ?", (id,)).fetchone()
            before = frozenset(msgspec.msgpack.decode(row[0], type=list[str])) if row else frozenset()
            found.append(Removal(deleted, before | frozenset(turns)))
            values = (id, int(deleted), msgspec.msgpack.encode(sorted(found[-1].turns)))
            db.execute("INSERT OR REPLACE INTO removal VALUES (?, ?, ?)", values)

        def remember(_: sqlite3.Connection) -> None:
            self.removals[id] = found[-1]

        self._write(write, remember)

    def set_removal(self, id: str, removal: Removal | None) -> None:
        """Note what was removed through the API, whatever was noted before."""

        def write(db: sqlite3.Connection) -> None:
            db.execute("DELETE FROM removal WHERE id = ?", (id,))
            if removal is not None:
                values = (id, int(removal.deleted), msgspec.msgpack.encode(sorted(removal.turns)))
                db.execute("INSERT INTO removal VALUES (?, ?, ?)", values)

        self._write(write, lambda _: _put(self.removals, id, removal))

    def forget_bases(self, kept: Collection[str]) -> None:
        """Forget what was common, but of these sessions."""

        def write(db: sqlite3.Connection) -> None:
            for id in self.rows.keys() - kept:
                _forget(db, id)
                db.execute("DELETE FROM removal WHERE id = ?", (id,))

        self._write(write, self._load)

    def _pack(self, parts: Digests) -> bytes:
        """Encode digests: names apart, since they can be compressed, and without what every empty session has."""
        values = {name: data for name, data in parts.values.items() if self._defaults.get(name) != data}
        missing = [name for name in self._defaults if name not in parts.values]
        lists = {path: entries for path, entries in parts.lists.items() if entries}
        keys = {path: _pack_keys(lists[path]) for path in lists}
        numbers = [len(entries) for entries in lists.values()]
        names = list(values), missing, list(lists), numbers, [*parts.lists.keys() - lists.keys()]
        packer = zlib.compressobj(zdict=self._names)
        compressed = packer.compress(msgspec.msgpack.encode(names)) + packer.flush()
        data = b"".join(itertools.chain(values.values(), *([item for _, item in lists[path]] for path in keys)))
        return msgspec.msgpack.encode((compressed, [*keys.values()], data))

    def _unpack(self, packed: bytes) -> Digests:
        compressed, keys, data = msgspec.msgpack.decode(
            packed, type=tuple[bytes, list[list[str] | bytes | None], bytes]
        )
        names, missing, paths, numbers, empty = msgspec.msgpack.decode(
            zlib.decompressobj(zdict=self._names).decompress(compressed),
            type=tuple[list[str], list[str], list[str], list[int], list[str]],
        )
        pieces = iter([data[at : at + _SIZE] for at in range(0, len(data), _SIZE)])
        values = {name: item for name, item in self._defaults.items() if name not in missing}
        values |= {name: next(pieces) for name in names}
        lists: dict[str, list[Entry]] = {path: [] for path in empty}
        for path, number, found in zip(paths, numbers, keys, strict=True):
            items = [next(pieces) for _ in range(number)]
            lists[path] = [*zip(_unpack_keys(found, items), items, strict=True)]
        return Digests(values, lists)

    def _open(self) -> sqlite3.Connection:
        new = not self._path.exists()
        connection = sqlite3.connect(self._path, _BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        self._inode = _inode(self._path)
        try:
            if new:
                os.chmod(self._path, 0o600)  # noqa: PTH101  # it is open already
            if self._check_version(connection) == 0:
                connection.execute("PRAGMA page_size = 8192")
                connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            with _transaction(connection, "IMMEDIATE"):
                if self._check_version(connection) == 0:
                    for statement in _TABLES.split(";"):
                        connection.execute(statement)
                    defaults = msgspec.msgpack.encode(digests(SessionAsset()).values)
                    connection.execute("INSERT INTO remote (one, defaults) VALUES (1, ?)", (defaults,))
                    connection.execute(f"PRAGMA user_version = {_VERSION}")
            with _decoding():
                (defaults,) = connection.execute("SELECT defaults FROM remote").fetchone()
                self._defaults = msgspec.msgpack.decode(defaults, type=dict[str, bytes])
            self._names = " ".join(self._defaults).encode()
        except BaseException:
            connection.close()
            raise
        return connection

    def _check_version(self, db: sqlite3.Connection) -> int:
        version: int = db.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, _VERSION):
            raise LayoutError(f"{self._path} is of version {version}, not {_VERSION}")
        return version

    def _load(self, db: sqlite3.Connection) -> None:
        with _decoding():
            self._load_tables(db)

    def _load_tables(self, db: sqlite3.Connection) -> None:
        self.seen = {
            id: Seen(
                Signature(inode % _WORD, *signature),
                looked,
                digest,
                None if meta is None else msgspec.msgpack.decode(meta, type=FileMeta),
                reason,
            )
            for id, inode, *signature, looked, digest, meta, reason in db.execute("SELECT * FROM file")
        }
        self.rows = {
            id: Row._make((*known, bool(pending), reason, tuple(msgspec.json.decode(parts))))
            for id, *known, pending, reason, parts in db.execute(_SELECT)
        }
        self.removals = {
            id: Removal(bool(deleted), frozenset(msgspec.msgpack.decode(turns, type=list[str])))
            for id, deleted, turns in db.execute("SELECT * FROM removal")
        }
        self.generation += 1

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
                if kind is None and self._version == _data_version(db):
                    return call(db)
                with _transaction(db, kind or "DEFERRED"):
                    if self._version != (version := _data_version(db)):
                        self._load(db)
                        self._version = version
                    result = call(db)
                after(db)
            except BaseException:
                self._version = -1  # what is in memory may be other than what is noted
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
            self._version = -1
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
        self.seen, self.rows, self.removals = {}, {}, {}
        self.generation += 1
        if is_first:
            text = "%s was damaged and is now %s: what was common with the shared store is forgotten"
            _log.warning(text, self._path, aside)
        return _DamagedError(f"{self._path} was damaged: it was moved aside, and the next sync is a first one")


_LIGHT: Final = (
    "base_digest",
    "base_revision",
    "base_operation",
    "there_revision",
    "there_origin",
    "there_meta",
    "has_pending",
    "reason",
    "parts",
)


def _pack_keys(entries: list[Entry]) -> list[str] | bytes | None:
    """Return the keys of a list as they are stored: of UUIDs the bytes, nothing where they are the digests."""
    keys = [key for key, _ in entries]
    if keys == [data.hex() for _, data in entries]:
        return None
    if all(len(key) == _UUID_LENGTH for key in keys):
        packed = b"".join([attempt(bytes.fromhex, key.replace("-", ""))[0] or b"" for key in keys])
        if keys == _unpack_keys(packed, []):
            return packed
    return keys


def _unpack_keys(keys: list[str] | bytes | None, items: list[bytes]) -> list[str]:
    if keys is None:
        return [item.hex() for item in items]
    if isinstance(keys, bytes):
        return [str(uuid.UUID(bytes=keys[at : at + 16].ljust(16))) for at in range(0, len(keys), 16)]
    return keys


_SELECT: Final = f"SELECT id, {', '.join(_LIGHT)} FROM session"  # noqa: S608  # constants


def _with_base_of(known: Row, row: Row) -> Row:
    return row._replace(
        base_digest=known.base_digest,
        base_revision=known.base_revision,
        base_operation=known.base_operation,
        has_pending=known.has_pending,
    )


_DETAILS: Final = """
SELECT base.parts, pending.version FROM session
LEFT JOIN base ON base.session = session.rowid LEFT JOIN pending ON pending.session = session.rowid
WHERE session.id = ?
"""


def _set_details(db: sqlite3.Connection, table: Literal["base", "pending"], number: int, data: bytes | None) -> None:
    if data is None:
        db.execute(f"DELETE FROM {table} WHERE session = ?", (number,))  # noqa: S608  # a constant
    else:
        db.execute(f"INSERT OR REPLACE INTO {table} VALUES (?, ?)", (number, data))  # noqa: S608  # a constant


def _forget(db: sqlite3.Connection, id: str) -> None:
    found = db.execute("SELECT rowid FROM session WHERE id = ?", (id,)).fetchone()
    if found is not None:
        _set_details(db, "base", found[0], None)
        _set_details(db, "pending", found[0], None)
        db.execute("DELETE FROM session WHERE rowid = ?", found)


def _upsert(db: sqlite3.Connection, id: str, row: Row) -> int:
    """Write what is known of a session; return its number."""
    values: dict[str, Any] = dict(zip(_LIGHT, row, strict=True))
    values |= {"parts": msgspec.json.encode(row.parts).decode()}
    names, places = ", ".join(values), ", ".join("?" * len(values))
    sets = ", ".join(f"{name} = excluded.{name}" for name in values)
    db.execute(
        f"INSERT INTO session (id, {names}) VALUES (?, {places}) ON CONFLICT (id) DO UPDATE SET {sets}",  # noqa: S608  # constants
        (id, *values.values()),
    )
    number: int = db.execute("SELECT rowid FROM session WHERE id = ?", (id,)).fetchone()[0]
    return number


def _note_remote(db: sqlite3.Connection, remote: Remote) -> None:
    values = (remote.incarnation, remote.namespace, msgspec.msgpack.encode(remote.revisions), remote.last_sync)
    db.execute("UPDATE remote SET incarnation = ?, namespace = ?, revisions = ?, last_sync = ?", values)


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
def _decoding() -> Iterator[None]:
    """What can't be taken apart is damaged."""
    try:
        yield
    except (TypeError, ValueError, LookupError, StopIteration) as error:
        raise_interruption(error)
        raise sqlite3.DatabaseError(f"it makes no sense: {type(error).__name__}") from error


def _put(known: dict[str, T], id: str, value: T | None) -> None:
    if value is None:
        known.pop(id, None)
    else:
        known[id] = value


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


def _signed(number: int) -> int:
    """Return a number that SQLite can keep: the same modulo 2 to the power of 64."""
    return (number + _WORD // 2) % _WORD - _WORD // 2

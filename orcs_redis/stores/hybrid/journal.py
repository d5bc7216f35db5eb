"""What a folder remembers, in SQLite: what was last common of each session, and what was last found on both sides.

Of contents it has digests only. A table has one kind of writer: `file` whoever reads files (it is a cache), `session`
the round, of which there is one at a time, `removal` the calls of the API. So nobody overwrites what another noted.
"""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeVar

import msgspec

from ...model.asset import SessionAsset
from ...model.parts import digests
from .database import Database, decoding, signed, unsigned
from .packing import Packing
from .planner import Base, Pending, content_digest
from .reading import Signature

__all__ = ["FileMeta", "Journal", "Notes", "Record", "Remote", "Removal", "Row", "Seen"]

T = TypeVar("T")

_VERSION: Final = 1
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


class Notes(NamedTuple):
    """What is to be noted of sessions."""

    records: Mapping[str, Record | None] = {}
    """All that is known; None: the session is forgotten. A base ends what was removed before it."""

    rows: Mapping[str, Row] = {}
    """What was heard of the shared store, and conflicts; base and pending remain as they are."""

    remote: Remote | None = None
    """The shared store that the bases are of; None: as it was."""

    back: Mapping[str, Collection[str]] = {}
    """Ids of turns that the files lacked, since they were removed: those that a base has again are back."""


_ROWS: Final = f"SELECT id, {', '.join(Row._fields)} FROM session"  # noqa: S608  # constants
_DETAILS: Final = """
SELECT base.parts, pending.version FROM session
LEFT JOIN base ON base.session = session.rowid LEFT JOIN pending ON pending.session = session.rowid
WHERE session.id = ?
"""


class Journal(Database):
    """The file `state.db`; for all threads of a process, over one connection."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, _VERSION)
        self._packing = Packing({})
        self.seen: dict[str, Seen] = {}
        self.rows: dict[str, Row] = {}
        self.removals: dict[str, Removal] = {}
        self._begin()

    def read_remote(self) -> Remote | None:
        """The shared store that the bases are of; None: there are none yet."""

        def read(db: sqlite3.Connection) -> Remote | None:
            with decoding():
                _, incarnation, namespace, revisions, last_sync, _ = db.execute("SELECT * FROM remote").fetchone()
                if incarnation is None:
                    return None
                return Remote(incarnation, namespace, msgspec.msgpack.decode(revisions, type=dict[int, int]), last_sync)

        return self._run(read)

    def records(self, ids: Iterable[str]) -> dict[str, Record]:
        """Return all that is known of sessions."""

        def read(db: sqlite3.Connection) -> dict[str, Record]:
            known = [(id, self.rows[id]) for id in ids if id in self.rows]
            return {id: self._record(db, id, row) for id, row in known}

        return self._run(read, "DEFERRED")

    def _record(self, db: sqlite3.Connection, id: str, row: Row) -> Record:
        base = waiting = None
        with decoding():
            parts, pending = db.execute(_DETAILS, (id,)).fetchone()
            if row.base_digest is not None:
                base = Base(self._packing.unpack(parts), row.base_digest, row.base_revision, row.base_operation)
                if content_digest(base.parts) != base.digest:
                    raise ValueError("not the parts of this base")
            if pending is not None:
                waiting = msgspec.msgpack.decode(zlib.decompress(pending), type=Pending)
        return Record(row, base, waiting)

    def note_seen(self, found: Mapping[str, Seen | None]) -> None:
        """Note what was found in files; None: there is none."""
        if not found:
            return

        def write(db: sqlite3.Connection) -> None:
            gone = [(id,) for id, seen in found.items() if seen is None and id in self.seen]
            values = [(id, *_file_values(seen)) for id, seen in found.items() if seen is not None]
            db.executemany("DELETE FROM file WHERE id = ?", gone)
            db.executemany("INSERT OR REPLACE INTO file VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", values)

        def remember(_: sqlite3.Connection) -> None:
            for id, seen in found.items():
                _put(self.seen, id, seen)

        self._write(write, remember)

    def note(self, notes: Notes) -> None:
        """Note what is known of sessions, in one transaction."""
        if not notes.records and not notes.rows and notes.remote is None:
            return
        known: dict[str, Row] = {}
        removals: dict[str, Removal | None] = {}

        def write(db: sqlite3.Connection) -> None:
            for id, row in notes.rows.items():
                known[id] = _with_base_of(self.rows.get(id, Row()), row)
                _upsert(db, id, known[id])
            for id, record in notes.records.items():
                self._set_record(db, id, record)
            removals.update(self._end_removals(db, notes))
            if notes.remote is not None:
                _set_remote(db, notes.remote)

        def remember(_: sqlite3.Connection) -> None:
            self.rows.update(known)
            for id, record in notes.records.items():
                _put(self.rows, id, None if record is None else record.row)
            for id, removal in removals.items():
                _put(self.removals, id, removal)

        self._write(write, remember)

    def _set_record(self, db: sqlite3.Connection, id: str, record: Record | None) -> None:
        if record is None:
            _forget(db, id)
            return
        number = _upsert(db, id, record.row)
        parts = None if record.base is None else self._packing.pack(record.base.parts)
        pending = None if record.pending is None else zlib.compress(msgspec.msgpack.encode(record.pending), 1)
        _set_details(db, "base", number, parts)
        _set_details(db, "pending", number, pending)

    def _end_removals(self, db: sqlite3.Connection, notes: Notes) -> dict[str, Removal | None]:
        """Forget what was removed before a new base, but for what is being removed at this moment.

        Return what is left of each that has changed.
        """
        removals: dict[str, Removal | None] = {}
        for id in notes.records.keys() & self.removals.keys():
            record = notes.records[id]
            if record is not None and (record.base is None or record.row.base_digest == self._base_digest(id)):
                continue
            before = self.removals[id]
            left = frozenset[str]()
            if record is not None and record.base is not None:
                left = before.turns.difference(notes.back.get(id, ()))
                left &= {key for key, _ in record.base.parts.lists.get("history.turns", [])}
            removals[id] = Removal(before.deleted, left) if left else None
            _set_removal(db, id, removals[id])
        return removals

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
            _set_removal(db, id, found[-1])

        def remember(_: sqlite3.Connection) -> None:
            self.removals[id] = found[-1]

        self._write(write, remember)

    def set_removal(self, id: str, removal: Removal | None) -> None:
        """Note what was removed through the API, whatever was noted before."""
        self._write(lambda db: _set_removal(db, id, removal), lambda _: _put(self.removals, id, removal))

    def forget_bases(self, kept: Collection[str]) -> None:
        """Forget what was common, but of these sessions."""

        def write(db: sqlite3.Connection) -> None:
            for id in self.rows.keys() - kept:
                _forget(db, id)
                _set_removal(db, id, None)

        self._write(write, self._load)

    # What the database asks for.

    def _create(self, db: sqlite3.Connection) -> None:
        for statement in _TABLES.split(";"):
            db.execute(statement)
        defaults = msgspec.msgpack.encode(digests(SessionAsset()).values)
        db.execute("INSERT INTO remote (one, defaults) VALUES (1, ?)", (defaults,))

    def _read_constants(self, db: sqlite3.Connection) -> None:
        with decoding():
            (defaults,) = db.execute("SELECT defaults FROM remote").fetchone()
            self._packing = Packing(msgspec.msgpack.decode(defaults, type=dict[str, bytes]))

    def _clear(self) -> None:
        self.seen, self.rows, self.removals = {}, {}, {}

    def _load(self, db: sqlite3.Connection) -> None:
        with decoding():
            self._load_tables(db)

    def _load_tables(self, db: sqlite3.Connection) -> None:
        self.seen = {
            id: Seen(
                Signature(unsigned(inode), *signature),
                looked,
                digest,
                None if meta is None else msgspec.msgpack.decode(meta, type=FileMeta),
                reason,
            )
            for id, inode, *signature, looked, digest, meta, reason in db.execute("SELECT * FROM file")
        }
        self.rows = {
            id: Row._make((*known, bool(pending), reason, tuple(msgspec.json.decode(parts))))
            for id, *known, pending, reason, parts in db.execute(_ROWS)
        }
        self.removals = {
            id: Removal(bool(deleted), frozenset(msgspec.msgpack.decode(turns, type=list[str])))
            for id, deleted, turns in db.execute("SELECT * FROM removal")
        }


def _with_base_of(known: Row, row: Row) -> Row:
    return row._replace(
        base_digest=known.base_digest,
        base_revision=known.base_revision,
        base_operation=known.base_operation,
        has_pending=known.has_pending,
    )


def _file_values(seen: Seen) -> tuple[Any, ...]:
    """Return what is written of a file beside its id."""
    meta = None if seen.meta is None else msgspec.msgpack.encode(seen.meta)
    return (*map(signed, seen.signature), signed(seen.looked_ns), seen.digest, meta, seen.reason)


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
    values: dict[str, Any] = dict(zip(Row._fields, row, strict=True))
    values |= {"parts": msgspec.json.encode(row.parts).decode()}
    names, places = ", ".join(values), ", ".join("?" * len(values))
    sets = ", ".join(f"{name} = excluded.{name}" for name in values)
    db.execute(
        f"INSERT INTO session (id, {names}) VALUES (?, {places}) ON CONFLICT (id) DO UPDATE SET {sets}",  # noqa: S608  # constants
        (id, *values.values()),
    )
    number: int = db.execute("SELECT rowid FROM session WHERE id = ?", (id,)).fetchone()[0]
    return number


def _set_remote(db: sqlite3.Connection, remote: Remote) -> None:
    values = (remote.incarnation, remote.namespace, msgspec.msgpack.encode(remote.revisions), remote.last_sync)
    db.execute("UPDATE remote SET incarnation = ?, namespace = ?, revisions = ?, last_sync = ?", values)


def _set_removal(db: sqlite3.Connection, id: str, removal: Removal | None) -> None:
    db.execute("DELETE FROM removal WHERE id = ?", (id,))
    if removal is not None:
        values = id, int(removal.deleted), msgspec.msgpack.encode(sorted(removal.turns))
        db.execute("INSERT INTO removal VALUES (?, ?, ?)", values)


def _put(known: dict[str, T], id: str, value: T | None) -> None:
    if value is None:
        known.pop(id, None)
    else:
        known[id] = value

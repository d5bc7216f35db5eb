"""What a folder remembers: it comes back equal, from whatever process, and damage costs no more than the memory."""

from __future__ import annotations

import logging
import random
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import orcs_redis
from orcs_redis import (
    LayoutError,
    PermissionDeniedError,
    SessionAsset,
    StorageError,
    StoreFullError,
    UnavailableError,
)
from orcs_redis.model.filters import Filters
from orcs_redis.model.parts import Digests, digests
from orcs_redis.stores.hybrid.files import Files
from orcs_redis.stores.hybrid.journal import FileMeta, Journal, Notes, Record, Remote, Removal, Row, Seen
from orcs_redis.stores.hybrid.local import Local
from orcs_redis.stores.hybrid.planner import Base, Pending, Side, content_digest
from orcs_redis.stores.hybrid.reading import Signature

from .test_merge import versions
from .test_parts import Scored, assets

DEMO = Path(orcs_redis.__file__).parent / "cli" / "demo_sessions"
SECRET = "hunter2"

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
uuids = st.uuids().map(str)
turn_ids = text | uuids | uuids.map(str.upper) | uuids.map(lambda name: name.replace("-", " ")) | st.just("-" * 36)
ids = text | uuids | st.sampled_from(["", "a/b", "x\0y", "ä", "é", "'; DROP TABLE session; --", "s" * 500])
hashes = st.binary(min_size=16, max_size=16)
entries = st.lists(st.tuples(turn_ids, hashes), max_size=4)
anything = st.builds(
    Digests,
    st.dictionaries(text | st.sampled_from(["created_at_ms", "metadata.", "history.max_turns"]), hashes, max_size=4),
    st.dictionaries(st.sampled_from(["history.turns", "granted_commands", "", "ä"]), entries, max_size=3),
)
parts = anything | assets().map(digests) | versions().map(lambda three: digests(three[1]))
numbers = st.integers(-(2**63), 2**63 - 1)
rows = st.builds(
    Row,
    there_revision=numbers,
    there_origin=st.binary(max_size=8),
    there_meta=st.binary(max_size=9),
    reason=text,
    parts=st.lists(text, max_size=3).map(tuple),
)
bases = st.none() | st.builds(lambda parts, n, op: Base(parts, content_digest(parts), n, op), parts, numbers, hashes)
pendings = st.none() | st.builds(Pending, hashes, numbers, hashes, st.none() | parts, entries, hashes)
records = st.builds(Record.of, bases, pendings, rows)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.db"


@contextmanager
def opened(path: Path, count: int = 1) -> Iterator[list[Journal]]:
    """Open journals of one file, as processes do."""
    journals = [Journal(path) for _ in range(count)]
    try:
        yield journals
    finally:
        for journal in journals:
            journal.close()


def known(journal: Journal) -> Any:
    """All that a journal says."""
    journal.refresh()
    return (
        journal.records([*journal.rows]),
        dict(journal.rows),
        dict(journal.seen),
        dict(journal.removals),
        journal.read_remote(),
    )


def based(*turns: str, revision: int = 1) -> Record:
    """A record with a base of these turns."""
    asset = SessionAsset(id="s", created_at_ms=1, updated_at_ms=1)
    asset.history.turns = [orcs_redis.ConversationTurn(id=id, timestamp_ms=0, role="user", content=id) for id in turns]
    side = Side.of(asset)
    return Record.of(Base(side.parts, side.digest, revision), None, Row(there_revision=revision))


fast = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


# What was noted comes back.


@given(st.dictionaries(ids, records, max_size=3), st.dictionaries(ids, records, max_size=3))
@fast
def test_records(tmp_path_factory: pytest.TempPathFactory, first: Any, second: Any) -> None:
    """Records come back equal, here and in another process, whatever keys and ids are in them."""
    with opened(tmp_path_factory.mktemp("journal") / "state.db", 2) as (one, other):
        one.note(Notes(first))
        assert one.records([*first, "none"]) == first
        one.note(Notes(second))
        for journal in (one, other):
            journal.refresh()
            assert journal.records([*first, *second]) == {**first, **second}
            assert journal.rows == {id: record.row for id, record in {**first, **second}.items()}
    with opened(one._path) as (again,):
        assert known(again) == known_of({**first, **second})


def known_of(records: dict[str, Record]) -> Any:
    return records, {id: record.row for id, record in records.items()}, {}, {}, None


@given(parts)
@fast
def test_digests(tmp_path_factory: pytest.TempPathFactory, of: Digests) -> None:
    """The digests of a base come back equal, with those that every empty session has and without."""
    folder = tmp_path_factory.mktemp("journal")
    with opened(folder / "state.db") as (journal,):
        base = Base(of, content_digest(of))
        journal.note(Notes({"s": Record.of(base, None, Row())}))
        assert journal.records(["s"])["s"].base == base


@given(assets())
def test_digests_survive_a_file(asset: SessionAsset) -> None:
    """A session that was written and read has the digests that it had."""
    again = Scored.from_json(asset.to_json())
    assert digests(again) == digests(asset)
    assert Side.of(again).digest == Side.of(asset).digest


@pytest.mark.parametrize("file", sorted(DEMO.glob("*.json")), ids=lambda file: file.stem[:8])
def test_digests_of_sessions_of_orcs(file: Path, path: Path) -> None:
    """So have those that orcs has written, and their digests come back from the journal."""
    asset = SessionAsset.from_json(file.read_bytes())
    assert digests(SessionAsset.from_json(asset.to_json())) == digests(asset)
    record = Record.of(Base(digests(asset), Side.of(asset).digest), None, Row())
    with opened(path) as (journal,):
        journal.note(Notes({"s": record}))
        assert journal.records(["s"]) == {"s": record}


def test_uuids_take_half(path: Path) -> None:
    """Ids of turns that are UUIDs are stored as 16 bytes: with its digest, a turn takes some 32."""
    asset = SessionAsset()
    asset.history.turns = [orcs_redis.ConversationTurn.user("x") for _ in range(1000)]
    with opened(path) as (journal,):
        journal.note(Notes({"s": Record.of(Base(digests(asset), b"x" * 16), None, Row())}))
        (size,) = journal._run(lambda db: db.execute("SELECT length(parts) FROM base").fetchone())
    assert size < 33_000


signatures = st.builds(Signature, *[st.integers(-(2**63), 2**64 - 1)] * 4)
seen = st.builds(
    Seen,
    signatures.map(lambda found: found._replace(inode=found.inode % 2**64)),
    st.integers(0, 2**63 - 1),
    hashes | st.just(b""),
    st.none() | st.builds(FileMeta, st.none() | text, st.none() | text, numbers, numbers, numbers, st.just({"a": "b"})),
    text,
)


@given(st.dictionaries(ids, st.none() | seen, max_size=4))
@fast
def test_what_was_seen(tmp_path_factory: pytest.TempPathFactory, found: dict[str, Seen | None]) -> None:
    """What was found in files comes back, whatever inode it has; a time that SQLite has no number for never equals."""
    with opened(tmp_path_factory.mktemp("journal") / "state.db", 2) as (one, other):
        one.note_seen(found)
        present = {id: item for id, item in found.items() if item is not None}
        assert one.seen == present
        other.refresh()
        assert other.seen.keys() == present.keys()
        for id, item in other.seen.items():
            times = (*item.signature[2:], item.signature.size)
            assert item.signature.inode == present[id].signature.inode
            if max(present[id].signature[1:]) < 2**63:
                assert item == present[id]
            else:
                assert times != (*present[id].signature[2:], present[id].signature.size)
        one.note_seen(dict.fromkeys(found))
        other.refresh()
        assert other.seen == one.seen == {}


def test_the_shared_store(path: Path) -> None:
    """Which store the bases are of, and that there is none at first."""
    remote = Remote(b"\0incarnation", "näme", {0: 1, 1023: 2**63}, 1.5)
    with opened(path, 2) as (one, other):
        assert one.read_remote() is None
        one.note(Notes(remote=remote))
        assert other.read_remote() == one.read_remote() == remote
        one.note(Notes(remote=remote._replace(last_sync=None)))
        assert other.read_remote() == remote._replace(last_sync=None)


# Several processes.


def test_forgotten_elsewhere(path: Path) -> None:
    """A session that another process has forgotten is gone, with its base and what was pending."""
    record = based("a")
    with opened(path, 2) as (one, other):
        one.note(Notes({"s": record, "t": record}))
        assert other.records(["s", "t"]) == {"s": record, "t": record}
        one.note(Notes({"s": None}))
        assert other.records(["s", "t"]) == {"t": record}
        assert "s" not in other.rows
        one.note(Notes({"s": Record.of(None, None, Row())}))
        assert other.records(["s"])["s"].base is None


def test_what_was_heard_leaves_the_base_alone(path: Path) -> None:
    """A row that was heard keeps the base that another process has noted meanwhile."""
    record = based("a")
    with opened(path, 2) as (one, other):
        one.note(Notes({"s": record}))
        other.note(Notes(rows={"s": Row(there_revision=7, reason="why", parts=("x",))}))
        found = one.records(["s"])["s"]
        assert found.base == record.base
        assert found.row == record.row._replace(there_revision=7, reason="why", parts=("x",))
        one.note(Notes({"s": None}))
        other.note(Notes(rows={"s": Row(there_revision=8)}))
        assert one.records(["s"]) == {"s": Record.of(None, None, Row(there_revision=8))}


def test_removals_of_two_processes(path: Path) -> None:
    """What was removed through the API adds up until there is a new base, and then is what that has still."""
    with opened(path, 2) as (one, other):
        one.note(Notes({"s": based("a", "b", "c")}))
        one.note_removal("s", ["a"])
        other.note_removal("s", ["b"])
        one.refresh()
        assert one.removals == other.removals == {"s": Removal(False, frozenset("ab"))}
        one.note_removal("s", ["c"], deleted=True)
        other.note(Notes({"s": based("a", "b", "c", revision=2)}))  # of the same content: no new base
        assert other.removals == {"s": Removal(True, frozenset("abc"))}
        other.note(Notes({"s": based("b", "d")}))
        one.refresh()
        assert one.removals == other.removals == {"s": Removal(True, frozenset("b"))}
        other.note(Notes({"s": based("d")}))
        one.refresh()
        assert one.removals == other.removals == {}


def test_removals_that_are_over(path: Path) -> None:
    """A turn that a base has again is back; what is removed while that is noted stays removed."""
    with opened(path, 2) as (one, other):
        for journal in (one, other):
            one.note(Notes({"s": based("a", "b")}))
            one.note_removal("s", ["a", "b"], deleted=True)
            journal.note(Notes({"s": based("a", "b", "c")}, back={"s": ["a", "b"]}))
            assert journal.removals == {}
            one.note(Notes({"s": based("a", "b")}))
            one.note_removal("s", ["a"])
            one.note_removal("s", ["b"], deleted=True)
            journal.note(Notes({"s": based("a", "b", "c")}, back={"s": ["a"]}))
            assert journal.removals == {"s": Removal(True, frozenset("b"))}
            one.note(Notes({"s": None}))
    with opened(path) as (again,):
        assert again.removals == {}


def test_a_session_that_is_gone_has_no_removals(path: Path) -> None:
    """What was removed from a session ends with it."""
    with opened(path) as (journal,):
        journal.note(Notes({"s": based("a")}))
        journal.note_removal("s", ["a"], deleted=True)
        journal.note(Notes({"s": None}))
        assert journal.removals == {}
        journal.note(Notes({"s": Record.of(None, None, Row())}))
        journal.note_removal("s", ["a"])
        journal.note(Notes({"s": Record.of(None, Pending(b"x"), Row())}))
        assert journal.removals == {"s": Removal(False, frozenset("a"))}  # nothing is common yet


def test_forgetting_bases(path: Path) -> None:
    """What was common is forgotten but of some sessions, of which other processes know, too."""
    with opened(path, 2) as (one, other):
        one.note(Notes({"s": based("a"), "t": based("b")}))
        one.note_removal("s", ["a"])
        one.note_removal("t", ["b"])
        one.note_seen({"s": Seen(Signature(1, 2, 3, 4), 5)})
        other.forget_bases({"t"})
        for journal in (one, other):
            assert known(journal)[0] == {"t": based("b")}
            assert journal.removals == {"t": Removal(False, frozenset("b"))}
            assert journal.seen.keys() == {"s"}


def test_a_generation_is_of_what_is_known(path: Path) -> None:
    """It changes with what is known, also by another process, and with nothing else."""
    with opened(path, 2) as (one, other):
        one.refresh()
        before = one.generation
        one.refresh()
        one.note(Notes())
        one.note_seen({})
        assert one.generation == before
        changes: list[Callable[[], None]] = [
            lambda: other.note(Notes({"s": based("a")})),
            lambda: other.note_seen({"s": Seen(Signature(1, 2, 3, 4), 5)}),
            lambda: other.note_removal("s", ["a"]),
            lambda: other.forget_bases(()),
        ]
        for change in changes:
            generations = one.generation, other.generation
            change()
            one.refresh()
            assert one.generation > generations[0]
            assert other.generation > generations[1]


# Damage.


def filled(path: Path, count: int = 40) -> dict[str, Record]:
    """Make a journal of some pages; return what is in it."""
    noted = {f"s{n}": based(*(f"{n}-{i}" for i in range(20)), revision=n + 1) for n in range(count)}
    with opened(path) as (journal,):
        journal.note(Notes(noted, remote=Remote(b"i", "n", {}, None)))
        journal.note_seen({id: Seen(Signature(1, 2, 3, 4), 5, record.base.digest) for id, record in noted.items()})  # type: ignore[union-attr]  # it has one
        journal.note_removal("s0", ["0-1"])
        assert known(journal)[0] == noted
    return noted


def usable(path: Path) -> None:
    """Check that a journal remembers, though it may have been damaged."""
    record = based("new")
    with opened(path) as (journal,):
        journal.note(Notes({"new": record}))
        assert journal.records(["new"]) == {"new": record}
    with opened(path) as (journal,):
        assert journal.records(["new"]) == {"new": record}


def aside(path: Path) -> list[Path]:
    return sorted(found for found in path.parent.glob("state.db.damaged-*") if found.name.endswith("Z"))


def foreign(path: Path, version: int, tables: str = "CREATE TABLE file (x)") -> None:
    db = sqlite3.connect(path)
    db.execute(tables)
    db.execute(f"PRAGMA user_version = {version}")
    db.commit()
    db.close()


def changed(path: Path, statement: str) -> None:
    filled(path)
    db = sqlite3.connect(path)
    db.execute(statement)
    db.commit()
    db.close()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "text": lambda path: path.write_bytes(b"hunter2 is no database" * 99),
    "zeros": lambda path: path.write_bytes(bytes(8192)),
    "half a page": lambda path: path.write_bytes(path.read_bytes()[:3000]) if filled(path) else None,
    "half a file": lambda path: path.write_bytes(path.read_bytes()[: 8192 * 3]) if filled(path) else None,
    "another program's": lambda path: foreign(path, 0),
    "another program's, version 1": lambda path: foreign(path, 1),
    "another program's, of a like name": lambda path: foreign(path, 1, "CREATE TABLE remote (defaults BLOB)"),
    "a row is missing": lambda path: changed(path, "DELETE FROM remote"),
    "a value is missing": lambda path: changed(path, "UPDATE remote SET defaults = NULL"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged(path: Path, damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture) -> None:
    """A damaged file is moved aside, which is logged; the journal begins anew and remembers."""
    damage(path)
    size = path.stat().st_size
    usable(path)
    assert [found.stat().st_size for found in aside(path)] == [size]
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1
    assert SECRET not in caplog.text


def test_an_empty_file(path: Path) -> None:
    """A file without contents is a new one."""
    path.touch()
    usable(path)
    assert aside(path) == []


def test_a_folder_in_its_place(path: Path) -> None:
    """It is refused, and left alone."""
    path.mkdir()
    for _ in range(2):
        with pytest.raises(PermissionDeniedError, match=r"state\.db"):
            Journal(path)
    assert [*path.parent.iterdir()] == [path]


@pytest.mark.parametrize("version", [2, 99, -1])
def test_another_version(path: Path, version: int) -> None:
    """A journal of a newer release is refused, and not a byte of it changes."""
    filled(path)
    db = sqlite3.connect(path)
    db.execute("PRAGMA journal_mode = DELETE")
    db.execute(f"PRAGMA user_version = {version}")
    db.close()
    before = path.read_bytes()
    for _ in range(2):
        with pytest.raises(LayoutError, match=f"version {version}, not 1"):
            Journal(path)
    assert path.read_bytes() == before
    assert aside(path) == []


@pytest.mark.parametrize("seed", range(40))
def test_damaged_anywhere(path: Path, seed: int) -> None:
    """Whatever bytes are other ones, a journal says what was noted, or an error of ours, and then begins anew."""
    noted = filled(path)
    chance = random.Random(seed)
    data = bytearray(path.read_bytes())
    for _ in range(chance.choice([1, 10, 300])):
        start = chance.randrange(len(data))
        length = chance.choice([1, 8, 500])
        data[start : start + length] = chance.randbytes(length)[: len(data) - start]
    path.write_bytes(data)
    for _ in range(3):
        try:
            with opened(path) as (journal,):
                journal.records([*noted])
                journal.read_remote()
                journal.note(Notes({"new": based("new")}))
                journal.note_removal("s1", ["1-1"])
        except LayoutError:
            assert data[60:64] != (1).to_bytes(4, "big")
            return
        except StorageError:
            continue
        break
    else:
        raise AssertionError("it stays damaged")
    usable(path)


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE base SET parts = x'00'",
        "UPDATE base SET parts = NULL",
        "UPDATE base SET parts = 'text'",
        "DELETE FROM base",
        "UPDATE base SET parts = (SELECT parts FROM base LIMIT 1)",
        "UPDATE base SET parts = substr(parts, 1, length(parts) - 4)",
        "UPDATE session SET parts = NULL",
        "UPDATE session SET parts = x'ff'",
        "UPDATE session SET base_digest = x'00'",
        "UPDATE file SET meta = x'c1'",
        "UPDATE file SET inode = NULL",
        "UPDATE removal SET turns = NULL",
        "UPDATE remote SET revisions = x'c1'",
        "INSERT INTO pending SELECT rowid, x'00' FROM session",
    ],
)
def test_damaged_values(path: Path, change: str) -> None:
    """A value that makes no sense is damage, too: of one journal it is noticed by all, and moved aside once."""
    noted = filled(path)
    with opened(path, 2) as (one, other):
        db = sqlite3.connect(path)
        db.execute(change)
        db.commit()
        db.close()
        with pytest.raises(UnavailableError, match="moved aside"):
            everything(one, [*noted])
        for journal in (one, other):
            assert everything(journal, [*noted]) == {}
        assert len(aside(path)) == 1
        other.note(Notes({"s": based("a")}))
        assert one.records(["s"]) == {"s": based("a")}


def everything(journal: Journal, ids: list[str]) -> dict[str, Record]:
    journal.refresh()
    journal.read_remote()
    return journal.records(ids)


@pytest.mark.parametrize("half", [False, True], ids=["text", "half a file"])
def test_damage_that_several_find(path: Path, half: bool) -> None:
    """It is moved aside once, and all go on in one new file, of which nothing is lost."""

    def work(number: int) -> Journal:
        start.wait()
        for _ in range(20):
            try:
                journal = Journal(path)
                journal.note(Notes({f"{number}": based("a")}))
            except UnavailableError:  # it was moved aside, by whomever
                continue
            return journal
        raise AssertionError("it stays damaged")

    start = threading.Barrier(6)
    with ThreadPoolExecutor(6) as pool:
        for _ in range(5):
            for found in path.parent.iterdir():
                found.unlink()
            DAMAGES["half a file" if half else "text"](path)
            journals = [*pool.map(work, range(6))]
            try:
                assert all(known(journal) == known_of({f"{n}": based("a") for n in range(6)}) for journal in journals)
                assert len(aside(path)) == 1
            finally:
                for journal in journals:
                    journal.close()


def test_the_folder_is_gone(path: Path) -> None:
    """A journal whose folder was deleted says so, with an error of ours."""
    folder = path.parent / "home"
    folder.mkdir()
    with opened(folder / "state.db") as (journal,):
        shutil.rmtree(folder)
        for _ in range(2):
            with pytest.raises(UnavailableError, match="home"):
                journal.refresh()
        folder.mkdir()
        journal.note(Notes({"s": based("a")}))
        assert journal.records(["s"]) == {"s": based("a")}


@pytest.mark.parametrize("statement", ["BEGIN", "INSERT", "COMMIT"])
def test_interrupted(path: Path, statement: str) -> None:
    """What a signal ends is noted or not, in memory as in the file."""
    with opened(path, 2) as (one, other):
        one.note(Notes({"s": based("a")}))
        healthy: Any = one._connection
        for call in (healthy.execute, lambda _: None):  # the statement has been executed, or has not
            one._connection = Interrupted(healthy, statement, call)  # type: ignore[assignment]  # it is used as one
            with pytest.raises(KeyboardInterrupt):
                one.note(Notes({"s": based("b"), "t": based("c")}))
            one._connection = healthy
            assert known(one) == known(other)
            one.note(Notes({"s": based("a"), "t": None}))
        assert known(other)[0] == {"s": based("a")}


class Interrupted:
    """A connection at which the user presses Ctrl-C."""

    def __init__(self, connection: sqlite3.Connection, starts: str, call: Callable[[str], object]) -> None:
        self._connection, self._starts, self._call = connection, starts, call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def execute(self, statement: str, *args: Any) -> Any:
        if statement.startswith(self._starts):
            self._call(statement) if not args else None
            raise KeyboardInterrupt
        return self._connection.execute(statement, *args)


def test_moved_aside_by_another_process(path: Path) -> None:
    """Who had the damaged file open goes on in the new one, and the new one's log stays."""
    filled(path)
    with opened(path, 2) as (one, other):
        for suffix in ("", "-wal", "-shm"):
            found = path.with_name(path.name + suffix)
            found.rename(found.with_name("old" + suffix))
        with opened(path) as (new,):
            new.note(Notes({"s": based("a")}))
            assert one.records(["s", "s1"]) == {"s": based("a")}
            other.note(Notes({"t": based("b")}))
            assert known(new)[0] == known(one)[0] == known(other)[0] == {"s": based("a"), "t": based("b")}
    with opened(path) as (again,):
        assert known(again)[0] == {"s": based("a"), "t": based("b")}
    assert aside(path) == []


def test_deleted_by_someone(path: Path) -> None:
    """A journal that was deleted begins anew."""
    filled(path)
    with opened(path) as (journal,):
        for suffix in ("", "-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        assert known(journal) == known_of({})
        usable(path)


# Errors of the disk.


class Faulty:
    """A connection that fails at a statement."""

    def __init__(self, connection: sqlite3.Connection, starts: str, error: int, *, after: bool = False) -> None:
        self._connection = connection
        self._starts, self._code, self._after = starts, error, after

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def execute(self, statement: str, *args: Any) -> Any:
        self._fail(statement)
        return self._connection.execute(statement, *args)

    def executemany(self, statement: str, *args: Any) -> Any:
        self._fail(statement)
        return self._connection.executemany(statement, *args)

    def _fail(self, statement: str) -> None:
        if statement.startswith(self._starts):
            self._starts = "nothing more"
            if self._after:
                self._connection.execute("ROLLBACK")  # as SQLite does by itself when a disk is full
            error = sqlite3.OperationalError("made up")
            error.sqlite_errorcode = self._code
            raise error


ERRORS = {
    sqlite3.SQLITE_FULL: StoreFullError,
    sqlite3.SQLITE_READONLY: PermissionDeniedError,
    sqlite3.SQLITE_READONLY_ROLLBACK: PermissionDeniedError,
    sqlite3.SQLITE_CANTOPEN: PermissionDeniedError,
    sqlite3.SQLITE_PERM: PermissionDeniedError,
    sqlite3.SQLITE_BUSY: UnavailableError,
    sqlite3.SQLITE_LOCKED: UnavailableError,
    sqlite3.SQLITE_IOERR_FSYNC: UnavailableError,
    sqlite3.SQLITE_NOMEM: UnavailableError,
    sqlite3.SQLITE_INTERRUPT: UnavailableError,
}


@pytest.mark.parametrize("after", [False, True], ids=["", "rolled back"])
@pytest.mark.parametrize("statement", ["BEGIN", "INSERT", "COMMIT"])
@pytest.mark.parametrize(("code", "kind"), ERRORS.items(), ids=str)
def test_errors(path: Path, code: int, kind: type[StorageError], statement: str, after: bool) -> None:
    """What SQLite refuses is an error of ours, changes nothing, and the next call works."""
    with opened(path, 2) as (one, other):
        one.note(Notes({"s": based("a")}))
        before = known(one)
        calls: list[Callable[[], None]] = [
            lambda: one.note(Notes({"s": based("b"), "t": based("c")})),
            lambda: one.note_seen({"s": Seen(Signature(1, 2, 3, 4), 5)}),
            lambda: one.note_removal("s", ["a"]),
        ]
        for call in calls:
            healthy: Any = one._connection
            one._connection = Faulty(healthy, statement, code, after=after and statement != "BEGIN")  # type: ignore[assignment]  # it is used as one
            with pytest.raises(kind, match=r"state\.db") as caught:
                call()
            assert type(caught.value) is kind
            one._connection = healthy
            assert known(one) == known(other) == before
        one.note(Notes({"s": based("b")}))
        assert known(other)[0] == {"s": based("b")}
    assert aside(path) == []


def limit(journal: Journal, pages: int) -> None:
    """Let the file grow to a number of pages."""
    journal._run(lambda db: db.execute(f"PRAGMA max_page_count = {pages}").fetchall())


def test_a_full_disk(path: Path) -> None:
    """With no space left nothing is noted and nothing forgotten; with room again all goes on."""
    with opened(path) as (journal,):
        journal.note(Notes({"s": based("a")}))
        before = known(journal)
        (pages,) = journal._run(lambda db: db.execute("PRAGMA page_count").fetchone())
        limit(journal, pages)
        big = {f"t{n}": based(*(f"{n}-{i}" for i in range(50))) for n in range(50)}
        for _ in range(2):
            with pytest.raises(StoreFullError, match=r"state\.db"):
                journal.note(Notes(big))
            assert known(journal) == before
        limit(journal, 2**20)
        journal.note(Notes(big))
        assert known(journal)[0] == {**before[0], **big}
    assert aside(path) == []


def test_private(path: Path) -> None:
    """Only its owner may read the file."""
    filled(path)
    assert path.stat().st_mode & 0o777 == 0o600


def test_closed(path: Path) -> None:
    """After it was closed, also twice, a call is an error."""
    journal = Journal(path)
    journal.close()
    journal.close()
    for call in (
        journal.refresh,
        journal.read_remote,
        lambda: journal.records(["s"]),
        lambda: journal.note(Notes({"s": None})),
        lambda: journal.note_removal("s", ()),
        lambda: journal.forget_bases(()),
    ):
        with pytest.raises(UnavailableError, match="closed"):
            call()


# Threads and processes at once.


def test_threads(path: Path) -> None:
    """Eight threads over two journals: what each has noted is there, in memory as on the disk."""
    with opened(path, 2) as journals, ThreadPoolExecutor(8) as pool:
        start = threading.Barrier(8)

        def work(number: int) -> None:
            journal = journals[number % 2]
            start.wait()
            for n in range(30):
                journal.note(
                    Notes({f"{number}": based("a", f"{n}"), f"{number}-{n % 3}": None if n % 2 else based("b")})
                )
                journal.note_removal("shared", [f"{number}-{n}"])
                journal.note_seen({"shared": Seen(Signature(number, n, 3, 4), 5), f"{number}": None})
                assert journal.records([f"{number}"])[f"{number}"].base == based("a", f"{n}").base
                assert f"{number}-{n}" in journal.removals["shared"].turns

        for _ in pool.map(work, range(8)):
            pass
        one, other = map(known, journals)
        assert one == other
        assert one[3] == {"shared": Removal(False, frozenset(f"{k}-{n}" for k in range(8) for n in range(30)))}
        with opened(path) as (again,):
            assert known(again) == one


def test_listed_while_a_round_notes(path: Path) -> None:
    """What is heard of other sessions, just when a list goes through those that are known, does not end the list."""

    class Heard(Row):
        @property
        def there_meta(self) -> bytes:  # read in the midst of a list
            journal.note(Notes(rows={"t": Row(there_revision=1)}))
            return b""

    with opened(path) as (journal,):
        local = Local(Files(path.parent / "sessions"), journal, SessionAsset)
        journal.rows |= {"s": Heard(), "u": Row()}
        assert local.list(Filters()) == []
        assert "t" in journal.rows


def test_deleted_in_another_process(path: Path) -> None:
    """A session that another process has brought to the shared store is noted as deleted, with its turns."""
    files = Files(path.parent / "sessions")
    asset = SessionAsset(id="s")
    asset.add_turn(orcs_redis.ConversationTurn(id="a", role="user", content="x"))
    with opened(path, 2) as (one, other):
        local = Local(files, one, SessionAsset)
        local.save("s", asset.to_json().encode(), ["a"], None, overwrite=False)
        other.note(Notes({"s": based("a")}))
        local.delete("s")
        assert one.removals == {"s": Removal(True, frozenset("a"))}


WORKER = """
import itertools, sys
from pathlib import Path
from orcs_redis.model.parts import Digests
from orcs_redis.stores.hybrid.journal import Journal, Notes, Record, Row
from orcs_redis.stores.hybrid.planner import Base, content_digest
journal = Journal(Path(sys.argv[1]))
for n in itertools.count():
    parts = Digests({}, {"history.turns": [(str(n), bytes(16))] * (n % 90)})
    record = Record.of(Base(parts, content_digest(parts), n + 1), None, Row(there_revision=n + 1))
    journal.note(Notes({"s": record, "t": record, f"u{n % 50}": record}))
    journal.note_removal("s", [str(n)])
    print(n, flush=True)
"""


def test_killed(path: Path) -> None:
    """A process that is killed at any moment leaves what it had noted, whole; several times, of two at once."""
    chance = random.Random(1)
    for _ in range(2):
        workers = [
            subprocess.Popen([sys.executable, "-c", WORKER, path], stdout=subprocess.PIPE, text=True) for _ in range(2)
        ]
        try:
            for worker in workers:
                assert worker.stdout is not None
                for _ in range(chance.randrange(20, 60)):
                    assert worker.stdout.readline()
        finally:
            for worker in workers:
                worker.kill()
                worker.communicate()
        with opened(path) as (journal,):
            found = journal.records([*journal.rows])
            assert found["s"] == found["t"]
            for record in found.values():
                assert record.base is not None
                assert record.base.digest == content_digest(record.base.parts)
                number = record.row.there_revision - 1
                assert record.base.revision == number + 1
                assert record.base.parts.lists.get("history.turns", []) == [(str(number), bytes(16))] * (number % 90)
    assert aside(path) == []

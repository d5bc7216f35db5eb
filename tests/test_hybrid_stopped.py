"""The scenarios of the hybrid store, killed at each step of a round and within the steps, and gone on with.

A killed process leaves the folder and the shared store, and nothing else. Whoever opens the folder after it has to come
to where it would have come: the same files, sessions and conflicts, and as many writes. A scenario is a function that
says what is done, and what the shared store has in the end. `test_stopped` runs it to the first point at which it can
be killed, to the second ..., until it ends by itself.

In one thread, at a server within the process: plans are the same in all forms.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from errno import ENOSPC
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest

from orcs_redis import (
    CompactedTurn,
    ConversationTurn,
    LearnedFact,
    OutcomeUnknownError,
    PermissionDeniedError,
    SessionAsset,
    StoreResetError,
    SyncReport,
    SyncStoppedError,
)
from orcs_redis.protocol.commands import ScriptCall
from orcs_redis.stores.disk import write_new
from orcs_redis.stores.hybrid import files, installing, rounds
from orcs_redis.stores.hybrid import kept as copies
from orcs_redis.stores.hybrid.installing import Installer
from orcs_redis.stores.hybrid.journal import Journal, Notes
from orcs_redis.stores.hybrid.shared import Shared
from orcs_redis.stores.hybrid.steps import There
from orcs_redis.sync import HybridSessionStore, RedisSessionStore
from orcs_redis.transport import clients

from .machines import told

_CREATED = 1_700_000_000_000  # milliseconds
_MEMORY = Path("/dev/shm")  # a disk would be synced at each write
_numbers = itertools.count()


# Where a process can be killed


class Killed(BaseException):
    """The process ends here: nothing that it does after this lasts."""


class Points:
    """The points that a process comes to: each step, and within a step all between calls that change what lasts.

    At the first at which `strikes` holds it is killed.
    """

    def __init__(self, strikes: Callable[[int, str], bool]) -> None:
        self._strikes = strikes
        self._changed = False  # since the last point
        self.passed = 0
        self.name = ""  # of the last one
        self.killed = False

    def reach(self, name: str) -> None:
        if not self.killed:
            self.name, self._changed = name, False
            self.killed = self._strikes(self.passed, name)
            self.passed += 1
        if self.killed:
            raise Killed

    @contextlib.contextmanager
    def change(self, name: str) -> Iterator[None]:
        """Have a point before a change, unless nothing has changed since the last point."""
        if self.killed or self._changed:
            self.reach(f"{self.name.partition(',')[0]}, before {name}")
        yield
        self._changed = True

    @contextlib.contextmanager
    def armed(self) -> Iterator[None]:
        """Have what is done in the block come to these points."""
        _armed.append(self)
        try:
            yield
        finally:
            _armed.pop()


_armed: list[Points] = []


def _changing(name: str) -> contextlib.AbstractContextManager[None]:
    return _armed[-1].change(name) if _armed else contextlib.nullcontext()


def _noting(note: Callable[..., Any]) -> Callable[..., Any]:
    def noted(journal: Journal, *arguments: Any, **named: Any) -> Any:
        says = [any(each) if isinstance(each, Notes) else bool(each) for each in (*arguments, *named.values())]
        with _changing(note.__name__) if any(says) else contextlib.nullcontext():
            return note(journal, *arguments, **named)

    return noted


def _writing(write: Callable[..., Any]) -> Callable[..., Any]:
    def written(*arguments: Any) -> Any:
        with _changing(write.__name__):
            return write(*arguments)

    return written


def _discarding(discard: Callable[..., None]) -> Callable[..., None]:
    def discarded(paths: Any) -> None:
        if any(path.name and path.exists() for path in paths):
            with _changing(discard.__name__):
                discard(paths)

    return discarded


def _sending(send: Callable[..., Any]) -> Callable[..., Any]:
    """A link's call that sends one command after the other: each may be the last."""

    def sent(link: Any, commands: Any, expires: float) -> Any:
        replies: list[Any] = []
        for command in commands:
            is_script = isinstance(command, ScriptCall) or str(command[0]).startswith("EVAL")
            with _changing("a script") if is_script else contextlib.nullcontext():
                replies += send(link, [command], expires)
        return replies

    return sent


def _doing(do: Callable[..., Any]) -> Callable[..., Any]:
    """A store's way to perform a step, with a point before it."""

    def done(store: Any, step: Any) -> Any:
        if _armed:
            call = getattr(step, "call", None) or getattr(step, "make", None)
            _armed[-1].reach(f"{type(step).__name__} {getattr(call, '__name__', '')}".strip())
        return do(store, step)

    return done


@pytest.fixture(autouse=True)
def instrumented(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have steps, and all calls that change what lasts, come to points."""
    for owner, names, wrap in (
        (HybridSessionStore, ("_do",), _doing),
        (clients.BlockingClientLink, ("call",), _sending),
        (files, ("write_new", "exchange", "move"), _writing),
        (copies, ("write_new", "move"), _writing),
        (files, ("discard",), _discarding),
        (copies, ("discard",), _discarding),
        (Journal, ("note", "note_seen", "note_removal"), _noting),
        (Journal, ("forget_bases",), _writing),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, wrap(getattr(owner, name)))
    monkeypatch.setattr(files, "_WRITERS", 1)  # else the order of the points is left to chance


# What scenarios are made of


def turn(text: str) -> ConversationTurn:
    """A turn that is the same in each run."""
    return ConversationTurn(
        id=str(uuid.uuid5(uuid.NAMESPACE_OID, text)), timestamp_ms=_CREATED, role="user", content=text
    )


def asset(texts: str = "a", id: str = "s", **metadata: Any) -> SessionAsset:
    """A session with a turn for each letter."""
    made = SessionAsset(id=id, metadata=metadata, created_at_ms=_CREATED)
    for text in texts:
        made.add_turn(turn(text))
    return made


def setting(**metadata: Any) -> Callable[[SessionAsset], None]:
    return lambda session: session.metadata.update(metadata)


def without(text: str) -> Callable[[SessionAsset], None]:
    def change(session: SessionAsset) -> None:
        session.history.turns = [each for each in session.history.turns if each.content != text]

    return change


def cutting(count: int) -> Callable[[SessionAsset], None]:
    """A compaction of the first turns."""

    def change(session: SessionAsset) -> None:
        made = CompactedTurn(summary=f"{count} turns", turn_count=count, start_time_ms=0, end_time_ms=0)
        del session.history.turns[:count]
        session.history.compacted.append(made)

    return change


def _timeless(data: bytes) -> Any:
    """What is in a file, without the times of the session; of what is no JSON, the size."""
    try:
        fields = json.loads(data)
    except ValueError:
        return f"{len(data)} bytes"
    return {name: value for name, value in fields.items() if name not in ("created_at_ms", "updated_at_ms")}


class Ending(NamedTuple):
    """What there is in the end."""

    writes: dict[str, int]  # to the shared store, by namespace
    there: dict[str, tuple[int, Any]]  # revisions and contents
    here: dict[str, dict[str, Any]]  # contents of the files, by machine
    standing: dict[str, Any]  # what each machine says of its sessions


class Machine:
    """A folder, and the store that a process has on it, whose methods it has."""

    def __init__(self, stage: Stage, folder: Path, options: dict[str, Any]) -> None:
        self.folder = folder
        self._stage = stage
        self._options = options
        self.store = self._opened()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def _opened(self) -> HybridSessionStore[SessionAsset]:
        return HybridSessionStore(self.folder, self._stage.url, live=False, **self._options)

    def reopen(self, **options: Any) -> None:
        """Open the folder anew, as another process."""
        self.store.close()
        self._options |= options
        self.store = self._opened()

    # What can be killed

    def sync(self, **options: Any) -> SyncReport:
        report: SyncReport = self._do(lambda: self.store.sync(**options))
        return report

    def save(self, session: SessionAsset) -> None:
        self._do(lambda: self.store.save(session))

    def append(self, id: str, added: ConversationTurn) -> None:
        def again() -> None:
            if added.id not in [each.id for each in self.store.load(id).history.turns]:
                self.store.append(id, added)

        self._do(lambda: self.store.append(id, added), again)

    def delete(self, id: str) -> None:
        def again() -> None:
            if self.store.exists(id):
                self.store.delete(id)

        self._do(lambda: self.store.delete(id), again)

    def resolve(self, id: str, keep: Any, *, syncs: bool = False) -> None:
        """Resolve; after it was killed resolve again, or synchronise first."""

        def again() -> None:
            if not syncs or id in self.store.sync().conflicts:
                self.store.resolve(id, keep)

        self._do(lambda: self.store.resolve(id, keep), again)

    def _do(self, call: Callable[[], Any], again: Callable[[], Any] | None = None) -> Any:
        """Do it; killed meanwhile, open the folder anew and do it again."""
        points, before = self._stage.points, self.files()
        try:
            with contextlib.nullcontext() if points.killed else points.armed():
                result = call()
        except Killed:
            self.reopen()
            self._stage.check_whole(before, self.files())
            result = (again or call)()
        finally:
            self._stage.seen.append(self.files())
        return result

    def killed(self, name: str = "Here _finish", keep: Any = None) -> None:
        """Begin a round, or to resolve, and be killed at a point: if nothing is said, once all is sent."""
        call = self.store.sync if keep is None else lambda: self.store.resolve("s", keep)
        with pytest.raises(Killed), Points(lambda _, reached: reached == name).armed():
            call()
        self.reopen()

    # Files

    def file(self, id: str = "s") -> Path:
        return self.folder / f"{id}.json"

    def files(self) -> dict[str, Any]:
        return {path.stem: _timeless(path.read_bytes()) for path in self.folder.glob("*.json")}

    def kept_copies(self) -> set[str]:
        """The kept copies, but for those of what the files have."""
        found, files = set(), self.files()
        for copy in self.store.kept():
            if (content := _timeless(copy.path.read_bytes())) != files.get(copy.id):
                found.add(f"{copy.id} {copy.side} {content}")
        return found

    def edit(self, change: Callable[[SessionAsset], object] | SessionAsset, id: str = "s") -> None:
        """Change a file behind the store's back, as orcs does."""
        if isinstance(change, SessionAsset):
            session = change
        else:
            session = SessionAsset.from_json(self.file(id).read_bytes())
            change(session)
        temporary = self.folder / f".{uuid.uuid4().hex}.tmp"
        temporary.write_text(session.to_json())
        temporary.rename(self.file(id))

    def traces(self) -> dict[str, Any]:
        """What any writing would change."""
        paths = [*self.folder.glob("*.json"), *(self.folder / ".orcs-redis" / "kept").rglob("*")]
        return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns, path.stat().st_ctime_ns) for path in paths}


class Stage:
    """A shared store, machines and a peer, and the points at which the machines' rounds can be killed."""

    def __init__(self, root: Path, strikes: Callable[[int, str], bool], seen: list[dict[str, Any]]) -> None:
        self.points = Points(strikes)
        self.seen: list[dict[str, Any]] = []  # the files after each call that can be killed
        self.namespaces = ["orcs"]
        self._expected = seen
        self._root = root
        self._name = f"stopped-{next(_numbers)}"
        self.url = f"memory://{self._name}"
        self.raw = clients.memory_client(self._name, "FakeRedis")
        self.machines: list[Machine] = []
        self._peers: dict[str, RedisSessionStore[SessionAsset]] = {}

    def close(self) -> None:
        for machine in self.machines:
            machine.store.close()
        for peer in self._peers.values():
            peer.close()
        clients._memories.pop(self._name, None)

    def machine(self, name: str = "a", **options: Any) -> Machine:
        self.machines.append(Machine(self, self._root / name, options))
        return self.machines[-1]

    def peer(self, namespace: str = "orcs") -> RedisSessionStore[SessionAsset]:
        if namespace not in self._peers:
            self._peers[namespace] = RedisSessionStore.connect(self.url, namespace=namespace)
        return self._peers[namespace]

    def synced(self, *sessions: SessionAsset, machines: str = "a", **options: Any) -> Any:
        """Machines and a peer, which comes last, that have sessions; [a] if none are given."""
        peer = self.peer()
        for session in sessions or (asset(x=1, y=1),):
            peer.save(session)
        opened = [self.machine(name, **options) for name in machines]
        for machine in opened:
            machine.store.sync()
        return *opened, peer

    def check_whole(self, before: dict[str, Any], found: dict[str, Any]) -> None:
        """Each file is as it was, or as it is to be."""
        after = self._expected[len(self.seen)]
        for id in before.keys() | found.keys() | after.keys():
            assert found.get(id) in (before.get(id), after.get(id)), f"the file of {id}"

    def writes(self) -> dict[str, int]:
        """How many writes the shared store has had, by namespace."""
        return {name: int(self.raw.hget(f"{{{name}/0}}:state", "revision") or 0) for name in self.namespaces}

    def ending(self) -> Ending:
        peer = self.peer(self.namespaces[-1])
        there = {}
        for meta in peer.list():
            stored = peer.load_versioned(meta.id)
            there[meta.id] = (stored.revision, _timeless(stored.asset.to_json().encode()))
        standing = {}
        for machine in self.machines:
            status = machine.store.sync_status()
            about = [machine.store.conflict(id) for id in status.conflicts]
            standing[machine.folder.name] = (
                {meta.id: meta.sync_state for meta in machine.store.list()},
                (status.mode, status.pending_uploads, status.pending_downloads, status.conflicts),
                [(each.parts, each.reason) for each in about if each is not None],
            )
        here = {machine.folder.name: machine.files() for machine in self.machines}
        return Ending(self.writes(), there, here, standing)

    def kept(self) -> dict[str, set[str]]:
        return {machine.folder.name: machine.kept_copies() for machine in self.machines}

    def check_idle(self) -> None:
        """One more round does nothing."""
        for machine in self.machines:
            before = machine.traces(), self.writes()
            report = machine.store.sync()
            assert {*told(report)} <= {"conflicts"}, report
            assert report.conflicts == machine.store.sync_status().conflicts
            assert (machine.traces(), self.writes()) == before


class Scenario(NamedTuple):
    """What is done, and what the turns of each session in the shared store say in the end."""

    play: Callable[[Stage], None]
    conflicts: str  # the ids of the sessions in conflict in the end
    end: dict[str, str]


SCENARIOS: dict[str, Scenario] = {}


def scenario(
    name: str, *, conflicts: str = "", **end: str
) -> Callable[[Callable[[Stage], None]], Callable[[Stage], None]]:
    def add(play: Callable[[Stage], None]) -> Callable[[Stage], None]:
        SCENARIOS[name] = Scenario(play, conflicts, end)
        return play

    return add


# Alone, and with a peer


@scenario("01 saved offline", s="a")
def _(stage: Stage) -> None:
    a = stage.machine()
    a.save(asset())
    a.sync()


@scenario("02 a peer's session comes", s="a")
def _(stage: Stage) -> None:
    a = stage.machine()
    stage.peer().save(asset())
    a.sync(dry_run=True)
    a.sync()


@scenario("03 appended offline", s="ab")
def _(stage: Stage) -> None:
    a, _ = stage.synced()
    a.append("s", turn("b"))
    a.sync()


@scenario("04 a peer appends", s="ab")
def _(stage: Stage) -> None:
    a, peer = stage.synced()
    peer.append("s", turn("b"))
    a.sync(dry_run=True)
    a.sync()


@scenario("04 a peer edits", s="a")
def _(stage: Stage) -> None:
    a, peer = stage.synced()
    peer.update("s", setting(x=2))
    a.sync()


@scenario("05 both append", s="acb")
def _(stage: Stage) -> None:
    a, b, peer = stage.synced(machines="ab")
    a.append("s", turn("b"))
    peer.append("s", turn("c"))
    a.sync()
    b.sync()


@scenario("07 other keys", s="a")
def _(stage: Stage) -> None:
    a, peer = stage.synced()
    a.update("s", setting(x=2))
    peer.update("s", setting(y=2))
    a.sync()


def in_conflict(stage: Stage, **options: Any) -> Any:
    a, peer = stage.synced(**options)
    a.update("s", setting(x=2))
    peer.update("s", setting(x=3))
    return a, peer


@scenario("08 the same key", conflicts="s", s="a")
def _(stage: Stage) -> None:
    a, _ = in_conflict(stage)
    a.sync()


@scenario("09 resolved for here", s="a")
def _(stage: Stage) -> None:
    a, _ = in_conflict(stage)
    a.sync()
    a.resolve("s", "local")


@scenario("09 resolved for here, with turns", s="acb")
def _(stage: Stage) -> None:
    a, peer = in_conflict(stage)
    a.append("s", turn("b"))
    peer.append("s", turn("c"))
    a.sync()
    a.resolve("s", "local")


@scenario("09 resolved for here, with turns, and synchronised", s="acb")
def _(stage: Stage) -> None:
    a, peer = in_conflict(stage)
    a.append("s", turn("b"))
    peer.append("s", turn("c"))
    a.sync()
    a.resolve("s", "local", syncs=True)


@scenario("09 resolved for there, with turns", s="acb")
def _(stage: Stage) -> None:
    a, peer = in_conflict(stage)
    a.append("s", turn("b"))
    peer.append("s", turn("c"))
    a.sync()
    a.resolve("s", "remote")


@scenario("10 preferring the shared store", s="a")
def _(stage: Stage) -> None:
    a, _ = in_conflict(stage, prefer="remote")
    a.sync()


@scenario("10 preferring this side, with turns", s="acb")
def _(stage: Stage) -> None:
    a, peer = in_conflict(stage, prefer="local")
    a.append("s", turn("b"))
    peer.append("s", turn("c"))
    a.sync()


@scenario("11 the same edit", s="a")
def _(stage: Stage) -> None:
    a, peer = stage.synced()
    a.update("s", setting(x=2))
    peer.update("s", setting(x=2))
    a.sync()


# Deletions


@scenario("12 deleted here")
def _(stage: Stage) -> None:
    a, _ = stage.synced()
    a.delete("s")
    a.sync()


@scenario("13 deleted there")
def _(stage: Stage) -> None:
    a, peer = stage.synced()
    peer.delete("s")
    a.sync(dry_run=True)
    a.sync()


@scenario("14 deleted here, edited there", s="ab")
def _(stage: Stage) -> None:
    a, peer = stage.synced()
    a.delete("s")
    peer.append("s", turn("b"))
    a.sync()


@scenario("15 deleted there, edited here", s="ab")
def _(stage: Stage) -> None:
    a, peer = stage.synced()
    peer.delete("s")
    a.append("s", turn("b"))
    a.sync()


@scenario("16 deleted on both")
def _(stage: Stage) -> None:
    a, peer = stage.synced()
    a.delete("s")
    peer.delete("s")
    a.sync()


@scenario("17 after the tombstones", other="a")
def _(stage: Stage) -> None:
    a, b, peer = stage.synced(machines="ab")
    a.delete("s")
    a.sync()
    raw, partition = stage.raw, "{orcs/0}:"
    raw.delete(partition + "deleted", partition + "deleted:meta")
    raw.zrem(partition + "changes", "s")
    raw.hset(partition + "state", "compacted", raw.hget(partition + "state", "revision"))
    peer.save(asset(id="other"))
    b.sync()
    a.sync()


# The stale writer


@scenario("18 overwritten from memory", s="abcd")
def _(stage: Stage) -> None:
    a, peer = stage.synced(asset("ab"))
    memory = SessionAsset.from_json(a.file().read_bytes())
    peer.append("s", turn("c"))
    a.sync()
    memory.add_turn(turn("d"))
    a.edit(memory)
    a.sync()


@scenario("19 saved from memory", s="abcde")
def _(stage: Stage) -> None:
    a, peer = stage.synced(asset("ab"))
    memory = a.load("s")
    peer.append("s", turn("c"))
    a.sync()
    for text in "de":
        memory.add_turn(turn(text))
        a.save(memory)
    a.sync()


@scenario("20 removed by a save", s="a")
def _(stage: Stage) -> None:
    a, b, _ = stage.synced(asset("ab"), machines="ab")
    a.update("s", without("b"))
    a.sync()
    b.sync()


@scenario("20 removed by a save, appended there", s="ac")
def _(stage: Stage) -> None:
    a, peer = stage.synced(asset("ab"))
    a.update("s", without("b"))
    peer.append("s", turn("c"))
    a.sync()


@scenario("21 removed by hand", s="a")
def _(stage: Stage) -> None:
    a, b, _ = stage.synced(asset("ab"), machines="ab")
    a.edit(without("b"))
    a.sync()
    loaded = a.load("s")
    without("b")(loaded)
    a.resolve("s", loaded)
    b.sync()


@scenario("22 compacted here, appended there", s="bcd")
def _(stage: Stage) -> None:
    a, peer = stage.synced(asset("abc"))
    a.update("s", cutting(1))
    peer.append("s", turn("d"))
    a.sync()


@scenario("22 compacted here by orcs, appended there", s="bcd")
def _(stage: Stage) -> None:
    a, peer = stage.synced(asset("abc"))
    a.edit(cutting(1))
    peer.append("s", turn("d"))
    a.sync()


@scenario("23 compacted on both", s="cdfe")
def _(stage: Stage) -> None:
    a, peer = stage.synced(asset("abcd"))
    a.update("s", cutting(3))
    a.append("s", turn("e"))
    peer.update("s", cutting(2))
    peer.append("s", turn("f"))
    a.sync()


# Identity


def two_of_one_id(stage: Stage) -> Any:
    a, b, other = stage.machine("a"), stage.machine("b"), asset("b")
    other.created_at_ms += 1
    a.save(asset("a"))
    b.save(other)
    b.sync()
    a.sync()
    return a, b


@scenario("24 two sessions of one id", s="b")
def _(stage: Stage) -> None:
    a, _ = two_of_one_id(stage)
    a.resolve("s", "remote")


@scenario("24 two sessions of one id, this one kept", s="a")
def _(stage: Stage) -> None:
    a, b = two_of_one_id(stage)
    a.resolve("s", "local")
    b.sync()


def copied(stage: Stage, *, state: bool) -> None:
    a, _ = stage.synced(asset(), asset(id="t", x=1), asset(id="u"))
    a.store.close()
    ignored = None if state else shutil.ignore_patterns(".orcs-redis")
    shutil.copytree(a.folder, a.folder.with_name("b"), ignore=ignored)
    a.reopen()
    a.append("s", turn("b"))
    a.append("t", turn("b"))
    a.update("t", setting(x=2))
    a.sync()
    stage.machine("b").sync()


@scenario("25 a copied folder", s="ab", t="ab", u="a")
def _(stage: Stage) -> None:
    copied(stage, state=True)


@scenario("25 a copied folder without its state", s="ab", t="ab", u="a")
def _(stage: Stage) -> None:
    copied(stage, state=False)


# Killed before: the second crash in a row


@scenario("26 killed after a first push", s="a")
def _(stage: Stage) -> None:
    a = stage.machine()
    a.save(asset())
    a.killed()
    a.sync()


@scenario("26 killed after a push", s="ab")
def _(stage: Stage) -> None:
    a, _ = stage.synced()
    a.append("s", turn("b"))
    a.killed()
    a.sync()


@scenario("26 killed after a merge", s="acb")
def _(stage: Stage) -> None:
    a, peer = stage.synced()
    a.append("s", turn("b"))
    peer.append("s", turn("c"))
    a.killed()
    a.sync()


@scenario("26 killed after a deletion")
def _(stage: Stage) -> None:
    a, _ = stage.synced()
    a.delete("s")
    a.killed()
    a.sync()


@scenario("27 and edited before the next round", s="a")
def _(stage: Stage) -> None:
    a, _ = stage.synced()
    a.update("s", setting(x=2))
    a.killed()
    a.update("s", setting(x=3))
    a.sync()


@scenario("28 and a peer appended", s="abc")
def _(stage: Stage) -> None:
    a, peer = stage.synced()
    a.append("s", turn("b"))
    a.killed()
    peer.append("s", turn("c"))
    a.sync()


@scenario("28 and both appended", s="abcd")
def _(stage: Stage) -> None:
    a, peer = stage.synced()
    a.append("s", turn("b"))
    a.killed()
    peer.append("s", turn("c"))
    a.append("s", turn("d"))
    a.sync()


@scenario("28 and the file was overwritten", s="abc")
def _(stage: Stage) -> None:
    a, _ = stage.synced()
    memory = SessionAsset.from_json(a.file().read_bytes())
    a.append("s", turn("b"))
    a.killed()
    memory.add_turn(turn("c"))
    a.edit(memory)
    a.sync()


@scenario("28 killed while it was resolved, and a peer appended", s="acbd")
def _(stage: Stage) -> None:
    a, peer = in_conflict(stage)
    a.append("s", turn("b"))
    peer.append("s", turn("c"))
    a.killed(keep="local")
    peer.append("s", turn("d"))
    a.resolve("s", "local")


@scenario("29 killed before a pull is written", s="ab")
def _(stage: Stage) -> None:
    a, peer = stage.synced()
    peer.append("s", turn("b"))
    a.killed()
    a.sync()


@scenario("30 several batches", a="a", b="ab", c="a", d="a", f="a")
def _(stage: Stage) -> None:
    a = stage.machine()
    for id in "abcde":
        a.save(asset(id=id))
    with mock.patch.object(rounds, "_BATCH", 2):
        a.sync()
        stage.peer().append("b", turn("b"))
        stage.peer().save(asset(id="f"))
        a.delete("e")
        a.sync()


@scenario("31 the reply of a push is lost", s="ab", t="ab")
def _(stage: Stage) -> None:
    a, _ = stage.synced(asset(), asset(id="t"))
    a.append("s", turn("b"))
    a.append("t", turn("b"))
    put = Shared.put
    lost: list[str] = []

    def losing(shared: Any, session: Any, revision: int) -> Any:
        mark = yield from put(shared, session, revision)
        if session.id == "s" and not lost:
            lost.append("s")
            raise OutcomeUnknownError("planted")
        return mark

    with mock.patch.object(Shared, "put", losing):
        a.sync()
    a.sync()


# Damaged


@scenario("32 half a file", s="ab")
def _(stage: Stage) -> None:
    a, peer = stage.synced()
    whole = a.file().read_bytes()
    a.file().write_bytes(whole[: len(whole) // 2])
    peer.append("s", turn("b"))
    a.sync()
    a.resolve("s", "remote")


@scenario("33 damaged there", s="a")
def _(stage: Stage) -> None:
    a, peer = stage.synced()
    peer.append("s", turn("b"))
    stage.raw.hset("{orcs/0}:session:s", "preferences", b"\xc1")
    a.reopen()
    a.sync()
    a.resolve("s", "local", syncs=True)


# Another past


@scenario("34 wiped", s="ab", t="a")
def _(stage: Stage) -> None:
    a, _ = stage.synced(asset(), asset(id="t"))
    stage.raw.flushall()
    with pytest.raises(StoreResetError):
        a.sync()
    a.append("s", turn("b"))
    a.sync(adopt=True)


@scenario("35 restored", s="ab", t="ac", u="a")
def _(stage: Stage) -> None:
    a, peer = stage.synced(asset(), asset(id="t"), asset(id="u"))
    backup = {key: stage.raw.dump(key) for key in stage.raw.scan_iter()}
    a.append("s", turn("b"))
    peer.append("t", turn("c"))
    a.store.sync()
    stage.raw.flushall()
    for key, data in backup.items():
        stage.raw.restore(key, 0, data)
    with pytest.raises(StoreResetError):
        a.sync()
    a.sync(adopt=True)


@scenario("36 another namespace", s="a", t="a", u="z")
def _(stage: Stage) -> None:
    a, _ = stage.synced(asset(), asset(id="t"))
    stage.namespaces.append("other")
    stage.peer(namespace="other").save(asset("z", id="u"))
    a.reopen(namespace="other")
    with pytest.raises(StoreResetError):
        a.sync()
    a.sync(adopt=True)


# Files gone


@scenario("37 many files removed", t="a", v="ab", w="a")
def _(stage: Stage) -> None:
    with mock.patch.object(rounds, "_BRAKE", 2):
        a, peer = stage.synced(*[asset(id=id) for id in "pqrv"])
        for id in "pqr":
            a.file(id).unlink()
        a.append("v", turn("b"))
        peer.save(asset(id="t"))
        with pytest.raises(SyncStoppedError):
            a.sync()
        peer.save(asset(id="w"))
        a.sync(deletions=True)


@scenario("37 some files removed", t="a")
def _(stage: Stage) -> None:
    a, _ = stage.synced(asset(), asset(id="t"))
    a.file().unlink()
    a.sync()


@scenario("38 a renamed file", conflicts="b", a="a")
def _(stage: Stage) -> None:
    a, _ = stage.synced(asset(id="a"))
    a.file("a").rename(a.file("b"))
    a.sync()


# No room, no rights


@scenario("39 a full disk", s="ab", t="ab", u="ab")
def _(stage: Stage) -> None:
    a, peer = stage.synced(*[asset(id=id) for id in "stu"])
    peer.append("s", turn("b"))
    peer.append("t", turn("b"))
    a.append("u", turn("b"))

    def full(path: Path, data: bytes, mode: int) -> Any:
        if path.suffix == ".tmp" and json.loads(data)["id"] == "s":
            raise OSError(ENOSPC, os.strerror(ENOSPC))
        return _writing(write_new)(path, data, mode)

    with mock.patch.object(files, "write_new", full):
        assert [id for id, _ in a.sync().failed] == ["s"]
    a.sync()


@scenario("40 read only", s="ab", t="ab", u="a")
def _(stage: Stage) -> None:
    a, peer = stage.synced(asset(), asset(id="t"))
    peer.append("s", turn("b"))
    a.append("t", turn("b"))
    a.save(asset(id="u"))
    with mock.patch.object(Shared, "put", side_effect=PermissionDeniedError("planted")):
        assert [id for id, _ in a.sync().failed] == ["t", "u"]
    a.sync()


# What is a change, and what is none


@scenario("43 within one tick", s="z")
def _(stage: Stage) -> None:
    a, _ = stage.synced()
    before, data = a.file().stat(), a.file().read_bytes()
    with a.file().open("r+b") as file:
        file.seek(data.index(b'"a"') + 1)
        file.write(b"z")
    os.utime(a.file(), ns=(before.st_atime_ns, before.st_mtime_ns))
    a.sync()


@scenario("44 what JSON changes", s="a")
def _(stage: Stage) -> None:
    a, made = stage.machine(), asset(x=1, z={"p": 1, "q": 2})
    fact = LearnedFact(key="k", value="v", source="peer", learned_at_ms=_CREATED)
    made.project_context.learn(fact.with_confidence(0.1 + 0.2))
    stage.peer().save(made)
    a.sync()
    fields = json.loads(a.file().read_bytes())
    fields["metadata"] = {"z": {"q": 2, "p": 1}, "x": 1}
    a.file().write_text(json.dumps(dict(reversed(fields.items())), indent=1))
    a.sync(verify=True)


@scenario("45 touched", s="a")
def _(stage: Stage) -> None:
    a, _ = stage.synced()
    a.edit(lambda session: setattr(session, "updated_at_ms", session.updated_at_ms + 5))
    a.sync()
    a.edit(setting(x=2))
    a.sync()


NOT_STOPPED = {
    "06": "the clock: as 05, since no step looks at it",
    "41": "two processes live on one folder: there is no one round; test_hybrid_faults.py and the main job have it",
    "42": "two machines live over broken connections: likewise",
}


# Playing them


def at(number: int) -> Callable[[int, str], bool]:
    return lambda passed, _: passed == number


def played(name: str, strikes: Callable[[int, str], bool], expected: list[dict[str, Any]]) -> Any:
    """Play a scenario; return what there is in the end, the kept copies, the files on the way, and its points."""
    folder = Path(tempfile.mkdtemp(prefix="stopped-", dir=_MEMORY if _MEMORY.is_dir() else None))
    stage = Stage(folder, strikes, expected)
    try:
        SCENARIOS[name].play(stage)
        found = stage.ending(), stage.kept(), stage.seen, stage.points
        stage.check_idle()
    except AssertionError as error:
        error.add_note(f"killed at point {stage.points.passed}: {stage.points.name}")
        raise
    finally:
        stage.close()
        shutil.rmtree(folder)
    return found


def check_end(scenario: Scenario, ending: Ending) -> None:
    """What is there is what is said of the scenario, and the machines have the same, but for conflicts."""
    there = {id: session for id, (_, session) in ending.there.items()}
    assert {id: "".join(turn["content"] for turn in there[id]["history"]["turns"]) for id in there} == scenario.end
    for machine, here in ending.here.items():
        conflicts = ending.standing[machine][1][-1]
        assert conflicts == [*scenario.conflicts]
        if not conflicts:
            assert here == there


def check(name: str) -> None:
    """Kill a scenario's rounds at each of their points."""
    ending, kept, seen, _ = played(name, lambda *_: False, [])
    check_end(SCENARIOS[name], ending)
    for number in itertools.count():
        after, copies, _, points = played(name, at(number), seen)
        where = f"killed at point {number}: {points.name}"
        if not points.killed:
            assert number > 5
            return
        assert after == ending, where
        for machine, copied in kept.items():
            assert copied <= copies[machine], where


@pytest.mark.parametrize("name", SCENARIOS)
def test_stopped(name: str) -> None:
    """Wherever a round is killed, the next one comes to where it would have come, with as many writes."""
    check(name)


def test_all_scenarios() -> None:
    """Each of the 45 scenarios is here, or it is said why it is not."""
    numbers = {name[:2] for name in SCENARIOS}
    assert numbers.isdisjoint(NOT_STOPPED)
    assert numbers | NOT_STOPPED.keys() == {f"{number:02}" for number in range(1, 46)}


# Faults that have to be found


def noting_first(installer: Any, items: Any, write: Callable[..., Any] = Installer._write_here) -> Any:
    """A base is noted before its file is written."""
    installer._journal.note(Notes({item.id: installing._common(item) for item in items}))
    return write(installer, items)


def keeping_last(installer: Any, round: Any, items: Any, finish: Callable[..., Any] = Installer._finish) -> Any:
    """What loses is kept after it was overwritten."""
    again = finish(installer, round, items)
    for item in items:
        round.report.kept.extend(KEEP(installer, item))
    return again


def clearing_only(_: Any, round: Any, item: Any) -> Any:
    """What can't be read is deleted, and it is not noted that this is no deletion by others."""
    yield There(round.shared.clear, (item.id, item.mark.revision))
    return item._replace(there=None, mark=None)


KEEP = Installer._keep
PLANTS: dict[str, tuple[str, list[tuple[Any, str, Any]]]] = {
    "a base is noted before its file": ("04 a peer edits", [(Installer, "_write_here", noting_first)]),
    "what is sent is not noted": ("27 and edited before the next round", [(installing, "_intention", lambda _: None)]),
    "what was sent is not looked for": (
        "27 and edited before the next round",
        [(installing, "caught_up", lambda base, *_, **__: base)],
    ),
    "an unreadable session is deleted and that is not noted": (
        "33 damaged there",
        [(rounds.Rounds, "_clear_there", clearing_only)],
    ),
    "the loser is kept too late": (
        "10 preferring the shared store",
        [(Installer, "_keep", lambda *_: ()), (Installer, "_finish", keeping_last)],
    ),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_planted(plant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A round that does things in another order is found."""
    name, patches = PLANTS[plant]
    for owner, attribute, value in patches:
        monkeypatch.setattr(owner, attribute, value)
    with pytest.raises(AssertionError):
        check(name)

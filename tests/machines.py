"""Machines with a folder and a hybrid store on it, peers that work on the shared store, and what is seen of both."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orcs_redis
import orcs_redis.sync
from orcs_redis import ConversationTurn, SessionAsset, SessionMeta, SyncMode, SyncState

from .conftest import CHOSEN, Place, Threaded
from .servers import free_port

__all__ = [
    "OFFLINE_URL",
    "TABLE",
    "Machine",
    "Machines",
    "asset",
    "contents",
    "copied",
    "idle",
    "open_machines",
    "setting",
    "told",
    "until_true",
]

# Where nobody listens: who connects is refused at once.
OFFLINE_URL = f"redis://127.0.0.1:{free_port()}"

# Both forms, at a server within the process and at one over TCP.
TABLE = [row for row in CHOSEN if row.server in ("memory", "redis") and not row.injected]

_LISTS = ("uploaded", "downloaded", "merged", "deleted", "revived", "conflicts")


def asset(*texts: str, id: str = "s", **metadata: Any) -> SessionAsset:
    """A session with turns that say this."""
    made = SessionAsset(id=id, metadata=metadata)
    for text in texts:
        made.add_turn(ConversationTurn.user(text))
    return made


def contents(session: SessionAsset) -> list[str]:
    """What the turns of a session say."""
    return [turn.content for turn in session.history.turns]


def setting(**metadata: Any) -> Callable[[SessionAsset], None]:
    """A change for `update`: keys of the metadata."""
    return lambda session: session.metadata.update(metadata)


def told(report: Any) -> dict[str, Any]:
    """What a report says, without what is empty and without its kept copies; of failures, the type of the error."""
    found = {name: getattr(report, name) for name in _LISTS if getattr(report, name)}
    if report.failed:
        found["failed"] = {id: type(error) for id, error in report.failed}
    return found


class _Blocking(Threaded):
    """A blocking hybrid store with awaitable methods, but for those that are plain in both forms."""

    def __getattr__(self, name: str) -> Any:
        if name == "kept":
            return self._store.kept
        if name == "remote":
            return Threaded(self._store.remote)
        return super().__getattr__(name)


class Machine:
    """A folder and the hybrid store on it, whose methods it has."""

    def __init__(self, folder: Path, store: Any, place: Place | None) -> None:
        self.folder = folder
        self.store = store
        self.place = place

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def file(self, id: str = "s") -> Path:
        return self.folder / f"{id}.json"

    def data(self, id: str = "s") -> bytes:
        return self.file(id).read_bytes()

    def signature(self, id: str = "s") -> tuple[int, ...]:
        """What any writing changes of a file."""
        status = self.file(id).lstat()
        return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns

    def read(self, id: str = "s") -> SessionAsset:
        """What the file has, as orcs would read it."""
        return SessionAsset.from_json(self.data(id))

    def texts(self, id: str = "s") -> list[str]:
        return contents(self.read(id))

    def write(self, session: SessionAsset | bytes, id: str = "s") -> None:
        """Write a file behind the store's back, as orcs does: beside the old one, and renamed over it."""
        temporary = self.folder / f".{uuid.uuid4().hex}.tmp"
        temporary.write_bytes(session if isinstance(session, bytes) else session.to_json().encode())
        os.replace(temporary, self.file(id))  # noqa: PTH105  # orcs' own way

    def edit(self, change: Callable[[SessionAsset], object], id: str = "s") -> None:
        """Change a file behind the store's back."""
        session = self.read(id)
        change(session)
        self.write(session, id)

    async def state(self, id: str = "s") -> SyncState | None:
        """The state of a session as the list has it; None if it is not listed."""
        return (await self.states()).get(id)

    async def states(self) -> dict[str, SyncState]:
        metas: list[SessionMeta] = await self.store.list()
        return {meta.id: meta.sync_state for meta in metas}

    async def load_kept_texts(self, id: str = "s") -> list[list[str]]:
        """What the turns of the kept copies say, sorted."""
        return sorted([contents(await self.store.load_kept(copy)) for copy in self.store.kept(id)])

    async def kept_values(self, key: str, id: str = "s") -> set[Any]:
        """What the kept copies of a session have under a key of the metadata."""
        return {(await self.store.load_kept(copy)).metadata.get(key) for copy in self.store.kept(id)}

    def pending(self) -> tuple[int, int, list[str]]:
        """Uploads, downloads and conflicts by the status."""
        status = self.store.sync_status()
        return status.pending_uploads, status.pending_downloads, status.conflicts

    def traces(self) -> dict[str, Any]:
        """What any writing would change: of each file, what is in it and its signature; of the server, its counters."""
        found: dict[str, Any] = {}
        for path in sorted(self.folder.glob("*.json")):
            data = path.read_bytes() if path.is_file() else b""
            found[path.name] = (self.signature(path.stem), data)
        for path in sorted((self.folder / ".orcs-redis" / "kept").rglob("*")):
            found[str(path)] = path.stat().st_mtime_ns
        return found | counters(self.place)


def counters(place: Place | None) -> dict[str, Any]:
    """How many writes each partition has had, and the revision of each session."""
    if place is None:
        return {}
    raw: Any = place.raw
    found = {key: raw.hget(key, "revision") for key in raw.scan_iter(match=f"{{{place.namespace}/*}}:state")}
    sessions = raw.scan_iter(match=f"{{{place.namespace}/*}}:session:*", count=10_000)
    return found | {key: raw.hget(key, ".revision") for key in sessions}


class Machines:
    """Opens machines and peers in the row's form, at the row's server; they are closed with the test."""

    def __init__(self, root: Path, place: Place) -> None:
        self.root = root
        self.place = place
        self._machines: list[Machine] = []
        self._peers: list[Any] = []

    @property
    def module(self) -> Any:
        return orcs_redis if self.place.row.form == "async" else orcs_redis.sync

    def folder(self, name: str = "a") -> Path:
        return self.root / name

    async def open(self, name: str = "a", *, url: str | None = None, **options: Any) -> Machine:
        """Open a store on a folder: at the row's server unless it is said, not live unless it is said.

        It is entered, as by `async with`: that begins what goes on in the background.
        """
        if url == OFFLINE_URL:
            options = {"deadline": 0.3} | options
        options = {"live": False, "namespace": self.place.namespace} | options
        make: Any = self.module.HybridSessionStore
        path, url = self.folder(name), url or self.place.url
        if self.place.row.form == "async":
            store = await make(path, url, **options).__aenter__()
        else:
            store = _Blocking(await asyncio.to_thread(lambda: make(path, url, **options).__enter__()))
        machine = Machine(path, store, self.place)
        self._machines.append(machine)
        return machine

    async def reopen(self, machine: Machine, **options: Any) -> Machine:
        """Close a machine's store and open another on its folder."""
        await machine.aclose()
        return await self.open(machine.folder.name, **options)

    async def peer(self, **options: Any) -> Any:
        """Open a plain Redis store."""
        self._peers.append(await self.place.connect(**options))
        return self._peers[-1]

    async def synced(self, *names: str, sessions: Iterable[SessionAsset] = ()) -> Any:
        """Open machines (one: "a") and a peer, all with these sessions; [a] if none are given. The peer comes last."""
        peer = await self.peer()
        stored = [*sessions] or [asset("a", x=1, y=1)]
        for result in await peer.save_many(stored):
            assert isinstance(result, int), result
        opened = [await self.open(name) for name in names or ("a",)]
        for machine in opened:
            assert told(await machine.sync()) == {"downloaded": sorted(session.id for session in stored)}
        return *opened, peer

    async def close(self) -> None:
        for machine in self._machines:
            await machine.aclose()
        for peer in self._peers:
            await self.place.close(peer)


@asynccontextmanager
async def open_machines(root: Path, place: Place) -> AsyncIterator[Machines]:
    machines = Machines(root, place)
    try:
        yield machines
    finally:
        await machines.close()


def copied(source: Machine, target: Path, *, state: bool = True) -> None:
    """Copy a closed machine's folder, with its state or without."""
    shutil.copytree(source.folder, target, ignore=None if state else shutil.ignore_patterns(".orcs-redis"))


async def until_true(condition: Callable[[], Awaitable[object]], seconds: float = 20) -> None:
    """Wait for a condition that is awaited."""
    end = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < end, "it did not happen"
        await asyncio.sleep(0.01)


async def idle(*machines: Machine, conflicts: Collection[str] = ()) -> None:
    """One more round does nothing: empty report, no file, copy or revision touched; both sides are equal."""
    for machine in machines:
        before = machine.traces()
        report = await machine.sync()
        assert told(report) == ({"conflicts": sorted(conflicts)} if conflicts else {})
        assert report.kept == []
        assert machine.traces() == before
        status = machine.sync_status()
        assert status.mode in (SyncMode.ONLINE, SyncMode.SYNCING)  # a live one may be in a round
        assert status.last_sync is not None
        assert (status.pending_uploads, status.pending_downloads) == (0, 0)
        assert status.conflicts == sorted(conflicts)
        states = await machine.states()
        for id in conflicts:
            assert states.pop(id, SyncState.CONFLICT) is SyncState.CONFLICT
        assert {*states.values()} <= {SyncState.SYNCED}
        assert {path.stem for path in machine.folder.glob("*.json")} - {*conflicts} == states.keys()
        stored = {meta.id for meta in await machine.remote.list()} - {*conflicts}
        assert stored == states.keys()
        for id in states:
            assert _timeless(machine.read(id)) == _timeless(await machine.remote.load(id))


def _timeless(session: SessionAsset) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(session.to_json())
    return {name: value for name, value in fields.items() if name not in ("created_at_ms", "updated_at_ms")}

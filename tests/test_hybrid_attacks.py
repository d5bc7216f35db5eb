"""What a stranger does to a hybrid store: calls that are cancelled, stores side by side, callbacks that fail."""

from __future__ import annotations

import asyncio
import pickle
import threading
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import orcs_redis
from orcs_redis import PermissionDeniedError, SessionAsset, SyncMode, SyncState
from orcs_redis.stores.hybrid import live, local
from orcs_redis.stores.hybrid.installing import Installer
from orcs_redis.stores.hybrid.local import Local
from orcs_redis.stores.hybrid.locks import RoundLock

from .conftest import Place
from .machines import OFFLINE_URL, TABLE, Machines, asset, contents, idle, open_machines, setting, told, until_true
from .support import turn, until

tabled = pytest.mark.parametrize("place", TABLE, indirect=True, ids=str)
only_async = pytest.mark.parametrize("place", [row for row in TABLE if row.form == "async"], indirect=True, ids=str)


@pytest.fixture
async def machines(place: Place, tmp_path: Path) -> AsyncIterator[Machines]:
    async with open_machines(tmp_path, place) as opened:
        yield opened


class Gate:
    """Lets a call of a thread wait, until it is opened."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()

    def around(self, call: Any) -> Any:
        def wait(*args: Any, **kwargs: Any) -> Any:
            result = call(*args, **kwargs)
            self.reached.set()
            assert self.opened.wait(20)
            return result

        return wait


# Cancelled calls


@only_async
async def test_cancelled_while_it_takes_the_lock(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    """A round that is cancelled while a thread takes the folder's lock leaves it to the next one."""
    a = await machines.open()
    await a.save(asset("a"))
    gate = Gate()
    with monkeypatch.context() as patched:
        patched.setattr(RoundLock, "take", gate.around(RoundLock.take))
        round = asyncio.create_task(a.sync())
        await until(gate.reached.is_set)
        round.cancel()
        asyncio.get_running_loop().call_later(0.05, gate.opened.set)
        with pytest.raises(asyncio.CancelledError):
            await round
    async with asyncio.timeout(10):
        assert told(await a.sync()) == {"uploaded": ["s"]}
        await idle(a)


@only_async
async def test_cancelled_while_it_writes(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock on rounds is held until a cancelled round writes no more."""
    a, peer = await machines.synced()
    other = await machines.open()
    await peer.append("s", turn("b"))
    gate = Gate()
    with monkeypatch.context() as patched:
        patched.setattr(Installer, "_finish", gate.around(Installer._finish))
        round = asyncio.create_task(a.sync())
        await until(gate.reached.is_set)
        round.cancel()
        await asyncio.sleep(0.05)
        is_free = other.store._files.round_lock().take()
        gate.opened.set()
        with pytest.raises(asyncio.CancelledError):
            await round
    assert not is_free, "another round could begin"
    assert told(await other.sync()) == {}
    await idle(a, other)


@only_async
async def test_closing_is_cancelled(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store whose closing was cancelled can be closed again: nothing of it is left."""
    a = await machines.open(live=True)
    await until(lambda: a.sync_status().mode is SyncMode.ONLINE)
    gate = Gate()
    with monkeypatch.context() as patched:
        patched.setattr(Local, "look", gate.around(Local.look))
        await a.save(asset("a"))
        await until(gate.reached.is_set)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await a.aclose()
        gate.opened.set()
    await a.aclose()
    assert a.store._journal._connection is None
    assert a.store._remote._driver.lifecycle.closed


# Side by side


@tabled
async def test_deleted_by_a_store_that_has_not_looked(machines: Machines) -> None:
    """What another store on the folder has synchronised, and this one deletes and makes anew, is another session."""
    other = await machines.open()
    a, peer = await machines.synced()
    await other.delete("s")
    await other.save(asset("z"))
    assert told(await a.sync()) == {"uploaded": ["s"]}
    assert a.texts() == contents(await peer.load("s")) == ["z"]
    await idle(a, other)


@tabled
async def test_made_anew_while_it_is_sent(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session that is deleted and made anew while a round sends it for the first time is not mixed with the old."""
    a, peer = await machines.open(), await machines.peer()
    await a.save(asset("a"))
    gate = Gate()
    with monkeypatch.context() as patched:
        patched.setattr(Installer, "_read_here", gate.around(Installer._read_here))
        round = asyncio.create_task(a.sync())
        await until(gate.reached.is_set)
        await a.delete("s")
        await a.save(asset("z"))
        gate.opened.set()
        await round
    await a.sync()
    assert a.texts() == contents(await peer.load("s")) == ["z"]
    await idle(a)


@tabled
async def test_deleted_before_it_was_sent(machines: Machines) -> None:
    """Of a session that was never sent nothing remains once it is deleted."""
    a = await machines.open()
    await a.save(asset("a"))
    await a.delete("s")
    await idle(a)
    assert a.store._journal.removals == {}
    assert (await machines.reopen(a)).store._journal.removals == {}


@tabled
async def test_listed_while_a_round_brings_sessions(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is noted of the shared store while a list is made is no error in it."""
    a, peer = await machines.synced()
    await peer.save(asset("b", id="t"))
    standings = Local.standings
    began, ended = threading.Event(), threading.Event()

    def slow(self: Local[Any], *args: Any) -> Any:
        found = standings(self, *args)
        if args and not began.is_set():
            began.set()
            assert ended.wait(20)
        return found

    monkeypatch.setattr(Local, "standings", slow)
    listing = asyncio.create_task(a.list())
    await until(began.is_set)
    assert told(await a.sync(dry_run=True)) == {"downloaded": ["t"]}
    ended.set()
    assert [meta.id for meta in await listing] in (["s"], ["t", "s"])


# Live


@tabled
async def test_a_save_to_an_empty_namespace(machines: Machines) -> None:
    """The first session that there is at all is sent at once, too."""
    a, peer = await machines.open(live=True, scan=30.0), await machines.peer()
    await until(lambda: a.sync_status().mode is SyncMode.ONLINE)
    await a.save(asset("a"))
    await until_true(partial(peer.exists, "s"), 5)


@tabled
async def test_a_callback_that_fails(machines: Machines) -> None:
    """What `on_sync` raises does not end the synchronisation."""

    def fail(report: Any) -> None:
        raise RuntimeError("not mine")

    a, peer = await machines.open(live=True, on_sync=fail), await machines.peer()
    await a.save(asset("a"))
    await until_true(lambda: peer.exists("s"))
    await a.append("s", turn("b"))

    async def arrived() -> bool:
        return contents(await peer.load("s")) == ["a", "b"]

    await until_true(arrived, 5)


@tabled
async def test_a_failure_is_not_forgotten(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session that could not be sent is tried again, though others were sent meanwhile."""
    monkeypatch.setattr(live, "_LAST_DELAY", 1.0)
    monkeypatch.setattr(local, "_RACY_NS", 0)
    a, peer = await machines.open(live=True, scan=0.1), await machines.peer()
    await until(lambda: a.sync_status().mode is SyncMode.ONLINE)
    write, denied, refusals = Installer._write_there, [True], []

    def deny(shared: Any, item: Any) -> Any:
        if item.id == "bad" and denied:
            refusals.append(item)
            raise PermissionDeniedError("not now")
        return (yield from write(shared, item))

    monkeypatch.setattr(Installer, "_write_there", staticmethod(deny))
    await a.save(asset("a", id="bad"))
    await until(lambda: bool(refusals))
    for n in range(2):
        await a.save(asset("a", id=f"good-{n}"))
        await until_true(partial(peer.exists, f"good-{n}"))
    denied.clear()
    await until_true(lambda: peer.exists("bad"), 5)


@tabled
async def test_a_round_among_many(machines: Machines) -> None:
    """A live store that has work all the time leaves the folder's lock to others."""
    sessions = [asset("a", id=f"s{n}") for n in range(10)]
    a, peer = await machines.synced(sessions=sessions)
    a = await machines.reopen(a, live=True, deadline=2.0)
    await until(lambda: a.sync_status().mode is SyncMode.ONLINE)
    ended = False

    async def append() -> None:
        while not ended:
            for session in sessions:
                await peer.append(session.id, turn())

    appending = asyncio.create_task(append())
    try:
        for _ in range(10):
            await a.load("s3", fresh=True)
    finally:
        ended = True
        await appending


# Lists


@tabled
async def test_listed_after_a_look_at_one(machines: Machines) -> None:
    """A session that is there only is listed, however its state was found out."""
    a, peer = await machines.synced()
    await peer.save(asset("b", id="t"))
    await a.sync(dry_run=True)
    assert await a.states() == {"s": SyncState.SYNCED, "t": SyncState.REMOTE_AHEAD}
    await a.sync("t", dry_run=True)
    assert await a.states() == {"s": SyncState.SYNCED, "t": SyncState.REMOTE_AHEAD}


@tabled
async def test_deleted_in_a_conflict(machines: Machines) -> None:
    """A session that is deleted here while it is in conflict has none any more, before and after the next round."""
    a, peer = await machines.synced()
    await a.update("s", setting(x=2))
    await peer.update("s", setting(x=3))
    assert told(await a.sync()) == {"conflicts": ["s"]}
    await a.delete("s")
    assert a.pending() == (0, 1, [])
    assert told(await a.sync()) == {"revived": ["s"]}
    await idle(a)


# Assets


class Own(SessionAsset):
    """An asset with a field of its own."""

    mood: str = ""
    score: int = 0


@tabled
async def test_pickled_with_own_fields(machines: Machines) -> None:
    """A loaded asset of a class of one's own is merged after it was pickled, too."""
    a = await machines.open(asset_type=Own)
    await a.save(Own(id="s", mood="good", score=1))
    loaded = pickle.loads(pickle.dumps(await a.load("s")))
    await a.update("s", lambda session: setattr(session, "mood", "better"))
    loaded.score = 2
    await a.save(loaded)
    stored = await a.load("s")
    assert (stored.mood, stored.score) == ("better", 2)


# Event loops


def test_live_in_another_event_loop(tmp_path: Path) -> None:
    """A live store says so where it can't go on: in another event loop than that in which it was begun."""
    store = orcs_redis.HybridSessionStore(tmp_path, OFFLINE_URL)
    asyncio.run(store.__aenter__())

    async def in_another() -> None:
        with pytest.raises(RuntimeError, match="another event loop"):
            await store.save(asset("a"))
        await store.aclose()

    asyncio.run(in_another())
    assert not (tmp_path / "s.json").exists()


# Kept copies


@tabled
async def test_copies_of_what_saves_overwrite(machines: Machines) -> None:
    """No more than 20 copies of a session are kept, the newest, though there is no round for long."""
    a = await machines.open(url=OFFLINE_URL)
    for n in range(30):
        await a.save(asset(str(n)))
    copies = a.kept("s")
    assert len(copies) == 20
    assert contents(await a.load_kept(copies[0])) == ["28"]


# Wiped


@tabled
@pytest.mark.parametrize("kind", ["wiped", "restored"])
async def test_another_process_adopts(machines: Machines, kind: str) -> None:
    """A live store goes on once another one on the folder has adopted what is there now."""
    a, peer = await machines.synced()
    raw = machines.place.raw
    key = machines.place.key("state")
    before = raw.hget(key, "revision")
    await peer.append("s", turn("b"))
    live, other = await machines.reopen(a, live=True, scan=0.1), await machines.open()
    await until(lambda: live.sync_status().is_fully_synced() and len(live.texts()) == 2)
    if kind == "wiped":
        raw.delete(*raw.scan_iter(match=f"*{machines.place.namespace}*"))
    else:
        raw.hset(key, "revision", before)
    await live.save(asset("a", id="t"))
    await until(lambda: live.sync_status().mode is SyncMode.ERROR)
    await other.sync(adopt=True)
    await other.aclose()
    await live.save(asset("a", id="u"))
    await until(lambda: live.sync_status().is_fully_synced(), 10)
    assert await (await machines.peer()).exists("u")


@tabled
async def test_one_folder_by_two_names(machines: Machines) -> None:
    """What was loaded by one name of a folder is saved by another one as a change, not as something new."""
    a = await machines.open("a")
    await a.save(asset("a"))
    machines.folder("link").symlink_to(machines.folder("a"))
    link = await machines.open("link")
    loaded = await a.load("s")
    await a.append("s", turn("b"))
    loaded.add_turn(turn("c"))
    await link.save(loaded)
    assert a.texts() == ["a", "b", "c"]


@tabled
async def test_appended_to_what_is_not_here(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session that others have made is fetched to append to it, as to load it."""
    a, peer = await machines.synced()
    monkeypatch.setattr(live.Live, "_is_news", lambda self, change: False)
    a = await machines.reopen(a, live=True)
    await until(lambda: a.sync_status().mode is SyncMode.ONLINE)
    await peer.save(asset("b", id="t"))
    await a.append("t", turn("c"))
    assert a.texts("t") == ["b", "c"]
    await a.sync()
    await idle(a)

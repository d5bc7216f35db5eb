"""The methods of the hybrid store: what holds of every session store, offline and online, and what is its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import orcs_redis
import orcs_redis.sync
from orcs_redis import (
    ConflictError,
    CorruptSessionError,
    InvalidIdError,
    LayoutError,
    NotFoundError,
    PermissionDeniedError,
    SerializationError,
    SessionAsset,
    SyncMode,
    SyncState,
    UnavailableError,
    VersionIncompatibleError,
)

from .conftest import Place
from .machines import (
    OFFLINE_URL,
    TABLE,
    Machine,
    Machines,
    asset,
    contents,
    idle,
    open_machines,
    setting,
    told,
    until_true,
)
from .support import turn, until
from .test_lease import leased

pytestmark = pytest.mark.parametrize("place", TABLE, indirect=True, ids=str)


@pytest.fixture
async def machines(place: Place, tmp_path: Path) -> AsyncIterator[Machines]:
    async with open_machines(tmp_path, place) as opened:
        yield opened


@pytest.fixture(params=["offline", "online"])
async def a(request: pytest.FixtureRequest, machines: Machines) -> Machine:
    """A machine whose server can't be reached, or that is at the row's."""
    url = OFFLINE_URL if request.param == "offline" else None
    machine = await machines.open(url=url)
    if url is None:
        await machine.sync()
    return machine


# What holds of every session store


async def test_saved_is_loaded(a: Machine) -> None:
    """A session comes back equal, from a file that is what orcs writes; the revision is the file's time."""
    saved = asset("a", "é\u2028", big=2**64 - 1, nested={"a": {"b": []}})
    revision = await a.save(saved)
    assert a.data() == saved.to_json().encode()
    assert a.file().stat().st_mtime_ns == revision
    assert await a.load("s") == saved
    assert [path.name for path in a.folder.iterdir() if path.name[0] != "."] == ["s.json"]


async def test_saved_again(a: Machine) -> None:
    """An asset can be changed and saved again and again; another of its id, made here, replaces it."""
    saved = asset("a")
    first = await a.save(saved)
    saved.add_turn(turn("b"))
    assert await a.save(saved) >= first
    assert await a.load("s") == saved
    another = asset("z")
    await a.save(another)
    assert await a.load("s") == another


async def test_absent(a: Machine) -> None:
    """What needs a session says that there is none."""
    for call in (
        a.load("nope"),
        a.turns("nope"),
        a.delete("nope"),
        a.append("nope", turn()),
        a.update("nope", lambda session: None),
    ):
        with pytest.raises(NotFoundError, match="nope"):
            await call


async def test_absent_does_not_exist(a: Machine) -> None:
    """A session that is nowhere does not exist."""
    assert await a.exists("nope") is False


async def test_deleted(a: Machine) -> None:
    """A deleted session is gone from everywhere, at once."""
    await a.save(asset("a"))
    assert await a.exists("s") is True
    await a.delete("s")
    assert await a.list() == []
    assert await a.count() == 0
    for call in (a.load("s"), a.delete("s"), a.append("s", turn())):
        with pytest.raises(NotFoundError):
            await call


async def test_listed_newest_first(a: Machine) -> None:
    """The last updated comes first, of equal ones the greater id; the revision is the file's."""
    revisions = {}
    for id, ms in [("b", 5), ("a", 5), ("c", 5), ("d", 9), ("e", 1)]:
        revisions[id] = await a.save(SessionAsset(id=id, updated_at_ms=ms))
    metas = await a.list()
    assert [meta.id for meta in metas] == ["d", "c", "b", "a", "e"]
    assert {meta.id: meta.revision for meta in metas} == revisions
    assert [meta.id for meta in await a.list(limit=2)] == ["d", "c"]
    assert await a.list(limit=0) == []
    assert await a.count() == 5


async def test_pages(a: Machine) -> None:
    """Pages are the list in parts."""
    for n in range(7):
        await a.save(SessionAsset(id=f"s{n}", updated_at_ms=n))
    seen, cursor, sizes = [], None, []
    while True:
        page = await a.page(3, cursor)
        seen += [meta.id for meta in page.items]
        sizes.append(len(page.items))
        cursor = page.cursor
        if cursor is None:
            break
    assert seen == [meta.id for meta in await a.list()] == [f"s{n}" for n in reversed(range(7))]
    assert sizes == [3, 3, 1]
    for bad in ("no cursor", "MjAyNi0xMS0yNlQwMDowMDowMCBz"):  # the second is a time without a zone, and an id
        with pytest.raises(ValueError, match="cursor"):
            await a.page(3, bad)


async def test_filters(a: Machine) -> None:
    """Lists and counts take the filters of the shared store."""
    for n in range(4):
        made = SessionAsset(id=f"s{n}", updated_at_ms=n * 1000)
        made.project_context.root_path = f"/{n % 2}"
        made.metadata["labels"] = {"user": f"u{n // 2}"}
        await a.save(made)
    epoch = datetime(1970, 1, 1, tzinfo=UTC)

    async def found(**filters: Any) -> list[str]:
        ids = [meta.id for meta in await a.list(**filters)]
        assert await a.count(**filters) == len(ids)
        assert [meta.id for meta in (await a.page(10, **filters)).items] == ids
        return ids

    assert await found(project_path="/1") == ["s3", "s1"]
    assert await found(labels={"user": "u0"}) == ["s1", "s0"]
    assert await found(updated_after=epoch + timedelta(seconds=2)) == ["s3", "s2"]
    assert await found(updated_before=epoch + timedelta(seconds=2)) == ["s1", "s0"]
    assert await found(project_path="/0", labels={"user": "u1"}) == ["s2"]
    for bad in (
        a.list(updated_after=datetime(1970, 1, 1)),
        a.list(limit=-1),
        a.count(labels={"user": 1}),
    ):  # that is what is refused
        with pytest.raises(ValueError, match=r"."):
            await bad
    with pytest.raises(TypeError):
        await a.list(colour="red")


async def test_metadata_in_lists(a: Machine) -> None:
    """A list tells name, times, path, number of turns and labels."""
    saved = asset("a", "b", labels={"user": "u1"})
    saved.project_context.name, saved.project_context.root_path = "a name", "/a/path"
    revision = await a.save(saved)
    (meta,) = await a.list()
    assert (meta.id, meta.name, meta.project_path) == ("s", "a name", "/a/path")
    assert (meta.turn_count, meta.revision, meta.labels) == (2, revision, {"user": "u1"})
    assert (meta.created_at, meta.updated_at) == (saved.created_at, saved.updated_at)
    assert abs(meta.written_at.timestamp() - revision / 1e9) < 1e-3
    assert meta.sync_state is SyncState.LOCAL_ONLY


async def test_appended(a: Machine) -> None:
    """Turns are added in order, and the session's time moves forward."""
    await a.save(SessionAsset(id="s", updated_at_ms=1000))
    before = time.time_ns() // 1_000_000
    await a.append("s", turn("a"), turn("b"))
    loaded = await a.load("s")
    assert contents(loaded) == ["a", "b"]
    assert before <= loaded.updated_at_ms <= before + 60_000
    with pytest.raises(ValueError, match="turn"):
        await a.append("s")


async def test_all_appends_land(a: Machine) -> None:
    """Of many appends at once each is there once."""
    await a.save(asset())
    turns = [turn(str(n)) for n in range(40)]
    await asyncio.gather(*(a.append("s", each) for each in turns))
    assert sorted(each.id for each in (await a.load("s")).history.turns) == sorted(each.id for each in turns)


@pytest.mark.parametrize(("start", "stop"), [(0, -1), (-3, -1), (2, 5), (5, 2), (-100, 100), (8, 99), (-1, -1)])
async def test_turns_are_a_slice(a: Machine, start: int, stop: int) -> None:
    """`turns` is Python's slice with the end included."""
    saved = asset(*map(str, range(10)))
    await a.save(saved)
    expected = saved.history.turns[start : None if stop == -1 else stop + 1]
    assert await a.turns("s", start, stop) == expected


async def test_updated(a: Machine) -> None:
    """Increments by many at once are all counted; what changes nothing writes nothing; what raises neither."""
    await a.save(asset("a"))

    def increment(session: SessionAsset) -> None:
        session.metadata["n"] = session.metadata.get("n", 0) + 1

    results = await asyncio.gather(*(a.update("s", increment) for _ in range(20)))
    assert sorted(result.asset.metadata["n"] for result in results) == list(range(1, 21))
    assert (await a.load("s")).metadata["n"] == 20
    before = a.traces()
    assert (await a.update("s", setting(n=20))).asset.metadata["n"] == 20

    def fail(session: SessionAsset) -> None:
        session.metadata["n"] = 0
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await a.update("s", fail)
    assert a.traces() == before


async def test_many(a: Machine) -> None:
    """The bulk methods answer in the order asked, with errors in the places of what failed."""
    bad = asset(id="bad")
    bad.metadata["x"] = float("nan")
    saved = [asset(str(n), id=f"s{n}") for n in range(20)]
    revisions = await a.save_many([*saved, bad])
    assert [a.file(each.id).stat().st_mtime_ns for each in saved] == revisions[:-1]
    assert type(revisions[-1]) is SerializationError
    loaded = await a.load_many(["s7", "nope", "/bad", "s3"])
    assert [loaded[0], loaded[3]] == [saved[7], saved[3]]
    assert [type(error) for error in loaded[1:3]] == [NotFoundError, InvalidIdError]
    deleted = await a.delete_many(["s0", "s0"])
    assert deleted[0] is None
    assert isinstance(deleted[1], NotFoundError)
    assert await a.save_many([]) == []
    assert len(await a.list()) == 19


@pytest.mark.parametrize("id", ["", "..", "../x", "/etc/passwd", "a/b", "a\\b", ".x", "a\0", "\ud800", "x" * 201])
async def test_ids_stay_in_the_folder(a: Machine, id: str) -> None:
    """No id leads out of the folder, or to a hidden file."""
    calls: list[Callable[[], Any]] = [
        lambda: a.load(id),
        lambda: a.delete(id),
        lambda: a.exists(id),
        lambda: a.append(id, turn()),
        lambda: a.update(id, setting(x=1)),
        lambda: a.save(SessionAsset(id=id)),
        lambda: a.turns(id),
        lambda: a.sync(id),
        lambda: a.resolve(id, keep="local"),
        lambda: a.conflict(id),
    ]
    for call in calls:
        with pytest.raises(InvalidIdError):
            await call()
    assert [path.name for path in a.folder.iterdir() if path.name != ".orcs-redis"] == []


@pytest.mark.parametrize("id", ["x" * 200, "é" * 100, "😀" * 50, "{a}*?[b] :", "~", "a.json", "%2e"])
async def test_any_id(machines: Machines, id: str) -> None:
    """The longest ids and all scripts work, here and there."""
    a = await machines.open()
    await a.save(asset("a", id=id))
    assert (await a.load(id)).id == id
    assert told(await a.sync()) == {"uploaded": [id]}
    b = await machines.open("b")
    assert told(await b.sync()) == {"downloaded": [id]}
    await idle(a, b)


async def test_refused_saves(a: Machine) -> None:
    """What can't be encoded, and another version, are refused before anything is touched."""
    bad, newer = asset("a"), asset("a")
    bad.metadata["x"] = {1, 2}
    newer.version = 2
    for each, error in ((bad, SerializationError), (newer, VersionIncompatibleError)):
        with pytest.raises(error):
            await a.save(each)
    assert await a.list() == []
    assert not a.file().exists()


async def test_unreadable_files_hide_no_others(a: Machine) -> None:
    """A file that can't be read is an error to load, and hides no other from the list."""
    await a.save(asset("a", id="good"))
    a.write(b"{secret", "bad")
    assert "good" in [meta.id for meta in await a.list()]
    with pytest.raises(CorruptSessionError) as caught:
        await a.load("bad")
    assert "secret" not in str(caught.value)


class MyAsset(SessionAsset):
    """A subclass with a field of its own."""

    notes: list[str] = []  # noqa: RUF012  # msgspec copies it


async def test_subclass(machines: Machines) -> None:
    """A subclass of SessionAsset is loaded as such, and a machine that does not know it keeps its fields."""
    a, b = await machines.open("a", asset_type=MyAsset), await machines.open("b")
    await a.save(MyAsset(id="s", notes=["n"]))
    await a.sync()
    await b.sync()
    assert (await b.load("s")).extra == {"notes": ["n"]}
    await b.update("s", setting(x=1))
    await b.sync()
    await a.sync()
    loaded = await a.load("s")
    assert type(loaded) is MyAsset
    assert (loaded.notes, loaded.metadata) == (["n"], {"x": 1})
    await idle(a, b)


# Saves of assets whose file has moved on


async def test_a_save_merges(a: Machine) -> None:
    """A save of an asset whose file has moved on keeps what others have changed in other parts."""
    await a.save(asset("a", x=1, y=1))
    loaded = await a.load("s")
    a.edit(setting(y=2))
    loaded.metadata["x"] = 2
    await a.save(loaded)
    assert a.read().metadata == {"x": 2, "y": 2}


async def test_a_save_that_collides(a: Machine) -> None:
    """A save of what others have changed differently is refused, and says which part; with overwrite it wins."""
    await a.save(asset("a", x=1))
    loaded = await a.load("s")
    a.edit(setting(x=2))
    before = a.data()
    loaded.metadata["x"] = 3
    with pytest.raises(ConflictError) as caught:
        await a.save(loaded)
    assert caught.value.parts == ("metadata.x",)
    assert a.data() == before
    await a.save(loaded, overwrite=True)
    assert a.read().metadata == {"x": 3}
    assert await a.kept_values("x") == {2}


async def test_a_save_of_what_is_gone(a: Machine) -> None:
    """A loaded asset whose file was deleted meanwhile is not brought back by a save."""
    await a.save(asset("a"))
    loaded = await a.load("s")
    await a.delete("s")
    loaded.metadata["x"] = 1
    with pytest.raises(ConflictError):
        await a.save(loaded)
    assert not a.file().exists()


# Without a server


async def test_nobody_listens(machines: Machines) -> None:
    """Without a server all that is of the folder works; what needs the server says that it is not to be had."""
    a = await machines.open(url=OFFLINE_URL)
    await a.save(asset("a"))
    await a.append("s", turn("b"))
    assert await a.state() is SyncState.LOCAL_ONLY
    for call in (a.sync(), a.load("s", fresh=True), a.resolve("s", keep="local"), a.sync("s"), a.sync(dry_run=True)):
        with pytest.raises(UnavailableError):
            await call
    with pytest.raises(UnavailableError):
        _ = a.remote
    status = a.sync_status()
    assert (status.mode, status.last_sync, status.pending_uploads) == (SyncMode.OFFLINE, None, 1)
    await a.delete("s")
    assert a.pending() == (0, 0, [])


async def test_known_there_but_not_here(machines: Machines) -> None:
    """A session that is known there is listed offline, exists, and can't be loaded; one that is unknown is absent."""
    a, peer = await machines.open(), await machines.peer()
    await peer.save(asset("a"))
    await a.sync(dry_run=True)
    a = await machines.reopen(a, url=OFFLINE_URL)
    (meta,) = await a.list()
    assert (meta.id, meta.sync_state, meta.turn_count) == ("s", SyncState.REMOTE_AHEAD, 1)
    assert await a.exists("s") is True
    with pytest.raises(UnavailableError):
        await a.load("s")
    with pytest.raises(NotFoundError):
        await a.load("other")
    assert a.pending() == (0, 1, [])


# With one


async def test_a_list_after_lists_of_the_same(machines: Machines) -> None:
    """However often nothing had changed, a list shows the next change, whatever made it."""
    a, peer = await machines.synced()

    async def states_before() -> dict[str, SyncState]:
        for file in a.folder.glob("*.json"):
            os.utime(file, (1e9, 1e9))  # so long ago that it is certainly as it was when it was read
        states: list[dict[str, SyncState]] = [await a.states() for _ in range(3)]
        return states[-1]

    async def states_after(change: Awaitable[object]) -> dict[str, SyncState]:
        await states_before()
        await change
        states: dict[str, SyncState] = await a.states()
        return states

    assert await states_before() == {"s": SyncState.SYNCED}
    await peer.append("s", turn("b"))
    assert await states_after(a.sync(dry_run=True)) == {"s": SyncState.REMOTE_AHEAD}
    assert await states_after(a.sync()) == {"s": SyncState.SYNCED}
    assert (await a.list())[0].turn_count == 2
    await states_before()
    a.edit(lambda session: session.add_turn(turn("c")))
    assert await a.states() == {"s": SyncState.LOCAL_AHEAD}
    assert (await a.list())[0].turn_count == 3
    assert await states_after(a.save(asset("x", id="t"))) == {"s": SyncState.LOCAL_AHEAD, "t": SyncState.LOCAL_ONLY}
    assert await states_after(a.delete("s")) == {"t": SyncState.LOCAL_ONLY}


async def test_fresh(machines: Machines) -> None:
    """A fresh load has what a peer has just written; a plain one has what is here."""
    a, peer = await machines.synced()
    await peer.append("s", turn("b"))
    assert contents(await a.load("s")) == ["a"]
    assert contents(await a.load("s", fresh=True)) == ["a", "b"]
    assert a.texts() == ["a", "b"]
    await a.append("s", turn("c"))
    assert contents(await a.load("s", fresh=True)) == ["a", "b", "c"]
    assert contents(await peer.load("s")) == ["a", "b", "c"]
    await peer.save(asset("new", id="new"))
    assert contents(await a.load("new", fresh=True)) == ["new"]
    with pytest.raises(NotFoundError):
        await a.load("nope", fresh=True)
    await idle(a)


async def test_some_only(machines: Machines) -> None:
    """A round of some sessions leaves the others alone."""
    a, peer = await machines.synced(sessions=[asset("a", id=id) for id in "stu"])
    for id in "st":
        await peer.append(id, turn("there"))
    await a.append("u", turn("here"))
    await a.save(asset("new", id="v"))
    assert told(await a.sync("s")) == {"downloaded": ["s"]}
    assert [a.texts(id) for id in "stu"] == [["a", "there"], ["a"], ["a", "here"]]
    assert told(await a.sync("u", "v")) == {"uploaded": ["u", "v"]}
    assert told(await a.sync()) == {"downloaded": ["t"]}
    await idle(a)


async def test_the_remote_store(machines: Machines) -> None:
    """What is the shared store's alone is done through it: leases, revisions, records."""
    a, peer = await machines.synced()
    async with leased(a.remote, "s") as lease:
        await a.remote.append("s", turn("b"), lease=lease)
    assert contents(await peer.load("s")) == ["a", "b"]
    assert told(await a.sync()) == {"downloaded": ["s"]}
    await idle(a)


async def test_two_rounds_at_once(machines: Machines) -> None:
    """Rounds at the same time, of one store and of two on one folder, do everything once."""
    a, peer = await machines.open(), await machines.peer()
    second = await machines.open()
    ids = [f"s{n}" for n in range(10)]
    for result in await a.save_many([asset("a", id=id) for id in ids]):
        assert isinstance(result, int)
    reports = await asyncio.gather(a.sync(), a.sync(), second.sync())
    assert sorted(id for report in reports for id in report.uploaded) == ids
    assert [report.failed for report in reports] == [[], [], []]
    revisions = sorted(meta.revision for meta in await peer.list())
    assert revisions == list(range(1, 11))
    await idle(a, second)


async def test_saved_while_a_round_is_under_way(machines: Machines) -> None:
    """What is saved here and there while rounds are under way is all there in the end, once."""
    a, peer = await machines.synced()
    here, there = [f"here {n}" for n in range(15)], [f"there {n}" for n in range(15)]
    done = asyncio.Event()

    async def rounds() -> None:
        while not done.is_set():
            report = await a.sync()
            assert (report.conflicts, report.failed) == ([], [])

    async def writing() -> None:
        for mine, theirs in zip(here, there, strict=True):
            await a.append("s", turn(mine))
            await peer.append("s", turn(theirs))
        done.set()

    await asyncio.gather(rounds(), writing())
    await a.sync()
    texts = a.texts()
    assert texts == contents(await peer.load("s"))
    assert sorted(texts) == sorted(["a", *here, *there])
    assert [text for text in texts if text in here] == here
    assert [text for text in texts if text in there] == there
    await idle(a)


async def test_progress(machines: Machines) -> None:
    """A round says how far it is, and the status that it is under way."""
    a, peer = await machines.open(), await machines.peer()
    await peer.save_many([asset("a", id=f"s{n:02}") for n in range(40)])
    modes = []

    def progress(*_: Any) -> None:
        modes.append(a.sync_status().mode)

    await a.sync(progress=progress)
    assert SyncMode.SYNCING in modes
    assert a.sync_status().mode is SyncMode.ONLINE
    await idle(a)


async def test_last_sync(machines: Machines) -> None:
    """The status has the end of the last round in which nothing failed."""
    a = await machines.open()
    before = datetime.now(UTC)
    await a.sync()
    first = a.sync_status().last_sync
    assert before <= first <= datetime.now(UTC)
    await a.sync()
    assert a.sync_status().last_sync >= first


# Conflicts, and what lost


async def colliding(machines: Machines) -> tuple[Machine, Any]:
    a, peer = await machines.synced()
    await a.update("s", setting(x=2))
    await a.append("s", turn("b"))
    await peer.update("s", setting(x=3))
    await peer.append("s", turn("c"))
    assert told(await a.sync()) == {"conflicts": ["s"]}
    return a, peer


async def test_resolved_with_an_asset(machines: Machines) -> None:
    """An asset is taken as it is, on both sides; both versions are kept."""
    a, peer = await colliding(machines)
    about = await a.conflict("s")
    chosen = about.remote
    chosen.metadata["x"] = 5
    await a.resolve("s", keep=chosen)
    assert a.read().metadata == (await peer.load("s")).metadata == {"x": 5, "y": 1}
    assert a.texts() == contents(await peer.load("s")) == ["a", "c"]
    assert await a.kept_values("x") == {2, 3}
    assert {copy.side for copy in a.kept("s")} == {"here", "there"}
    await idle(a)


async def test_edited_while_in_conflict(machines: Machines) -> None:
    """Both sides may go on being edited while they are in conflict, and may come to agree by themselves."""
    a, peer = await colliding(machines)
    await a.append("s", turn("d"))
    await peer.append("s", turn("e"))
    assert told(await a.sync()) == {"conflicts": ["s"]}
    await peer.update("s", setting(x=2))
    assert told(await a.sync()) == {"merged": ["s"]}
    assert a.texts() == contents(await peer.load("s")) == ["a", "c", "e", "b", "d"]
    await idle(a)


async def test_resolved_for_the_shared_store(machines: Machines) -> None:
    """What is there holds for the part that collides, and the turns of both are kept."""
    a, peer = await colliding(machines)
    await a.resolve("s", keep="remote")
    assert a.read().metadata == (await peer.load("s")).metadata == {"x": 3, "y": 1}
    assert a.texts() == contents(await peer.load("s")) == ["a", "c", "b"]
    assert 2 in await a.kept_values("x")
    await idle(a)


@pytest.mark.parametrize("keep", ["local", "remote"])
async def test_resolved_without_a_conflict(machines: Machines, keep: str) -> None:
    """Resolving a session that is in no conflict makes both sides as that side is."""
    a, peer = await machines.synced()
    await a.append("s", turn("b"))
    await peer.append("s", turn("c"))
    await a.resolve("s", keep=keep)
    expected = ["a", "b"] if keep == "local" else ["a", "c"]
    assert a.texts() == contents(await peer.load("s")) == expected
    await idle(a)


async def test_what_can_not_be_resolved(machines: Machines) -> None:
    """An unknown side, an asset of another session, a session that is nowhere: each is refused, nothing is written."""
    a, _ = await colliding(machines)
    before = a.traces()
    for keep in ("mine", None, 1):
        with pytest.raises((ValueError, TypeError)):
            await a.resolve("s", keep=keep)
    with pytest.raises(ValueError, match="id"):
        await a.resolve("s", keep=asset("a", id="t"))
    with pytest.raises(NotFoundError):
        await a.resolve("nope", keep="local")
    assert a.traces() == before
    await idle(a, conflicts=["s"])


async def test_kept_copies(machines: Machines) -> None:
    """A kept copy is a session file of the machine that decided, for its user alone; it says which side, when, why."""
    a, _ = await colliding(machines)
    before = datetime.now(UTC) - timedelta(seconds=1)
    await a.resolve("s", keep="local")
    copies = a.kept("s")
    assert copies
    for each in copies:
        assert each.id == "s"
        assert each.side in ("here", "there")
        assert before <= each.at <= datetime.now(UTC)
        assert each.why
        assert each.path.parent == a.folder / ".orcs-redis" / "kept" / "s"
        assert each.path.stat().st_mode & 0o777 == 0o600
        assert await a.load_kept(each) == SessionAsset.from_json(each.path.read_bytes())
    assert [meta.id for meta in await a.list()] == ["s"]
    assert a.kept("other") == []
    with pytest.raises(InvalidIdError):
        a.kept("../s")


async def test_no_more_than_twenty_copies(machines: Machines) -> None:
    """Of a session the last twenty copies are kept."""
    a, peer = await machines.synced()
    a = await machines.reopen(a, prefer="remote")
    for n in range(22):
        await a.update("s", setting(x=f"here {n}"))
        await peer.update("s", setting(x=f"there {n}"))
        await a.sync()
    kept = await a.kept_values("x")
    assert len(a.kept("s")) <= 20
    assert "here 21" in kept
    assert "here 0" not in kept
    await idle(a)


# Opening and closing


async def test_open_store(place: Place, tmp_path: Path) -> None:
    """`open_store` with a folder gives a hybrid store, and closes it."""
    options: Any = {"namespace": place.namespace, "live": False}
    if place.row.form == "async":
        async with orcs_redis.open_store(place.url, local=tmp_path, **options) as store:
            assert isinstance(store, orcs_redis.HybridSessionStore)
            await store.save(asset("a"))
            assert (await store.sync()).uploaded == ["s"]
    else:
        with orcs_redis.sync.open_store(place.url, local=tmp_path, **options) as store:
            assert isinstance(store, orcs_redis.sync.HybridSessionStore)
            store.save(asset("a"))
            assert store.sync().uploaded == ["s"]
    assert store.sync_status().mode is SyncMode.OFFLINE


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"url": "redis://[::1"}, ValueError),
        ({"url": "ftp://host"}, ValueError),
        ({"url": "redis://host/0?x=1"}, ValueError),
        ({"prefer": "mine"}, ValueError),
        ({"keep_days": -1.0}, ValueError),
        ({"scan": 0.0}, ValueError),
        ({"namespace": "{"}, ValueError),
        ({"colour": "red"}, TypeError),
    ],
    ids=str,
)
async def test_what_can_not_be_opened(machines: Machines, options: dict[str, Any], error: type[Exception]) -> None:
    """A malformed URL or option is an error at opening, before a folder is made."""
    with pytest.raises(error):
        await machines.open(**options)
    assert not machines.folder().exists()


async def test_a_closed_folder(machines: Machines, closed: Path) -> None:
    """A folder that is not to be written to is refused."""
    machines.root = closed.parent
    with pytest.raises(PermissionDeniedError):
        await machines.open("closed")


async def test_after_closing(machines: Machines) -> None:
    """A store that was closed does nothing more, and says so."""
    a, _ = await machines.synced()
    before = a.traces()
    await a.aclose()
    await a.aclose()
    assert a.sync_status().mode is SyncMode.OFFLINE
    for call in (a.sync(), a.save(asset("z")), a.load("s"), a.list(), a.delete("s"), a.resolve("s", keep="local")):
        with pytest.raises(UnavailableError):
            await call
    assert a.traces() == before


async def test_in_a_forked_child(machines: Machines) -> None:
    """A child that was forked may not use its parent's store, which goes on."""
    a, peer = await machines.synced()
    child = os.fork()
    if child == 0:
        try:
            call: Any = a.store.load("s") if machines.place.row.form == "async" else None
            if call is None:
                a.store._store.load("s")
            else:
                call.send(None)
        except RuntimeError:
            os._exit(7)
        finally:
            os._exit(1)
    _, status = await asyncio.to_thread(os.waitpid, child, 0)
    assert os.waitstatus_to_exitcode(status) == 7
    await a.append("s", turn("b"))
    await a.sync()
    assert contents(await peer.load("s")) == ["a", "b"]
    await idle(a)


async def test_a_secret_in_the_url(machines: Machines) -> None:
    """The password of the URL is in no repr and in no error."""
    a = await machines.open(url=OFFLINE_URL.replace("//", "//user:hush@"))
    with pytest.raises(UnavailableError) as caught:
        await a.sync()
    assert "hush" not in repr(a.store) + str(caught.value) + repr(caught.value)


# What is kept beside the files


async def test_a_damaged_state(machines: Machines) -> None:
    """A state that can't be read is moved aside; a first round follows, which loses nothing and asks nothing."""
    a, peer = await machines.synced(sessions=[asset("a", id=id, x=1) for id in ("s", "t", "u")])
    await a.append("s", turn("b"))
    await a.aclose()
    for path in (a.folder / ".orcs-redis").glob("state.db*"):
        path.unlink() if path.name != "state.db" else path.write_bytes(b"damaged" * 1000)
    await peer.append("t", turn("c"))
    a = await machines.open()
    assert await a.state("s") is SyncState.LOCAL_ONLY
    report = await a.sync()
    assert (report.conflicts, report.failed, report.deleted) == ([], [], [])
    assert [a.texts(id) for id in "stu"] == [["a", "b"], ["a", "c"], ["a"]]
    aside = [
        path for path in (a.folder / ".orcs-redis").rglob("*") if path.is_file() and b"damaged" in path.read_bytes()
    ]
    assert len(aside) == 1
    await idle(a)


async def test_a_state_of_a_newer_version(machines: Machines) -> None:
    """A state that a newer version has written is neither used nor moved."""
    a, _ = await machines.synced()
    await a.aclose()
    path = a.folder / ".orcs-redis" / "state.db"
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA user_version = 99")
        database.commit()
    with pytest.raises(LayoutError):
        await machines.open()
    with contextlib.closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (99,)


async def test_orcs_does_not_see_the_state(machines: Machines) -> None:
    """A store of the files alone finds the sessions and nothing else, and so does an import."""
    a, _ = await machines.synced()
    files = orcs_redis.sync.LocalFileStore(a.folder)
    assert [meta.id for meta in files.list()] == ["s"]
    assert files.unreadable() == []
    assert [path.name for path in a.folder.iterdir() if path.name[0] != "."] == ["s.json"]
    assert (a.folder / ".orcs-redis" / "state.db").stat().st_mode & 0o077 == 0


# Live


async def online(machine: Machine) -> None:
    await until(lambda: machine.sync_status().mode is SyncMode.ONLINE)


async def test_live(machines: Machines) -> None:
    """A live store sends what is saved here, and brings what is saved there, by itself."""
    a, peer = await machines.open(live=True), await machines.peer()
    await a.save(asset("a"))
    await until_true(lambda: peer.exists("s"))
    await peer.append("s", turn("b"))
    await until(lambda: a.texts() == ["a", "b"])
    await a.append("s", turn("c"))
    await until_true(lambda: has(peer, "c"))
    await peer.save(asset("z", id="t"))
    await until(lambda: a.file("t").exists())
    await a.delete("t")

    async def gone() -> bool:
        return not await peer.exists("t")

    await until_true(gone)
    await idle(a)


async def test_live_finds_what_others_write(machines: Machines) -> None:
    """A live store looks at its folder now and then, and sends what other programs have written there."""
    a, peer = await machines.open(live=True, scan=0.1), await machines.peer()
    await online(a)
    a.write(asset("a"))
    await until_true(lambda: peer.exists("s"))
    a.edit(lambda session: session.add_turn(turn("b")))
    await until_true(lambda: has(peer, "b"))
    await idle(a)


async def test_live_fetches(machines: Machines) -> None:
    """A live store loads a session that is not here yet, and knows that one is nowhere."""
    a, peer = await machines.open(live=True), await machines.peer()
    await online(a)
    await peer.save(asset("a"))
    assert await a.exists("s") is True
    assert contents(await a.load("s")) == ["a"]
    assert await a.exists("nope") is False
    with pytest.raises(NotFoundError):
        await a.load("nope")
    await idle(a)


async def test_live_without_a_server(machines: Machines) -> None:
    """A live store whose server can't be reached opens at once, works on its folder, and closes."""
    a = await machines.open(url=OFFLINE_URL, live=True)
    await a.save(asset("a"))
    assert contents(await a.load("s")) == ["a"]
    await until(lambda: a.pending() == (1, 0, []))
    assert a.sync_status().mode is SyncMode.OFFLINE
    await a.aclose()


async def has(store: Any, text: str) -> bool:
    return text in contents(await store.load("s"))

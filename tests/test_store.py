"""What a caller sees of a Redis store: on every server, in both forms."""

from __future__ import annotations

import asyncio
import copy
import gc
import time
import weakref
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from orcs_redis import (
    ConflictError,
    ConversationTurn,
    NotFoundError,
    SessionAsset,
    SyncMode,
    SyncState,
    ToolCallRecord,
    VersionIncompatibleError,
)

from .conftest import Connect, Place


def session(turns: int = 2, **fields: Any) -> SessionAsset:
    asset = SessionAsset(**fields)
    asset.project_context.name = "a name"
    asset.project_context.root_path = "/a/path"
    for n in range(turns):
        asset.add_turn(ConversationTurn.user(f"turn {n}"))
    return asset


async def test_saved_is_loaded_equal(store: Any) -> None:
    """What was saved comes back equal, with every part."""
    asset = session(3)
    args = {"a": [1, 2.5, None, True, "ü"]}
    asset.history.turns[0].tool_calls = [ToolCallRecord(tool_name="t", args=args, result={})]
    asset.metadata = {"big": 2**64 - 1, "small": -(2**63), "text": "\U0001f600", "nested": {"a": {"b": []}}}
    revision = await store.save(asset)
    assert revision >= 1
    assert await store.load_versioned(asset.id) == (asset, revision)
    assert await store.load(asset.id) == asset


async def test_many_turns_are_loaded_in_order(store: Any) -> None:
    """A history long enough to be staged comes back whole and in order, and can be appended to."""
    asset = session(1000)
    await store.save(asset)
    await store.append(asset.id, ConversationTurn.user("one more"))
    loaded = await store.load(asset.id)
    assert loaded.history.turns[:-1] == asset.history.turns
    assert loaded.history.turns[-1].content == "one more"


async def test_save_overwrites(store: Any) -> None:
    """A save without a condition replaces what another client has written."""
    asset, other = session(30), session(2)
    other.id = asset.id
    await store.save(asset)
    await store.save(other)
    assert await store.load(asset.id) == other


async def test_revisions_grow(store: Any) -> None:
    """Every write gets a higher revision, a session made anew is not taken for the old one."""
    asset = session()
    first = await store.save(asset)
    second = await store.append(asset.id, ConversationTurn.user("x"))
    await store.delete(asset.id)
    third = await store.save(session(id=asset.id), if_revision=0)
    assert first < second < third
    with pytest.raises(ConflictError):
        await store.save(asset, if_revision=second)


async def test_compare_and_set(store: Any) -> None:
    """A conditional save holds over that revision only, and the error says what was found."""
    asset = session()
    with pytest.raises(ConflictError) as absent:
        await store.save(asset, if_revision=7)
    assert (absent.value.id, absent.value.expected, absent.value.actual) == (asset.id, 7, 0)
    first = await store.save(asset, if_revision=0)
    with pytest.raises(ConflictError) as present:
        await store.save(asset, if_revision=0)
    assert present.value.actual == first
    assert await store.save(asset, if_revision=first) == first
    asset.metadata["n"] = 1
    second = await store.save(asset, if_revision=first)
    with pytest.raises(ConflictError):
        await store.append(asset.id, ConversationTurn.user("x"), if_revision=first)
    with pytest.raises(ConflictError):
        await store.delete(asset.id, if_revision=first)
    third = await store.append(asset.id, ConversationTurn.user("x"), if_revision=second)
    await store.delete(asset.id, if_revision=third)
    assert not await store.exists(asset.id)


async def test_absent(store: Any) -> None:
    """What needs a session says that there is none."""
    for call in (
        store.load("nope"),
        store.load_versioned("nope"),
        store.turns("nope"),
        store.delete("nope"),
        store.append("nope", ConversationTurn.user("x")),
        store.update("nope", lambda asset: None),
    ):
        with pytest.raises(NotFoundError, match="nope"):
            await call
    assert await store.exists("nope") is False


async def test_append(store: Any) -> None:
    """Turns are added in order, the session's time moves forward to the server's, never backwards."""
    asset = session(1, updated_at_ms=1000)
    asset.updated_at_ms = 1000
    await store.save(asset)
    before = time.time_ns() // 1_000_000 - 2000
    await store.append(asset.id, ConversationTurn.user("a"), ConversationTurn.assistant("b"))
    loaded = await store.load(asset.id)
    assert [turn.content for turn in loaded.history.turns] == ["turn 0", "a", "b"]
    assert before <= loaded.updated_at_ms <= before + 60_000
    loaded.updated_at_ms = 2000
    await store.save(loaded)
    await store.append(asset.id, ConversationTurn.user("c"))
    assert before <= (await store.load(asset.id)).updated_at_ms <= before + 60_000
    with pytest.raises(ValueError, match="turn"):
        await store.append(asset.id)


async def test_concurrent_appends_all_land(connect: Connect) -> None:
    """Appends of two clients, many at a time, are all there once."""
    one, other = await connect(), await connect()
    asset = session(0)
    await one.save(asset)
    turns = [ConversationTurn.user(str(n)) for n in range(100)]
    await asyncio.gather(*((one if n % 2 else other).append(asset.id, turn) for n, turn in enumerate(turns)))
    loaded = await one.load(asset.id)
    assert sorted(turn.id for turn in loaded.history.turns) == sorted(turn.id for turn in turns)


@pytest.mark.parametrize(
    ("start", "stop"),
    [(0, -1), (-3, -1), (0, 0), (2, 5), (5, 2), (-100, 100), (8, 99), (99, 100), (0, -2), (-1, -1), (-2, -5)],
)
async def test_turns_are_a_slice(store: Any, start: int, stop: int) -> None:
    """`turns` is Python's slice with the end included, as LRANGE has it."""
    asset = session(10)
    await store.save(asset)
    expected = asset.history.turns[start : None if stop == -1 else stop + 1]
    assert await store.turns(asset.id, start, stop) == expected


async def test_turns_of_an_empty_history(store: Any) -> None:
    """No turns is not the same as no session."""
    asset = session(0)
    await store.save(asset)
    assert await store.turns(asset.id) == []


async def test_update(store: Any) -> None:
    """Increments by many at once are all counted."""
    asset = session()
    await store.save(asset)

    def increment(asset: SessionAsset) -> None:
        asset.metadata["n"] = asset.metadata.get("n", 0) + 1

    results = await asyncio.gather(*(store.update(asset.id, increment) for _ in range(20)))
    assert (await store.load(asset.id)).metadata["n"] == 20
    assert sorted(result.asset.metadata["n"] for result in results) == list(range(1, 21))


async def test_update_that_changes_nothing_writes_nothing(store: Any) -> None:
    """The revision stays, whatever the asset was changed to meanwhile; what did change is written."""
    asset = session(30)
    revision = await store.save(asset)

    def rename_and_back(asset: SessionAsset) -> None:
        name = asset.project_context.name
        asset.project_context.name = "another"
        asset.history.turns.reverse()
        asset.project_context.name = name
        asset.history.turns.reverse()

    assert await store.update(asset.id, rename_and_back) == (asset, revision)
    assert (await store.load_versioned(asset.id)).revision == revision
    changes: list[Callable[[SessionAsset], object]] = [
        lambda asset: asset.history.turns.pop(),
        lambda asset: asset.history.turns.reverse(),
        lambda asset: asset.metadata.update(x=1),
        lambda asset: asset.metadata.clear(),
        lambda asset: asset.extra.update(x=1),
        lambda asset: asset.extra.clear(),
        lambda asset: asset.history.turns[-1].metadata.update(x=1),
    ]
    for change in changes:
        updated = await store.update(asset.id, change)
        assert updated.revision > revision
        revision = updated.revision
        assert await store.load_versioned(asset.id) == updated


async def test_update_that_raises_writes_nothing(store: Any) -> None:
    """What `change` raises reaches the caller, and the session stays as it was."""
    asset = session()
    revision = await store.save(asset)

    def fail(asset: SessionAsset) -> None:
        asset.metadata["x"] = 1
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await store.update(asset.id, fail)
    assert await store.load_versioned(asset.id) == (asset, revision)


async def test_edits_of_a_loaded_asset(connect: Connect) -> None:
    """However a loaded asset is edited, what is saved is what is loaded again."""
    store = await connect()
    asset = session(30)
    await store.save(asset)

    def compact(a: SessionAsset) -> None:
        a.history.max_turns = 10
        a.history.compact(lambda old: f"{len(old)} turns")

    edits: list[Callable[[SessionAsset], object]] = [
        lambda a: a.history.turns.append(ConversationTurn.user("new")),
        lambda a: a.history.turns.pop(),
        lambda a: a.history.turns.pop(0),
        lambda a: a.history.turns.insert(5, ConversationTurn.user("in between")),
        lambda a: setattr(a.history.turns[0], "content", "first, edited"),
        lambda a: setattr(a.history.turns[-1], "content", "last, edited"),
        lambda a: a.history.turns.reverse(),
        compact,
        lambda a: a.metadata.update(x=1),
        lambda a: a.extra.update({"unknown": [1], ".dotted": 2, "revision": 3}),
        lambda a: a.extra.pop("unknown"),
        lambda a: a.history.turns.clear(),
        lambda a: a.history.turns.append(ConversationTurn.user("again")),
    ]
    for edit in edits:
        edit(asset)
        revision = await store.save(asset)
        fresh = await (await connect()).load_versioned(asset.id)
        assert fresh == (asset, revision)


async def test_copies_and_renamed_assets(store: Any) -> None:
    """A copy, or an asset given another id, is stored whole under its own id."""
    asset = session(3)
    await store.save(asset)
    twin = copy.deepcopy(await store.load(asset.id))
    twin.id = "twin"
    await store.save(twin)
    renamed = await store.load(asset.id)
    renamed.id = "renamed"
    await store.save(renamed)
    for id in ("twin", "renamed"):
        assert (await store.load(id)).history == asset.history


async def test_exists_and_delete(store: Any) -> None:
    """A deleted session is gone from everywhere."""
    asset = session()
    await store.save(asset)
    assert await store.exists(asset.id) is True
    await store.delete(asset.id)
    assert await store.exists(asset.id) is False
    assert await store.list() == []
    with pytest.raises(NotFoundError):
        await store.delete(asset.id)


async def test_metadata_in_lists(store: Any) -> None:
    """A list tells name, times, path, number of turns and revision without loading a session."""
    asset = session(4)
    revision = await store.save(asset)
    (meta,) = await store.list()
    assert meta.id == asset.id
    assert (meta.name, meta.project_path, meta.turn_count, meta.revision) == ("a name", "/a/path", 4, revision)
    assert (meta.created_at, meta.updated_at) == (asset.created_at, asset.updated_at)
    assert meta.sync_state is SyncState.SYNCED
    revision = await store.append(asset.id, ConversationTurn.user("x"))
    (meta,) = await store.list()
    assert (meta.name, meta.turn_count, meta.revision) == ("a name", 5, revision)


async def test_many(connect: Connect) -> None:
    """The bulk methods answer in the order asked, with errors in the places of what failed."""
    store = await connect(deadline=60.0)  # Lua in fakeredis is slow
    assets = [session(n % 40) for n in range(300)]
    bad = session()
    bad.metadata["x"] = float("nan")
    revisions = await store.save_many([*assets, bad])
    assert len(set(revisions[:-1])) == 300
    assert type(revisions[-1]).__name__ == "SerializationError"
    loaded = await store.load_many([assets[7].id, "nope", "/bad", assets[3].id])
    assert loaded[0] == assets[7]
    assert loaded[3] == assets[3]
    assert [type(error).__name__ for error in loaded[1:3]] == ["NotFoundError", "InvalidIdError"]
    deleted = await store.delete_many([assets[0].id, assets[0].id])
    assert deleted[0] is None
    assert isinstance(deleted[1], NotFoundError)
    assert await store.save_many([]) == []


async def test_delete_many_at_their_revisions(store: Any) -> None:
    """Of metadata, a session is deleted only if it is as the list had it; what has changed since is reported."""
    assets = [session(2) for _ in range(4)]
    await store.save_many(assets)
    metas = {meta.id: meta for meta in await store.list()}
    revision = await store.append(assets[1].id, ConversationTurn.user("late"))
    await store.delete(assets[2].id)
    deleted = await store.delete_many([*(metas[asset.id] for asset in assets[:3]), assets[3].id])
    assert [type(error).__name__ for error in deleted] == ["NoneType", "ConflictError", "ConflictError", "NoneType"]
    assert [error.actual for error in deleted[1:3]] == [revision, 0]
    assert [meta.id for meta in await store.list()] == [assets[1].id]


class MyAsset(SessionAsset):
    """A subclass with a field of its own."""

    notes: list[str] = []  # noqa: RUF012  # msgspec copies it
    score: float | None = None


async def test_subclass(connect: Connect) -> None:
    """A subclass keeps its own fields, also when a client that doesn't know them saves the session."""
    store = await connect(asset_type=MyAsset)
    asset = MyAsset(notes=["a", "b"], score=1.5)
    await store.save(asset)
    loaded = await store.load(asset.id)
    assert type(loaded) is MyAsset
    assert loaded == asset
    plain = await connect()
    other = await plain.load(asset.id)
    assert other.extra == {"notes": ["a", "b"], "score": 1.5}
    other.metadata["x"] = 1
    await plain.save(other)
    again = await store.load(asset.id)
    assert (again.notes, again.score, again.metadata) == (["a", "b"], 1.5, {"x": 1})


async def test_unknown_fields_of_a_hash_are_left_alone(place: Place, store: Any) -> None:
    """What a newer client keeps in a session's hash under a dotted name survives our writes."""
    asset = session()
    await store.save(asset)
    key = place.key(f"session:{asset.id}")
    place.raw.hset(key, mapping={".future": b"\x01", b"\xff\xfe": b"?"})
    fresh = await store.load(asset.id)
    assert fresh == asset
    fresh.metadata["x"] = 1
    await store.save(fresh)
    await store.append(asset.id, ConversationTurn.user("x"))
    assert place.raw.hget(key, ".future") == b"\x01"
    assert place.raw.hget(key, b"\xff\xfe") == b"?"


async def test_version_2(place: Place, store: Any) -> None:
    """A session of a newer schema is neither loaded nor overwritten, and an asset that says so is not saved."""
    asset = session()
    await store.save(asset)
    place.raw.hset(place.key(f"session:{asset.id}"), "version", msgspec.msgpack.encode(2))
    stored = place.raw.hgetall(place.key(f"session:{asset.id}"))
    for call in (
        store.load(asset.id),
        store.save(session(id=asset.id)),
        store.append(asset.id, ConversationTurn.user("x")),
    ):
        with pytest.raises(VersionIncompatibleError) as caught:
            await call
        assert (caught.value.found, caught.value.supported) == (2, 1)
    assert place.raw.hgetall(place.key(f"session:{asset.id}")) == stored
    newer = session(version=2)
    with pytest.raises(VersionIncompatibleError):
        await store.save(newer)


async def test_sync_status(connect: Connect) -> None:
    """The status is Online with the last acknowledged operation, and Offline after closing."""
    store = await connect()
    await store.save(session())
    status = store.sync_status()
    assert status.mode is SyncMode.ONLINE
    assert status.last_sync is not None
    assert abs(status.last_sync.timestamp() - time.time()) < 60
    assert status.pending_uploads == 0
    assert status.is_fully_synced()
    await store.aclose()
    assert store.sync_status().mode is SyncMode.OFFLINE


async def test_partitions(connect: Connect) -> None:
    """Over several partitions everything is as with one; their number is read from the descriptor."""
    store = await connect(partitions=5)
    assets = [session(n, updated_at_ms=1000 + n) for n in range(20)]
    for n, asset in enumerate(assets):
        asset.updated_at_ms = 1000 + n
    await store.save_many(assets)
    other = await connect()
    assert [meta.id for meta in await other.list()] == [asset.id for asset in reversed(assets)]
    assert [meta.id for meta in await other.list(limit=7)] == [asset.id for asset in reversed(assets)][:7]
    seen = []
    cursor = None
    while True:
        page = await other.page(3, cursor)
        seen += [meta.id for meta in page.items]
        cursor = page.cursor
        if cursor is None:
            break
        assert len(page.items) == 3
    assert seen == [asset.id for asset in reversed(assets)]
    await other.append(assets[0].id, ConversationTurn.user("x"))
    assert (await store.list(limit=1))[0].id == assets[0].id


async def test_a_failed_call_leaves_no_cycle(store: Any) -> None:
    """What a call raised is freed with it, and so are the frames that it came through, which hold sessions."""
    blocking = getattr(store, "_store", None)
    gc.disable()
    try:
        try:
            if blocking is not None:
                blocking.load("absent")
            else:
                await store.load("absent")
        except NotFoundError as error:
            raised = weakref.ref(error)
        assert raised() is None
    finally:
        gc.enable()

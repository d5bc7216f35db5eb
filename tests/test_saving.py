"""Saving what was loaded: changes are applied to what is stored by then, and nothing of others is lost."""

from __future__ import annotations

import asyncio
import copy
import pickle
from collections.abc import Callable
from typing import Any
from unittest import mock

import msgspec
import pytest

from orcs_redis import (
    CompactedTurn,
    ConflictError,
    ConversationTurn,
    NotFoundError,
    OutcomeUnknownError,
    ProjectContext,
    RawItem,
    SerializationError,
    SessionAsset,
)
from orcs_redis.model.sections import now_ms
from orcs_redis.protocol.writes import Write

from .conftest import Connect, Place
from .support import turn
from .test_lease import leased

HOUR = 3_600_000


def session(turns: int = 3, **fields: Any) -> SessionAsset:
    asset = SessionAsset(**fields)
    for n in range(turns):
        asset.add_turn(turn(f"turn {n}"))
    return asset


def contents(asset: SessionAsset) -> list[str]:
    return [turn.content for turn in asset.history.turns]


async def meta(store: Any, id: str) -> Any:
    (found,) = [meta for meta in await store.list() if meta.id == id]
    return found


def unpickled(asset: Any) -> Any:
    return pickle.loads(pickle.dumps(asset))


WAYS: dict[str, Callable[[Any], Any]] = {"itself": lambda asset: asset, "copied": copy.deepcopy, "pickled": unpickled}
in_each_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


async def refused(save: Any, *parts: str) -> ConflictError:
    """The conflict that it ends in, which names these parts."""
    with pytest.raises(ConflictError) as caught:
        await save
    assert caught.value.parts == tuple(sorted(parts))
    return caught.value


# Two who change one session


@in_each_way
async def test_parts_of_one_section(connect: Connect, way: Callable[[Any], Any]) -> None:
    """Other parts, turns of others and ours: all of it is stored, and the asset has it."""
    store, peer = await connect(), await connect()
    asset = session()
    await store.save(asset)
    mine, theirs = way(await store.load(asset.id)), await peer.load(asset.id)
    theirs.project_context.root_path = "/theirs"
    theirs.metadata["theirs"] = 1
    theirs.add_turn(turn("theirs"))
    theirs.history.turns[1].content = "edited there"
    await peer.save(theirs)
    mine.project_context.name = "mine"
    mine.metadata["mine"] = 1
    mine.add_turn(turn("mine"))
    mine.history.turns[0].content = "edited here"
    await store.save(mine)
    assert contents(mine) == ["edited here", "edited there", "turn 2", "theirs", "mine"]
    assert (mine.project_context.name, mine.project_context.root_path) == ("mine", "/theirs")
    assert mine.metadata == {"mine": 1, "theirs": 1}
    assert await peer.load(asset.id) == mine


def edited(asset: SessionAsset, text: str) -> None:
    asset.history.turns[1].content = text


def removed(asset: SessionAsset, _: str) -> None:
    del asset.history.turns[1]


def compacted(asset: SessionAsset, text: str) -> None:
    del asset.history.turns[:2]
    asset.history.compacted = [CompactedTurn(summary=text, turn_count=2, start_time_ms=0, end_time_ms=0)]


Change = Callable[[SessionAsset, str], object]
CONFLICTS: dict[str, tuple[Change, Change, str]] = {
    "a turn": (edited, edited, "turn/t"),
    "edited, removed": (edited, removed, "turn/t"),
    "removed, edited": (removed, edited, "turn/t"),
    "compaction": (compacted, compacted, "history.compacted"),
    "name": (lambda a, text: setattr(a.project_context, "name", text),) * 2 + ("project_context.name",),
    "metadata": (lambda a, text: a.metadata.update({"a.b\n": text}),) * 2 + ("metadata.a.b\n",),
    "no name": (lambda a, text: a.metadata.update({"": text}),) * 2 + ("metadata.",),
    "set, removed": (lambda a, t: a.metadata.update(k=t), lambda a, _: a.metadata.pop("k"), "metadata.k"),
    "extra": (lambda a, text: a.extra.update({".x.y": text}),) * 2 + ("extra..x.y",),
    "custom": (lambda a, text: a.preferences.custom.update({"x.y": text}),) * 2 + ("preferences.custom.x.y",),
}


@in_each_way
@pytest.mark.parametrize("case", CONFLICTS.values(), ids=CONFLICTS)
async def test_conflicts(connect: Connect, way: Callable[[Any], Any], case: tuple[Change, Change, str]) -> None:
    """What both have changed is named; nothing is written, nothing lost, and refresh leaves it as it is."""
    store, peer = await connect(), await connect()
    asset = session()
    asset.history.turns[1].id = "t"
    asset.metadata["k"] = "old"
    first = await store.save(asset)
    mine, theirs = await store.load(asset.id), await peer.load(asset.id)
    case[0](mine, "mine")
    case[1](theirs, "theirs")
    mine.metadata["mine"] = theirs.metadata["theirs"] = 1
    second = await peer.save(theirs)
    mine = way(mine)
    before = copy.deepcopy(mine)
    error = await refused(store.save(mine), case[2])
    assert (error.id, error.expected, error.actual) == (asset.id, first, second)
    assert mine == before
    assert await peer.load_versioned(asset.id) == (theirs, second)
    for _ in range(2):
        assert await store.refresh(mine) == second
        assert (mine.metadata["mine"], mine.metadata["theirs"]) == (1, 1)
        mine = way(mine)
        error = await refused(store.save(mine), case[2])
        assert (error.expected, error.actual) == (second, second)
    await store.save(mine, overwrite=True)
    assert await peer.load(asset.id) == mine


async def test_a_conflict_given_up(connect: Connect) -> None:
    """Who takes the others' value, or the old one, has no conflict any more."""
    store, peer = await connect(), await connect()
    asset = session()
    asset.metadata["k"] = "old"
    await store.save(asset)
    for value in ("theirs", "old"):
        mine = await store.load(asset.id)
        await peer.commit(asset.id, set={"metadata.k": "theirs"})
        mine.metadata["k"] = "mine"
        await store.refresh(mine)
        await refused(store.save(mine), "metadata.k")
        mine.metadata["k"] = value
        await store.refresh(mine)
        assert mine == await store.load(asset.id)
        assert mine.metadata["k"] == "theirs"
        await peer.commit(asset.id, set={"metadata.k": "old"})


async def test_equal_changes(connect: Connect) -> None:
    """What both have changed equally is no conflict, and writes nothing if it is all."""
    store, peer = await connect(), await connect()
    asset = session()
    asset.metadata["gone"] = 1
    await store.save(asset)
    mine, theirs = await store.load(asset.id), await peer.load(asset.id)
    for each in (mine, theirs):
        each.metadata = {"k": [1]}
        each.project_context.name = "both"
        each.history.turns[0].content = "both"
        del each.history.turns[1]
        each.history.turns.append(ConversationTurn(id="one", role="user", content="x", timestamp_ms=0))
    revision = await peer.save(theirs)
    assert await store.save(mine) == revision
    assert mine == theirs == await store.load(asset.id)


async def test_unchanged_and_touched(connect: Connect) -> None:
    """A save without changes writes nothing and is a refresh; a touched asset is a change."""
    store, peer = await connect(), await connect()
    asset = session()
    revision = await store.save(asset)
    assert await store.save(asset) == revision
    later = await peer.append(asset.id, turn("theirs"))
    assert await store.save(asset) == later
    assert contents(asset)[-1] == "theirs"
    before = await meta(store, asset.id)
    await asyncio.sleep(0.01)
    asset.touch()
    assert await store.save(asset) > later
    assert (await meta(store, asset.id)).updated_at > before.updated_at


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("changed", [False, True])
@in_each_way
async def test_gone_or_made_anew(connect: Connect, way: Callable[[Any], Any], changed: bool, held: bool) -> None:
    """A deleted session is not brought back, and one that was made anew is another."""
    store, peer = await connect(), await connect()
    asset = session()
    revision = await store.save(asset)
    mine = way(asset)
    if changed:
        mine.add_turn(turn("mine"))
    for anew in (0, 1):
        if anew:
            anew = await peer.save(session(id=asset.id))
        else:
            await peer.delete(asset.id)
        before = copy.deepcopy(mine)
        if held:
            async with leased(store, asset.id) as lease:
                error = await refused(store.save(mine, lease=lease))
        else:
            error = await refused(store.save(mine))
        assert (error.expected, error.actual) == (revision, anew)
        with pytest.raises(ConflictError if anew else NotFoundError):
            await store.refresh(mine)
        assert mine == before
        assert await store.exists(asset.id) == bool(anew)


async def test_a_new_asset_is_stored_whole(connect: Connect) -> None:
    """Over whatever has its id: nothing of what others have added is left; so with overwrite."""
    store, peer = await connect(), await connect()
    old = session()
    old.extra = {"theirs": 1, ".x": 2, "a.b": 3}
    old.metadata = {"theirs": 1, "": 2}
    await peer.save(old)
    new = session(1, id=old.id)
    await store.save(new)
    assert await peer.load(old.id) == new
    await peer.commit(old.id, set={"extra.theirs": 1, "metadata.theirs": 1}, append=[turn("theirs")])
    await store.save(new, overwrite=True)
    assert await peer.load(old.id) == new


async def test_two_namespaces(connect: Connect) -> None:
    """An asset remembers what was stored of it in each; a change goes to both."""
    one, other = await connect(), await connect(namespace="saving-other")
    asset = session()
    await one.save(asset)
    await other.save(asset)
    await one.append(asset.id, turn("one"))
    await other.append(asset.id, turn("other"))
    asset.metadata["k"] = 1
    await one.save(asset)
    assert contents(asset)[3:] == ["one"]
    await other.save(asset)
    assert contents(asset)[3:] == ["other", "one"]
    assert contents(await other.load(asset.id))[3:] == ["other", "one"]
    assert contents(await one.load(asset.id))[3:] == ["one"]


class Ticket(SessionAsset, kw_only=True):
    """A subclass: a field that is required, one of another name in JSON."""

    tenant: str
    note: str | None = msgspec.field(default=None, name="theNote")


@pytest.mark.parametrize("typed", [True, False], ids=["its own type", "a plain store"])
async def test_fields_of_a_subclass(connect: Connect, typed: bool) -> None:
    """They are merged as other parts are, and so they are by a store that doesn't know them."""
    peer = await connect(asset_type=Ticket)
    store = await connect(asset_type=Ticket) if typed else await connect()
    mine = Ticket(tenant="t", note="old")
    await store.save(mine)
    theirs = await peer.load(mine.id)
    theirs.note = "theirs"
    await peer.save(theirs)
    mine.tenant = "mine"
    await store.save(mine)
    assert (mine.tenant, mine.note) == ("mine", "theirs")
    await peer.commit(mine.id, unset=["note"])
    await store.refresh(mine)
    assert mine.note is None
    await peer.refresh(theirs)
    theirs.note, mine.note = "theirs", "mine"
    await peer.save(theirs)
    await store.refresh(mine)
    assert mine.note == "mine"
    await refused(store.save(mine), "note")


# Turns


async def test_ours_come_after_theirs(connect: Connect) -> None:
    """Whatever is done to the turns here, those that others have pushed meanwhile stay before ours."""
    store, peer = await connect(), await connect()

    def put_between(turns: list[Any]) -> None:
        turns.insert(1, turn("mine"))

    def put_in_place(turns: list[Any]) -> None:
        turns[1] = turn("mine")

    def dropped(turns: list[Any]) -> None:
        del turns[0]
        turns.append(turn("mine"))

    cases = [
        (put_between, ["turn 0", "turn 1", "turn 2", "theirs", "mine"]),
        (put_in_place, ["turn 0", "turn 2", "theirs", "mine"]),
        (dropped, ["turn 1", "turn 2", "theirs", "mine"]),
    ]
    for change, expected in cases:
        for refreshed in (0, 1, 2):
            asset = session()
            await store.save(asset)
            change(asset.history.turns)
            await peer.append(asset.id, turn("theirs"))
            for _ in range(refreshed):
                await store.refresh(asset)
            await store.save(asset)
            assert contents(asset) == contents(await peer.load(asset.id)) == expected


async def test_pushed_twice_over_a_removal(connect: Connect) -> None:
    """The second refresh puts what is new where it is stored, too."""
    store, peer = await connect(), await connect()
    asset = session()
    await store.save(asset)
    del asset.history.turns[0]
    asset.add_turn(turn("mine"))
    for text in ("one", "two"):
        await peer.append(asset.id, turn(text))
        await store.refresh(asset)
    assert contents(asset) == ["turn 1", "turn 2", "one", "two", "mine"]


@pytest.mark.parametrize("ids", [("x", "x"), ("", "")], ids=["twice", "empty"])
async def test_ids_that_are_not_unique(connect: Connect, ids: tuple[str, str]) -> None:
    """Turns of one id are turns all the same; one that both add with the same content is one turn."""
    store, peer = await connect(), await connect()
    asset = session(1)
    for id in ids:
        asset.history.turns.append(ConversationTurn(id=id, role="user", content="same", timestamp_ms=0))
    await store.save(asset)
    theirs = await peer.load(asset.id)
    theirs.history.turns.append(ConversationTurn(id=ids[0], role="user", content="theirs", timestamp_ms=0))
    theirs.history.turns.append(ConversationTurn(id=ids[0], role="user", content="both", timestamp_ms=0))
    await peer.save(theirs)
    asset.history.turns.append(ConversationTurn(id=ids[0], role="user", content="both", timestamp_ms=0))
    asset.history.turns.append(ConversationTurn(id=ids[0], role="user", content="mine", timestamp_ms=0))
    await store.save(asset)
    assert contents(asset) == ["turn 0", "same", "same", "theirs", "both", "mine"]
    assert await peer.load(asset.id) == asset


async def test_many_turns_and_many_edits(connect: Connect) -> None:
    """Thousands of turns, most of them edited, while others push more than a save compares."""
    store, peer = await connect(), await connect()
    asset = session(3000)
    await store.save(asset)
    for each in asset.history.turns[:2000]:
        each.content += "!"
    await peer.append(asset.id, *(turn(f"theirs {n}") for n in range(100)))
    asset.add_turn(turn("mine"))
    await store.save(asset)
    found = contents(asset)
    assert found[1999:2001] == ["turn 1999!", "turn 2000"]
    assert found[-2:] == ["theirs 99", "mine"]
    assert len(found) == 3101
    assert contents(await peer.load(asset.id)) == found


async def test_raw_turns(connect: Connect) -> None:
    """They are merged as they are stored."""
    store, peer = await connect(), await connect()
    asset = session(1)
    asset.history.turns.append(ConversationTurn.from_raw(RawItem("x/1", b"\x00"), role="user", id="r"))
    await store.save(asset)
    theirs = await peer.load(asset.id)
    theirs.history.turns[1] = ConversationTurn.from_raw(
        RawItem("x/1", b"\x01"), role="user", id="r", timestamp_ms=theirs.history.turns[1].timestamp_ms
    )
    await peer.save(theirs)
    asset.add_turn(ConversationTurn.from_raw(RawItem("x/1", b"\x02"), role="user"))
    await store.save(asset)
    assert [turn.raw and turn.raw.data for turn in asset.history.turns] == [None, b"\x01", b"\x02"]
    assert await peer.load(asset.id) == asset


# What can't be


async def test_a_value_that_would_not_come_back(connect: Connect) -> None:
    """It is named by a save and by a refresh that has to merge, and the asset is as it was."""
    store, peer = await connect(), await connect()
    asset = session()
    await store.save(asset)
    asset.metadata["k"] = object()
    asset.project_context.name = "mine"
    await peer.commit(asset.id, set={"project_context": ProjectContext(root_path="/theirs")})
    for attempt in (store.save, store.refresh):
        with pytest.raises(SerializationError, match=r"metadata\.k"):
            await attempt(asset)
        assert asset.project_context.root_path is None


async def test_never_stored(connect: Connect) -> None:
    """What was not loaded from here, nor saved to it, can't be refreshed."""
    store = await connect()
    with pytest.raises(ValueError, match="neither"):
        await store.refresh(session())
    with pytest.raises(TypeError):
        await store.refresh("s")


async def test_fields_of_nobody(place: Place, connect: Connect) -> None:
    """A field of the hash that no store knows is left alone, and is no change."""
    store, peer = await connect(), await connect()
    asset = session()
    revision = await store.save(asset)
    loaded = await store.load(asset.id)
    for value in (b"\x01", b"\x02"):
        place.raw.hset(place.key(f"session:{asset.id}"), "attachments.x", value)
        assert await store.save(loaded) == revision
        revision = (await peer.commit(asset.id, set={"metadata.k": value.hex()})).revision
        await store.refresh(loaded)
    assert place.raw.hget(place.key(f"session:{asset.id}"), "attachments.x") == b"\x02"


@pytest.mark.parametrize("labels", [{"user": 1}, {"": "x"}, {"a": "x" * 201}, [1], {str(n): "x" for n in range(9)}])
async def test_labels_that_are_none(connect: Connect, labels: Any) -> None:
    """Ordinary metadata: merged, not indexed; and labels are indexed by whichever save stores them."""
    store, peer = await connect(), await connect()
    asset = session()
    asset.metadata["labels"] = {"user": "u1"}
    await store.save(asset)
    theirs = await peer.load(asset.id)
    asset.metadata["labels"] = labels
    theirs.metadata["x"] = 1
    await peer.save(theirs)
    await store.save(asset)
    assert await store.count(labels={"user": "u1"}) == 0
    assert (await peer.load(asset.id)).metadata == {"labels": labels, "x": 1}
    assert (await meta(store, asset.id)).labels == {}
    asset.metadata["labels"] = {"user": "u2"}
    await store.save(asset)
    assert await store.count(labels={"user": "u2"}) == 1


async def test_pickled_it_is_little_more(store: Any) -> None:
    """What was stored does not travel: digests of it are at most a tenth more."""
    asset = session()
    for n in range(500):
        asset.add_turn(turn(f"{n} " + "word " * 20))
    asset.project_context.name = "named"
    await store.save(asset)
    loaded = await store.load(asset.id)
    bare = loaded.from_json(loaded.to_json())
    assert len(pickle.dumps(loaded)) <= 1.1 * len(pickle.dumps(bare))


# Times and names in lists


async def test_updated_at_stays_with_other_parts(store: Any) -> None:
    """What was saved by a clock that is ahead does not move again when another part is saved."""
    asset = session()
    asset.updated_at_ms += HOUR
    await store.save(asset)
    before = await meta(store, asset.id)
    await asyncio.sleep(0.01)
    loaded = await store.load(asset.id)
    assert loaded.updated_at_ms == asset.updated_at_ms
    loaded.metadata["title"] = "x"
    await store.save(loaded)
    after = await meta(store, asset.id)
    assert after.updated_at == before.updated_at
    assert after.written_at > before.written_at


async def test_a_peers_name_stays_in_lists(store: Any) -> None:
    """A save of another part leaves what lists say of those that it does not change."""
    asset = session()
    await store.save(asset)
    first, second = await store.load(asset.id), await store.load(asset.id)
    second.project_context.name = "theirs"
    second.project_context.root_path = "/theirs"
    await store.save(second)
    first.created_at_ms -= HOUR
    await store.save(first)
    found = await meta(store, asset.id)
    assert (found.name, found.project_path, found.created_at) == ("theirs", "/theirs", first.created_at)
    assert await store.count(project_path="/theirs") == 1


async def test_a_time_that_both_have_changed(connect: Connect) -> None:
    """The later one holds, but none after the server's now."""
    store, peer = await connect(), await connect()
    asset = session()
    await store.save(asset)
    for shift, expected in ((HOUR, None), (-HOUR, "theirs")):
        await asyncio.sleep(0.01)
        await peer.append(asset.id, turn("theirs"))
        theirs = (await peer.load(asset.id)).updated_at_ms
        asset.metadata["n"] = shift
        asset.updated_at_ms = theirs + shift
        await store.save(asset)
        loaded = await store.load(asset.id)
        assert asset == loaded
        assert theirs <= loaded.updated_at_ms <= now_ms()
        assert expected is None or loaded.updated_at_ms == theirs
        listed = await meta(store, asset.id)
        assert theirs <= listed.updated_at.timestamp() * 1000 + 1


UNKNOWN = OutcomeUnknownError("no answer")


@pytest.mark.parametrize("stored", [True, False])
async def test_changed_again_after_an_unknown_outcome(connect: Connect, stored: bool) -> None:
    """Whether or not a save was applied whose answer was lost: what it brought is no change of others."""
    store = await connect()
    asset = session(3, id="a", metadata={"step": 0, "other": 0})
    await store.save(asset)
    asset.metadata["step"] = 1
    asset.history.turns[1].content = "edited once"
    asset.history.turns += [turn("draft"), turn("mistake")]
    lost = mock.patch.object(Write, "decode" if stored else "commands", side_effect=UNKNOWN)
    with lost, pytest.raises(OutcomeUnknownError):
        await store.save(asset)
    assert ((await store.load("a")).metadata["step"] == 1) is stored
    asset.metadata["step"] = 2
    asset.history.turns[1].content = "edited twice"
    asset.history.turns[3].content = "final"
    asset.history.turns.pop()
    await (await connect()).commit("a", set={"metadata.other": 5}, append=[turn("peer")])
    with mock.patch.object(Write, "commands", side_effect=UNKNOWN), pytest.raises(OutcomeUnknownError):
        await store.save(asset)
    asset.metadata["step"] = 3
    await store.save(asset)
    expected = ["turn 0", "edited twice", "turn 2", "final", "peer"]
    assert sorted(contents(asset)) == sorted(expected)
    assert asset.metadata == {"step": 3, "other": 5}
    assert await store.load("a") == asset


async def test_others_changes_after_an_unknown_outcome(connect: Connect) -> None:
    """They collide as ever; and a refresh settles what was stored."""
    store, peer = await connect(), await connect()
    asset = session(1, id="a", metadata={"step": 0, "title": ""})
    await store.save(asset)
    asset.metadata["step"] = 1
    with mock.patch.object(Write, "decode", side_effect=UNKNOWN), pytest.raises(OutcomeUnknownError):
        await store.save(asset)
    await peer.commit("a", set={"metadata.step": 7})
    asset.metadata["step"] = 2
    await refused(store.save(asset), "metadata.step")
    asset.metadata["step"] = 7
    assert await store.refresh(asset) == await store.save(asset)
    assert asset == await peer.load("a")

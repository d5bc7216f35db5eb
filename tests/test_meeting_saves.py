"""Saves and refreshes that meet others' writes: the order of turns, and what collides."""

from __future__ import annotations

from typing import Any

import pytest

from orcs_redis import ConflictError, ConversationTurn, SessionAsset, UnavailableError
from orcs_redis.protocol import saving


def ids(asset: SessionAsset) -> list[str]:
    return [turn.content for turn in asset.history.turns]


async def stored(store: Any, *contents: str) -> SessionAsset:
    """Store a session of these turns, and return it as loaded."""
    asset = SessionAsset.new()
    asset.history.turns = [ConversationTurn.user(content) for content in contents]
    await store.save(asset)
    loaded: SessionAsset = await store.load(asset.id)
    return loaded


async def test_turn_removed_and_another_added(store: Any) -> None:
    """Where a turn was removed and another added, that one comes after those that others have pushed."""
    asset = await stored(store, "a", "b", "c")
    del asset.history.turns[1]
    asset.add_turn(ConversationTurn.user("mine"))
    await store.append(asset.id, ConversationTurn.user("theirs"))
    await store.save(asset)
    assert ids(asset) == ids(await store.load(asset.id)) == ["a", "c", "theirs", "mine"]


async def test_refresh_with_a_removed_and_an_added_turn(store: Any) -> None:
    """Turns that come with a refresh stand before those that were added here, though others were removed here."""
    asset = await stored(store, "a", "b", "c")
    del asset.history.turns[1]
    asset.add_turn(ConversationTurn.user("mine"))
    await store.append(asset.id, ConversationTurn.user("d"))
    await store.refresh(asset)
    await store.append(asset.id, ConversationTurn.user("e"))
    await store.refresh(asset)
    assert ids(asset) == ["a", "c", "d", "e", "mine"]
    await store.save(asset)
    assert ids(await store.load(asset.id)) == ["a", "c", "d", "e", "mine"]


async def test_conflict_after_a_refresh_with_one(store: Any) -> None:
    """After a refresh that left a conflict, a save names that one alone, though others changed what was taken over."""
    asset = await stored(store, "a", "b", "c")
    theirs = await store.load(asset.id)
    asset.history.turns[0].content = "a of mine"
    asset.project_context.name = "of mine"
    for n in range(2):
        theirs.history.turns[0].content = f"a of theirs {n}"
        theirs.history.turns[1].content = f"b of theirs {n}"
        theirs.project_context.name = f"of theirs {n}"
        theirs.project_context.root_path = f"/{n}"
        await store.save(theirs)
        await store.refresh(asset)
        assert ids(asset) == ["a of mine", f"b of theirs {n}", "c"]
        assert (asset.project_context.name, asset.project_context.root_path) == ("of mine", f"/{n}")
    with pytest.raises(ConflictError) as refused:
        await store.save(asset)
    assert refused.value.parts == ("project_context.name", f"turn/{asset.history.turns[0].id}")


async def test_turn_popped_after_a_refresh_with_a_conflict(store: Any) -> None:
    """A turn that came with a refresh is not pushed again once another has popped it."""
    asset = await stored(store, "a")
    theirs = await store.load(asset.id)
    asset.history.turns[0].content = "a of mine"
    theirs.history.turns[0].content = "a of theirs"
    theirs.add_turn(ConversationTurn.user("b"))
    await store.save(theirs)
    await store.refresh(asset)
    assert ids(asset) == ["a of mine", "b"]
    await store.pop(asset.id)
    asset.history.turns[0] = theirs.history.turns[0]
    await store.save(asset)
    assert ids(asset) == ids(await store.load(asset.id)) == ["a of theirs"]


def fail(*_: object) -> None:
    raise UnavailableError("planted")


async def test_read_that_fails_after_the_write(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save that was applied says so, though what others had changed can't be read; that comes with the next one."""
    asset = await stored(store, "a")
    await store.append(asset.id, ConversationTurn.user("b"))
    asset.metadata["mine"] = 1
    with monkeypatch.context() as patch:
        patch.setattr(saving, "ReadStored", fail)
        revision = await store.save(asset)
    assert (await store.load_versioned(asset.id)).revision == revision
    assert await store.refresh(asset) == revision
    assert (asset.metadata, ids(asset)) == ({"mine": 1}, ["a", "b"])
    asset.metadata["mine"] = 2
    await store.save(asset)
    assert (await store.load(asset.id)).metadata == {"mine": 2}

"""Saves that meet others' writes: the order of turns."""

from __future__ import annotations

from typing import Any

from orcs_redis import ConversationTurn, SessionAsset


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

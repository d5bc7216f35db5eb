"""Assets with the last turns only, while others cut and mend the history."""

from __future__ import annotations

from typing import Any

import pytest

from orcs_redis import ConflictError, ConversationTurn, SessionAsset

from .conftest import Connect


def turn(id: str) -> ConversationTurn:
    return ConversationTurn(id=id, role="user", content=id)


@pytest.fixture
async def stores(connect: Connect) -> tuple[Any, Any]:
    """A store and a peer, with a session of ten turns, t0 to t9."""
    store = await connect()
    asset = SessionAsset(id="s")
    asset.history.turns = [turn(f"t{n}") for n in range(10)]
    await store.save(asset)
    return store, await connect()


def ids(asset: SessionAsset) -> list[str]:
    return [turn.id for turn in asset.history.turns]


async def test_pops_of_peers(stores: tuple[Any, Any]) -> None:
    """What others have popped is gone, what they have pushed is there, and the rest keeps its place."""
    store, peer = stores
    asset = await store.load("s", last=4)
    await peer.pop("s", 2)
    await peer.append("s", turn("new"))
    await store.refresh(asset)
    assert (asset.history.skipped, ids(asset)) == (6, ["t6", "t7", "new"])
    await peer.pop("s")
    asset.add_turn(turn("mine"))
    await store.save(asset)
    assert (asset.history.skipped, ids(asset)) == (6, ["t6", "t7", "mine"])
    assert ids(await peer.load("s")) == [*(f"t{n}" for n in range(8)), "mine"]


async def test_turns_that_were_removed_from_the_front(stores: tuple[Any, Any]) -> None:
    """An asset is where its turns are, though fewer are before them."""
    store, peer = stores
    asset = await store.load("s", last=4)
    other = await peer.load("s")
    del other.history.turns[1:4]
    await peer.save(other)
    await store.refresh(asset)
    assert (asset.history.skipped, ids(asset)) == (3, ["t6", "t7", "t8", "t9"])
    del other.history.turns[:2]
    other.history.turns.append(turn("last"))
    await peer.save(other)
    asset.project_context.name = "mine"
    asset.add_turn(turn("mine"))
    await store.save(asset)
    assert ids(await peer.load("s")) == ["t5", "t6", "t7", "t8", "t9", "last", "mine"]
    await store.refresh(asset)
    assert (asset.history.skipped, ids(asset)) == (1, ["t6", "t7", "t8", "t9", "last", "mine"])


async def test_cut_below(stores: tuple[Any, Any]) -> None:
    """A history that was cut below what was loaded, even if it grew again, is a conflict."""
    store, peer = stores
    asset = await store.load("s", last=4)
    await peer.truncate("s", 5)
    with pytest.raises(ConflictError):
        await store.refresh(asset)
    await peer.append("s", *(turn(f"other{n}") for n in range(5)))
    with pytest.raises(ConflictError):
        await store.refresh(asset)


async def test_no_turns_at_all(stores: tuple[Any, Any]) -> None:
    """An asset without turns follows the parts, and counts the turns before it."""
    store, peer = stores
    asset = await store.load("s", last=0)
    await peer.pop("s", 3)
    await peer.commit("s", set={"metadata.x": 1})
    await store.refresh(asset)
    assert (asset.history.skipped, ids(asset), asset.metadata) == (7, [], {"x": 1})
    await peer.pop("s", 1)
    asset.project_context.name = "mine"
    await store.save(asset)
    loaded = await peer.load("s")
    assert (ids(loaded), loaded.project_context.name) == ([f"t{n}" for n in range(6)], "mine")
    assert asset.history.skipped == 6

"""Saving what was loaded: changes are applied to what is stored by then, and nothing of others is lost."""

from __future__ import annotations

import asyncio
from typing import Any

from orcs_redis import SessionAsset
from orcs_redis.model.sections import now_ms

from .conftest import Connect
from .support import turn

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

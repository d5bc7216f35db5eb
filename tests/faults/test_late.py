"""A write whose first attempt is delayed: it is sent again, that one is refused, and then the first one arrives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from orcs_redis import ConversationTurn, NotFoundError, RedisSessionStore, SessionAsset, StorageError

from .ops import REFUSALS
from .proxy import Proxy, late
from .server import Server

Store = RedisSessionStore[SessionAsset]


# To be taken away when it is mended: a refusal that comes after a lost attempt is no proof that nothing was applied.
@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    server.start()
    yield server
    server.close()


@dataclass
class Place:
    """A store whose connection can be slowed, and one that is not."""

    server: Server
    proxy: Proxy
    far: Store
    near: Store


@pytest.fixture
async def place(server: Server) -> AsyncIterator[Place]:
    with Proxy(server.port) as proxy:
        far = await RedisSessionStore.connect(f"redis://127.0.0.1:{proxy.port}/0", deadline=1)
        near = await RedisSessionStore.connect(f"redis://127.0.0.1:{server.port}/0")
        async with far, near:
            yield Place(server, proxy, far, near)


async def outcome(place: Place, session: str, *, create: bool, refuse: Callable[[], object] | None = None) -> str:
    """Do a late write: return "ok" or its error's name. `refuse` makes the server refuse the second attempt."""
    place.proxy.strike(late(0.9))

    async def write() -> int:
        if create:
            return await place.far.save(asset_of_turn(session), if_revision=0)
        return await place.far.append(session, ConversationTurn.user("late"))

    task = asyncio.create_task(write())
    await asyncio.sleep(0.1)
    if refuse:
        refuse()
    try:
        await task
    except StorageError as error:
        return type(error).__name__
    return "ok"


def asset_of_turn(session: str) -> SessionAsset:
    asset = SessionAsset(id=session)
    asset.add_turn(ConversationTurn.user("late"))
    return asset


async def applied(place: Place, session: str) -> int:
    """Return how often the late write is there once it has arrived."""
    await asyncio.sleep(1.2)
    try:
        turns = await place.near.turns(session)
    except NotFoundError:
        return 0
    return sum(turn.content == "late" for turn in turns)


async def test_applied_once(place: Place) -> None:
    """An acknowledged write is applied once, though its first attempt arrives after the second."""
    await place.near.save(SessionAsset(id="s"))
    assert await outcome(place, "s", create=False) == "ok"
    assert await applied(place, "s") == 1


async def test_append_to_an_absent_session(place: Place) -> None:
    """An append that ends in NotFoundError is not applied later, when the session is there."""
    told = await outcome(place, "s", create=False)
    await place.near.save(SessionAsset(id="s"))
    assert told not in REFUSALS or not await applied(place, "s")


async def test_creation_of_an_existing_session(place: Place) -> None:
    """A creation that ends in ConflictError is not applied later, when the session is gone."""
    await place.near.save(SessionAsset(id="s"))
    told = await outcome(place, "s", create=True)
    await place.near.delete("s")
    assert told not in REFUSALS or not await applied(place, "s")


@pytest.mark.parametrize(("setting", "value"), [("min-replicas-to-write", "1"), ("maxmemory", "1")])
async def test_server_that_takes_no_writes(place: Place, setting: str, value: str) -> None:
    """An append that ends because the server takes no writes is not applied later, when it takes them again."""
    await place.near.save(SessionAsset(id="s"))
    await place.far.turns("s")
    told = await outcome(place, "s", create=False, refuse=lambda: place.server.admin.config_set(setting, value))
    place.server.admin.config_set(setting, "0")
    assert told not in REFUSALS or not await applied(place, "s")

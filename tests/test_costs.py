"""What each operation costs, in counts: round trips, commands on the server, bytes. No clock is looked at."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import pytest

from orcs_redis import ConversationTurn, RedisSessionStore, SessionAsset
from orcs_redis import sync as blocking

from .conftest import Server, Threaded

CONTENT = "x" * 300  # of a turn


def turn() -> ConversationTurn:
    return ConversationTurn(id="t" * 36, timestamp_ms=1_750_000_000_000, role="user", content=CONTENT)


class Cost(NamedTuple):
    """What one operation was seen to cost."""

    trips: int
    commands: dict[str, int]
    sent: int  # bytes from the store
    received: int


class Meter:
    """A store, and the counts of its server."""

    def __init__(self, server: Server, store: Any, link: Any) -> None:
        self.store = store
        self._raw: Any = server.raw()
        self._link = link

    def _counts(self) -> tuple[dict[str, int], int, int]:
        commands = {name[8:]: stat["calls"] for name, stat in self._raw.info("commandstats").items()}
        stats = self._raw.info("stats")
        return commands, stats["total_net_input_bytes"], stats["total_net_output_bytes"]

    async def cost(self, operation: Callable[[], Awaitable[object]] | None) -> Cost:
        trips, call = 0, self._link.call

        def counting(*arguments: Any) -> Any:
            nonlocal trips
            trips += 1
            return call(*arguments)

        before, sent, received = self._counts()
        self._link.call = counting
        try:
            if operation is not None:
                await operation()
        finally:
            self._link.call = call
        after, sent_after, received_after = self._counts()
        commands = {name: calls - before.get(name, 0) for name, calls in after.items()}
        del commands["info"]
        return Cost(trips, {n: c for n, c in commands.items() if c}, sent_after - sent, received_after - received)

    async def measure(self, operation: Callable[[], Awaitable[object]]) -> Cost:
        """What an operation costs, without what the asking does."""
        await self.cost(None)
        quiet, cost = await self.cost(None), await self.cost(operation)
        return cost._replace(sent=cost.sent - quiet.sent, received=cost.received - quiet.received)


@pytest.fixture(params=["async", "sync"])
async def meter(request: pytest.FixtureRequest, start_server: Callable[..., Server]) -> Any:
    """A store with a session of 10 turns and one of 1,000."""
    server = start_server()
    if request.param == "async":
        opened: Any = await RedisSessionStore.connect(server.url)
        store = opened
    else:
        opened = await asyncio.to_thread(blocking.RedisSessionStore.connect, server.url)
        store = Threaded(opened)
    for id, turns in (("short", 10), ("long", 1000)):
        asset = SessionAsset(id=id)
        for _ in range(turns):
            asset.add_turn(turn())
        await store.save(asset)
    await store.save_many([SessionAsset(id=f"other-{n}") for n in range(200)])
    await store.append("other-0", turn())  # what was under way together is forgotten
    yield Meter(server, store, opened._driver.link)
    await store.aclose()


APPEND = {
    "evalsha": 1, "hmget": 3, "time": 1, "zadd": 2, "hset": 3, "rpush": 1, "publish": 2,
}  # fmt: skip


@pytest.mark.parametrize("id", ["short", "long"])
async def test_append(meter: Meter, id: str) -> None:
    """One round trip, one call of the script with eleven commands in it, however long the history is."""
    cost = await meter.measure(lambda: meter.store.append(id, turn()))
    assert (cost.trips, cost.commands) == (1, APPEND)
    assert len(CONTENT) < cost.sent < len(CONTENT) + 460
    assert cost.received < 60


async def test_appends_together(meter: Meter) -> None:
    """What 33 tasks append goes out in one write and three calls, in which the index and the counter are written once.

    The first of the tasks is alone on the connection and waits for nobody.
    """
    if isinstance(meter.store, Threaded):
        return  # each thread waits for its own reply
    await meter.store.ping()
    cost = await meter.measure(lambda: asyncio.gather(*(meter.store.append(f"other-{n}", turn()) for n in range(33))))
    assert cost.commands == {
        "evalsha": 3, "hmget": 3 + 3 + 33, "time": 3, "zadd": 2 + 4 + 4, "hset": 6 + 33, "rpush": 33, "publish": 66,
        "hincrby": 2,
    }  # fmt: skip
    assert cost.sent < 33 * (len(CONTENT) + 205)


async def test_save_of_one_new_turn(meter: Meter) -> None:
    """A save of an asset that is known costs what its changes cost, whatever else it has."""
    costs = []
    for id in ("short", "long"):
        asset = await meter.store.load(id)
        asset.add_turn(turn())
        costs.append(await meter.measure(lambda asset=asset: meter.store.save(asset)))  # type: ignore[misc]
    for cost in costs:
        assert (cost.trips, cost.commands) == (1, APPEND)
        assert cost.sent < len(CONTENT) + 600
    assert abs(costs[0].sent - costs[1].sent) < 16


async def test_save_of_a_whole(meter: Meter) -> None:
    """Of many turns nothing passes through the script; of few, all."""
    asset = SessionAsset(id="new")
    asset.history.turns = [turn() for _ in range(1000)]
    cost = await meter.measure(lambda: meter.store.save(asset))
    assert cost.trips == 1
    assert cost.commands == {
        "multi": 1, "rpush": 2, "pexpire": 1, "exec": 1, "evalsha": 1, "hmget": 3, "exists": 1, "hget": 1, "zscore": 1,
        "llen": 2, "zcard": 2, "time": 1, "zadd": 2, "hset": 3, "rename": 1, "persist": 1, "zrem": 1, "hdel": 1,
        "publish": 2,
    }  # fmt: skip
    assert cost.sent < 1000 * (len(CONTENT) + 80)


async def test_load(meter: Meter) -> None:
    """Three plain commands in one round trip, and little more than the bodies."""
    cost = await meter.measure(lambda: meter.store.load("long"))
    assert (cost.trips, cost.commands) == (1, {"hgetall": 1, "lrange": 1, "hget": 1})
    assert cost.sent < 160
    assert cost.received < 1000 * (len(CONTENT) + 80)


async def test_other_reads(meter: Meter) -> None:
    """One round trip each, and no more commands or bytes than the answer needs."""
    tail = await meter.measure(lambda: meter.store.turns("long", -20))
    assert (tail.trips, tail.commands) == (1, {"lrange": 1, "hget": 1})
    assert tail.received < 21 * (len(CONTENT) + 80)
    assert (await meter.measure(lambda: meter.store.exists("long")))[:2] == (1, {"exists": 1})
    await meter.store.list(limit=50)  # the server has the script from now on
    newest = await meter.measure(lambda: meter.store.list(limit=50))
    assert (newest.trips, newest.commands) == (1, {"evalsha": 1, "zrange": 1, "hmget": 1, "zscore": 1})
    assert newest.received < 50 * 110
    everything = await meter.measure(lambda: meter.store.list())
    assert (everything.trips, everything.commands) == (1, {"hgetall": 1})


async def test_refresh_of_the_last_turns_after_a_pop(meter: Meter) -> None:
    """It reads what the asset has, and no turn before that."""
    await meter.store.append("long", *(ConversationTurn.user(CONTENT) for _ in range(20)))
    for last in (0, 10):
        asset = await meter.store.load("long", last=last)
        await meter.store.pop("long", 3)
        cost = await meter.measure(lambda asset=asset: meter.store.refresh(asset))  # type: ignore[misc]
        assert cost.received < (last + 5) * (len(CONTENT) + 80) + 1500
        assert len(asset.history) == max(last - 3, 0)


async def test_many(meter: Meter) -> None:
    """Two hundred sessions are saved, loaded, deleted in few round trips; the script is called for 16 saves at a time.

    Deletions are never joined: a key that vanishes is not used again in its call.
    """
    assets = await meter.store.load_many([f"other-{n}" for n in range(200)])
    for asset in assets:
        asset.metadata["changed"] = True
    saved = await meter.measure(lambda: meter.store.save_many(assets))
    # A burst begins with one alone, goes out in waves, and is cut once a second, when the server is asked for its role.
    assert saved.commands["evalsha"] <= 200 // 16 + 4
    deleted = await meter.measure(lambda: meter.store.delete_many([f"other-{n}" for n in range(200)]))
    assert deleted.commands["evalsha"] == 200
    if isinstance(meter.store, Threaded):
        assert (saved.trips, deleted.trips) == (1, 1)

"""Watches whose connection is harmed, in both forms, on a real server: each last state is told all the same."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import pytest

import orcs_redis.sync
from orcs_redis import Change, ConversationTurn, RedisSessionStore, SessionAsset
from orcs_redis.protocol.watching import Watcher

from ..conftest import Server, channel
from ..support import until
from .proxy import BLACKHOLE, HOLD, REFUSE, SWALLOW, Mode, Proxy

HEARTBEAT = 1.0
Store = RedisSessionStore[SessionAsset]


@dataclass
class Told:
    """What a watch has told, from whichever thread."""

    changes: list[Change] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def add(self, change: Change) -> None:
        self.changes.append(change)
        self.times.append(time.monotonic())

    async def until(self, revision: int, seconds: float = 20.0) -> float:
        """Wait until a revision was told; return when."""
        limit = time.monotonic() + seconds
        while not any(change.revision >= revision for change in self.changes):
            assert time.monotonic() < limit, f"not told of {revision}: {[c.revision for c in self.changes]}"
            await asyncio.sleep(0.005)
        revisions = [change.revision for change in self.changes]
        assert revisions == sorted(set(revisions)), "out of order, or twice"
        return next(at for at, change in zip(self.times, self.changes, strict=True) if change.revision >= revision)


@dataclass
class Place:
    """A server, a proxy before it, a store beside the proxy that writes, and what a watch through the proxy is told."""

    server: Server
    proxy: Proxy
    writer: Store
    told: Told
    ids: list[str] | None

    async def write(self, id: str = "s") -> int:
        return await self.writer.append(id, ConversationTurn.user("x"))

    @property
    def channels(self) -> list[str]:
        """What the watch listens to."""
        own = channel(self.server.raw(), "{orcs/0}:changes")
        return [own] if self.ids is None else [f"{own}:{id}" for id in self.ids]

    async def listening(self) -> None:
        """Wait until the watch has subscribed."""
        raw: Any = self.server.raw()
        channels = self.channels
        await until(lambda: all(count == 1 for _, count in raw.pubsub_numsub(*channels)))

    def strike_feed(self, mode: Mode) -> None:
        self.proxy.strike(mode, feeds=True)


@contextlib.asynccontextmanager
async def watch_async(url: str, told: Told, ids: list[str] | None) -> AsyncIterator[None]:
    async with await RedisSessionStore.connect(url, heartbeat=HEARTBEAT, deadline=2) as store:
        since = await store.cursor()

        async def watch() -> None:
            async for change in store.watch(since=since, ids=ids):
                told.add(change)

        task = asyncio.create_task(watch())
        try:
            yield
            assert not task.done()
        finally:
            task.cancel()
            await asyncio.wait([task])


@contextlib.asynccontextmanager
async def watch_blocking(url: str, told: Told, ids: list[str] | None) -> AsyncIterator[None]:
    connect = orcs_redis.sync.RedisSessionStore.connect
    store = await asyncio.to_thread(connect, url, heartbeat=HEARTBEAT, deadline=2)
    since = await asyncio.to_thread(store.cursor)

    def watch() -> None:
        for change in store.watch(since=since, ids=ids):
            told.add(change)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
        assert thread.is_alive()
    finally:
        await asyncio.to_thread(store.close)
        await asyncio.to_thread(thread.join, 10)
        assert not thread.is_alive()


@pytest.fixture
def server(start_server: Callable[..., Server]) -> Server:
    return start_server("--appendonly", "yes", "--appendfsync", "always")


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    with Proxy(server.port) as proxy:
        yield proxy


@pytest.fixture(params=["async", "sync", "async-some", "sync-some"])
async def place(request: pytest.FixtureRequest, server: Server, proxy: Proxy) -> AsyncIterator[Place]:
    told = Told()
    form, _, some = request.param.partition("-")
    ids = ["s", "t", "never"] if some else None
    watching = watch_async if form == "async" else watch_blocking
    async with await RedisSessionStore.connect(server.url) as writer:
        await writer.save(SessionAsset(id="s"))
        async with watching(f"redis://127.0.0.1:{proxy.port}/0", told, ids):
            place = Place(server, proxy, writer, told, ids)
            await place.listening()
            yield place


async def test_reconnect(place: Place) -> None:
    """What was written while there was no connection is told once there is one."""
    await place.told.until(await place.write())
    for _ in range(5):
        place.proxy.strike(REFUSE, new=True)
        for _ in range(3):
            last = await place.write()
        await asyncio.sleep(0.05)
        place.proxy.heal()
        healed = time.monotonic()
        assert await place.told.until(last) - healed < 1.5
        await place.listening()


async def test_pubsub_connection_reset(place: Place) -> None:
    """When the subscribing connection alone is reset, nothing is missed and it is opened again."""
    for _ in range(5):
        place.strike_feed(REFUSE)
        cut = time.monotonic()
        assert await place.told.until(await place.write()) - cut < 1
        await place.listening()


@pytest.mark.parametrize("mode", [BLACKHOLE, SWALLOW, HOLD], ids=lambda mode: str(mode.name))
async def test_half_open(place: Place, mode: Mode) -> None:
    """A subscribing connection over which nothing comes any more is noticed within the heartbeat."""
    await place.told.until(await place.write())
    place.strike_feed(mode)
    struck = time.monotonic()
    last = await place.write()
    noticed = await place.told.until(last) - struck
    assert noticed < HEARTBEAT + 0.5
    place.proxy.heal()  # what was held back comes now, to nobody
    await place.told.until(await place.write())
    assert len(place.told.changes) == len({change.revision for change in place.told.changes})


async def test_half_open_both(place: Place) -> None:
    """When all connections are half-open and new ones too, the last state is told soon after the end of it."""
    place.proxy.strike(BLACKHOLE, new=True)
    last = await place.write()
    await asyncio.sleep(2 * HEARTBEAT)
    assert place.told.changes == []
    place.proxy.heal()
    healed = time.monotonic()
    assert await place.told.until(last) - healed < HEARTBEAT + 1.5


async def test_server_restart(place: Place) -> None:
    """A server that is killed and started again with its AOF is watched on, deletions too."""
    await place.writer.save(SessionAsset(id="t"))
    await place.told.until(await place.write())
    for number in range(3):
        if number == 1:
            await place.writer.delete("t")
        place.server.kill()
        await asyncio.sleep(0.1)
        place.server.start()
        last = await place.write()
        await place.told.until(last)
        assert place.told.changes[-1].id == "s"
    deleted = [change for change in place.told.changes if change.id == "t"][-1]
    assert deleted.kind == "deleted"


async def test_client_kill(place: Place) -> None:
    """CLIENT KILL TYPE pubsub, again and again between writes, costs no session's last state."""
    raw: Any = place.server.raw()
    for _ in range(20):
        await place.write()
        raw.client_kill_filter(_type="pubsub")
        last = await place.write()
    await place.told.until(last)
    await place.listening()


async def test_output_buffer_overflow(place: Place) -> None:
    """A reader that stalls until the server throws it out catches up."""
    raw: Any = place.server.raw()
    raw.config_set("client-output-buffer-limit", "pubsub 1kb 1kb 1")
    place.strike_feed(HOLD)
    log = place.server.folder / "server.log"

    def thrown_out() -> bool:
        # The kernel's buffers take a lot before the server's own one grows.
        raw.publish(place.channels[0], b"x" * 100_000)
        return "output buffer limits" in log.read_text()

    await until(thrown_out)
    last = await place.write()
    place.proxy.heal()
    await place.told.until(last)
    await place.listening()
    await place.told.until(await place.write())


async def test_quiet_connection_stays(place: Place) -> None:
    """A connection over which nothing comes for several heartbeats is not given up, if the server answers."""
    raw: Any = place.server.raw()
    (before,) = raw.client_list(_type="pubsub")
    await asyncio.sleep(3 * HEARTBEAT)
    (after,) = raw.client_list(_type="pubsub")
    assert after["id"] == before["id"]
    assert place.told.changes == []


async def test_slow_server_keeps_order(place: Place) -> None:
    """News that come late, after what they tell was read elsewhere, are told no second time."""
    for _ in range(5):
        place.strike_feed(HOLD)
        await place.write()
        await asyncio.sleep(0.2)
        raw: Any = place.server.raw()
        raw.client_kill_filter(_type="pubsub")
        last = await place.write()
        place.proxy.heal()
        await place.told.until(last)
        await place.listening()
    assert len(place.told.changes) == len({change.revision for change in place.told.changes})


async def test_everything_is_freed(server: Server) -> None:
    """Leaving the loop, cancelling it and closing the store each leave no connection, task or subscription behind."""
    raw: Any = server.raw()
    async with await RedisSessionStore.connect(server.url) as store:
        since = await store.cursor()
        await store.save(SessionAsset(id="s"))
        tasks = asyncio.all_tasks()
        for _ in range(3):
            async with contextlib.aclosing(store.watch(since=since)) as changes:
                async for _ in changes:
                    break
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.05):
                    async for _ in store.watch():
                        pass
            await asyncio.sleep(0.05)
            assert asyncio.all_tasks() == tasks
            assert raw.client_list(_type="pubsub") == []
    await until(lambda: len(raw.client_list()) == 1)


async def test_confirmation_while_reading(server: Server) -> None:
    """A subscription that is confirmed while the index's answer is on its way calls for another look."""
    async with await RedisSessionStore.connect(server.url) as store:
        await store.save(SessionAsset(id="s"))
        wake = asyncio.Event()
        watcher = Watcher(store._core.changes, None, wake)
        await store._driver.execute(watcher.start(await store.cursor()))
        (listen,) = watcher.listeners().values()
        looking = watcher.wait()
        question: Any = next(looking)
        answer = await store._driver.send(question)
        revision = await store.append("s", ConversationTurn.user("x"))  # not heard: the subscription comes later
        listen(None)
        with contextlib.suppress(StopIteration):
            looking.send(answer)
        async with asyncio.timeout(2):
            while (change := watcher.pop()) is None:
                await store._driver.follow(watcher.wait())
        assert change.revision == revision


async def test_no_partition_starves(server: Server) -> None:
    """A slow consumer is told of a quiet partition's changes, though another one has always something pending."""
    busy, quiet = "s-0", "s-4"
    assert (crc32(busy.encode()) % 2, crc32(quiet.encode()) % 2) == (0, 1)
    async with await RedisSessionStore.connect(server.url, partitions=2) as store:
        await store.save_many([SessionAsset(id=busy), SessionAsset(id=quiet)])
        told: list[str] = []
        async with contextlib.aclosing(store.watch()) as changes:
            first = asyncio.ensure_future(anext(changes))
            await asyncio.sleep(0.2)
            await store.append(busy, ConversationTurn.user("x"))
            told.append((await first).id)
            await store.append(quiet, ConversationTurn.user("x"))
            while quiet not in told and len(told) < 20:
                await store.append(busy, ConversationTurn.user("x"))
                await asyncio.sleep(0.02)
                told.append((await anext(changes)).id)
        assert quiet in told

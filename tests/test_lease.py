"""Leases: one holder at a time, and no write by a former one."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from orcs_redis import (
    ConversationTurn,
    InvalidIdError,
    LeaseHeldError,
    LeaseLostError,
    OutcomeUnknownError,
    RedisSessionStore,
    SessionAsset,
)

from .conftest import Connect, Place, Server, channel, connected
from .faults.proxy import SWALLOW, Proxy
from .support import until


@contextlib.asynccontextmanager
async def leased(store: Any, id: str, **options: Any) -> AsyncIterator[Any]:
    """A lease in either form."""
    if hasattr(store, "_store"):  # a blocking one behind `Threaded`
        manager = store._store.lease(id, **options)
        lease = await asyncio.to_thread(manager.__enter__)
        try:
            yield lease
        finally:
            await asyncio.to_thread(manager.__exit__, None, None, None)
    else:
        async with store.lease(id, **options) as lease:
            yield lease


async def lost(lease: Any, seconds: float) -> bool:
    if isinstance(lease.lost, threading.Event):
        return await asyncio.to_thread(lease.lost.wait, seconds)
    done, _ = await asyncio.wait([lease.lost], timeout=seconds)
    return bool(done)


async def test_one_holder(connect: Connect) -> None:
    """While one holds it nobody else gets it, and the error says for how long."""
    one, other = await connect(), await connect()
    async with leased(one, "s", ttl=20) as lease:
        assert lease.id == "s"
        with pytest.raises(LeaseHeldError) as caught:
            async with leased(other, "s"):
                pass
        assert caught.value.remaining is not None
        assert 15 < caught.value.remaining <= 20
        async with leased(other, "another"):
            pass
    async with leased(other, "s") as later:
        assert later.token > lease.token


async def test_writes_under_a_lease(connect: Connect) -> None:
    """Every write takes a lease; once it has passed to another, none is applied."""
    one, other = await connect(), await connect()
    async with leased(one, "s") as lease:
        await one.save(SessionAsset(id="s"), lease=lease)
        await one.append("s", ConversationTurn.user("x"), lease=lease)
        await one.update("s", lambda asset: asset.metadata.update(a=1), lease=lease)
        await one.delete("s", lease=lease)
        asset = SessionAsset(id="s")
        await one.save(asset, lease=lease)
        asset.metadata["b"] = 1
    async with leased(other, "s") as successor:
        before = await other.load_versioned("s")
        for write in (
            one.save(asset, lease=lease),
            one.append("s", ConversationTurn.user("x"), lease=lease),
            one.update("s", lambda asset: asset.metadata.update(a=1), lease=lease),
            one.delete("s", lease=lease),
        ):
            with pytest.raises(LeaseLostError):
                await write
        assert await other.load_versioned("s") == before
        await other.append("s", ConversationTurn.user("y"), lease=successor)
    with pytest.raises(LeaseLostError):
        await other.append("s", ConversationTurn.user("z"), lease=successor)


async def test_a_lease_of_another_session(store: Any) -> None:
    """A lease is for its session only."""
    await store.save(SessionAsset(id="t"))
    async with leased(store, "s") as lease:
        with pytest.raises(ValueError, match="another session"):
            await store.append("t", ConversationTurn.user("x"), lease=lease)


async def test_waiting_is_woken_by_release(connect: Connect) -> None:
    """Who waits gets the lease as soon as it is given back, long before it would end."""
    one, other = await connect(), await connect()
    got = asyncio.Event()
    released = 0.0

    async def wait() -> float:
        async with leased(other, "s", wait=30):
            got.set()
            return time.monotonic()

    async with leased(one, "s", ttl=60):
        task = asyncio.create_task(wait())
        await asyncio.sleep(0.3)
        assert not got.is_set()
        released = time.monotonic()
    assert await task - released < 5


@pytest.mark.parametrize("way", ["async", "sync"])
async def test_channel_of_a_wait(start_server: Callable[..., Server], way: str) -> None:
    """Who waits for a lease hears of that one's release alone."""
    server = start_server()
    raw: Any = server.raw()
    one, other = await connected(way, server.url), await connected(way, server.url)

    async def wait() -> None:
        async with leased(other, "s", wait=30):
            pass

    def claims() -> int:
        return int(raw.info("commandstats")["cmdstat_evalsha"]["calls"])

    async with leased(one, "s", ttl=60), leased(one, "t", ttl=60):
        task = asyncio.create_task(wait())
        own = channel(raw, "{orcs/0}:leases") + ":s"
        await until(lambda: raw.pubsub_channels() == [own.encode()])
        await asyncio.sleep(0.2)
        before = claims()
        for n in range(3):
            async with leased(one, f"u{n}"):
                pass
        await asyncio.sleep(0.1)
        assert claims() - before == 6
        assert not task.done()
    await asyncio.wait_for(task, 5)
    await until(lambda: raw.pubsub_channels() == [])
    for store in (one, other):
        await store.aclose()


async def test_many_wait(connect: Connect) -> None:
    """Many who want it hold it one after the other, never two at a time."""
    stores = [await connect(), await connect()]
    holders = 0
    tokens = []

    async def work(store: Any) -> None:
        nonlocal holders
        async with leased(store, "s", wait=60) as lease:
            holders += 1
            assert holders == 1
            tokens.append(lease.token)
            await asyncio.sleep(0.01)
            holders -= 1

    await asyncio.gather(*(work(stores[n % 2]) for n in range(12)))
    assert tokens == sorted(set(tokens))


async def test_waiting_ends(connect: Connect) -> None:
    """Who has waited long enough is told that another holds it."""
    one, other = await connect(), await connect()
    async with leased(one, "s", ttl=60):
        start = time.monotonic()
        with pytest.raises(LeaseHeldError):
            async with leased(other, "s", wait=0.3):
                pass
        assert 0.25 < time.monotonic() - start < 5


async def test_it_is_renewed(connect: Connect) -> None:
    """A lease outlives its ttl while it is held."""
    one, other = await connect(), await connect()
    async with leased(one, "s", ttl=0.6) as lease:
        await asyncio.sleep(1.5)
        assert not await lost(lease, 0)
        with pytest.raises(LeaseHeldError):
            async with leased(other, "s"):
                pass


async def test_a_block_that_was_left_without_its_end(connect: Connect) -> None:
    """A lease is not renewed for ever when an exception, of a signal handler say, came before the end of its block."""
    one, other = await connect(), await connect()
    if hasattr(one, "_store"):
        manager = one._store.lease("s", ttl=0.6)
        lease = await asyncio.to_thread(manager.__enter__)
    else:
        manager = one.lease("s", ttl=0.6)
        lease = await manager.__aenter__()
    del manager
    gc.collect()
    assert await lost(lease, 5)
    async with leased(other, "s", wait=5):
        pass


@pytest.mark.parametrize("way", ["async", "sync"])
async def test_a_refused_renewal_is_tried_again(start_server: Callable[..., Server], way: str) -> None:
    """A server that is full for a moment ends no lease."""
    server = start_server()
    raw: Any = server.raw()
    store = await connected(way, server.url)
    async with leased(store, "s", ttl=1.5) as lease:
        raw.config_set("maxmemory", "1")
        assert not await lost(lease, 0.8)  # the first renewal was refused
        raw.config_set("maxmemory", "0")
        assert not await lost(lease, 1.2)
    await store.aclose()


@pytest.mark.parametrize("way", ["async", "sync"])
async def test_a_claim_that_is_refused_after_a_lost_answer(start_server: Callable[..., Server], way: str) -> None:
    """A claim whose answer was lost may have been applied, though the second attempt is refused for want of a right."""
    server = start_server()
    proxy = Proxy(server.port)
    raw: Any = server.raw()
    store = await connected(way, f"redis://127.0.0.1:{proxy.port}", deadline=2.5)

    async def take() -> None:
        async with leased(store, "s"):
            pass

    await take()  # the server knows the script from then on
    proxy.strike(SWALLOW)
    task = asyncio.create_task(take())
    await asyncio.sleep(0.3)
    raw.execute_command("ACL", "SETUSER", "default", "-pexpire")
    with pytest.raises(OutcomeUnknownError):
        await task
    assert len(await store.leases()) == 1
    await store.aclose()
    proxy.close()


async def test_a_lease_that_vanished_is_lost(place: Place, connect: Connect) -> None:
    """Whoever holds a lease that is gone on the server is told, and can't write."""
    store = await connect()
    await store.save(SessionAsset(id="s"))
    async with leased(store, "s", ttl=0.6) as lease:
        place.raw.delete(place.key("lease:s"))
        assert await lost(lease, 10)
        with pytest.raises(LeaseLostError):
            await store.append("s", ConversationTurn.user("x"), lease=lease)


async def test_leases_shows_holders(connect: Connect) -> None:
    """`leases` tells who holds what, since when and until when."""
    one, other = await connect(partitions=3), await connect()
    async with leased(one, "s", ttl=30) as s, leased(one, "t", ttl=60) as t:
        first, second = await other.leases()
        assert [(first.id, first.token), (second.id, second.token)] == [("s", s.token), ("t", t.token)]
        assert first.holder == second.holder
        assert 29 < (first.until - first.since).total_seconds() <= 31
        assert abs(first.since.timestamp() - time.time()) < 60
    assert await other.leases() == []


async def test_bad_arguments(store: Any) -> None:
    """Nonsense is refused before anything is sent."""
    for options in ({"ttl": 0}, {"ttl": float("nan")}, {"ttl": 1e9}, {"wait": -1}):
        with pytest.raises(ValueError, match=r"ttl|wait"):
            async with leased(store, "s", **options):
                pass
    with pytest.raises(InvalidIdError):
        async with leased(store, ""):
            pass


async def test_a_late_claim(start_server: Callable[..., Server]) -> None:
    """The first attempt at a claim that arrives when the lease was given back, or refused, gives it to nobody."""
    store = await RedisSessionStore.connect(start_server().url)
    await store.save(SessionAsset())
    leases, loop = store._core.leases, asyncio.get_running_loop()
    claim = leases.acquire("s", 30)
    commands = claim.commands()
    token = await store._driver.send(claim)
    await store._driver.send(leases.release("s", token))
    refused = leases.acquire("s", 30)
    late = refused.commands()
    async with leased(store, "s"):
        with pytest.raises(LeaseHeldError):
            await store._driver.send(refused)
    for again in (commands, late):
        (reply,) = await store._driver.link.call(again, loop.time() + 5)
        assert reply[0] == b"FORGOTTEN"
    assert await store.leases() == []
    async with leased(store, "s"):
        pass
    await store.aclose()


@pytest.mark.parametrize("way", ["async", "sync"])
async def test_its_time_begins_with_the_last_sending(start_server: Callable[..., Server], way: str) -> None:
    """A claim whose first reply was lost is held from its last attempt on, and lost no later than its ttl is over."""
    server = start_server()
    proxy = Proxy(server.port)
    raw: Any = server.raw()
    store = await connected(way, f"redis://127.0.0.1:{proxy.port}", deadline=2.5)
    proxy.strike(SWALLOW)  # what is open is given up after a second, longer than the ttl
    async with leased(store, "s", ttl=0.8) as lease:
        assert not await lost(lease, 0.1)
        raw.client_pause(1500)  # renewals come to nothing
        paused = time.monotonic()
        assert await lost(lease, 5)
        assert time.monotonic() < paused + 1.1
    await store.aclose()
    proxy.close()

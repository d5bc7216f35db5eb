"""Channels of single sessions: who watches few sessions hears of no others, and misses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable
from typing import Any
from zlib import crc32

import msgspec
import pytest

from orcs_redis import Change, NotFoundError, SessionAsset, StoreResetError
from orcs_redis.transport.pubsub import Subscription

from .conftest import Connect, Place, Server, channel, connected
from .support import until
from .test_watch import append, take, watched


async def within(seconds: float, store: Any, **options: Any) -> list[Change]:
    """What a watch tells in some seconds."""
    found: list[Change] = []
    async with contextlib.aclosing(watched(store, **options)) as changes:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                async for change in changes:
                    found.append(change)
    return found


def channels_of(raw: Any, match: str = "*") -> set[str]:
    return {name.decode() for name in raw.pubsub_channels(match)}


async def subscribed(raw: Any, *names: str) -> None:
    """Wait until these channels are listened to, and no others."""
    await until(lambda: channels_of(raw) == set(names))


def calls_of(raw: Any, command: str) -> int:
    return int(raw.info("commandstats").get(f"cmdstat_{command}", {"calls": 0})["calls"])


async def test_some_ids_over_partitions(connect: Connect) -> None:
    """A watch of sessions in several partitions is told of their saves, deletions and new beginnings, in order."""
    watcher, writer = await connect(partitions=4), await connect(partitions=4)
    ids = [f"s{n}" for n in range(12)]
    task = asyncio.create_task(take(watcher, 36, since=await watcher.cursor(), ids=ids))
    await asyncio.sleep(0.3)
    saved = {}
    for step in ("save", "delete", "save"):
        for id in ids:
            await writer.save(SessionAsset(id="other-" + id))
            if step == "save":
                saved[id] = await writer.save(SessionAsset(id=id))
            else:
                await writer.delete(id)
        await asyncio.sleep(0.3)  # else they may come as the last of them
    told = await task
    for id in ids:
        own = [change for change in told if change.id == id]
        assert [change.kind for change in own] == ["saved", "deleted", "saved"]
        assert [change.revision for change in own] == sorted({change.revision for change in own})
        assert own[-1].revision == saved[id]
        assert {change.origin for change in own} == {writer.origin}


async def test_some_ids_since(connect: Connect) -> None:
    """From a cursor on, a watch of some tells what they have become, and of what did not change nothing."""
    store = await connect(partitions=3)
    await store.save_many([SessionAsset(id=f"s{n}") for n in range(9)])
    start = await store.cursor()
    assert {change.id for change in await within(0.3, store, since=start, ids=["never"])} == set()
    for n in range(6):
        await append(store, f"s{n}")
    await store.delete("s5")
    ids = ["s4", "s5", "s7", "never"]
    told = await within(0.5, store, since=start, ids=ids)
    assert {(change.id, change.kind) for change in told} == {("s4", "saved"), ("s5", "deleted")}
    # What was told is not told again.
    assert await within(0.3, store, since=told[-1].cursor, ids=ids) == []


async def test_cursors_of_both_kinds(connect: Connect) -> None:
    """A watch of some goes on from a cursor of a watch of all, and the other way round; neither misses anything."""
    store = await connect(partitions=3)
    start = await store.cursor()
    ids = [f"s{n}" for n in range(9)]
    await store.save_many([SessionAsset(id=id) for id in ids])
    some = ids[::2]
    of_all = await take(store, 9, since=start)
    for n, change in enumerate(of_all):
        rest = {(later.id, later.revision) for later in of_all[n + 1 :] if later.id in some}
        told = await within(0.3, store, since=change.cursor, ids=some)
        assert {(later.id, later.revision) for later in told} == rest
    of_some = await take(store, 5, since=start, ids=some)
    for n, change in enumerate(of_some):
        told = await within(0.3, store, since=change.cursor)
        assert {later.id for later in told} >= {later.id for later in of_some[n + 1 :]}
        assert not {later.id for later in told} & {earlier.id for earlier in of_some[: n + 1]}


async def test_garbage_on_an_own_channel(place: Place, connect: Connect) -> None:
    """What is no message costs a look, and ends nothing."""
    store = await connect()
    await store.save(SessionAsset(id="s"))
    task = asyncio.create_task(take(store, 2, ids=["s"]))
    await asyncio.sleep(0.3)
    for garbage in (b"", b"\xc1", b"\x95\x01", b"hello", msgspec.msgpack.encode((1, 2, 3, b"\xff", 4))):
        place.raw.publish(place.channel("changes") + ":s", garbage)
    first = await append(store, "s")
    await asyncio.sleep(0.3)
    second = await append(store, "s")
    assert [change.revision for change in await task] == [first, second]


async def test_a_deletion_that_is_forgotten(place: Place, connect: Connect) -> None:
    """A watch of some is told to list again only where one of them may have been deleted since the cursor."""
    store = await connect()
    await store.save(SessionAsset(id="s"))
    start = await store.cursor()
    for _ in range(3):
        await store.save(SessionAsset(id="t"))
    place.raw.hset(place.key("state"), "compacted", 3)
    assert [change.id for change in await take(store, 1, since=start, ids=["s", "t"])] == ["t"]
    with pytest.raises(StoreResetError, match="list again"):
        await take(store, 1, since=start, ids=["s", "absent"])


async def test_many_deletions_of_others(place: Place, connect: Connect) -> None:
    """A watch that waits for a session to be made goes on, whatever number of others is deleted meanwhile."""
    store, writer = await connect(heartbeat=0.3), await connect()
    await writer.save(SessionAsset(id="t"))
    task = asyncio.create_task(take(store, 1, since=await store.cursor(), ids=["s"]))
    await asyncio.sleep(0.5)
    for _ in range(3):
        revision = await append(writer, "t")
        place.raw.hset(place.key("state"), "compacted", revision)  # as if tombstones up to there had been dropped
        await asyncio.sleep(0.4)
    await writer.save(SessionAsset(id="s"))
    assert [change.id for change in await task] == ["s"]


@pytest.mark.parametrize("ids", [None, ["s", "absent"]], ids=["all", "some"])
async def test_wiped_while_others_write(place: Place, connect: Connect, ids: list[str] | None) -> None:
    """A watch notices within its heartbeat that one partition was wiped, though another one has always news."""
    watcher, writer = await connect(heartbeat=0.5, partitions=2), await connect(partitions=2)
    busy, quiet = "s-0", "s-4"
    assert (crc32(busy.encode()) % 2, crc32(quiet.encode()) % 2) == (0, 1)
    await writer.save_many([SessionAsset(id=busy), SessionAsset(id=quiet)])
    task = asyncio.create_task(take(watcher, 10_000, since=await watcher.cursor(), ids=ids and [busy, quiet]))
    await asyncio.sleep(0.3)
    place.raw.delete(place.key("state", 1))
    while not task.done():
        await append(writer, busy)
        await asyncio.sleep(0.01)
    with pytest.raises(StoreResetError, match="wiped"):
        await task


@pytest.mark.parametrize("way", ["async", "sync"])
async def test_channels_of_some(start_server: Callable[..., Server], way: str) -> None:
    """Few sessions' watch listens to their channels alone, in one command, also after a reconnection; many's to all."""
    server = start_server()
    raw: Any = server.raw()
    store = await connected(way, server.url, partitions=3)
    await store.save(SessionAsset(id="first"))
    ids = [f"s{n}" for n in range(1000)]
    partition = store._core.changes.namespace.keyspace.of
    of = {id: f"{channel(raw, partition(id).changes)}:{id}" for id in ids}
    watch = watched(store, ids=ids)
    first = asyncio.ensure_future(anext(watch))
    await subscribed(raw, *of.values())
    assert calls_of(raw, "subscribe") == 1
    # Another watch of one of them asks the server for nothing.
    other = asyncio.create_task(take(store, 1, ids=["s5"]))
    await asyncio.sleep(0.3)
    assert calls_of(raw, "subscribe") == 1
    # The same again after a reconnection.
    raw.client_kill_filter(_type="pubsub")
    await subscribed(raw, *of.values())
    assert calls_of(raw, "subscribe") == 2
    await store.save(SessionAsset(id="s5"))
    assert (await first).id == "s5"
    assert [change.id for change in await other] == ["s5"]
    assert calls_of(raw, "unsubscribe") == 0
    # Beyond 1,000 it is the partitions' channels.
    await store.aclose()
    await subscribed(raw)
    store = await connected(way, server.url)
    many = asyncio.create_task(take(store, 1, ids=[*ids, "one more"]))
    await subscribed(raw, *(channel(raw, f"{{orcs/{n}}}:changes") for n in range(3)))
    await store.save(SessionAsset(id="not asked for"))
    await store.save(SessionAsset(id="one more"))
    assert [change.id for change in await many] == ["one more"]
    await store.aclose()


@pytest.mark.parametrize("way", ["async", "sync"])
async def test_leaving_a_channel(start_server: Callable[..., Server], way: str) -> None:
    """What nobody listens to any more is left, in one command; what others listen to stays."""
    server = start_server()
    raw: Any = server.raw()
    store, writer = await connected(way, server.url), await connected(way, server.url)
    await writer.save(SessionAsset(id="s"))
    stays = asyncio.create_task(take(store, 1, ids=["s", "t"]))
    prefix = channel(raw, "{orcs/0}:changes") + ":"
    await subscribed(raw, prefix + "s", prefix + "t")
    leaves = asyncio.create_task(take(store, 1, ids=["s", "t", *map(str, range(100))]))
    await until(lambda: len(channels_of(raw)) == 102)
    await writer.save(SessionAsset(id="7"))
    await leaves
    await subscribed(raw, prefix + "s", prefix + "t")
    assert calls_of(raw, "unsubscribe") == 1
    await append(writer, "s")
    assert [change.id for change in await stays] == ["s"]
    await subscribed(raw)
    for each in (store, writer):
        await each.aclose()


@pytest.mark.parametrize("way", ["async", "sync"])
async def test_no_news_of_others(start_server: Callable[..., Server], way: str) -> None:
    """A watch of a session receives nothing of others, and neither reads what they did."""
    server = start_server()
    raw: Any = server.raw()
    store, writer = await connected(way, server.url, heartbeat=60), await connected(way, server.url)
    await writer.save(SessionAsset(id="s"))
    task = asyncio.create_task(take(store, 1, ids=["s"]))
    await subscribed(raw, channel(raw, "{orcs/0}:changes") + ":s")
    await asyncio.sleep(0.2)
    (feed,) = raw.client_list(_type="pubsub")
    calls = calls_of(raw, "evalsha") + calls_of(raw, "eval")
    for n in range(50):
        await writer.save(SessionAsset(id=f"other{n}"))
    (after,) = raw.client_list(_type="pubsub")
    if "tot-net-out" in feed:  # Redis 8, Valkey 8.1
        assert after["tot-net-out"] == feed["tot-net-out"]
    assert calls_of(raw, "evalsha") + calls_of(raw, "eval") - calls == 50
    revision = await append(writer, "s")
    assert [change.revision for change in await task] == [revision]
    for each in (store, writer):
        await each.aclose()


@pytest.mark.parametrize("way", ["async", "sync"])
@pytest.mark.parametrize("some", [False, True], ids=["all", "some"])
async def test_a_writer_that_may_not_publish(start_server: Callable[..., Server], way: str, some: bool) -> None:
    """What somebody wrote who may not publish is told within a heartbeat, in order, though others' messages come."""
    server = start_server()
    raw: Any = server.raw()
    raw.execute_command("ACL", "SETUSER", "mute", "on", "nopass", "~*", "allchannels", "+@all")
    watcher = await connected(way, server.url, partitions=2, heartbeat=0.5)
    heard = await connected(way, server.url, partitions=2)
    mute = await connected(way, f"redis://mute:x@127.0.0.1:{server.port}")
    busy, quiet, beside = "s-0", "s-4", "s-2"
    assert [crc32(id.encode()) % 2 for id in (busy, quiet, beside)] == [0, 1, 0]
    await heard.save_many([SessionAsset(id=id) for id in (busy, quiet, beside)])
    raw.execute_command("ACL", "SETUSER", "mute", "resetchannels")
    told: list[Change] = []

    async def watch() -> None:
        async for change in watched(watcher, since=start, ids=[busy, quiet, beside] if some else None):
            told.append(change)
            if {busy, quiet, beside} <= {change.id for change in told}:
                return

    start = await watcher.cursor()
    task = asyncio.create_task(watch())
    await asyncio.sleep(0.3)
    await append(mute, quiet)
    await append(mute, beside)
    began = time.monotonic()
    while not task.done():
        await append(heard, busy)
        await asyncio.sleep(0.01)
    await task
    assert time.monotonic() < began + 3
    revisions = [change.revision for change in told if change.id != quiet]
    assert revisions == sorted(set(revisions))
    for each in (watcher, heard, mute):
        await each.aclose()


@pytest.mark.parametrize("seed", range(3))
async def test_latest_states_over_kills(connect: Connect, place: Place, seed: int) -> None:
    """Whatever is written, and however often the connection breaks, each session's last state comes, none twice."""
    rng = random.Random(seed)
    watcher, writer = await connect(partitions=3, heartbeat=1.0), await connect(partitions=3)
    ids = [f"s{n}" for n in range(8)]
    some = rng.sample(ids, 5)
    told: list[Change] = []

    async def watch() -> None:
        async for change in watched(watcher, since=start, ids=some):
            told.append(change)

    start = await watcher.cursor()
    task = asyncio.create_task(watch())
    last: dict[str, tuple[str, int]] = {}
    for _ in range(120):
        id = rng.choice(ids)
        if id in last and last[id][0] == "saved" and rng.random() < 0.3:
            await writer.delete(id)
            last[id] = "deleted", last[id][1]
        else:
            last[id] = "saved", await writer.save(SessionAsset(id=id))
        if place.row.server != "memory" and rng.random() < 0.05:
            place.raw.client_kill_filter(_type="pubsub")
    wanted = {id: state for id, state in last.items() if id in some}

    def latest() -> bool:
        now = {change.id: change for change in told}
        return now.keys() == wanted.keys() and all(
            now[id].kind == kind and (kind == "deleted" or now[id].revision == revision)
            for id, (kind, revision) in wanted.items()
        )

    await until(latest)
    assert {change.id for change in told} <= set(some)
    for id in some:
        revisions = [change.revision for change in told if change.id == id]
        assert revisions == sorted(set(revisions))
    assert not task.done()
    task.cancel()
    await asyncio.wait([task])


@pytest.mark.parametrize("way", ["async", "sync"])
async def test_channel_of_wait_for(start_server: Callable[..., Server], way: str) -> None:
    """Who waits for a session listens to its channel; a session that is deleted is not waited for in vain."""
    server = start_server()
    raw: Any = server.raw()
    store = await connected(way, server.url, heartbeat=60)
    revision = await store.save(SessionAsset(id="s"))
    task = asyncio.create_task(store.wait_for("s", revision=revision + 2, timeout=20))
    await subscribed(raw, channel(raw, "{orcs/0}:changes") + ":s")
    await store.save(SessionAsset(id="t"))
    await store.delete("s")
    with pytest.raises(NotFoundError):
        await asyncio.wait_for(task, 5)
    await subscribed(raw)
    await store.aclose()


async def test_a_listener_that_comes_later() -> None:
    """Who joins a channel that may be confirmed already is told to look: what came before it joined is lost."""
    subscription = Subscription(never_connected, heartbeat=5.0)
    first: list[bytes | None] = []
    second: list[bytes | None] = []
    subscription.listen({"a": first.append})
    subscription.listen({"a": second.append, "b": second.append})
    assert (first, second) == ([], [None])
    await subscription.close()


async def never_connected(*_: object) -> Any:
    await asyncio.Event().wait()

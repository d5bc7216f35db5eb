"""Watching: every change in order, no gap, resumable."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncGenerator, Callable
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from orcs_redis import Change, ConversationTurn, InvalidIdError, NotFoundError, SessionAsset, StoreResetError
from orcs_redis.protocol.changes import Changes
from orcs_redis.protocol.writer import Namespace

from .conftest import ROWS, Connect, Place, Server, connected


async def watched(store: Any, **options: Any) -> AsyncGenerator[Change, None]:
    """A watch of either form."""
    if not hasattr(store, "_store"):
        async for change in store.watch(**options):
            yield change
        return
    iterator = store._store.watch(**options)
    end = object()
    pending: Any = None
    try:
        while True:
            pending = asyncio.ensure_future(asyncio.to_thread(next, iterator, end))
            result: Any = await asyncio.shield(pending)
            if result is end:
                return
            yield result
    finally:
        if pending is not None and not pending.done():
            # A thread waits in the iterator: the store's closing ends it.
            pending.add_done_callback(lambda task: task.cancelled() or task.exception())
        else:
            iterator.close()


async def take(store: Any, count: int, **options: Any) -> list[Change]:
    """The first `count` changes of a watch."""
    found: list[Change] = []
    async with contextlib.aclosing(watched(store, **options)) as changes:
        async with asyncio.timeout(20):
            async for change in changes:
                found.append(change)
                if len(found) == count:
                    break
    return found


def append(store: Any, id: str) -> Any:
    return store.append(id, ConversationTurn.user("x"))


async def test_changes_of_peers(connect: Connect) -> None:
    """A watcher is told of every save, append and deletion, in order, with what it needs to know."""
    watcher, writer = await connect(), await connect()
    task = asyncio.create_task(take(watcher, 3, since=await watcher.cursor()))
    before = datetime.now(UTC).timestamp() - 2
    saved = await writer.save(SessionAsset(id="s", updated_at_ms=5000))
    await asyncio.sleep(0.3)  # else the first changes of a session may come as one
    appended = await append(writer, "s")
    await asyncio.sleep(0.3)
    await writer.delete("s")
    first, second, third = await task
    assert (first.kind, first.id, first.revision) == ("saved", "s", saved)
    assert first.updated_at.timestamp() == 5
    assert (second.kind, second.revision) == ("saved", appended)
    assert (third.kind, third.id, third.revision) == ("deleted", "s", appended + 1)
    assert before < second.updated_at.timestamp() <= third.updated_at.timestamp() < before + 60
    assert {change.origin for change in (first, second, third)} == {writer.origin}
    assert writer.origin != watcher.origin


async def test_resumed_watch(connect: Connect) -> None:
    """A watch resumed from a cursor, in another store, tells each session's latest state once."""
    writer, other = await connect(partitions=3), await connect()
    await writer.save_many([SessionAsset(id=f"s{n}") for n in range(10)])
    start = await writer.cursor()
    for n in range(5):
        await append(writer, f"s{n}")
        await append(writer, f"s{n}")
    await writer.delete("s3")
    changes = await take(other, 5, since=start)
    assert {(change.id, change.kind) for change in changes} == {
        ("s0", "saved"), ("s1", "saved"), ("s2", "saved"), ("s3", "deleted"), ("s4", "saved"),
    }  # fmt: skip
    for change in changes:
        if change.kind == "saved":
            assert change.revision == (await other.load_versioned(change.id)).revision
    # From each cursor on, the rest follows.
    for n, change in enumerate(changes[:-1]):
        rest = await take(other, 4 - n, since=change.cursor)
        assert {(c.id, c.revision) for c in rest} == {(c.id, c.revision) for c in changes[n + 1 :]}


async def test_only_some_ids(connect: Connect) -> None:
    """A watch of some sessions is told of no others."""
    store = await connect(partitions=2)
    start = await store.cursor()
    await store.save_many([SessionAsset(id=f"s{n}") for n in range(20)])
    await append(store, "s7")
    changes = await take(store, 2, since=start, ids=["s7", "s11"])
    assert {change.id for change in changes} == {"s7", "s11"}
    with pytest.raises(ValueError, match="ids"):
        await take(store, 1, ids="s7")
    with pytest.raises(InvalidIdError):
        await take(store, 1, ids=[""])


async def test_many_watches(connect: Connect) -> None:
    """Many watches of one store are each told of everything."""
    store, writer = await connect(), await connect()
    start = await store.cursor()
    tasks = [asyncio.create_task(take(store, 10, since=start)) for _ in range(4)]
    await asyncio.sleep(0.3)
    for n in range(10):
        await writer.save(SessionAsset(id=f"s{n}"))
    for task in tasks:
        assert [change.id for change in await task] == [f"s{n}" for n in range(10)]


async def test_messages_lost(place: Place, connect: Connect) -> None:
    """What pub/sub has lost is found by the gap in the revisions."""
    watcher, writer = await connect(), await connect()
    task = asyncio.create_task(take(watcher, 3, since=await watcher.cursor()))
    await asyncio.sleep(0.3)
    await writer.save(SessionAsset(id="a"))
    # A write whose message nobody gets: what a dropped connection or a full buffer comes to.
    raw: Any = place.raw
    revision = int(raw.hget(place.key("state"), "revision"))
    await writer.save(SessionAsset(id="b"))
    await writer.save(SessionAsset(id="c"))
    changes = await task
    assert [change.id for change in changes] == ["a", "b", "c"]
    assert changes[-1].revision == revision + 2
    # Garbage on the channel costs a look at the index, no more.
    task = asyncio.create_task(take(watcher, 1, since=changes[-1].cursor))
    await asyncio.sleep(0.3)
    for garbage in (b"", b"\xc1", b"\x95\x01", b"hello"):
        raw.publish(place.channel("changes"), garbage)
    await writer.save(SessionAsset(id="d"))
    assert [change.id for change in await task] == ["d"]


async def test_slow_consumer(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow consumer's changes merge into each session's latest, and beyond a bound they are read again."""
    monkeypatch.setattr("orcs_redis.protocol.watching._MAX_PENDING", 5)
    monkeypatch.setattr("orcs_redis.protocol.watching._MAX_READ", 3)
    store, writer = await connect(), await connect()
    seen: list[Change] = []
    started, finish = asyncio.Event(), asyncio.Event()

    async def consume() -> None:
        async with contextlib.aclosing(watched(store, since=start)) as changes:
            async for change in changes:
                seen.append(change)
                started.set()
                await finish.wait()
                if change.id == "end":
                    break

    start = await store.cursor()
    task = asyncio.create_task(consume())
    await writer.save(SessionAsset(id="begin"))
    await asyncio.wait_for(started.wait(), 20)
    for _ in range(5):
        for n in range(20):
            await writer.save(SessionAsset(id=f"s{n}"))
    await writer.save(SessionAsset(id="end"))
    await asyncio.sleep(0.3)
    finish.set()
    await asyncio.wait_for(task, 20)
    revisions = [change.revision for change in seen]
    assert revisions == sorted(set(revisions))
    latest = {change.id: change.revision for change in seen}
    assert {f"s{n}" for n in range(20)} < set(latest)
    for id, revision in latest.items():
        assert revision == (await store.load_versioned(id)).revision


async def test_cursors(connect: Connect) -> None:
    """What is no cursor is refused, and one of another namespace says so."""
    store, other = await connect(), await connect(namespace="another-" + str(time.monotonic_ns()))
    for bad in ("", "x", "AAAA"):
        with pytest.raises(ValueError, match="cursor"):
            await take(store, 1, since=bad)
    await other.save(SessionAsset(id="s"))
    with pytest.raises(StoreResetError):
        await take(store, 1, since=await other.cursor())


async def test_a_cursor_that_is_too_old(place: Place, connect: Connect) -> None:
    """Where deletions since a cursor were forgotten, the watch says so."""
    store = await connect()
    await store.save(SessionAsset(id="s"))
    start = await store.cursor()
    for _ in range(3):
        await store.save(SessionAsset(id="t"))
    place.raw.hset(place.key("state"), "compacted", 3)  # as the writing script does beyond 10,000 tombstones
    with pytest.raises(StoreResetError, match="list again"):
        await take(store, 1, since=start)
    with pytest.raises(StoreResetError):
        await store.changes(start)
    assert len(await store.changes()) == 2


@pytest.mark.parametrize("place", [ROWS[2], ROWS[5]], ids=str, indirect=True)  # 20,000 writes: one of each server
async def test_tombstones_are_bounded(place: Place, connect: Connect) -> None:
    """Beyond 10,000 deletions the oldest are forgotten, one by one, and the partition knows up to where."""
    store = await connect()
    ids = [f"s{n}" for n in range(10_003)]
    for at in range(0, len(ids), 1000):
        await store.save_many([SessionAsset(id=id) for id in ids[at : at + 1000]])
        await store.delete_many(ids[at : at + 1000])
    raw: Any = place.raw
    assert raw.zcard(place.key("deleted")) == raw.hlen(place.key("deleted:meta")) == 10_000
    assert raw.zcard(place.key("changes")) == 10_000
    oldest = raw.zrange(place.key("deleted"), 0, 0, withscores=True)[0][1]
    assert 0 < int(raw.hget(place.key("state"), "compacted")) < oldest


async def test_wiped(place: Place, connect: Connect) -> None:
    """A watch whose namespace is wiped ends with an error, it does not wait for ever."""
    store = await connect(heartbeat=0.5)
    await store.save(SessionAsset(id="s"))
    task = asyncio.create_task(take(store, 1))
    await asyncio.sleep(0.3)
    raw: Any = place.raw
    raw.delete(*raw.scan_iter(match=f"*{place.namespace}*"))
    other = await connect()
    for _ in range(3):
        await other.save(SessionAsset(id="s"))
    with pytest.raises(StoreResetError):
        await task


async def test_closing_ends_a_watch(connect: Connect) -> None:
    """When the store is closed, its watches end."""
    store = await connect()
    task = asyncio.create_task(take(store, 1))
    await asyncio.sleep(0.3)
    await store.aclose()
    assert await asyncio.wait_for(task, 10) == []


async def test_changes(connect: Connect) -> None:
    """`changes` is the same for pollers, in parts, and without a cursor tells every session there is."""
    store = await connect(partitions=3)
    start = await store.cursor()
    assert await store.changes(start) == []
    await store.save_many([SessionAsset(id=f"s{n}") for n in range(10)])
    await store.delete("s4")
    seen: list[Change] = []
    cursor = start
    while batch := await store.changes(cursor, 3):
        assert len(batch) <= 3
        seen += batch
        cursor = batch[-1].cursor
    assert {change.id: change.kind for change in seen} == {f"s{n}": "deleted" if n == 4 else "saved" for n in range(10)}
    assert len(seen) == 10
    assert len(await store.changes()) == 10
    with pytest.raises(ValueError, match="limit"):
        await store.changes(start, 0)


async def test_wait_for(connect: Connect) -> None:
    """It returns once the session has reached the revision, at once if it has."""
    store, writer = await connect(), await connect()
    revision = await writer.save(SessionAsset(id="s"))
    assert await store.wait_for("s", revision=revision, timeout=0) == revision
    assert await store.wait_for("s", revision=1, timeout=5) == revision
    task = asyncio.create_task(store.wait_for("s", revision=revision + 2, timeout=20))
    await asyncio.sleep(0.2)
    await append(writer, "s")
    await asyncio.sleep(0.2)
    assert not task.done()
    assert await append(writer, "s") == await task
    with pytest.raises(TimeoutError):
        await store.wait_for("s", revision=revision + 99, timeout=0.1)
    with pytest.raises(NotFoundError):
        await store.wait_for("nope", revision=1, timeout=5)


async def test_data_that_went_back(place: Place, connect: Connect) -> None:
    """A watch that finds fewer revisions than it was sent says so, once, whatever it has delivered."""
    watcher, writer = await connect(), await connect()
    task = asyncio.create_task(take(watcher, 100, since=await watcher.cursor()))
    raw: Any = place.raw
    for n in range(5):
        await writer.save(SessionAsset(id=f"s{n}"))
    await asyncio.sleep(0.3)
    before = {key: raw.dump(key) for key in raw.keys(f"*{place.namespace}*")} if place.row.server != "memory" else {}
    for n in range(5):
        await writer.save(SessionAsset(id=f"t{n}"))
    if before:  # a restore of what there was before
        raw.delete(*raw.keys(f"*{place.namespace}*"))
        for key, value in before.items():
            raw.restore(key, 0, value)
    else:
        raw.hset(place.key("state"), "revision", 5)
    await (await connect()).save(SessionAsset(id="new"))
    with pytest.raises(StoreResetError, match="went back"):
        await asyncio.wait_for(task, 20)


async def test_behind_when_data_went_back(place: Place, connect: Connect) -> None:
    """A watch that is behind what it was sent, when the data goes back, ends; it does not ask without end."""
    watcher, writer = await connect(), await connect()
    tracked = watched(watcher, since=await watcher.cursor())
    await writer.save(SessionAsset(id="s"))
    assert (await anext(tracked)).id == "s"
    raw: Any = place.raw
    incarnation: Any = raw.hget(place.key("state"), "incarnation")
    message = msgspec.msgpack.encode((9, 1000, 0, bytes(8), "x"))  # of a write that was lost since
    pending = asyncio.ensure_future(anext(tracked))
    await asyncio.sleep(0.3)
    raw.publish(f"{place.key('changes')}:{incarnation.decode()}", message)
    with pytest.raises(StoreResetError, match="went back"):
        await asyncio.wait_for(pending, 20)


async def test_wiped_while_nobody_writes(place: Place, connect: Connect) -> None:
    """A watch notices within its heartbeat that the namespace was wiped, though nobody writes."""
    watcher = await connect(heartbeat=0.4)
    await watcher.save(SessionAsset(id="s"))
    task = asyncio.create_task(take(watcher, 1, since=await watcher.cursor()))
    await asyncio.sleep(0.2)
    place.raw.delete(*place.raw.keys(f"*{place.namespace}*"))
    with pytest.raises(StoreResetError, match="wiped"):
        await asyncio.wait_for(task, 10)


@pytest.mark.parametrize("way", ["async", "sync"])
async def test_databases_of_one_server(start_server: Callable[..., Server], way: str) -> None:
    """The same namespace in two databases: a watch gets the changes of its own, though pub/sub knows no databases."""
    server = start_server()
    stores = [await connected(way, f"redis://127.0.0.1:{server.port}/{number}") for number in (0, 1)]
    task = asyncio.create_task(take(stores[0], 2, since=await stores[0].cursor()))
    await asyncio.sleep(0.3)
    raw: Any = server.raw()
    calls = raw.info("commandstats")["cmdstat_evalsha"]["calls"]
    for n in range(20):
        await stores[1].save(SessionAsset(id=f"other{n}"))
    await stores[0].save(SessionAsset(id="mine"))
    await stores[0].save(SessionAsset(id="last"))
    assert [change.id for change in await task] == ["mine", "last"]
    assert raw.info("commandstats")["cmdstat_evalsha"]["calls"] - calls < 40
    for store in stores:
        await store.aclose()


@pytest.mark.parametrize("partitions", [1, 7, 1024])
def test_size_of_a_cursor(partitions: int) -> None:
    """A cursor comes back as it was, and takes two bytes for each partition at most where they are alike."""
    namespace = Namespace("orcs", partitions, b"0123456789abcdef")
    changes = Changes(namespace, 5.0)
    rng = random.Random(partitions)
    for least, spread in ((0, 0), (10, 200), (10**6, 60_000), (3, 10**6), (0, 2**53 - 1), (2**53 - 1, 0)):
        positions = [least + rng.randint(0, spread) for _ in range(partitions)]
        cursor = changes.encode(positions)
        assert changes.decode(cursor) == positions
        if spread < 2**16:
            assert len(cursor) < 60 + partitions * 2 * 4 / 3

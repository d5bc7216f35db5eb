"""Exactly once: what was acknowledged is there once, what failed at most once, whatever struck between.

`tests/test_connection.py` has the errors of a store that is alone with a bad server; here are the writes that are sent
again, those that come late, and what others do meanwhile.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import itertools
import math
import os
import random
import re
import shutil
import signal
import sys
import textwrap
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import pytest
import redis

import orcs_redis
import orcs_redis.sync
from orcs_redis import (
    ConflictError,
    ConversationTurn,
    CorruptSessionError,
    LeaseHeldError,
    LeaseLostError,
    OutcomeUnknownError,
    PermissionDeniedError,
    RedisSessionStore,
    SessionAsset,
    StorageError,
    StoreResetError,
    UnavailableError,
    scripts,
)
from orcs_redis.protocol.attempts import ConnectionLost, OperationEvicted, Retry, TornRead
from orcs_redis.protocol.commands import ScriptCall, merge
from orcs_redis.protocol.writer import Namespace, OperationToken
from orcs_redis.protocol.writes import Write

from .conftest import Place, Server, Threaded
from .faults.proxy import BLACKHOLE, SWALLOW, Proxy, mid_command, mid_reply
from .support import turn, until
from .test_lease import leased, lost

Store: TypeAlias = RedisSessionStore[SessionAsset]
StartServer: TypeAlias = Callable[..., Server]
Open: TypeAlias = Callable[..., Awaitable[Any]]

DURABLE = ("--appendonly", "yes", "--appendfsync", "always")
MAX_WINDOWS, MAX_TOMBSTONES = map(
    int, re.findall(r"^ *local (?:MAX_WINDOWS|MAX_TOMBSTONES) = (\d+)", scripts.WRITE.source.decode(), re.MULTILINE)
)

forms = pytest.mark.parametrize("way", ["async", "sync"])


def session(*contents: str, **fields: Any) -> SessionAsset:
    asset = SessionAsset(**fields)
    for content in contents:
        asset.add_turn(ConversationTurn.user(content))
    return asset


async def contents(store: Any, id: str) -> list[str]:
    return [turn.content for turn in await store.turns(id)]


def runs(raw: Any) -> int:
    """How often scripts were run by their digest."""
    return int(raw.info("commandstats").get("cmdstat_evalsha", {"calls": 0})["calls"])


def counter(raw: Any) -> int:
    """How many writes the partition has had."""
    return int(raw.hget("{orcs/0}:state", "revision"))


def reached(raw: Any, revision: int) -> Callable[[], bool]:
    """Whether the partition has had so many writes."""
    return lambda: counter(raw) == revision


def key(rest: str) -> str:
    return "{orcs/0}:" + rest


@pytest.fixture
def server(start_server: StartServer) -> Server:
    return start_server()


@pytest.fixture
def proxies() -> Iterator[Callable[[Server], Proxy]]:
    """Put a proxy before a server."""
    made: list[Proxy] = []

    def make(server: Server) -> Proxy:
        made.append(Proxy(server.port))
        return made[-1]

    yield make
    for proxy in made:
        proxy.close()


@pytest.fixture
async def open_store() -> AsyncIterator[Open]:
    """Open stores in either form, and close them with the test."""
    opened: list[Any] = []

    async def open_one(way: str, where: Server | Proxy, **options: Any) -> Any:
        url = f"redis://127.0.0.1:{where.port}/0"
        if way == "async":
            store: Any = await RedisSessionStore.connect(url, **options)
        else:
            connect: Any = orcs_redis.sync.RedisSessionStore.connect
            store = Threaded(await asyncio.to_thread(connect, url, **options))
        opened.append(store)
        return store

    yield open_one
    for store in opened:
        await store.aclose()


# Retries


@forms
async def test_lost_replies(server: Server, proxies: Any, open_store: Open, way: str) -> None:
    """Every kind of write whose reply is lost is sent again, recognised, and answered as the first time."""
    proxy, raw = proxies(server), server.raw()
    near, far = await open_store("async", server), await open_store(way, proxy, deadline=20.0)
    await near.save_many([session("first", id=id) for id in ("append", "over", "delete")])
    await far.turns("append")
    writes: dict[str, Callable[[], Awaitable[int | None]]] = {
        "append": lambda: far.append("append", turn("second")),
        "over": lambda: far.save(session("other", id="over")),
        "new": lambda: far.save(session(*map(str, range(50)), id="new"), if_revision=0),
        "delete": lambda: far.delete("delete"),
    }
    for revision, (id, write) in enumerate(writes.items(), 4):
        sent = runs(raw)
        proxy.strike(SWALLOW)
        writing = asyncio.ensure_future(write())
        await until(reached(raw, revision))
        proxy.cut()
        assert await writing == (None if id == "delete" else revision)
        assert runs(raw) == sent + 2
        assert counter(raw) == revision
    assert await contents(near, "append") == ["first", "second"]
    assert await contents(near, "over") == ["other"]
    assert await contents(near, "new") == list(map(str, range(50)))
    assert not await near.exists("delete")


@forms
async def test_lost_reply_of_an_update(server: Server, proxies: Any, open_store: Open, way: str) -> None:
    """An update whose save lost its reply neither conflicts with itself nor is made twice."""
    proxy, raw = proxies(server), server.raw()
    far = await open_store(way, proxy, deadline=1.0)
    await far.save(session(id="s", metadata={"n": 0}))
    before, calls = counter(raw), 0

    def increment(asset: SessionAsset) -> None:
        nonlocal calls
        calls += 1
        asset.metadata["n"] += 1
        proxy.strike(SWALLOW)

    updated = await far.update("s", increment)
    assert (calls, counter(raw), updated.revision) == (1, before + 1, before + 1)
    assert (await far.load("s")).metadata["n"] == 1


@forms
async def test_cut_in_mid_frame(server: Server, proxies: Any, open_store: Open, way: str) -> None:
    """Connections that break within a command or a reply cost a retry, and nothing is doubled or left out."""
    proxy = proxies(server)
    store = await open_store(way, proxy)
    await store.save(session(id="s"))
    modes = [*map(mid_reply, (1, 3, 9)), *map(mid_command, (0, 1, 40, 200))]
    revisions = []
    for number, mode in enumerate(modes):
        proxy.strike(mode)
        revisions.append(await store.append("s", turn(str(number))))
    assert await contents(store, "s") == list(map(str, range(len(modes))))
    assert revisions == list(range(revisions[0], revisions[0] + len(modes)))
    large = session(*("x" * 20_000 for _ in range(40)), id="large")
    for mode in (mid_command(5), mid_command(50_000), mid_reply(2)):
        proxy.strike(mode)
        await store.save(large)
        large.history.turns[0].content += "y"
        assert (await store.load("large")).history.turns[1:] == large.history.turns[1:]
        proxy.strike(mid_reply(30_000))
        assert len(await store.turns("large")) == 40


@forms
async def test_half_open(server: Server, proxies: Any, open_store: Open, way: str) -> None:
    """A connection that has gone mute is noticed, and replaced in time; if each one is, the error says what is sure."""
    proxy = proxies(server)
    store = await open_store(way, proxy, deadline=1.0)
    await store.save(session("first", id="s"))
    for call in (store.append("s", turn("second")), store.load("s")):
        began = time.monotonic()
        proxy.strike(BLACKHOLE)
        await call
        assert time.monotonic() - began < 1.0
    proxy.strike(BLACKHOLE, new=True)
    with pytest.raises(OutcomeUnknownError):
        await store.append("s", turn("third"))
    with pytest.raises(UnavailableError):  # no connection can be had, so this was not sent
        await store.append("s", turn("fourth"))
    proxy.heal()
    assert await contents(store, "s") == ["first", "second"]


@forms
async def test_hung_and_continued(server: Server, open_store: Open, way: str) -> None:
    """What a hung server was sent, and then again by another connection, it does once when it goes on."""
    store = await open_store(way, server, deadline=4.0)
    await store.save(session("first", id="s"))
    assert server.process is not None
    server.process.send_signal(signal.SIGSTOP)
    appending = asyncio.ensure_future(store.append("s", turn("second")))
    await asyncio.sleep(0.4 * 4.0 + 0.3)  # the first connection has been given up
    server.process.send_signal(signal.SIGCONT)
    await appending
    assert await contents(store, "s") == ["first", "second"]


@forms
async def test_restart_before_the_reply(start_server: StartServer, proxies: Any, open_store: Open, way: str) -> None:
    """With an AOF a write that was applied just before a crash is recognised after it, without script cache."""
    server = start_server(*DURABLE)
    proxy, raw = proxies(server), server.raw()
    store = await open_store(way, proxy, deadline=20.0)
    await store.save(session("first", id="s"))
    before = counter(raw)
    proxy.strike(SWALLOW)
    appending = asyncio.ensure_future(store.append("s", turn("second")))
    await until(reached(raw, before + 1))
    server.kill()
    proxy.cut()
    server.start()
    assert await appending == before + 1
    await store.append("s", turn("third"))
    assert await contents(store, "s") == ["first", "second", "third"]


@forms
async def test_scripts_flushed_before_the_retry(server: Server, proxies: Any, open_store: Open, way: str) -> None:
    """A retry that meets NOSCRIPT is recognised all the same, also one whose turns were staged."""
    proxy, raw = proxies(server), server.raw()
    flush: Callable[[], Any] = raw.script_flush
    store = await open_store(way, proxy, deadline=10.0)
    await store.save(session("first", id="s"))
    whole = session(*map(str, range(100)), id="whole")
    for revision, write in ((2, store.append("s", turn("second"))), (3, store.save(whole))):
        proxy.strike(SWALLOW)
        writing = asyncio.ensure_future(write)
        await until(reached(raw, revision))
        flush()
        proxy.cut()
        assert await writing == revision
    assert await contents(store, "s") == ["first", "second"]
    assert await contents(store, "whole") == list(map(str, range(100)))
    assert counter(raw) == 3


@forms
async def test_loading(start_server: StartServer, open_store: Open, way: str) -> None:
    """Calls that meet a server which is still reading its data wait for it, within their deadline."""
    slow = ("--loading-process-events-interval-bytes", "1024", "--key-load-delay", "3000")
    server = start_server(*DURABLE, *slow)
    raw: Any = server.raw()
    store = await open_store(way, server, deadline=30.0)
    await store.save(session("first", id="s"))
    raw.mset({f"other {n}": "x" * 2000 for n in range(400)})
    raw.bgrewriteaof()
    await until(lambda: not raw.info("persistence")["aof_rewrite_in_progress"])
    server.kill()
    server.start()
    assert raw.info("persistence")["loading"]
    found, revision = await asyncio.gather(store.load("s"), store.append("s", turn("second")))
    assert found.history.turns[0].content == "first"
    assert revision == 2
    assert await contents(store, "s") == ["first", "second"]


@forms
async def test_client_kill(server: Server, open_store: Open, way: str) -> None:
    """While connections are killed under them, appends land once each and at their revision, or are said to be unknown.

    Each worker's own session has so few writers that nothing is forgotten; of the one that all share an outcome may
    become unknown, as the others get on while one waits to try again.
    """
    raw = server.raw()
    store = await open_store(way, server, deadline=20.0)
    workers, rounds = 8, 20
    await store.save_many([session(id=id) for id in ("shared", *map(str, range(workers)))])
    done, killed, unknown = False, 0, 0

    async def kill() -> None:
        nonlocal killed
        while not done:
            killed += raw.client_kill_filter(_type="normal", skipme=True)
            await asyncio.sleep(0.01)

    killing = asyncio.ensure_future(kill())
    revisions = {}

    async def work(worker: int) -> None:
        nonlocal unknown
        for number in range(rounds):
            name = f"{worker}.{number}"
            await store.append(str(worker), turn(name))
            try:
                revisions[name] = await store.append("shared", turn(name))
            except OutcomeUnknownError:
                unknown += 1

    await asyncio.gather(*map(work, range(workers)))
    done = True
    await killing
    print(f"\n{way}: {killed} connections killed, {unknown} of {workers * rounds} outcomes unknown")
    assert killed > 0
    for worker in range(workers):
        assert await contents(store, str(worker)) == [f"{worker}.{number}" for number in range(rounds)]
    found = await contents(store, "shared")
    assert len(set(found)) == len(found)
    assert [name for name in found if name in revisions] == sorted(revisions, key=lambda name: revisions[name])
    assert counter(raw) == 1 + workers + workers * rounds + len(found)
    assert unknown <= workers * rounds / 4


@forms
@pytest.mark.parametrize("scope", ["WRITE", "ALL"])
async def test_client_pause(server: Server, open_store: Open, way: str, scope: str) -> None:
    """A write that a paused server holds back beyond the deadline has an unknown outcome, and happens at most once."""
    raw: Any = server.raw()
    store = await open_store(way, server, deadline=0.5)
    await store.save(session("first", id="s"))
    raw.execute_command("CLIENT", "PAUSE", 1200 if scope == "ALL" else 60_000, scope)
    with pytest.raises(OutcomeUnknownError):
        await store.append("s", turn("second"))
    if scope == "WRITE":
        assert await contents(store, "s") == ["first"]
        raw.execute_command("CLIENT", "UNPAUSE")
    await asyncio.to_thread(raw.ping)  # answered when the pause is over
    await store.append("s", turn("third"))
    found = await contents(store, "s")
    assert found in (["first", "third"], ["first", "second", "third"])
    assert counter(raw) == len(found)


@pytest.mark.parametrize("connected", [True, False], ids=["connected", "connecting"])
async def test_cancelled_at_any_await(server: Server, open_store: Open, connected: bool) -> None:
    """However far a write has come when it is cancelled: it is there at most once, and others get their own reply."""
    raw = server.raw()
    store = await open_store("async", server)
    await store.save_many([session("first", id=id) for id in ("s", "t", "deleted")])
    calls: list[Callable[[], Awaitable[object]]] = [
        lambda: store.append("s", turn("cancelled")),
        lambda: store.update("t", lambda asset: asset.metadata.update(n=asset.metadata.get("n", 0) + 1)),
        lambda: store.save(session(*map(str, range(20)), id="new")),
        lambda: store.delete("deleted"),
        lambda: store.load("s"),
        lambda: store.list(limit=1),
    ]
    lasted = 0
    for turns in range(25):
        if not connected:
            raw.client_kill_filter(_type="normal", skipme=True)
            await until(lambda: len(client_ids(raw)) == 0)
        done = []
        for call in calls:
            task = asyncio.ensure_future(call())
            beside = asyncio.ensure_future(store.turns("s", 0, 0))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            (result,) = await asyncio.gather(task, return_exceptions=True)
            done.append(not isinstance(result, BaseException))
            assert [found.content for found in await beside] == ["first"]
        lasted += all(done)
        found = collections.Counter(await contents(store, "s"))
        assert int(done[0]) <= found["cancelled"] <= 1
        count = (await store.load("t")).metadata.get("n", 0)
        assert int(done[1]) <= count <= 1
        if await store.exists("new"):
            assert await contents(store, "new") == list(map(str, range(20)))
        else:
            assert not done[2]
        assert not (done[3] and await store.exists("deleted"))
        await store.save_many([session("first", id=id) for id in ("s", "t", "deleted")])
        await store.save_many([session("first", id="new")])
        await store.delete("new")
    assert lasted < 25  # some were cancelled


# The memory of operations


def append_by_hand(store: Any, id: str, content: str) -> Write:
    """An append as an operation, to be sent as often as one likes."""
    write: Write = store._core.sessions.append(id, [turn(content)], None, None)
    return write


def save_by_hand(store: Any, asset: SessionAsset) -> Write:
    """The only step of a plain save."""
    write: Write = next(store._core.saving.save(asset))
    return write


async def send(store: Any, write: Write) -> list[Any]:
    """One attempt; the script's reply."""
    replies = await store._driver.link.call(write.commands(), asyncio.get_running_loop().time() + 5)
    (answer,) = replies[-1]
    return list(answer)


def windows(raw: Any) -> dict[bytes, bytes]:
    """What the partition remembers of its writers."""
    return {name: value for name, value in raw.hgetall(key("state")).items() if name.startswith(b"w")}


@pytest.mark.parametrize("writer", ["same", "other"])
@pytest.mark.parametrize("others", [0, 1, 500])
async def test_recognised_however_late(server: Server, open_store: Open, writer: str, others: int) -> None:
    """Sent again after any number of other writes, a write is recognised; only what is not finished is remembered."""
    raw = server.raw()
    store = await open_store("async", server)
    other = store if writer == "same" else await open_store("async", server)
    await store.save(session(id="s"))
    write = append_by_hand(store, "s", "once")
    assert (await send(store, write))[:2] == [b"OK", 2]
    for number in range(others):
        await other.append("s", turn(str(number)))
    assert await send(store, write) == [b"OK", 2, 0, b""]
    assert (await contents(store, "s")).count("once") == 1
    assert counter(raw) == 2 + others
    write.end()
    for name in ("x", "y"):
        await store.append("s", turn(name))
        await other.append("s", turn(name))
    assert {len(window) for window in windows(raw).values()} == {16 + 16}
    assert len(windows(raw)) == len({store, other})


def unfinished(store: Any) -> int:
    """How many writes the server still has to remember for a store."""
    store = getattr(store, "_store", store)
    namespace = store._core.sessions._namespace
    return sum(len(window.unfinished) for window in itertools.chain(namespace._windows, *namespace._retired))


@forms
async def test_every_write_is_finished(server: Server, proxies: Any, open_store: Open, way: str) -> None:
    """However a write ends, the server need not remember it for longer: done, refused, retried or unknown."""
    proxy, raw = proxies(server), server.raw()
    store = await open_store(way, proxy, deadline=1.0)
    await store.save_many([session(*map(str, range(20)), id=id) for id in "stu"])
    asset = await store.load("s")
    asset.metadata["x"] = 1
    await store.save(asset)
    for refused in (
        store.append("no", turn("x")), store.append("s", turn("x"), if_revision=1), store.delete("no"),
        store.append("s", turn("x" * 2**25)), store.save(session(id="s"), if_revision=0),
    ):  # fmt: skip
        with pytest.raises(StorageError):
            await refused
    await store.delete_many(["t", "no", "t"])
    await store.update("s", SessionAsset.touch)
    raw.script_flush()
    await store.append("s", turn("x"))
    proxy.strike(SWALLOW)
    with contextlib.suppress(OutcomeUnknownError):
        await store.append("s", turn("x"))
    proxy.strike(BLACKHOLE, new=True)
    with pytest.raises(StorageError):
        await store.append("s", turn("x"))
    assert unfinished(store) == 0


async def test_changed_again_after_a_cancelled_save(server: Server, open_store: Open) -> None:
    """What a cancelled save has stored is no change of others, and the turn that grew since is there once."""
    store = await open_store("async", server)
    asset = session(id="s")
    await store.save(asset)
    asset.add_turn(turn("so far"))
    call: Any = store._driver.link.call
    answered = asyncio.Event()

    async def hold(commands: Any, expires: float) -> Any:
        await call(commands, expires)
        answered.set()
        await asyncio.sleep(60)

    store._driver.link.call = hold
    saving = asyncio.create_task(store.save(asset))
    await answered.wait()
    store._driver.link.call = call
    saving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await saving
    asset.history.turns[0].content = "so far, so good"
    await store.save(asset)
    assert await contents(store, "s") == ["so far, so good"]


async def test_late_append_to_a_session_that_is_gone_again(server: Server, open_store: Open) -> None:
    """What was to make a session, and met one that others had made, may do so yet when that is gone: it is not told."""
    store, other = await open_store("async", server), await open_store("async", server)
    await store.save(session(id="s"))
    link, delivered = store._driver.link, turn("once")
    call: Any = link.call

    async def lose(commands: Any, expires: float) -> Any:
        if isinstance(commands[-1], ScriptCall):
            link.call = call
            await other.append("new", delivered, create=True, once=True)
            raise ConnectionLost("the attempt is on its way", sent=True)
        return await call(commands, expires)

    link.call = lose
    with pytest.raises(OutcomeUnknownError):
        await store.append("new", delivered, create=True, once=True)
    assert await contents(other, "new") == ["once"]


async def test_late_sending_of_a_finished_write(server: Server, open_store: Open) -> None:
    """What arrives when its write was given up, and the writer has gone on since, is refused, applied or not."""
    store = await open_store("async", server)
    await store.save(session(id="s"))
    applied, given_up = append_by_hand(store, "s", "applied"), append_by_hand(store, "s", "given up")
    late = [applied.commands(), given_up.commands()]
    assert (await send(store, applied))[:2] == [b"OK", 2]
    applied.end()
    given_up.end()
    for number in range(3):
        await store.append("s", turn(str(number)))
    for commands in late:
        replies = await store._driver.link.call(commands, asyncio.get_running_loop().time() + 5)
        assert replies[0] == [[b"FORGOTTEN", 5]] or replies[0][0][0] == b"FORGOTTEN"
    assert await contents(store, "s") == ["applied", "0", "1", "2"]


async def test_a_write_that_hangs(server: Server, open_store: Open) -> None:
    """While one write of a store is not finished its others go on, in a new window when the old one has grown large."""
    raw = server.raw()
    store = await open_store("async", server)
    await store.save(session(id="s"))
    write = append_by_hand(store, "s", "once")
    assert (await send(store, write))[:2] == [b"OK", 2]
    for _ in range(9):
        await asyncio.gather(*(store.append("s", turn("x")) for _ in range(1000)))
    assert await send(store, write) == [b"OK", 2, 0, b""]
    sizes = sorted(len(window) for window in windows(raw).values())
    assert len(sizes) > 1
    assert sizes[-1] <= 16 + 16 * 1024
    assert len(await store.turns("s")) == 9001
    assert raw.hget(key("state"), "forgotten") == b"0"


async def test_more_writers_than_remembered(server: Server, open_store: Open) -> None:
    """Of too many writers one goes that wrote nothing for long; what it may have written is refused, not repeated."""
    raw: Any = server.raw()
    quiet, store = await open_store("async", server), await open_store("async", server)
    await quiet.save(session(id="s"))
    write = append_by_hand(quiet, "s", "once")
    assert (await send(quiet, write))[:2] == [b"OK", 2]
    (first,) = windows(raw)
    for _ in range(60):
        await store.append("s", turn("x"))
    others = {b"w%012d" % n: bytes(24) + (50).to_bytes(8) for n in range(MAX_WINDOWS)}
    raw.hset(key("state"), mapping=others)
    raw.hset(key("state"), first, bytes(24) + (2).to_bytes(8))
    await (await open_store("async", server)).append("s", turn("x"))
    assert len(windows(raw)) == MAX_WINDOWS
    assert raw.hget(key("state"), "forgotten") in (b"2", b"50")
    # Some that were used lately may outlive it, since a few at random are looked at; now it is gone as well.
    raw.hdel(key("state"), first)
    raw.hset(key("state"), "forgotten", 50)
    assert (await send(quiet, write))[0] == b"FORGOTTEN"
    assert await quiet.append("s", turn("fresh")) == counter(raw)
    assert (await contents(store, "s")).count("once") == 1


async def test_forgotten_after_a_lost_reply(server: Server, open_store: Open) -> None:
    """If a reply was lost and the server has forgotten, the outcome is unknown at once; else it is tried afresh."""
    store = await open_store("async", server)
    write, retry = append_by_hand(store, "s", "x"), Retry(expires=100.0)
    assert retry.after(OperationEvicted(""), 0.0, write) == 0
    retry.after(ConnectionLost("", sent=False), 0.0, write)
    assert retry.after(OperationEvicted(""), 0.0, write) == 0
    retry.after(ConnectionLost("", sent=True), 0.0, write)
    with pytest.raises(OutcomeUnknownError):
        retry.after(OperationEvicted(""), 0.0, write)


@forms
async def test_others_write_while_the_reply_is_lost(server: Server, proxies: Any, open_store: Open, way: str) -> None:
    """A retry that comes after 40 writes by others is recognised; the turn is there once."""
    proxy, raw = proxies(server), server.raw()
    near, far = await open_store("async", server), await open_store(way, proxy, deadline=30.0)
    await far.save(session("first", id="s"))
    proxy.strike(SWALLOW)
    appending = asyncio.ensure_future(far.append("s", turn("second")))
    await until(reached(raw, 2))
    for number in range(40):
        await near.append("s", turn(str(number)))
    proxy.cut()
    began = time.monotonic()
    assert await appending == 2
    assert time.monotonic() - began < 10
    assert (await contents(near, "s")).count("second") == 1
    await far.append("s", turn("third"))


async def test_many_replies_lost_at_once(server: Server, proxies: Any, open_store: Open) -> None:
    """If a store loses the replies of any number of writes to a session, each is recognised: none is unknown."""
    proxy, raw = proxies(server), server.raw()
    near, far = await open_store("async", server), await open_store("async", proxy, deadline=30.0)
    await far.save(session(id="s"))
    count = 500
    proxy.strike(SWALLOW)
    appending = [asyncio.ensure_future(far.append("s", turn(str(number)))) for number in range(count)]
    await until(lambda: counter(raw) == 1 + count)
    proxy.cut()
    revisions = await asyncio.gather(*appending)
    found = await contents(near, "s")
    assert {str(number): revision for number, revision in enumerate(revisions)} == {
        name: 2 + at for at, name in enumerate(found)
    }


@forms
async def test_a_writer_that_saw_nothing_lately(server: Server, open_store: Open, way: str) -> None:
    """Who has not heard of the last hundred writes writes all the same, in one call."""
    raw = server.raw()
    busy = await open_store("async", server)
    await busy.save(session(id="s"))
    stale = await open_store(way, server)
    for number in range(100):
        await busy.append("s", turn(str(number)))
    before = runs(raw)
    assert await stale.append("s", turn("stale")) == 102
    assert runs(raw) == before + 1
    assert await contents(busy, "s") == [*map(str, range(100)), "stale"]


async def test_repeated_delete(server: Server, open_store: Open) -> None:
    """A deletion is recognised, also when the session is there again, and then leaves it alone."""
    store, other = await open_store("async", server), await open_store("async", server)
    await store.save(session("first", id="s"))
    delete = store._core.sessions.delete("s", None, None)
    for _ in range(2):
        assert (await send(store, delete))[:2] == [b"OK", 2]
    await other.save(session("new", id="s"))
    assert (await send(store, delete))[:2] == [b"OK", 2]
    assert await contents(other, "s") == ["new"]


async def test_repeated_delete_after_its_tombstone(server: Server, open_store: Open) -> None:
    """A deletion whose tombstone was dropped is recognised, also when the session is there again."""
    raw: Any = server.raw()
    store, other = await open_store("async", server), await open_store("async", server)
    await other.save_many([session(id="s"), session(id="last")])
    await store.load("s")
    delete = store._core.sessions.delete("s", None, None)
    assert (await send(store, delete))[:2] == [b"OK", 3]
    raw.zadd(key("deleted"), {f"t{n}": 3.5 for n in range(MAX_TOMBSTONES - 1)})
    assert (await send(store, delete))[:2] == [b"OK", 3]
    await other.delete("last")
    assert not raw.hexists(key("deleted:meta"), "s")
    assert await send(store, delete) == [b"OK", 3, 0, b""]
    await other.save(session("new", id="s"))
    assert await send(store, delete) == [b"OK", 3, 0, b""]
    assert await contents(other, "s") == ["new"]


@pytest.mark.parametrize("kind", ["append", "save"])
async def test_repeated_after_deletion_and_creation(server: Server, open_store: Open, kind: str) -> None:
    """A write to a session that was deleted, and perhaps made again, is recognised and not done to the new one."""
    store, other = await open_store("async", server), await open_store("async", server)
    await other.save(session(id="s"))
    await store.load("s")
    staged = session(*map(str, range(20)), id="s")
    write = append_by_hand(store, "s", "old") if kind == "append" else save_by_hand(store, staged)
    assert (await send(store, write))[:2] == [b"OK", 2]
    await other.delete("s")
    assert (await send(store, write))[:2] == [b"OK", 2]
    assert not await other.exists("s")
    await other.save(session("new", id="s"))
    assert (await send(store, write))[:2] == [b"OK", 2]
    assert await contents(other, "s") == ["new"]
    left: Any = server.raw().keys(key("staging:*"))
    assert len(left) == (0 if kind == "append" else 2)
    ttl: Callable[[bytes], Any] = server.raw().ttl
    assert all(0 < ttl(name) <= 60 for name in left)


@pytest.mark.parametrize("write", ["append", "save"])
async def test_late_first_sending(server: Server, open_store: Open, write: str) -> None:
    """A first attempt that arrives after the second succeeded, and after others wrote, does nothing."""
    raw = server.raw()
    store, other = await open_store("async", server), await open_store("async", server)
    await other.save(session(id="s"))
    await store.load("s")
    asset = session(*map(str, range(20)), id="s")
    operation = append_by_hand(store, "s", "once") if write == "append" else save_by_hand(store, asset)
    first = operation.commands()
    assert (await send(store, operation))[:2] == [b"OK", 2]
    await other.append("s", turn("after"))
    with redis.Redis(port=server.port, single_connection_client=True) as late:
        replies: list[Any] = [
            late.execute_command(*(merge([command]) if isinstance(command, ScriptCall) else command))
            for command in first
        ]
    assert replies[-1][0][:2] == [b"OK", 2]
    expected = ["once"] if write == "append" else list(map(str, range(20)))
    assert await contents(other, "s") == [*expected, "after"]
    assert counter(raw) == 3


async def test_repeated_after_an_eviction(server: Server, open_store: Open) -> None:
    """A write is not applied a second time when its session's hash was evicted meanwhile."""
    raw = server.raw()
    other = await open_store("async", server)
    await other.save(session(id="s"))
    store = await open_store("async", server)
    write = append_by_hand(store, "s", "once")
    assert (await send(store, write))[:2] == [b"OK", 2]
    raw.delete(key("session:s"))
    await other.save(session("new", id="s"))
    assert await send(store, write) == [b"OK", 2, 0, b""]
    assert await contents(other, "s") == ["new"]


# Data that went back or vanished


def wipe(server: Server) -> None:
    server.raw().flushall()


def restart_without_persistence(server: Server) -> None:
    server.kill()
    server.start()


@forms
@pytest.mark.parametrize("how", [wipe, restart_without_persistence])
async def test_wiped(server: Server, open_store: Open, way: str, how: Callable[[Server], None]) -> None:
    """After the data vanished every write says so, whoever made the namespace anew; a new store goes on."""
    store = await open_store(way, server)
    asset = session("first", id="s")
    await store.save(asset)
    asset.metadata["changed"] = True
    how(server)
    writes: list[Callable[[], Awaitable[object]]] = [
        lambda: store.save(asset),
        lambda: store.save(session(id="t"), if_revision=0),
        lambda: store.append("s", turn("second")),
        lambda: store.delete("s"),
        lambda: store.cursor(),
    ]
    for write in writes:
        with pytest.raises(StoreResetError):
            await write()
    with pytest.raises(StoreResetError):
        async with leased(store, "s"):
            pass
    assert server.raw().dbsize() == 0
    new = await open_store(way, server)
    for write in writes:
        with pytest.raises(StoreResetError):
            await write()
    assert await new.list() == []
    await new.save(asset)  # what was remembered of the old namespace is not taken for stored
    assert await new.load("s") == asset


@forms
async def test_wiped_between_a_write_and_its_retry(server: Server, proxies: Any, open_store: Open, way: str) -> None:
    """A write whose reply was lost, and then the data, is not begun anew: that the data vanished is told."""
    proxy, raw = proxies(server), server.raw()
    store = await open_store(way, proxy, deadline=20.0)
    await store.save(session(id="s"))
    proxy.strike(SWALLOW)
    appending = asyncio.ensure_future(store.append("s", turn("x")))
    await until(reached(raw, 2))
    raw.flushall()
    proxy.cut()
    with pytest.raises(StoreResetError):
        await appending


def backup(server: Server) -> Callable[[], None]:
    """Keep the AOF as it is; the result puts it back."""
    kept = server.folder / "kept"
    shutil.copytree(server.folder / "appendonlydir", kept)

    def restore() -> None:
        server.kill()
        shutil.rmtree(server.folder / "appendonlydir")
        shutil.copytree(kept, server.folder / "appendonlydir")
        server.start()

    return restore


@forms
async def test_older_aof(start_server: StartServer, open_store: Open, way: str) -> None:
    """A store that has seen later revisions than a restored backup writes nothing; a new store goes on from there."""
    server = start_server(*DURABLE)
    store = await open_store(way, server)
    asset = session("first", id="s")
    await store.save(asset)
    restore = backup(server)
    await store.append("s", turn("lost"))
    await store.save(session(id="lost"))
    cursor = await store.cursor()
    await asyncio.to_thread(restore)
    asset.metadata["changed"] = True
    for write in (store.save(asset), store.append("s", turn("x")), store.delete("s"), store.changes(cursor)):
        with pytest.raises(StoreResetError):
            await write
    assert counter(server.raw()) == 1
    new = await open_store(way, server)
    assert [meta.id for meta in await new.list()] == ["s"]
    assert await contents(new, "s") == ["first"]
    with pytest.raises(StoreResetError):
        await new.changes(cursor)
    with pytest.raises(ConflictError):
        await new.save(asset, if_revision=2)
    await new.append("s", turn("second"))
    assert await contents(new, "s") == ["first", "second"]


async def test_a_revision_of_another_past(start_server: StartServer, open_store: Open) -> None:
    """An asset that was saved before the data went back is merged with another write of the same revision."""
    server = start_server(*DURABLE)
    asset = session("first", id="s")
    old = await open_store("async", server)
    await old.save(asset)
    restore = backup(server)
    asset.add_turn(turn("lost"))
    assert await old.save(asset) == 2
    await asyncio.to_thread(restore)
    new = await open_store("async", server)
    assert await new.append("s", turn("new")) == 2
    asset.metadata["a"] = 1
    await new.save(asset)
    assert await contents(new, "s") == ["first", "new"]
    assert (await new.load("s")).metadata == {"a": 1}


async def test_evicted_turns(place: Place, store: Any) -> None:
    """A session whose turns were evicted tells so by every call that needs them, and the others go on."""
    await store.save_many([session("first", id="s"), session("first", id="other")])
    place.raw.delete(place.key("turns:s"))
    for call in (store.load("s"), store.turns("s"), store.append("s", turn("x"))):
        with pytest.raises(orcs_redis.CorruptSessionError, match="turns"):
            await call
    assert {meta.id for meta in await store.list()} == {"s", "other"}
    assert (await store.page(1)).cursor is not None
    assert await contents(store, "other") == ["first"]
    await store.save(session("whole", id="s"))
    assert await contents(store, "s") == ["whole"]


async def test_no_right_to_close_epochs(server: Server, open_store: Open) -> None:
    """Without the right to HGET a write that closes an epoch is refused, and not stopped half-way."""
    raw: Any = server.raw()
    raw.execute_command("ACL", "SETUSER", "w", "on", ">p", "~*", "&*", "+@all")
    async with await RedisSessionStore.connect(server.url.replace("//", "//w:p@")) as store:
        await store.save(SessionAsset(id="s"))
        raw.client_kill_filter(_type="normal", skipme=True)
        await store.exists("s")  # over a new connection
        raw.execute_command("ACL", "SETUSER", "w", "-hget")
        results = await asyncio.gather(
            *(store.append("s", ConversationTurn.user(str(n))) for n in range(5)), return_exceptions=True
        )
        assert {type(result) for result in results} == {PermissionDeniedError}
        raw.execute_command("ACL", "SETUSER", "w", "+hget")
        assert len((await store.load("s")).history) == 0


def test_writes_of_threads_begin_and_end_side_by_side() -> None:
    """A write can begin while other threads finish theirs, wherever they are interrupted."""
    namespace = Namespace("n", 1, b"0" * 16)
    (partition,) = namespace.keyspace.partitions
    begun: collections.deque[OperationToken] = collections.deque()
    done = threading.Event()

    def finish() -> None:
        while not done.is_set():
            while len(begun) > 3:
                with contextlib.suppress(IndexError):
                    namespace.end(begun.popleft())

    threads = [threading.Thread(target=finish) for _ in range(2)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for _ in range(50_000):
            begun.append(namespace.begin(partition))
    finally:
        done.set()
        sys.setswitchinterval(before)
        for thread in threads:
            thread.join()


async def test_created_while_it_is_looked_for(place: Place, store: Any) -> None:
    """A session that is created between the commands of a load is not taken for one whose hash was evicted."""
    raw: Any = place.raw
    load = store._core.sessions.load("s")

    def ask() -> list[Any]:
        return [raw.execute_command(*command) for command in load.commands()]

    with pytest.raises(TornRead):
        load.decode(ask())  # absent
    *found, last = load.commands()
    replies = [raw.execute_command(*command) for command in found]
    await store.save(SessionAsset(id="s"))
    with pytest.raises(TornRead):
        load.decode([*replies, raw.execute_command(*last)])
    assert load.decode(ask()).asset.id == "s"


async def test_evicted_hash(place: Place, store: Any) -> None:
    """A session whose hash was evicted says so, and lists still name it; it can be deleted and saved anew."""
    await store.save_many([session("first", id="s"), session("first", id="other")])
    place.raw.delete(place.key("session:s"))
    for call in (store.load("s"), store.append("s", turn("x"))):
        with pytest.raises(CorruptSessionError):
            await call
    assert not await store.exists("s")
    assert {meta.id for meta in await store.list()} == {"s", "other"}
    assert await contents(store, "other") == ["first"]
    await store.delete("s")
    assert [meta.id for meta in await store.list()] == ["other"]
    await store.save(session("whole", id="s"))
    assert await contents(store, "s") == ["whole"]
    place.raw.delete(place.key("session:s"))
    await store.save(session("again", id="s"))
    assert await contents(store, "s") == ["again"]


# Leases

_WORKER = """
    import asyncio, sys
    from orcs_redis import ConversationTurn, RedisSessionStore
    from orcs_redis.sync import open_store

    url, way, ttl = sys.argv[1], sys.argv[2], float(sys.argv[3])

    async def colour_async():
        async with await RedisSessionStore.connect(url) as store, store.lease("s", ttl=ttl) as lease:
            print(lease.token, flush=True)
            try:
                while True:
                    await store.append("s", ConversationTurn.user("worker"), lease=lease)
                    await asyncio.sleep(0.005)
            except Exception as error:
                print(type(error).__name__, flush=True)
            await asyncio.wait([lease.lost], timeout=20)
            print("lost" if lease.lost.done() else "not lost", flush=True)

    def colour_sync():
        with open_store(url) as store, store.lease("s", ttl=ttl) as lease:
            print(lease.token, flush=True)
            try:
                while not lease.lost.wait(0.005):
                    store.append("s", ConversationTurn.user("worker"), lease=lease)
                store.append("s", ConversationTurn.user("worker"), lease=lease)
            except Exception as error:
                print(type(error).__name__, flush=True)
            print("lost" if lease.lost.wait(20) else "not lost", flush=True)

    colour_sync() if way == "sync" else asyncio.run(colour_async())
"""


class Worker:
    """A process that takes the lease of "s", and appends under it until it can't."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def line(self) -> str:
        assert self.process.stdout is not None
        return (await asyncio.wait_for(self.process.stdout.readline(), 30)).decode().strip()


@pytest.fixture
async def start_worker() -> AsyncIterator[Callable[..., Awaitable[Worker]]]:
    """Start workers; those that are left are killed."""
    workers: list[Worker] = []

    async def start(server: Server, way: str, ttl: float) -> Worker:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        code = [sys.executable, "-c", textwrap.dedent(_WORKER), server.url, way, str(ttl)]
        process = await asyncio.create_subprocess_exec(*code, stdout=asyncio.subprocess.PIPE, env=environment)
        workers.append(Worker(process))
        return workers[-1]

    yield start
    for worker in workers:
        if worker.process.returncode is None:
            worker.process.kill()
        assert worker.process.stdout is not None
        await worker.process.stdout.read()
        await worker.process.wait()


@forms
async def test_stopped_past_its_ttl(server: Server, open_store: Open, start_worker: Any, way: str) -> None:
    """A worker that was stopped for longer than its ttl can't write when it goes on, and hears of its loss."""
    store = await open_store("async", server)
    await store.save(session(id="s"))
    worker = await start_worker(server, way, 0.6)
    token = int(await worker.line())
    await store.wait_for("s", revision=4, timeout=20)
    worker.process.send_signal(signal.SIGSTOP)
    async with store.lease("s", ttl=30, wait=20) as lease:
        assert lease.token > token
        before = await contents(store, "s")
        worker.process.send_signal(signal.SIGCONT)
        assert [await worker.line(), await worker.line()] == ["LeaseLostError", "lost"]
        assert await worker.process.wait() == 0
        assert await contents(store, "s") == before  # its release did not end the successor's lease either
        await store.append("s", turn("successor"), lease=lease)
    assert (await store.leases()) == []


@forms
async def test_killed_holder(server: Server, open_store: Open, start_worker: Any, way: str) -> None:
    """The lease of a worker that was killed passes on when its ttl is over, not before it and not much later."""
    store = await open_store(way, server)
    await store.save(session(id="s"))
    worker = await start_worker(server, way, 1.0)
    token = int(await worker.line())
    worker.process.kill()
    began = time.monotonic()
    with pytest.raises(LeaseHeldError):
        async with leased(store, "s"):
            pass
    async with leased(store, "s", wait=20) as lease:
        assert 0.3 < time.monotonic() - began < 4
        assert lease.token > token


@forms
async def test_renewal_over_a_bad_connection(server: Server, proxies: Any, open_store: Open, way: str) -> None:
    """A holder whose connection is cut again and again, and loses replies, keeps its lease and its token."""
    proxy = proxies(server)
    near, far = await open_store("async", server), await open_store(way, proxy, deadline=1.0)
    async with leased(far, "s", ttl=1.2) as lease:
        end = time.monotonic() + 1.9
        while time.monotonic() < end:
            proxy.cut()
            await asyncio.sleep(0.15)
            proxy.strike(SWALLOW)
            await asyncio.sleep(0.1)
        assert not await lost(lease, 0)
        assert [held.token for held in await near.leases()] == [lease.token]
        await far.save(session(id="s"), lease=lease)


@forms
async def test_lost_reply_of_an_acquisition(server: Server, proxies: Any, open_store: Open, way: str) -> None:
    """Who took a lease and did not hear of it takes the same one again: it is not held by itself."""
    proxy, raw = proxies(server), server.raw()
    far = await open_store(way, proxy, deadline=2.0)
    proxy.strike(SWALLOW)
    async with leased(far, "s") as lease:
        assert raw.get(key("fence")) == b"%d" % lease.token
        proxy.strike(SWALLOW)
    assert not raw.exists(key("lease:s"))


@forms
async def test_cut_off_holder(server: Server, proxies: Any, open_store: Open, way: str) -> None:
    """A holder that is cut off hears that the lease is lost, and its successor gets it when the ttl is over."""
    proxy = proxies(server)
    near, far = await open_store("async", server), await open_store(way, proxy, deadline=0.6)
    await near.save(session(id="s"))
    async with leased(far, "s", ttl=0.9) as lease:
        proxy.strike(BLACKHOLE, new=True)
        async with near.lease("s", wait=20) as successor:
            assert successor.token > lease.token
            assert await lost(lease, 5)
            proxy.heal()
            with pytest.raises(LeaseLostError):
                await far.append("s", turn("x"), lease=lease)
            assert [held.token for held in await near.leases()] == [successor.token]


async def test_lost_is_told_in_time(server: Server, proxies: Any, open_store: Open) -> None:
    """A holder that is cut off hears that the lease is lost before anybody else can have it."""
    proxy = proxies(server)
    near, far = await open_store("async", server), await open_store("async", proxy, deadline=0.5)
    async with far.lease("s", ttl=1.5) as lease:
        proxy.strike(BLACKHOLE, new=True)
        async with near.lease("s", wait=20):
            assert lease.lost.done() or await lost(lease, 0.2)


async def test_lost_after_a_short_block(server: Server, open_store: Open) -> None:
    """`lost` is done after the block, also after one that awaited nothing."""
    store = await open_store("async", server)
    async with store.lease("s") as lease:
        pass
    assert await lost(lease, 1)


async def test_giving_up_to_await_lost(server: Server, open_store: Open) -> None:
    """Awaiting `lost` for some time only does not make the lease look lost."""
    store = await open_store("async", server)
    async with store.lease("s") as lease:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(lease.lost, 0.05)
        assert not lease.lost.done()


# Contention, cancellation


@forms
async def test_contention(server: Server, open_store: Open, way: str) -> None:
    """Sixteen workers with stores of their own increment one counter: none is lost, and none starves."""
    workers, times = 16, 50
    stores = [await open_store(way, server, deadline=60.0) for _ in range(workers)]
    await stores[0].save(session(id="s", metadata={"n": 0}))

    def increment(asset: SessionAsset) -> None:
        asset.metadata["n"] += 1

    async def work(store: Any) -> float:
        for _ in range(times):
            await store.update("s", increment)
        return time.monotonic() - began

    began = time.monotonic()
    spent = await asyncio.gather(*map(work, stores))
    mean = sum(spent) / workers
    print(f"\n{way}: {workers} x {times} increments in {max(spent):.2f} s, slowest {max(spent) / mean:.2f} x the mean")
    assert (await stores[0].load("s")).metadata["n"] == workers * times
    assert counter(server.raw()) == 1 + workers * times
    assert max(spent) < 3 * mean


def client_ids(raw: Any) -> list[str]:
    return [client["id"] for client in raw.client_list() if client["name"] == "orcs-redis"]


def descriptors() -> set[str]:
    """What the process has open, without the folder that is being looked at."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found.add(f"{entry.name} {entry.readlink()}")
        except OSError:
            continue
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
async def test_ten_thousand_operations_a_third_cancelled(server: Server) -> None:
    """Cancelled at random, operations leave no wrong reply, connection, task or file descriptor behind."""
    raw = server.raw()
    raw.ping()
    chance = random.Random(11)
    outside, tasks_outside = descriptors(), asyncio.all_tasks()
    store = await RedisSessionStore.connect(server.url, deadline=30.0)
    assets = [session(f"content {n}", id=f"s{n}", metadata={"n": 0}) for n in range(50)]
    await store.save_many(assets)
    before = client_ids(raw), descriptors(), asyncio.all_tasks()
    assert len(before[0]) == 1
    acknowledged: set[str] = set()

    async def one(number: int) -> None:
        which = chance.randrange(50)
        id = f"s{which}"
        match number % 5:
            case 0:
                found = await store.load(id)
                assert (found.id, found.history.turns[0].content) == (id, f"content {which}")
            case 1:
                assert [found.content for found in await store.turns(id, 0, 0)] == [f"content {which}"]
            case 2:
                assert await store.exists(id if number % 2 else f"no {id}") is bool(number % 2)
            case 3:
                assert await store.append(id, turn(str(number))) > 50
                acknowledged.add(f"{id} {number}")
            case _:
                own = session(str(number), id=f"own {which}")
                await store.save(own)

    cancelled = 0
    for batch in range(20):
        tasks = [asyncio.ensure_future(one(500 * batch + number)) for number in range(500)]
        chosen = chance.sample(tasks, 500 // 3)
        while chosen:
            await asyncio.sleep(chance.choice([0, 0, 0, 0, 0.0005, 0.002]))
            for task in chosen[-15:]:
                task.cancel()
            del chosen[-15:]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(result) for result in results} <= {type(None), asyncio.CancelledError}
        cancelled += sum(result is not None for result in results)
    assert cancelled > 300
    found: collections.Counter[str] = collections.Counter()
    for which in range(50):
        found.update(f"s{which} {content}" for content in (await contents(store, f"s{which}"))[1:])
    assert set(found.values()) == {1}
    assert acknowledged <= found.keys()
    assert unfinished(store) == 0
    print(f"\n{cancelled} of 10,000 cancelled; {len(found) - len(acknowledged)} of the appends landed all the same")
    assert (client_ids(raw), descriptors(), asyncio.all_tasks()) == before
    await store.aclose()
    await until(lambda: descriptors() == outside)
    assert asyncio.all_tasks() == tasks_outside


@forms
async def test_closing_while_retrying(server: Server, proxies: Any, open_store: Open, way: str) -> None:
    """What is being sent again when the store is closed comes to its end."""
    proxy, raw = proxies(server), server.raw()
    store = await open_store(way, proxy, deadline=3.0)
    await store.save(session(id="s"))
    proxy.strike(SWALLOW)
    appending = asyncio.ensure_future(store.append("s", turn("x")))
    await until(reached(raw, 2))
    closing = asyncio.ensure_future(store.aclose())
    assert await appending == 2
    await closing
    near = await open_store("async", server)
    assert await contents(near, "s") == ["x"]


# What the dedup windows remember, and for how long


async def test_retry_after_its_window_was_made_anew(server: Server, open_store: Open) -> None:
    """A write whose window was dropped for others, and made anew by a later write, is not applied a second time."""
    raw: Any = server.raw()
    store, other = await open_store("async", server), await open_store("async", server)
    await store.save(session(id="s"))
    write = append_by_hand(store, "s", "once")
    assert (await send(store, write))[:2] == [b"OK", 2]
    await other.append("s", turn("x"))
    (window,) = (name for name in windows(raw) if raw.hget(key("state"), name).endswith((2).to_bytes(8)))
    raw.hdel(key("state"), window)  # as if 10,000 others had written since
    raw.hset(key("state"), "forgotten", 2)
    await store.append("s", turn("later"))
    assert (await send(store, write))[0] == b"FORGOTTEN"
    assert (await contents(store, "s")).count("once") == 1


async def test_late_sending_of_a_left_window(server: Server, open_store: Open) -> None:
    """A write that hung while its store went on to another window, given up and repeated as documented, is late."""
    raw = server.raw()
    store = await open_store("async", server)
    await store.save(session(id="s"))
    stuck = append_by_hand(store, "s", "once")
    late = stuck.commands()
    for _ in range(2):
        await asyncio.gather(*(store.append("s", turn("x")) for _ in range(600)))
    stuck.end()  # OutcomeUnknownError
    await store.append("s", turn("once"))
    (replies,) = await store._driver.link.call(late, asyncio.get_running_loop().time() + 5)
    assert replies[0][0] == b"FORGOTTEN"
    assert (await contents(store, "s")).count("once") == 1
    assert all(not retired for retired in store._core.sessions._namespace._retired)
    assert len(windows(raw)) == 2


async def test_late_sending_behind_an_older_one(server: Server, open_store: Open) -> None:
    """A write that was given up while an older one went on is refused, too, once its store has written again."""
    store = await open_store("async", server)
    await store.save(session(id="s"))
    older, stuck = append_by_hand(store, "s", "older"), append_by_hand(store, "s", "once")
    older.commands()
    late = stuck.commands()
    stuck.end()  # cancelled, say
    await store.append("s", turn("once"))
    (replies,) = await store._driver.link.call(late, asyncio.get_running_loop().time() + 5)
    assert replies[0][0] == b"FORGOTTEN"  # a clone of the process may wait for it: it was not applied
    assert (await send(store, older))[0] == b"OK"
    assert await contents(store, "s") == ["once", "older"]


async def test_two_clones(server: Server, open_store: Open) -> None:
    """Two processes that are clones of one, with its writer's ids and counters, have each their writes applied."""
    one, other = await open_store("async", server), await open_store("async", server)
    await one.save(session(id="s"))
    mine, theirs = one._core.sessions._namespace, other._core.sessions._namespace
    theirs.origin, theirs.high_water_marks = mine.origin, list(mine.high_water_marks)
    window = mine._windows[0]
    clone = theirs._windows[0]
    clone.writer, clone.counters = window.writer, itertools.count(2)
    revisions = [
        await store.append("s", turn(name)) for store, name in ((one, "1"), (other, "2"), (one, "3"), (other, "4"))
    ]
    assert revisions == [2, 3, 4, 5]
    assert await contents(one, "s") == ["1", "2", "3", "4"]


@forms
async def test_a_connection_begins_an_epoch(server: Server, open_store: Open, way: str) -> None:
    """After each connecting a store's writes have ids that no clone of its process has."""
    raw: Any = server.raw()
    store = await open_store(way, server)
    await store.save(session(id="s"))
    first = raw.hget(key("session:s"), ".op")
    raw.client_kill_filter(_type="normal", skipme=True)
    for name in ("by its old id", "by a new one"):
        await store.append("s", turn(name))
    last = raw.hget(key("session:s"), ".op")
    assert first[:8] == last[:8]
    assert first[8:12] != last[8:12]


async def test_first_write_of_a_new_store(server: Server, open_store: Open) -> None:
    """A new store's first write is one call, though others' windows were dropped before."""
    raw: Any = server.raw()
    store = await open_store("async", server)
    await store.save(session(id="s"))
    for number in range(5):
        await store.append("s", turn(str(number)))
    raw.hset(key("state"), "forgotten", 5)
    new = await open_store("async", server)
    before = runs(raw)
    assert await new.append("s", turn("new")) == 7
    assert runs(raw) == before + 1


async def test_windows_have_few_bytes(server: Server, open_store: Open) -> None:
    """Stores that end after a burst leave little behind: the windows of a partition are bounded by bytes."""
    raw: Any = server.raw()
    store = await open_store("async", server)
    await store.save(session(id="s"))
    entries = b"".join(n.to_bytes(4) + bytes(4) + (1).to_bytes(8) for n in range(1000))
    old = {b"w%012d" % n: (1).to_bytes(4) + (1000).to_bytes(4) + bytes(8) + entries for n in range(400)}
    raw.hset(key("state"), mapping=old)
    raw.hset(key("state"), "dedup_bytes", sum(map(len, windows(raw).values())))
    for number in range(60):
        await (await open_store("async", server)).append("s", turn(str(number)))
    size = sum(map(len, windows(raw).values()))
    assert size == int(raw.hget(key("state"), "dedup_bytes"))
    assert size <= 4 * 2**20


async def test_reset_does_not_settle(server: Server, open_store: Open) -> None:
    """A refusal since the counter went back leaves a lost attempt's outcome open: the counter may come to it again."""
    raw: Any = server.raw()
    store = await open_store("async", server)
    await store.save(session(id="s"))
    write, retry = append_by_hand(store, "s", "x"), Retry(expires=math.inf)
    commands = write.commands()
    raw.hset(key("state"), "revision", 0)
    replies = await store._driver.link.call(commands, asyncio.get_running_loop().time() + 5)
    with pytest.raises(StoreResetError) as caught:
        write.decode(replies)
    retry.after(ConnectionLost("", sent=True), 0.0, write)
    with pytest.raises(OutcomeUnknownError):
        retry.after(caught.value, 0.0, write)
    with pytest.raises(StoreResetError):
        Retry(expires=math.inf).after(caught.value, 0.0, write)


@pytest.mark.parametrize("harm", ["lease", "staging"])
async def test_a_foreign_key_of_one_member(server: Server, open_store: Open, harm: str) -> None:
    """In a merged call, a member whose lease or staging key has a foreign type is refused alone."""
    raw: Any = server.raw()
    store = await open_store("async", server)
    await store.save_many([session(id=id) for id in "abc"])
    operations = store._core.sessions
    held = SimpleNamespace(id="b", token=1)
    if harm == "lease":
        raw.set(key("lease:b"), "foreign")
        bad = operations.append("b", [turn("x")], None, held)
        calls = bad.commands()
    else:
        bad = next(store._core.saving.save(session(*map(str, range(20)), id="b")))
        calls = bad.commands()[-1:]
        raw.set(calls[0].keys[-1], "foreign")
    good = [append_by_hand(store, id, "x") for id in "ac"]
    members: Any = [good[0].commands()[0], calls[0], good[1].commands()[0]]
    _, _, *rest = merge(members)
    answers = raw.execute_command("EVAL", scripts.WRITE.source, *rest)
    assert [answer[0] if isinstance(answer, list) else answer for answer in (answers[0], answers[2])] == [b"OK", b"OK"]
    assert answers[1] == [b"LAYOUT", b"lease"] or "WRONGTYPE" in str(answers[1])
    assert [await contents(store, id) for id in "abc"] == [["x"], [], ["x"]]
    assert counter(raw) == 5
    assert {meta.id: meta.turn_count for meta in await store.list()} == {"a": 1, "b": 0, "c": 1}


async def test_a_script_that_is_stopped(server: Server, open_store: Open) -> None:
    """An error that stopped the script after it may have written is no refusal."""
    raw: Any = server.raw()
    store = await open_store("async", server)
    await store.save(session(id="s"))
    write = append_by_hand(store, "s", "x")
    write.commands()
    source = "redis.call('HSET', KEYS[1], 'a', 1) return redis.call('RPUSH', KEYS[1], 1)"
    replies = await store._driver.link.call([("EVAL", source, 1, key("half"))], asyncio.get_running_loop().time() + 5)
    with pytest.raises(OutcomeUnknownError):
        write.decode(replies)
    assert raw.hgetall(key("half")) == {b"a": b"1"}


@pytest.mark.parametrize("way", ["async", "sync"])
async def test_no_empty_turn(server: Server, open_store: Open, way: str) -> None:
    """A turn or section of no bytes is refused by the script, whoever sends it."""
    raw: Any = server.raw()
    store = await open_store(way, server)
    await store.save(session("a", id="s"))
    plain: Any = getattr(store, "_store", store)
    write = plain._core.sessions.append("s", [turn("x")], None, None)
    (call,) = write.commands()
    call.arguments[-1] = b""
    _, _, *rest = merge([call])
    assert raw.execute_command("EVAL", scripts.WRITE.source, *rest) == [[b"EMPTY", b"turn"]]
    write = next(plain._core.saving.save(session("b", id="s")))
    (call,) = write.commands()
    call.arguments[call.arguments.index("preferences") + 1] = b""
    _, _, *rest = merge([call])
    assert raw.execute_command("EVAL", scripts.WRITE.source, *rest) == [[b"EMPTY", b"preferences"]]
    assert await contents(store, "s") == ["a"]

"""Many calls at once: bulk methods, and thousands of separate calls; deadlines, order, and what a dead server costs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Any, TypeAlias

import pytest
import redis

from orcs_redis import (
    ConversationTurn,
    OutcomeUnknownError,
    PermissionDeniedError,
    SessionAsset,
    StorageError,
    UnavailableError,
)
from orcs_redis.transport.lifecycle import IN_FLIGHT

from .conftest import Server, Threaded
from .faults.proxy import BLACKHOLE, HOLD, Proxy, delay
from .support import turn

StartServer: TypeAlias = Callable[..., Server]
Open: TypeAlias = Callable[..., Awaitable[Any]]

forms = pytest.mark.parametrize("form", ["async", "sync"])


@pytest.fixture
def proxy(start_server: StartServer) -> Iterator[Proxy]:
    """A proxy before a server of the test's own."""
    with Proxy(start_server().port) as proxy:
        yield proxy


def url(proxy: Proxy) -> str:
    return f"redis://127.0.0.1:{proxy.port}"


def session(id: str, size: int = 10) -> SessionAsset:
    asset = SessionAsset(id=id)
    asset.add_turn(ConversationTurn.user("x" * size))
    return asset


def errors(results: list[Any]) -> list[BaseException]:
    return [result for result in results if isinstance(result, BaseException)]


def unfinished(store: Any) -> int:
    """How many writes the store says that it may send again."""
    core = (store._store if isinstance(store, Threaded) else store)._core
    return sum(len(window.unfinished) for window in core.sessions._namespace._windows)


@forms
async def test_deadlines_begin_at_sending(proxy: Proxy, open_in: Open, form: str) -> None:
    """What takes several deadlines in all succeeds, over a line that is slow but alive."""
    store = await open_in(form, url(proxy), deadline=1.5)
    assets = [session(f"s{n}", 2000) for n in range(1500)]
    ids = [asset.id for asset in assets]
    await store.save(assets[0])  # the server knows the script from now on
    proxy.strike(delay(0.04))  # for each 64 KiB, at most
    for many in (partial(store.save_many, assets), partial(store.load_many, ids)):
        begin = time.monotonic()
        assert errors(await many()) == []
        assert time.monotonic() - begin > 1.5
    if form == "async":
        for call, items in ((store.load, ids), (store.save, assets)):
            assert errors(await asyncio.gather(*map(call, items), return_exceptions=True)) == []


@forms
async def test_a_dead_server_is_waited_for_once(proxy: Proxy, open_in: Open, form: str) -> None:
    """Thousands of calls fail in about a deadline; those that were not sent are known not to have been applied."""
    store = await open_in(form, url(proxy), deadline=1.0)
    proxy.strike(BLACKHOLE, new=True)
    kinds: list[set[type]] = []
    begin = time.monotonic()
    results = await store.load_many([f"s{n}" for n in range(2000)])
    kinds.append({type(result) for result in results})
    results = await store.save_many([session(f"s{n}") for n in range(1000)])
    kinds.append({type(result) for result in results})
    if form == "async":
        appends = (store.append(f"s{n}", turn()) for n in range(2000))
        results = await asyncio.gather(*appends, return_exceptions=True)
        kinds.append({type(result) for result in results})
        assert sum(isinstance(result, OutcomeUnknownError) for result in results) <= IN_FLIGHT
    assert time.monotonic() - begin < len(kinds) * 2 * 1.0 + 2
    assert set().union(*kinds) <= {UnavailableError, OutcomeUnknownError}
    assert kinds[0] == {UnavailableError}
    assert store.sync_status().pending_uploads == 0
    assert unfinished(store) == 0
    proxy.heal()
    proxy.cut()
    assert errors(await store.save_many([session(f"s{n}") for n in range(1000)])) == []


async def test_waiting_calls_keep_their_order(proxy: Proxy, open_in: Open) -> None:
    """Calls go out in the order in which they were made, and all are counted as waiting for the server."""
    store = await open_in("async", url(proxy))
    await store.save(session("s"))
    proxy.strike(HOLD)
    tasks = [asyncio.ensure_future(store.append("s", turn(str(n)))) for n in range(1000)]
    await asyncio.sleep(0.1)
    assert store.sync_status().pending_uploads == 1000
    proxy.heal()
    await asyncio.gather(*tasks)
    assert [one.content for one in await store.turns("s", 1)] == [str(n) for n in range(1000)]
    assert store.sync_status().pending_uploads == 0


async def test_cancelled_while_waiting(proxy: Proxy, open_in: Open) -> None:
    """Who is cancelled while it waits has sent nothing, and is in nobody's way."""
    store = await open_in("async", url(proxy))
    await store.save(session("s"))
    for _ in range(2):
        proxy.strike(HOLD)
        tasks = [asyncio.ensure_future(store.append("s", turn(str(n)))) for n in range(1000)]
        await asyncio.sleep(0.05)
        for task in tasks[IN_FLIGHT::2]:
            task.cancel()
        await asyncio.sleep(0)
        assert store.sync_status().pending_uploads == IN_FLIGHT + (1000 - IN_FLIGHT) // 2
        proxy.heal()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        cancelled = {str(n) for n, result in enumerate(done) if isinstance(result, asyncio.CancelledError)}
        assert len(cancelled) == (1000 - IN_FLIGHT) // 2
        contents = [one.content for one in await store.turns("s", -(1000 - len(cancelled)))]
        assert contents == [str(n) for n in range(1000) if str(n) not in cancelled]
    assert store.sync_status().pending_uploads == 0
    assert not store._driver._waiting
    assert unfinished(store) == 0


async def test_leases_are_renewed_while_others_wait(proxy: Proxy, open_in: Open) -> None:
    """The renewal of a lease doesn't wait for thousands of calls that were made before it."""
    store = await open_in("async", url(proxy))
    await store.save(session("s"))
    with redis.Redis(port=proxy.target) as server:  # logs the order in which it got the commands
        server.config_set("slowlog-max-len", 20_000)
        server.config_set("slowlog-log-slower-than", 0)
        async with store.lease("s", ttl=3.0):
            server.slowlog_reset()
            proxy.strike(HOLD)
            loads = [asyncio.ensure_future(store.load("s")) for _ in range(5000)]
            await asyncio.sleep(1.2)  # it is renewed after a third of its ttl
            proxy.heal()
            await asyncio.gather(*loads)
            commands = [b" renew " in entry["command"] for entry in reversed(server.slowlog_get(20_000))]
    assert len(commands) > 5000 * 3
    assert commands.index(True) < 2 * IN_FLIGHT * 3  # a load is three commands


@forms
async def test_closing_while_many_are_saved(proxy: Proxy, open_in: Open, start_server: StartServer, form: str) -> None:
    """What was stored is reported as stored, and what was not begun when the store was closed as refused."""
    store = await open_in(form, url(proxy))
    peer = await open_in(form, url(proxy))
    proxy.strike(HOLD)
    saving = asyncio.ensure_future(store.save_many([session(f"s{n}") for n in range(1000)]))
    await asyncio.sleep(0.3)
    assert store.sync_status().pending_uploads >= IN_FLIGHT // 2
    closing = asyncio.ensure_future(store.aclose())
    await asyncio.sleep(0.1)
    assert not closing.done()
    proxy.heal()
    results = await saving
    await closing
    stored = {meta.id: meta.revision for meta in await peer.list()}
    assert {f"s{n}": result for n, result in enumerate(results) if isinstance(result, int)} == stored
    assert 0 < len(stored) <= IN_FLIGHT
    assert {type(error) for error in errors(results)} == {UnavailableError}


@forms
async def test_no_connection_for_good(start_server: StartServer, open_in: Open, form: str) -> None:
    """An error stands in the place of each item, also if later ones can't connect any more; nothing is left over."""
    server = start_server()
    store = await open_in(form, server.url)
    raw: Any = server.raw()
    inner = store._store if form == "sync" else store
    await store.save_many([session("s")])  # the server knows the script from now on
    call, sent = inner._driver.link.call, 0

    def lock_out(*arguments: Any) -> Any:
        nonlocal sent
        sent += 1
        if sent == (2 if form == "sync" else 400):
            raw.config_set("requirepass", "secret")
            server.password = "secret"
            server.raw().client_kill_filter(_type="normal", skipme=True)
            time.sleep(0.05)
        return call(*arguments)

    inner._driver.link.call = lock_out
    results = await store.save_many([session(f"s{n}") for n in range(1000)])
    assert len(results) == 1000
    assert all(isinstance(result, (int, StorageError)) for result in results)
    assert {type(error) for error in errors(results)} <= {PermissionDeniedError, OutcomeUnknownError}
    assert isinstance(results[-1], PermissionDeniedError)
    assert isinstance(results[0], int)
    assert unfinished(store) == 0
    assert store.sync_status().pending_uploads == 0


@forms
async def test_a_call_has_one_deadline(proxy: Proxy, open_in: Open, form: str) -> None:
    """Opening and saving take several round trips, and end in time also where each of them is slow."""
    store = await open_in(form, url(proxy), deadline=2.0)
    peer = await open_in(form, url(proxy))
    asset = session("s")
    await store.save(asset)
    await peer.append("s", turn())
    asset.metadata["x"] = 1  # not over what it was loaded from: it is sent again whole
    proxy.strike(delay(0.6), new=True)
    for call in (
        open_in(form, url(proxy), deadline=2.0, namespace="new"),
        store.save(asset),
    ):
        begin = time.monotonic()
        with pytest.raises((UnavailableError, OutcomeUnknownError)):
            await call
        assert time.monotonic() - begin < 2.0 + 1.0


async def test_a_text_is_no_collection_of_ids(store: Any) -> None:
    """A single id in the place of several is refused; its characters may be ids of sessions."""
    await store.save_many([session("a"), session("b")])
    for many in (store.load_many, store.delete_many):
        with pytest.raises(TypeError, match="collection"):
            await many("ab")
    assert len(await store.list()) == 2

"""A pool gives each event loop a store, and all threads one; what it has opened is closed with the loop or the pool."""

from __future__ import annotations

import asyncio
import gc
import os
import secrets
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import orcs_redis.sync
from orcs_redis import LocalFileStore, RedisSessionStore, SessionAsset, StorePool, SyncMode, UnavailableError
from orcs_redis.transport import embedded

from .conftest import Server

StartServer = Callable[..., Server]
forms = pytest.mark.parametrize("form", ["async", "sync"])


@pytest.fixture(params=["memory", "embedded", "redis"])
def url(request: pytest.FixtureRequest, shared_server: Server, embedded_server: embedded.Attachment) -> str:
    """A pool's URL, over each kind of server."""
    return {
        "memory": "memory://",
        "embedded": f"embedded://{embedded_server.folder}",
        "redis": shared_server.url,
    }[request.param]


def make_pool(url: str, **options: Any) -> StorePool[SessionAsset]:
    return StorePool(url, namespace=f"test-{secrets.token_hex(4)}", **options)


async def get(pool: StorePool[Any], form: str) -> Any:
    """The pool's store in a form."""
    return await pool.store() if form == "async" else await asyncio.to_thread(pool.blocking)


async def done(result: Any) -> Any:
    """What a method of either form comes to; the blocking one of a test's store takes no time."""
    return await result if asyncio.iscoroutine(result) else result


def connections(server: Server) -> int:
    """How many connections of stores a server has."""
    return sum(each["name"] == "orcs-redis" for each in server.raw().client_list())


def until(condition: Callable[[], object]) -> None:
    """Wait for a condition that needs nothing of this thread's loop."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


@forms
async def test_one_store(url: str, form: str) -> None:
    """All that ask at once, and later, get the same store."""
    pool = make_pool(url)
    first, *others = await asyncio.gather(*(get(pool, form) for _ in range(20)))
    assert all(each is first for each in (*others, await get(pool, form)))
    asset = SessionAsset.new()
    await done(first.save(asset))
    assert (await done(first.load(asset.id))).id == asset.id
    await pool.aclose()


async def test_both_forms_share_the_data(url: str) -> None:
    """What a loop's store saves, the blocking one and another loop's load; that of another `memory://` does not."""
    pool = make_pool(url)
    asset = SessionAsset.new()
    await (await pool.store()).save(asset)
    blocking = await asyncio.to_thread(pool.blocking)
    assert blocking.exists(asset.id)

    async def elsewhere() -> tuple[object, bool]:
        store = await pool.store()
        return store, await store.exists(asset.id)

    other, exists = await asyncio.to_thread(lambda: asyncio.run(elsewhere()))
    assert exists
    assert other is not await pool.store()
    another = make_pool(url)
    assert not await (await another.store()).exists(asset.id)
    await another.aclose()
    await pool.aclose()


def test_a_loop_leaves_nothing_behind(start_server: StartServer) -> None:
    """`asyncio.run` again and again: each loop has a store of its own, which is closed with it; no loop is kept."""
    server = start_server()
    pool = make_pool(server.url)
    loops = []

    async def use() -> RedisSessionStore[SessionAsset]:
        loops.append(weakref.ref(asyncio.get_running_loop()))
        store = await pool.store()
        await store.save(SessionAsset.new())
        until(lambda: connections(server) == 1)  # the server may yet have to notice that the last one was closed
        return store

    stores = [asyncio.run(use()) for _ in range(3)]
    until(lambda: connections(server) == 0)
    assert len({id(store) for store in stores}) == 3
    assert {store.sync_status().mode for store in stores} == {SyncMode.OFFLINE}
    del stores
    gc.collect()
    assert [loop() for loop in loops] == [None] * 3


def test_tasks_have_the_store_until_they_have_ended(start_server: StartServer) -> None:
    """A task that is cancelled at the loop's end can still save."""
    pool = make_pool(start_server().url)
    asset = SessionAsset.new()

    async def late() -> None:
        store = await pool.store()
        try:
            await asyncio.Event().wait()
        finally:
            await store.save(asset)

    async def main() -> None:
        task = asyncio.create_task(late())
        await asyncio.sleep(0)
        await pool.store()
        assert not task.done()

    asyncio.run(main())
    with pool:
        assert pool.blocking().exists(asset.id)


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # of asyncio: the loop is closed over a connection
def test_a_loop_that_is_just_closed(start_server: StartServer) -> None:
    """Of a loop that was closed without ending what it has, the next call lets go."""
    server = start_server()
    pool = make_pool(server.url)
    loop = asyncio.new_event_loop()
    closed = weakref.ref(loop)
    loop.run_until_complete(pool.store())
    loop.close()
    del loop

    async def next_one() -> None:
        await (await pool.store()).ping()

    asyncio.run(next_one())
    gc.collect()
    assert closed() is None
    until(lambda: connections(server) == 0)


def test_a_loop_that_goes_on_later(start_server: StartServer) -> None:
    """A loop that is run in pieces has one store."""
    pool = make_pool(start_server().url)
    with asyncio.Runner() as runner:
        store = runner.run(pool.store())
        assert runner.run(pool.store()) is store
        assert runner.run(store.ping()) > 0


async def test_a_pool_that_is_gone(start_server: StartServer) -> None:
    """What a pool has opened in a loop that goes on is closed when the pool is gone."""
    server = start_server()
    pool = make_pool(server.url)
    await pool.store()
    assert connections(server) == 1
    del pool
    gc.collect()
    await asyncio.to_thread(until, lambda: connections(server) == 0)


def test_loops_in_threads(start_server: StartServer) -> None:
    """Loops in several threads at once have stores of their own, and each closes its own."""
    server = start_server()
    pool = make_pool(server.url)
    all_there = threading.Barrier(4)

    async def use() -> object:
        store = await pool.store()
        all_there.wait(20)
        assert connections(server) == 4
        all_there.wait(20)
        for _ in range(5):
            await store.save(SessionAsset.new())
        return store

    with ThreadPoolExecutor(4) as threads:
        stores = list(threads.map(lambda _: asyncio.run(use()), range(4)))
    assert len({id(store) for store in stores}) == 4
    until(lambda: connections(server) == 0)
    with pool:
        assert len(pool.blocking().list()) == 20


_FORK = """
    import asyncio, os, sys
    from orcs_redis import ConversationTurn, SessionAsset, StorePool

    pool = StorePool(sys.argv[1], deadline=5)
    used = sys.argv[2] == "used"

    async def append(id):
        await (await pool.store()).append(id, ConversationTurn.user("x"))

    def use(id):
        pool.blocking().append(id, ConversationTurn.user("x"))
        asyncio.run(append(id))

    async def main():
        asset = SessionAsset()
        if used:
            await (await pool.store()).save(asset)
            pool.blocking()
        child = os.fork()
        if not child:
            try:
                if not used:
                    pool.blocking().save(asset)
                pool.blocking().append(asset.id, ConversationTurn.user("x"))
                asyncio._set_running_loop(None)  # as a child of blocking code is
                use(asset.id)
                pool.close()
                os._exit(7)
            except BaseException as error:
                print(repr(error))
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        await append(asset.id)
        pool.blocking().append(asset.id, ConversationTurn.user("x"))
        print(len((await (await pool.store()).load(asset.id)).history.turns))
        await pool.aclose()

    asyncio.run(main())
"""


@pytest.mark.parametrize("when", ["unused", "used"])
@pytest.mark.parametrize("kind", ["redis", "embedded"])
def test_fork(shared_server: Server, embedded_server: embedded.Attachment, kind: str, when: str) -> None:
    """A child of a fork opens anew, and leaves the parent's stores undisturbed."""
    url = shared_server.url if kind == "redis" else f"embedded://{embedded_server.folder}"
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(_FORK), url, when],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (run.stdout, run.stderr) == ("5\n", "")


@forms
async def test_errors(start_server: StartServer, form: str) -> None:
    """All that wait for an opening get its error, a dead server is waited for once; the next call tries again."""
    server = start_server()
    server.kill()
    pool = make_pool(server.url, deadline=1)
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(8))
    for _ in range(2):
        began = time.monotonic()
        errors = await asyncio.gather(*(get(pool, form) for _ in range(8)), return_exceptions=True)
        assert {type(error) for error in errors} == {UnavailableError}
        assert len({id(error) for error in errors}) == 8
        assert time.monotonic() < began + 4
    server.start()
    assert await done((await get(pool, form)).list()) == []
    await pool.aclose()


async def test_cancellation_while_opening(start_server: StartServer) -> None:
    """A task that is cancelled while it waits takes nothing from the others, and nothing is left if all are."""
    server = start_server()
    pool = make_pool(server.url, deadline=20)
    assert server.process is not None
    server.process.send_signal(signal.SIGSTOP)
    try:
        first, second = (asyncio.create_task(pool.store()) for _ in range(2))
        await asyncio.sleep(0.05)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert not second.done()
    finally:
        server.process.send_signal(signal.SIGCONT)
    assert await (await second).list() == []
    await pool.aclose()
    until(lambda: connections(server) == 0)


@pytest.mark.parametrize("end", ["aclose", "loop"])
def test_closing_while_opening(start_server: StartServer, end: str) -> None:
    """Those who wait for a store when the pool is closed get UnavailableError; the end of a loop leaves nothing."""
    server = start_server()
    pool = make_pool(server.url, deadline=20)
    assert server.process is not None

    async def main() -> None:
        task = asyncio.create_task(pool.store())
        await asyncio.sleep(0.05)
        if end == "aclose":
            await pool.aclose()
            with pytest.raises(UnavailableError, match="closed"):
                await task

    server.process.send_signal(signal.SIGSTOP)
    try:
        asyncio.run(main())
    finally:
        server.process.send_signal(signal.SIGCONT)
    gc.collect()
    until(lambda: connections(server) == 0)


@forms
async def test_closing(url: str, form: str) -> None:
    """`aclose` and `close` close the stores, and the pool opens others when it is asked again."""
    pool = make_pool(url)
    close = pool.aclose if form == "async" else partial(asyncio.to_thread, pool.close)
    await close()  # nothing was opened
    store = await get(pool, form)
    await close()
    with pytest.raises(UnavailableError, match="closed"):
        await done(store.ping())
    another = await get(pool, form)
    assert another is not store
    await done(another.ping())
    await close()
    await close()


async def test_what_is_closed(start_server: StartServer) -> None:
    """`aclose` closes this loop's store and the blocking one, `close` the latter; neither that of another loop."""
    server = start_server()
    pool = make_pool(server.url)
    used, closed = threading.Event(), threading.Event()

    async def elsewhere() -> None:
        store = await pool.store()
        used.set()
        await asyncio.to_thread(closed.wait, 20)
        assert await pool.store() is store
        await store.ping()

    other = asyncio.create_task(asyncio.to_thread(lambda: asyncio.run(elsewhere())))
    await asyncio.to_thread(used.wait, 20)
    store, blocking = await pool.store(), await asyncio.to_thread(pool.blocking)
    await asyncio.to_thread(pool.close)
    await store.ping()
    with pytest.raises(UnavailableError):
        blocking.ping()
    blocking = await asyncio.to_thread(pool.blocking)
    await asyncio.gather(pool.aclose(), pool.aclose())
    for ping in (store.ping, partial(asyncio.to_thread, blocking.ping)):
        with pytest.raises(UnavailableError):
            await ping()
    closed.set()
    await other
    until(lambda: connections(server) == 0)


@forms
async def test_a_store_closed_by_its_user(url: str, form: str) -> None:
    """One who closes the store by himself gets another at the next call."""
    pool = make_pool(url)
    store = await get(pool, form)
    await done(store.aclose() if form == "async" else store.close())
    another = await get(pool, form)
    await done(another.ping())
    gc.collect()  # what has kept the first is gone
    for _ in range(3):
        await asyncio.sleep(0)
    assert await get(pool, form) is another
    await pool.aclose()


async def test_context_managers(url: str) -> None:
    """`async with` and `with` close what `aclose` and `close` do."""
    async with make_pool(url) as pool:
        store = await pool.store()
        await store.ping()
    with pytest.raises(UnavailableError):
        await store.ping()
    with make_pool(url) as pool:
        blocking = pool.blocking()
        blocking.ping()
    with pytest.raises(UnavailableError):
        blocking.ping()


@forms
async def test_files(tmp_path: Path, form: str) -> None:
    """At a file: URL the stores are those of orcs' files."""

    class Ticket(SessionAsset):
        priority: int = 0

    pool = StorePool(f"file://{tmp_path}/made", asset_type=Ticket)
    assert not (tmp_path / "made").exists()
    store: Any = await get(pool, form)
    assert isinstance(store, LocalFileStore if form == "async" else orcs_redis.sync.LocalFileStore)
    asset = Ticket.new()
    asset.priority = 3
    await done(store.save(asset))
    assert (await done((await get(pool, form)).load(asset.id))).priority == 3
    assert await get(pool, form) is store
    await pool.aclose()


@pytest.mark.parametrize(
    ("url", "options", "error"),
    [
        ("other://", {}, ValueError),
        ("", {}, ValueError),
        (5, {}, TypeError),
        (Path("/tmp"), {}, TypeError),
        ("memory://", {"client": None}, TypeError),
        ("memory://", {"retries": 3}, TypeError),
        ("memory://", {"deadline": 0}, ValueError),
        ("memory://", {"asset_type": int}, ValueError),
        ("memory://", {"credentials": lambda: (None, "x")}, TypeError),
        ("file:///tmp", {"namespace": "n"}, TypeError),
    ],
)
def test_bad_arguments(url: Any, options: dict[str, Any], error: type[Exception]) -> None:
    """A URL or option that can't be is refused when the pool is made."""
    with pytest.raises(error):
        StorePool(url, **options)


def test_making_one_opens_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The constructor needs neither loop nor server; without a URL it is that of the environment, as it is then."""
    monkeypatch.setenv("ORCS_REDIS_URL", f"file://{tmp_path}/made")
    pool = StorePool()
    monkeypatch.delenv("ORCS_REDIS_URL")
    assert list(tmp_path.iterdir()) == []
    pool.blocking()
    assert [each.name for each in tmp_path.iterdir()] == ["made"]
    assert repr(StorePool("redis://user:secret@host", namespace="n")) == "<StorePool namespace='n'>"


def test_a_signal_handler_may_ask(start_server: StartServer) -> None:
    """A signal handler that interrupts the opening of the blocking store gets one, and there is one in the end."""
    server = start_server()
    pool = make_pool(server.url, deadline=20)
    assert server.process is not None
    got: list[object] = []

    def handler(*_: object) -> None:
        server.process.send_signal(signal.SIGCONT)  # type: ignore[union-attr]
        got.append(pool.blocking())

    before = signal.signal(signal.SIGALRM, handler)
    server.process.send_signal(signal.SIGSTOP)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        assert pool.blocking() is pool.blocking()
        assert got == [pool.blocking()]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        server.process.send_signal(signal.SIGCONT)
    pool.close()
    until(lambda: connections(server) == 0)

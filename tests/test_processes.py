"""Forks, signal handlers and finalizers: a store that is used where its thread was interrupted, or in a child."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import TypeAlias

import pytest

import orcs_redis.sync
from orcs_redis import SessionAsset, UnavailableError

from .conftest import Server

StartServer: TypeAlias = Callable[..., Server]

PRELUDE = """
    import asyncio, faulthandler, gc, itertools, os, signal, sys, threading, time
    import orcs_redis, orcs_redis.sync
    from orcs_redis import ConversationTurn, SessionAsset, StorageError, UnavailableError

    faulthandler.dump_traceback_later(30, exit=True)
    URL = sys.argv[1]
    CONNECT = orcs_redis.sync.RedisSessionStore.connect
    turn = ConversationTurn.user

    def reap(child):
        until = time.monotonic() + 10
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if time.monotonic() > until:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                raise SystemExit("the child hangs")
            time.sleep(0.01)
        assert os.waitstatus_to_exitcode(ended[1]) == 7, ended
"""


async def run(server: Server, script: str) -> None:
    """Run a script, which prints "done", in a process of its own."""
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", textwrap.dedent(PRELUDE) + textwrap.dedent(script), server.url],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.stdout == "done\n", done.stderr


@pytest.mark.parametrize("leaving", ["the block", "the watch", "all"])
async def test_fork_of_a_blocking_store_that_watches(start_server: StartServer, leaving: str) -> None:
    """The child of a fork leaves its blocks at once; the parent's connections and its watch go on undisturbed."""
    script = f"""
    LEAVING = {leaving!r}
    try:
        with orcs_redis.sync.open_store(URL) as store, orcs_redis.sync.open_store(URL) as peer:
            store.save(SessionAsset(id="s"))
            watch = store.watch(since=store.cursor())
            peer.append("s", turn("0"))
            next(watch)
            busy = threading.Thread(target=lambda: [store.append("s", turn("x")) for _ in range(300)])
            busy.start()
            for n in range(5):
                child = os.fork()
                if not child:
                    for use in (store.load, store.exists, lambda id: next(store.watch()),
                                lambda id: store.wait_for(id, revision=1, timeout=1), lambda id: store.leases()):
                        try:
                            use("s")
                        except RuntimeError as error:
                            assert "fork" in str(error)
                        else:
                            os._exit(1)
                    if LEAVING != "the block":
                        watch.close()
                    if LEAVING == "all":
                        store.close()
                        peer.close()
                    if LEAVING != "the watch":
                        raise SystemExit(7)
                    os._exit(7)
                begin = time.monotonic()
                reap(child)
                assert time.monotonic() - begin < 3
                marker = peer.append("s", turn(str(n)))
                assert any(change.revision >= marker for change in watch)
            busy.join()
            assert len(store.turns("s")) == 306
    except SystemExit:
        os._exit(7)  # faulthandler's own thread would keep the child
    print("done")
    """
    await run(start_server(), script)


async def test_fork_of_an_asyncio_store_that_watches(start_server: StartServer) -> None:
    """The same in asyncio: closing in the child returns at once, and touches nothing of the parent's."""
    script = """
    async def main():
        async with orcs_redis.open_store(URL) as store, orcs_redis.open_store(URL) as peer:
            await store.save(SessionAsset(id="s"))
            changes = asyncio.Queue()

            async def watch():
                async for change in store.watch():
                    changes.put_nowait(change)

            watching = asyncio.ensure_future(watch())
            await asyncio.sleep(0.2)
            for n in range(5):
                calls = [asyncio.ensure_future(store.append("s", turn("x"))) for _ in range(20)]
                await asyncio.sleep(0)
                child = os.fork()
                if not child:
                    begin = time.monotonic()
                    try:
                        await store.load("s")
                    except RuntimeError:
                        await store.aclose()
                        await peer.aclose()
                        os._exit(7 if time.monotonic() - begin < 2 else 2)
                    os._exit(1)
                reap(child)
                await asyncio.gather(*calls)
                marker = await peer.append("s", turn(str(n)))
                while (await asyncio.wait_for(changes.get(), 10)).revision < marker:
                    pass
            assert len(await store.turns("s")) == 105
            watching.cancel()

    asyncio.run(main())
    print("done")
    """
    await run(start_server(), script)


USES = {
    "append": "store.append('s', turn('main'))",
    "save": "store.save(SessionAsset(id=f'new-{next(numbers)}'))",
    "load": "store.load('s')",
    "save_many": "store.save_many([SessionAsset(id=f'new-{next(numbers)}') for _ in range(40)])",
    "watch": "next(watch)",
    "wait_for": "store.wait_for('s', revision=1, timeout=5)",
    "lease": "lease(store)",
    "open and close": "CONNECT(URL, namespace='orcs').close()",
}


@pytest.mark.parametrize("use", USES)
async def test_a_signal_handler_uses_the_store(start_server: StartServer, use: str) -> None:
    """Wherever a thread was interrupted, a handler can append, load and close a store: nothing waits for itself."""
    script = f"""
    def lease(store):
        with store.lease("s", wait=0.5):
            pass

    store = CONNECT(URL, deadline=5)
    store.save(SessionAsset(id="s"))
    watch = store.watch(since=store.cursor())
    numbers = itertools.count()
    handled = 0

    def handler(*_):
        global handled
        store.append("s", turn("handler"))
        store.sync_status()
        handled += 1
        if time.monotonic() < until:
            signal.setitimer(signal.ITIMER_REAL, 0.0017)  # not at intervals, which a slow machine can't keep up with

    signal.signal(signal.SIGALRM, handler)
    until = time.monotonic() + 2
    signal.setitimer(signal.ITIMER_REAL, 0.001)
    while time.monotonic() < until:
        {USES[use]}
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert handled > 20, handled
    assert store.sync_status().pending_uploads == 0
    assert not store._driver.lifecycle.active
    contents = [one.content for one in store.turns("s")]
    assert contents.count("handler") == handled
    signal.signal(signal.SIGALRM, lambda *_: store.close())
    begin = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    try:
        while not store._driver.lifecycle.closed:
            {USES[use]}
    except (UnavailableError, StopIteration):
        pass
    assert time.monotonic() - begin < 10
    print("done")
    """
    await run(start_server(), script)


async def test_exceptions_out_of_signal_handlers_leave_nothing_behind(start_server: StartServer) -> None:
    """Whatever an exception interrupts, the store's books are right afterwards, and close waits for nothing."""
    script = """
    class Limit(Exception):
        pass

    def handler(*_):
        raise Limit

    store = CONNECT(URL, deadline=5)
    store.save(SessionAsset(id="s"))
    signal.signal(signal.SIGALRM, handler)
    assets = [SessionAsset(id=f"m{n}") for n in range(20)]
    uses = itertools.cycle([
        lambda: store.append("s", turn("main")),
        lambda: store.load("s"),
        lambda: store.save(SessionAsset(id="t")),
        lambda: store.save_many(assets),
        lambda: store.load_many(["s", "t", "m1"]),
        lambda: store.list(limit=5),
    ])
    until = time.monotonic() + 3
    struck = 0
    for n in itertools.count():
        if time.monotonic() > until:
            break
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.00005 + n % 97 * 0.00002)
            next(uses)()
            signal.setitimer(signal.ITIMER_REAL, 0)
        except Limit:
            struck += 1
        finally:
            while True:
                try:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    break
                except Limit:
                    struck += 1
    assert struck > 100, struck
    assert not store._driver.lifecycle.active, store._driver.lifecycle.active
    assert store.sync_status().pending_uploads == 0
    thread = threading.Thread(target=store.close)
    begin = time.monotonic()
    thread.start()
    thread.join()
    assert time.monotonic() - begin < 2
    print("done")
    """
    await run(start_server(), script)


async def test_a_finalizer_uses_the_store(start_server: StartServer) -> None:
    """Garbage is collected wherever something is allocated, in the thread that receives changes as well."""
    script = """
    store = CONNECT(URL, deadline=5)
    other = CONNECT(URL, deadline=2)
    store.save(SessionAsset(id="s"))
    finalized = 0

    class Final:
        def __init__(self):
            self.itself = self

        def __del__(self):
            global finalized
            store.append("s", turn("finalizer"))
            finalized += 1

    watch = store.watch(since=store.cursor())
    gc.set_threshold(50, 2, 2)
    for n in range(200):
        Final()
        store.append("s", turn("main"))
        next(watch)
    gc.set_threshold(100000)
    contents = [one.content for one in store.turns("s")]
    assert finalized > 20, finalized
    assert contents.count("finalizer") == finalized
    assert contents.count("main") == 200

    # A store that is closed by the thread that its changes come in.
    closed = threading.Event()
    other._driver.listen({"channel": lambda message: None})
    other._driver._listeners[0].call(lambda: (other.close(), closed.set()))
    assert closed.wait(10)
    store.close()
    print("done")
    """
    await run(start_server(), script)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Python's own, in a callback of its gc
@pytest.mark.parametrize("kind", [UnavailableError, StopIteration])
def test_what_a_handler_raises_is_no_answer(start_server: Callable[..., Server], kind: type[Exception]) -> None:
    """A handler's error of a kind that the store uses itself reaches the caller; it is not taken for an answer."""

    def strike(*_: object) -> None:
        raise kind("by the handler")

    before = signal.signal(signal.SIGPROF, strike)
    raised = 0
    try:
        with orcs_redis.sync.open_store(start_server().url) as store:
            assets = [SessionAsset(id=f"s{n}") for n in range(300)]
            store.save_many(assets)
            for call in (
                lambda: store.save_many(assets),
                lambda: store.update("s1", SessionAsset.touch),
                store.list,
            ) * 40:
                answer: object = None
                try:
                    signal.setitimer(signal.ITIMER_PROF, random.uniform(0.0005, 0.006))
                    answer = call()
                except (kind, RuntimeError):  # a generator makes the latter of StopIteration
                    raised += 1
                finally:
                    signal.setitimer(signal.ITIMER_PROF, 0)
                assert "by the handler" not in repr(answer)
    except kind:
        pass  # it struck at the very end
    finally:
        signal.signal(signal.SIGPROF, before)
    assert raised > 5


def test_closed_standard_streams(start_server: Callable[..., Server]) -> None:
    """What a daemon without standard streams prints does not go over a store's connection."""
    program = """if True:
        import os, sys, orcs_redis.sync
        for number in (0, 1, 2):
            os.close(number)
        with orcs_redis.sync.open_store(sys.argv[1]) as store:
            store.save(orcs_redis.SessionAsset(id="s"))
            for number in (0, 1, 2):
                try:
                    os.write(number, b"PING\\r\\n")
                except OSError:
                    continue
                os._exit(10 + number)
        os._exit(0)
    """
    run = subprocess.run([sys.executable, "-c", program, start_server().url], timeout=30, check=False)
    assert run.returncode == 0

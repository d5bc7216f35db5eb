"""What watching costs and how quick it is: python -m benchmarks.watching.

On a redis-server of its own. Watchers are in other processes than writers; moments are of the monotonic clock, which
all processes of a machine share.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any

import msgspec
import redis.asyncio
from rich.console import Console

from orcs_redis import ConversationTurn, RedisSessionStore, SessionAsset
from orcs_redis import sync as blocking
from orcs_redis.transport.embedded import find_server
from tests.faults.proxy import BLACKHOLE, Proxy

from .report import Figure, Run, Target, document, show
from .servers import Server

Store = RedisSessionStore[SessionAsset]
Say = Callable[[str], None]


def turn() -> ConversationTurn:
    return ConversationTurn.user("a turn of a few words, as in a conversation")


# Child processes: they say "ready", and in the end one line of JSON


async def watch_child(url: str, namespace: str, count: int) -> None:
    """Watch, and tell when which revision came."""
    times: list[tuple[int, int]] = []
    async with await RedisSessionStore.connect(url, namespace=namespace) as store:
        since = await store.cursor()
        print("ready", flush=True)
        begin = cpu = 0.0
        async for change in store.watch(since=since):
            if not times:
                begin, cpu = time.monotonic(), time.process_time()
            times.append((change.revision, time.monotonic_ns()))
            if change.id == "end" or len(times) == count:
                break
        spent = {"cpu": time.process_time() - cpu, "seconds": time.monotonic() - begin}
    print(json.dumps({"times": times, **spent}))


async def subscribe_child(url: str, channel: str, count: int) -> None:
    """Subscribe with redis-py, and tell when which message came."""
    times = []
    client = redis.asyncio.Redis.from_url(url)
    async with client.pubsub() as pubsub:
        await pubsub.subscribe(channel)
        async for message in pubsub.listen():
            if message["type"] == "subscribe":
                print("ready", flush=True)
                continue
            times.append((int(message["data"][:8]), time.monotonic_ns()))
            if len(times) == count:
                break
    await client.aclose()
    print(json.dumps({"times": times}))


async def crowd_child(url: str, namespace: str, count: int) -> None:
    """Watch with so many stores until the parent closes our input."""
    async with contextlib.AsyncExitStack() as stack:
        stores = [
            await stack.enter_async_context(await RedisSessionStore.connect(url, namespace=namespace))
            for _ in range(count)
        ]

        async def watch(store: Store) -> None:
            async for _ in store.watch():
                pass

        tasks = [asyncio.create_task(watch(store)) for store in stores]
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        for task in tasks:
            task.cancel()
    print("{}")


async def write_child(url: str, namespace: str, count: int) -> None:
    """Append from 50 tasks, as quickly as it goes."""
    async with await RedisSessionStore.connect(url, namespace=namespace) as store:
        print("ready", flush=True)
        sys.stdin.readline()
        numbers = itertools.count()
        begin = time.monotonic()

        async def work() -> None:
            while (number := next(numbers)) < count:
                await store.append(f"s{number % 1000}", turn())

        await asyncio.gather(*(work() for _ in range(50)))
        seconds = time.monotonic() - begin
        revision = await store.save(SessionAsset(id="end"))
    print(json.dumps({"seconds": seconds, "revision": revision, "at": time.monotonic_ns()}))


CHILDREN: dict[str, Callable[[str, str, int], Awaitable[None]]] = {
    "watch": watch_child,
    "subscribe": subscribe_child,
    "crowd": crowd_child,
    "write": write_child,
}


class Child:
    """One of them, running."""

    def __init__(self, kind: str, *arguments: object) -> None:
        command = [sys.executable, "-m", "benchmarks.watching", "--child", kind, *map(str, arguments)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    async def _line(self) -> str:
        assert self._process.stdout is not None
        return await asyncio.wait_for(asyncio.to_thread(self._process.stdout.readline), 120)

    async def ready(self) -> None:
        if await self._line() != "ready\n":
            raise SystemExit("a child process failed")

    def go(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    async def result(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(await self._line())
        return found

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextlib.asynccontextmanager
async def child(kind: str, *arguments: object) -> AsyncIterator[Child]:
    """Start one, wait until it is ready, end it."""
    process = Child(kind, *arguments)
    try:
        await process.ready()
        yield process
    finally:
        process.close()


class Bench:
    """A server, and how often to repeat what is measured."""

    def __init__(self, server: Server, quick: bool, say: Say) -> None:
        self.server = server
        self.quick = quick
        self.say = say

    @contextlib.asynccontextmanager
    async def open(self, sessions: int) -> AsyncIterator[tuple[str, Store]]:
        """Open a store on a new namespace of so many sessions, of one turn each."""
        namespace = self.server.namespace()
        with blocking.RedisSessionStore.connect(self.server.url, namespace=namespace) as store:
            for at in range(0, sessions, 1000):
                assets = [SessionAsset(id=f"s{n}") for n in range(at, min(at + 1000, sessions))]
                store.save_many(assets)
        async with await RedisSessionStore.connect(self.server.url, namespace=namespace) as writer:
            yield namespace, writer

    async def subscribed(self, namespace: str, count: int) -> None:
        """Wait until so many have subscribed."""
        client: Any = self.server.client
        while client.pubsub_numsub(f"{{{namespace}/0}}:changes")[0][1] != count:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def percentile(values: Sequence[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]


async def latency(bench: Bench) -> list[Figure]:
    """1: from the write to the peer's loop, beside a bare PUBLISH and a bare subscriber; they take turns."""
    bench.say("1: latency")
    count, channel = 600 if bench.quick else 3000, "bench-bare"
    url = bench.server.plain
    called: dict[str, dict[int, int]] = {"watch": {}, "bare": {}}
    returned: dict[str, dict[int, int]] = {"watch": {}, "bare": {}}
    async with (
        bench.open(50) as (namespace, store),
        redis.asyncio.Redis.from_url(url) as client,
        child("watch", bench.server.url, namespace, count) as watching,
        child("subscribe", url, channel, count) as listening,
    ):
        await bench.subscribed(namespace, 1)
        for n in range(count):
            begin = time.monotonic_ns()
            revision = await store.append(f"s{n % 50}", turn())
            returned["watch"][revision] = time.monotonic_ns()
            called["watch"][revision] = begin
            await asyncio.sleep(0.002)
            message = b"%08d" % n + b"x" * 30  # as long as a change's
            begin = time.monotonic_ns()
            await client.publish(channel, message)
            returned["bare"][n] = time.monotonic_ns()
            called["bare"][n] = begin
            await asyncio.sleep(0.002)
        told = {"watch": await watching.result(), "bare": await listening.result()}

    def micros(who: str, begins: dict[str, dict[int, int]]) -> list[float]:
        return [(at - begins[who][number]) / 1000 for number, at in told[who]["times"]]

    # A subscriber mostly has a message before redis-py has read the reply to its PUBLISH: its call is the beginning.
    bare = micros("bare", called)
    figures = []
    for name, ours in (
        ("acknowledged write to the peer's loop", micros("watch", returned)),
        ("call of the write to the peer's loop", micros("watch", called)),
    ):
        p50, p99 = ({"watch": percentile(ours, part), "bare": percentile(bare, part)} for part in (0.5, 0.99))
        figures.append(
            Figure(
                number=1,
                name=f"{name}, p50, against call of PUBLISH to subscriber",
                measured=p50["watch"] / p50["bare"],
                target=Target("at most", 1.5),
                note=f"µs p50 {p50['watch']:.0f} and {p50['bare']:.0f}; p99 {p99['watch']:.0f} and {p99['bare']:.0f}",
                detail={"p50_us": p50, "p99_us": p99, "told": len(ours)},
            )
        )
    return figures


async def rate(bench: Bench) -> list[Figure]:
    """2: one watcher, while another process writes as quickly as it can."""
    bench.say("2: rate")
    count = 10_000 if bench.quick else 60_000
    async with (
        bench.open(1000) as (namespace, _),
        child("watch", bench.server.url, namespace, 10**9) as watching,
        child("write", bench.server.url, namespace, count) as writing,
    ):
        await bench.subscribed(namespace, 1)
        writing.go()
        wrote, told = await writing.result(), await watching.result()
    changes = len(told["times"])
    lag = (told["times"][-1][1] - wrote["at"]) / 1e6
    return [
        Figure(
            number=2,
            name="changes told to one watcher while 50 tasks write",
            measured=changes / told["seconds"],
            unit="/s",
            note=f"{changes:,} of {count + 1:,} writes, {count / wrote['seconds']:,.0f} writes/s; "
            f"the last one {lag:.1f} ms after its acknowledgement",
            detail={"lag_ms": lag, "changes": changes, "writes": count + 1},
        ),
        Figure(
            number=2,
            name="changes for which one core would do, by the watcher's CPU",
            measured=changes / told["cpu"],
            unit="/s",
            note=f"{told['cpu'] / changes * 1e6:.1f} µs of CPU for each",
        ),
    ]


async def catch_up(bench: Bench) -> list[Figure]:
    """3: a watch resumed after many changes."""
    total, changed = (20_000, 2_000) if bench.quick else (100_000, 10_000)
    bench.say(f"3: catching up, {total:,} sessions")
    async with bench.open(total) as (namespace, store):
        since = await store.cursor()
        step = total // changed
        for at in range(0, changed, 500):
            await asyncio.gather(*(store.append(f"s{n * step}", turn()) for n in range(at, at + 500)))
        seconds, server = [], []
        for _ in range(3 if bench.quick else 7):
            async with await RedisSessionStore.connect(bench.server.url, namespace=namespace) as watcher:
                _, before = bench.server.calls("evalsha")
                begin = time.monotonic()
                seen = 0
                async with contextlib.aclosing(watcher.watch(since=since)) as changes:
                    async for _ in changes:
                        seen += 1
                        if seen == changed:
                            break
                seconds.append(time.monotonic() - begin)
                server.append((bench.server.calls("evalsha")[1] - before) / 1000)
        polled = await store.changes(since, changed)
    assert len(polled) == changed
    return [
        Figure(
            number=3,
            name=f"catching up on {changed:,} changed sessions among {total:,}",
            measured=statistics.median(seconds) * 1000,
            unit="ms",
            spread=(min(seconds) * 1000, max(seconds) * 1000),
            note=f"of which {statistics.median(server):.0f} ms of the server's CPU, in scripts of 1,000 each",
        )
    ]


async def server_cost(bench: Bench) -> list[Figure]:
    """4: what watchers add to a write, in the server."""
    writes = 500 if bench.quick else 2000
    crowds = (0, 10, 100)
    rounds = 2 if bench.quick else 4
    cpu: dict[int, list[float]] = {crowd: [] for crowd in crowds}
    script: dict[int, list[float]] = {crowd: [] for crowd in crowds}
    async with bench.open(50) as (namespace, store):
        for _, crowd in itertools.product(range(rounds), crowds):
            bench.say(f"4: {crowd} watchers")
            async with child("crowd", bench.server.url, namespace, crowd):
                await bench.subscribed(namespace, crowd)
                await asyncio.sleep(0.2)
                before, (calls, usec) = bench.server.cpu(), bench.server.calls("evalsha")
                for n in range(writes):
                    await store.append(f"s{n % 50}", turn())
                after, (more, further) = bench.server.cpu(), bench.server.calls("evalsha")
                cpu[crowd].append((after - before) / writes * 1e6)
                script[crowd].append((further - usec) / (more - calls))
    alone = statistics.median(cpu[0])
    return [
        Figure(
            number=4,
            name=f"server's CPU of one append with {crowd} watchers",
            measured=statistics.median(cpu[crowd]),
            unit="µs",
            spread=(min(cpu[crowd]), max(cpu[crowd])),
            note=f"in the script {statistics.median(script[crowd]):.1f} µs"
            + (f"; {(statistics.median(cpu[crowd]) - alone) / crowd:.2f} µs for each watcher" if crowd else ""),
        )
        for crowd in crowds
    ]


async def half_open(bench: Bench) -> list[Figure]:
    """5: how soon a watcher is told of what was written after its connection went dead without a word."""
    figures = []
    port = int(bench.server.url.rpartition(":")[2].partition("/")[0])
    for heartbeat, repeats in ((1.0, 3), (5.0, 1)) if bench.quick else ((1.0, 8), (5.0, 4)):
        bench.say(f"5: half-open, heartbeat {heartbeat:.0f} s")
        took = []
        async with bench.open(1) as (namespace, store):
            for n in range(repeats):
                with Proxy(port) as proxy:
                    url = f"redis://127.0.0.1:{proxy.port}/0"
                    async with await RedisSessionStore.connect(
                        url, namespace=namespace, heartbeat=heartbeat
                    ) as watcher:
                        changes = watcher.watch()
                        first = asyncio.ensure_future(anext(changes))
                        await bench.subscribed(namespace, 1)
                        # At another time between two heartbeats each time.
                        await asyncio.sleep(0.1 + heartbeat / 2 * n / repeats)
                        proxy.strike(BLACKHOLE, feeds=True)
                        begin = time.monotonic()
                        await store.append("s0", turn())
                        await first
                        took.append(time.monotonic() - begin)
                        await changes.aclose()
                await bench.subscribed(namespace, 0)
        figures.append(
            Figure(
                number=5,
                name=f"half-open connection noticed, at a heartbeat of {heartbeat:.0f} s: worst",
                measured=max(took),
                unit="s",
                spread=(min(took), max(took)),
                target=Target("at most", heartbeat + 0.1),
                note="from the write that did not come to its delivery, reconnected or not",
            )
        )
    return figures


FIGURES: dict[int, Callable[[Bench], Awaitable[list[Figure]]]] = {
    1: latency,
    2: rate,
    3: catch_up,
    4: server_cost,
    5: half_open,
}


@contextlib.contextmanager
def own_server() -> Iterator[Server]:
    """Start a redis-server on a free port: watchers come over TCP, as those on other machines do."""
    binary = shutil.which("redis-server") or str(find_server())
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="orcs-bench-") as folder:
        command = [binary, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            for _ in range(500):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                time.sleep(0.02)
            url = f"redis://127.0.0.1:{port}/0"
            server = Server("redis", url, url)
            yield server
            server.client.close()
        finally:
            process.kill()
            process.wait()


async def measure(bench: Bench, wanted: Sequence[int]) -> list[Figure]:
    figures = []
    for number, function in FIGURES.items():
        if not wanted or number in wanted:
            figures += await function(bench)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.watching", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    parser.add_argument("--quick", action="store_true", help="fewer repeats, 20,000 sessions")
    parser.add_argument("--figure", action="append", type=int, choices=list(FIGURES), default=[], help="only this")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        kind, url, name, count = arguments.child
        run: Any = CHILDREN[kind](url, name, int(count))
        asyncio.run(run)
        return
    progress = Console(stderr=True, highlight=False)
    started = time.monotonic()

    def say(text: str) -> None:
        progress.print(f"[dim]{time.monotonic() - started:6.1f} s  {text}[/]")

    with own_server() as server:
        figures = asyncio.run(measure(Bench(server, arguments.quick, say), arguments.figure))
        result = document("watching", arguments.quick, [Run(server.name, server.version, figures)])
    if arguments.json:
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n")
    else:
        show(result, Console(width=None if sys.stdout.isatty() else 200))


if __name__ == "__main__":
    main()

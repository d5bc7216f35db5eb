"""What several processes do to each other: writers that meet, and watchers, which are in other processes than writers.

Moments are of the monotonic clock, which all processes of a machine share.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import Any

import redis.asyncio

from orcs_redis import ConversationTurn, RedisSessionStore, SessionAsset
from tests.faults.proxy import BLACKHOLE, Proxy

from ..harness import in_turns, medians, ratio, spread
from ..processes import Process, go, race, ready
from ..report import Figure, at_most
from .bench import Bench, Store, figure, fill


def turn() -> ConversationTurn:
    return ConversationTurn.user("a turn of a few words, as in a conversation")


@asynccontextmanager
async def _open(bench: Bench, sessions: int) -> AsyncIterator[tuple[str, Store]]:
    """Open a store on a new namespace of so many sessions."""
    namespace = bench.server.namespace()
    async with await RedisSessionStore.connect(bench.tcp, namespace=namespace) as store:
        await fill(store, [SessionAsset(id=f"s{n}") for n in range(sessions)])
        yield namespace, store


async def _subscribed(bench: Bench, namespace: str, count: int) -> None:
    """Wait until so many watch."""
    client: Any = bench.server.client
    while True:
        channels = client.pubsub_channels(f"{{{namespace}/*")
        if sum(number for _, number in client.pubsub_numsub(*channels)) == count:
            return
        await asyncio.sleep(0.01)


@figure(14)
async def latency(bench: Bench) -> AsyncIterator[Figure]:
    """From a write to the loop of a watching process, p50: at most 1.5 times a bare PUBLISH to a bare subscriber.

    From the write's acknowledgement and from its call; of PUBLISH from the call, since a subscriber mostly has a
    message before redis-py has read the reply. They take turns.
    """
    count, channel = bench.often(3000, 600), "bench-bare"
    called: dict[str, dict[int, int]] = {"watch": {}, "bare": {}}
    acknowledged: dict[int, int] = {}
    async with (
        _open(bench, 50) as (namespace, store),
        redis.asyncio.Redis.from_url(bench.tcp) as client,
    ):
        with (
            Process(f"{__name__}:watch", bench.tcp, namespace, count) as watching,
            Process(f"{__name__}:subscribe", bench.tcp, channel, count) as listening,
        ):
            watching.ready()
            listening.ready()
            await _subscribed(bench, namespace, 1)
            for n in range(count):
                begin = time.monotonic_ns()
                revision = await store.append(f"s{n % 50}", turn())
                acknowledged[revision], called["watch"][revision] = time.monotonic_ns(), begin
                await asyncio.sleep(0.002)
                called["bare"][n] = time.monotonic_ns()
                await client.publish(channel, b"%08d" % n + b"x" * 30)  # as long as a change's
                await asyncio.sleep(0.002)
            seen = {"watch": (await asyncio.to_thread(watching.answer))["times"], "bare": listening.answer()}

    def micros(side: str, begins: dict[int, int]) -> list[float]:
        return sorted((at - begins[number]) / 1000 for number, at in seen[side])

    bare = micros("bare", called["bare"])
    for name, begins in (("acknowledged write", acknowledged), ("call of the write", called["watch"])):
        ours = micros("watch", begins)
        yield Figure(
            f"{name} to the peer's loop, p50, against call of PUBLISH to subscriber",
            statistics.median(ours) / statistics.median(bare),
            target=at_most(1.5),
            detail={
                "p50 µs": medians({"watch": ours, "bare": bare}),
                "p99 µs": {side: values[len(values) * 99 // 100] for side, values in (("watch", ours), ("bare", bare))},
            },
        )


async def watch(url: str, namespace: str, count: str) -> dict[str, Any]:
    """Watch so many changes, or until the session "end" is saved; return when which revision came."""
    times: list[tuple[int, int]] = []
    async with await RedisSessionStore.connect(url, namespace=namespace) as store:
        since = await store.cursor()
        ready()
        begin = cpu = 0.0
        async for change in store.watch(since=since):
            if not times:
                begin, cpu = time.monotonic(), time.process_time()
            times.append((change.revision, time.monotonic_ns()))
            if change.id == "end" or len(times) == int(count):
                break
        return {"times": times, "cpu": time.process_time() - cpu, "seconds": time.monotonic() - begin}


async def subscribe(url: str, channel: str, count: str) -> Sequence[tuple[int, int]]:
    """Subscribe with redis-py; return when which message came."""
    times: list[tuple[int, int]] = []
    async with redis.asyncio.Redis.from_url(url) as client, client.pubsub() as pubsub:
        await pubsub.subscribe(channel)
        async for message in pubsub.listen():
            if message["type"] == "subscribe":
                ready()
                continue
            times.append((int(message["data"][:8]), time.monotonic_ns()))
            if len(times) == int(count):
                break
    return times


@figure(15)
async def rate(bench: Bench) -> AsyncIterator[Figure]:
    """Changes that one watcher gets while another process writes as quickly as it can, and what they cost it."""
    count = bench.often(60_000, 10_000)
    async with _open(bench, 1000) as (namespace, _):
        with (
            Process(f"{__name__}:watch", bench.tcp, namespace, -1) as watching,
            Process(f"{__name__}:write", bench.tcp, namespace, count) as writing,
        ):
            watching.ready()
            writing.ready()
            await _subscribed(bench, namespace, 1)
            writing.go()
            wrote, found = [await asyncio.to_thread(process.answer) for process in (writing, watching)]
    changes = len(found["times"])
    lag = (found["times"][-1][1] - wrote["at"]) / 1e6
    yield Figure(
        "changes that one watcher gets while 50 tasks write",
        changes / found["seconds"],
        unit="/s",
        detail={"writes a second": count / wrote["seconds"], "ms of the last after its acknowledgement": lag},
        note=f"{changes:,} of {count + 1:,} writes",
    )
    yield Figure(
        "changes for which one core would do, by the watcher's CPU",
        changes / found["cpu"],
        unit="/s",
        detail={"µs of CPU for each": found["cpu"] / changes * 1e6},
    )


async def write(url: str, namespace: str, count: str) -> dict[str, Any]:
    """Append from 50 tasks, as quickly as it goes, and save the session "end"."""
    async with await RedisSessionStore.connect(url, namespace=namespace) as store:
        ready()
        await go()
        numbers = iter(range(int(count)))
        begin = time.monotonic()

        async def work() -> None:
            for number in numbers:
                await store.append(f"s{number % 1000}", turn())

        await asyncio.gather(*(work() for _ in range(50)))
        seconds = time.monotonic() - begin
        await store.save(SessionAsset(id="end"))
    return {"seconds": seconds, "at": time.monotonic_ns()}


@figure(16)
async def catch_up(bench: Bench) -> AsyncIterator[Figure]:
    """A watch resumed after 10,000 of 100,000 sessions have changed: the time, and the server's CPU in it."""
    total, changed = bench.often(100_000, 20_000), bench.often(10_000, 2_000)
    async with _open(bench, total) as (namespace, store):
        since = await store.cursor()
        ids = [f"s{n}" for n in range(0, total, total // changed)]
        for at in range(0, changed, 500):
            await asyncio.gather(*(store.append(id, turn()) for id in ids[at : at + 500]))
        took, server = [], []
        for _ in range(bench.often(7, 3)):
            async with await RedisSessionStore.connect(bench.tcp, namespace=namespace) as watcher:
                before, begin = bench.server.usec("evalsha"), time.monotonic()
                async with aclosing(watcher.watch(since=since)) as changes:
                    for _ in range(changed):
                        await anext(changes)
                took.append((time.monotonic() - begin) * 1000)
                server.append((bench.server.usec("evalsha") - before) / 1000)
        assert len(await store.changes(since, changed)) == changed
    yield Figure(
        f"catching up on {changed:,} changed sessions among {total:,}",
        *spread(took),
        unit="ms",
        detail={"ms of the server's CPU, in scripts of 1,000 each": statistics.median(server)},
    )


@figure(17)
async def crowds(bench: Bench) -> AsyncIterator[Figure]:
    """The server's CPU for an append while 0, 10 and 100 watch, and of that in the script."""
    writes = bench.often(2000, 500)
    cpu: dict[int, list[float]] = {0: [], 10: [], 100: []}
    script: dict[int, list[float]] = {crowd: [] for crowd in cpu}
    async with _open(bench, 50) as (namespace, store):
        for crowd in in_turns(cpu, bench.often(4, 2)):
            with Process(f"{__name__}:watchers", bench.tcp, namespace, crowd) as watching:
                watching.ready()
                await _subscribed(bench, namespace, crowd)
                await asyncio.sleep(0.2)
                before, usec = bench.server.cpu(), bench.server.usec("evalsha")
                for n in range(writes):
                    await store.append(f"s{n % 50}", turn())
                cpu[crowd].append((bench.server.cpu() - before) / writes * 1e6)
                script[crowd].append((bench.server.usec("evalsha") - usec) / writes)
            await _subscribed(bench, namespace, 0)
    for crowd, values in cpu.items():
        detail: dict[str, float | dict[str, float]] = {"in the script": statistics.median(script[crowd])}
        if crowd:
            detail["for each watcher"] = (statistics.median(values) - statistics.median(cpu[0])) / crowd
        yield Figure(f"server's CPU of one append with {crowd} watchers", *spread(values), unit="µs", detail=detail)


@figure(27)
async def bystanders(bench: Bench) -> AsyncIterator[Figure]:
    """The server's CPU for an append while 100 watch other sessions: at most 1.1 times that with nobody watching."""
    writes = bench.often(2000, 500)
    cpu: dict[int, list[float]] = {0: [], 100: []}
    async with _open(bench, 51) as (namespace, store):
        for crowd in in_turns(cpu, bench.often(11, 5)):
            with Process(f"{__name__}:watchers", bench.tcp, namespace, crowd, "s50") as watching:
                watching.ready()
                await _subscribed(bench, namespace, crowd)
                await asyncio.sleep(0.2)
                before = bench.server.cpu()
                for n in range(writes):
                    await store.append(f"s{n % 50}", turn())
                cpu[crowd].append((bench.server.cpu() - before) / writes * 1e6)
            await _subscribed(bench, namespace, 0)
    yield Figure(
        "server's CPU of one append, 100 watchers of other sessions against none",
        *ratio(cpu[100], cpu[0]),
        target=at_most(1.1),
        detail={"µs": {str(crowd): statistics.median(values) for crowd, values in cpu.items()}},
    )


async def watchers(url: str, namespace: str, count: str, *ids: str) -> None:
    """Watch with so many stores, until this process is ended: these sessions, or all if there are none."""

    async def watch(store: Store) -> None:
        async for _ in store.watch(ids=ids or None):
            pass

    async with AsyncExitStack() as stack:
        stores: list[Store] = [
            await stack.enter_async_context(await RedisSessionStore.connect(url, namespace=namespace))
            for _ in range(int(count))
        ]
        ready()
        await asyncio.gather(*map(watch, stores), go())


@figure(18)
async def half_open(bench: Bench) -> AsyncIterator[Figure]:
    """From a write to its delivery after the watcher's connection went dead: at most the heartbeat and 0.1 s."""
    port = int(bench.tcp.rpartition(":")[2].partition("/")[0])
    for heartbeat, repeats in ((1.0, bench.often(8, 3)), (5.0, bench.often(4, 1))):
        took = []
        async with _open(bench, 1) as (namespace, store):
            for n in range(repeats):
                with Proxy(port) as proxy:
                    url = f"redis://127.0.0.1:{proxy.port}/0"
                    async with await RedisSessionStore.connect(
                        url, namespace=namespace, heartbeat=heartbeat
                    ) as watcher:
                        changes = watcher.watch()
                        first = asyncio.ensure_future(anext(changes))
                        await _subscribed(bench, namespace, 1)
                        # At another time between two heartbeats each time.
                        await asyncio.sleep(0.1 + heartbeat / 2 * n / repeats)
                        proxy.strike(BLACKHOLE, feeds=True)
                        begin = time.monotonic()
                        await store.append("s0", turn())
                        await first
                        took.append(time.monotonic() - begin)
                        await changes.aclose()
                await _subscribed(bench, namespace, 0)
        yield Figure(
            f"half-open connection noticed, at a heartbeat of {heartbeat:.0f} s: worst",
            max(took), min(took), max(took), "s",
            target=at_most(heartbeat + 0.1),
        )  # fmt: skip


@figure(19)
async def contention(bench: Bench) -> AsyncIterator[Figure]:
    """16 processes call `update` 200 times each on one counter: none is lost, and how long the slowest takes."""
    workers, updates = 16, bench.often(200, 50)
    async with _open(bench, 1) as (namespace, store):
        arguments = [(bench.tcp, namespace, updates)] * workers
        times: list[float] = await asyncio.to_thread(race, f"{__name__}:count", *arguments)
        counted = (await store.load("s0")).metadata["n"]
    yield Figure(
        "updates of one session by 16 processes that are lost", workers * updates - counted, unit="", target=at_most(0)
    )
    yield Figure("updates a second", workers * updates / max(times), unit="/s")
    yield Figure("the slowest process' time against the mean", max(times) / statistics.mean(times))


async def count(url: str, namespace: str, updates: str) -> float:
    """Add to one counter; return the seconds that it took."""

    def increment(asset: SessionAsset) -> None:
        asset.metadata["n"] = asset.metadata.get("n", 0) + 1

    async with await RedisSessionStore.connect(url, namespace=namespace, deadline=30) as store:
        ready()
        await go()
        begin = time.perf_counter()
        for _ in range(int(updates)):
            await store.update("s0", increment)
        return time.perf_counter() - begin

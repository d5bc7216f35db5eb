"""What small writes and reads of parts cost: what is new, tails, single keys, records, labels; whatever the rest."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

from orcs_redis import ConversationTurn, RedisSessionStore, SessionAsset
from orcs_redis.model.encoding import encode

from ..harness import Step, latencies, medians, ratio_of_medians, repeating, spread
from ..processes import Process, ready
from ..report import Figure, at_most
from .bench import Bench, Store, figure, fill

_SIZES = (10, 10_000)


def _title(n: int) -> dict[str, object]:
    return {"metadata.title": f"title {n % 1000:03d}"}


def _few_words(n: int) -> ConversationTurn:
    return ConversationTurn.user(f"turn {n} of a few words, as in a conversation")


@figure(20)
async def refreshes(bench: Bench) -> AsyncIterator[Figure]:
    """Refresh of an asset of 1,000 turns: unchanged, at most 1.3 times PING; with 2 new turns, at most 2 appends alone.

    The bytes of that, both ways by the server's count: at most the two turns' and 1,500.
    """
    repeats = bench.often(1000, 200)
    async with bench.open() as (peer, by_hand):
        (id,) = await bench.filled(peer, "f", 1, 1000)
        async with await RedisSessionStore.connect(bench.server.url, namespace=by_hand.namespace) as store:
            asset = await store.load(id)
            unchanged = await latencies({"refresh": lambda: store.refresh(asset), "PING": store.ping}, repeats)
            times: dict[str, list[float]] = {"refresh": [], "2 appends": []}
            quiet, turns, beyond = sum(bench.quiet()), bench.source.turns(2), 0.0
            for n in range(repeats):
                begin = time.perf_counter()
                for turn in turns:
                    await peer.append(id, turn)
                middle, before = time.perf_counter(), sum(bench.server.traffic()) if n % 10 == 0 else 0
                between = time.perf_counter()
                await store.refresh(asset)
                times["2 appends"].append((middle - begin) * 1e6)
                times["refresh"].append((time.perf_counter() - between) * 1e6)
                if before:
                    read = sum(bench.server.traffic()) - before - quiet
                    beyond = max(beyond, read - sum(len(encode(turn)) for turn in turns))
            assert len(asset.history.turns) == 1000 + 2 * repeats
    yield Figure(
        "refresh of 1,000 turns, unchanged, against PING",
        *ratio_of_medians(unchanged["refresh"], unchanged["PING"]),
        target=at_most(1.3),
        detail={"p50 µs": medians(unchanged)},
    )
    yield Figure(
        "refresh of 1,000 turns and 2 new ones, against 2 appends alone",
        *ratio_of_medians(times["refresh"], times["2 appends"]),
        target=at_most(1.0),
        detail={"p50 µs": medians(times)},
    )
    yield Figure("the same, bytes both ways beyond the 2 turns'", beyond, unit="B", target=at_most(1500))


@figure(21)
async def encoding(bench: Bench) -> AsyncIterator[Figure]:
    """The client's CPU for a save of 1,000 turns and a new one: at most 3 times msgspec's encoding of these turns."""
    repeats = bench.often(150, 40)
    cpu: dict[str, list[float]] = {"save": [], "msgspec": []}
    async with bench.open() as (store, _):
        asset = bench.source.session("s", 1000)
        await store.save(asset)
        for turn in bench.source.turns(repeats):
            asset.add_turn(turn)
            begin = time.process_time()
            await store.save(asset)
            middle = time.process_time()
            encode(asset.history.turns)
            cpu["save"].append((middle - begin) * 1e6)
            cpu["msgspec"].append((time.process_time() - middle) * 1e6)
    yield Figure(
        "save of 1,000 turns and a new one: client's CPU, against msgspec's encoding of the turns",
        *ratio_of_medians(cpu["save"], cpu["msgspec"]),
        target=at_most(3.0),
        detail={"µs": medians(cpu)},
    )


@figure(22)
async def tails(bench: Bench) -> AsyncIterator[Figure]:
    """`load(id, last=20)` of 10,000 turns: at most 1.1 times that of 100, and the load of 20 turns."""
    async with bench.open() as (store, _):
        calls: dict[str, Step] = {}
        for size in (10_000, 100):
            calls[f"last=20 of {size:,}"] = repeating(
                lambda session: store.load(session, last=20), await bench.filled(store, f"t{size}", 1, size)
            )
        calls["load of 20"] = repeating(store.load, await bench.filled(store, "t20", 1, 20))
        times = await latencies(calls, bench.often(3000, 500))
    for other in ("last=20 of 100", "load of 20"):
        yield _against("load, last=20 of 10,000", times, "last=20 of 10,000", other, 1.1)


def _against(name: str, times: dict[str, list[float]], side: str, other: str, most: float) -> Figure:
    ratio = ratio_of_medians(times[side], times[other])
    return Figure(
        f"{name}, against {other}",
        *ratio,
        target=at_most(most),
        detail={"p50 µs": medians({side: times[side], other: times[other]})},
    )


@figure(23)
async def renames(bench: Bench) -> AsyncIterator[Figure]:
    """Rename by `update`, 10,000 turns, while a peer appends every 5 ms: p50 at most 10 ms, none above 0.5 s."""
    times: list[float] = []
    async with bench.open() as (store, by_hand):
        asset = SessionAsset(id="s")
        asset.history.turns = [_few_words(n) for n in range(10_000)]
        await store.save(asset)
        with Process(f"{__name__}:append_steadily", bench.server.url, by_hand.namespace, "s") as peer:
            peer.ready()
            begin, before = time.perf_counter(), await store.load_versioned("s")
            for n in range(bench.often(300, 60)):

                def rename(asset: SessionAsset, name: str = f"name {n}") -> None:
                    asset.project_context.name = name

                start = time.perf_counter()
                await store.update("s", rename)
                times.append((time.perf_counter() - start) * 1000)
            appended = (await store.load_versioned("s")).revision - before.revision - len(times)
            rate = appended / (time.perf_counter() - begin)
    detail: dict[str, float | dict[str, float]] = {"appends a second meanwhile": rate}
    yield Figure(
        "rename by update of 10,000 turns under appends, p50",
        *spread(times),
        unit="ms",
        target=at_most(10.0),
        detail=detail,
    )
    yield Figure("the same, the slowest", max(times), unit="ms", target=at_most(500.0))


async def append_steadily(url: str, namespace: str, id: str) -> None:
    """Append a turn every 5 ms, until this process is ended."""
    async with await RedisSessionStore.connect(url, namespace=namespace) as store:
        await store.append(id, _few_words(0))
        ready()
        due = time.perf_counter()
        while True:
            await store.append(id, _few_words(0))
            due += 0.005
            await asyncio.sleep(max(0.0, due - time.perf_counter()))


@figure(24)
async def commits(bench: Bench) -> AsyncIterator[Figure]:
    """`commit(set=)` of one metadata key, and pop of the last turn: of 10,000 turns at most 1.1 times those of 10.

    A pop: at most 2.5 times an append.
    """
    async with bench.open() as (store, _):
        ids = {size: (await bench.filled(store, f"c{size}", 1, size))[0] for size in _SIZES}
        titles = repeating(_title, range(1000))
        sets: dict[str, Step] = {
            f"{size:,} turns": repeating(lambda session: store.commit(session, set=titles()), [id])
            for size, id in ids.items()
        }
        pops: dict[str, Step] = {}  # each after an append, so that the lengths stay
        for size, id in ids.items():
            pops[f"append, {size:,}"] = repeating(bench.appending(store), [id])
            pops[f"{size:,} turns"] = repeating(store.pop, [id])
        set_times = await latencies(sets, bench.often(3000, 500))
        pop_times = await latencies(pops, bench.often(3000, 500))
        assert [len(await store.turns(id)) for id in ids.values()] == [*_SIZES]
    yield _against("commit(set=) of a key of 10,000 turns", set_times, "10,000 turns", "10 turns", 1.1)
    yield _against("pop of 10,000 turns", pop_times, "10,000 turns", "10 turns", 1.1)
    yield _against("pop of 10,000 turns", pop_times, "10,000 turns", "append, 10,000", 2.5)


@figure(25)
async def records(bench: Bench) -> AsyncIterator[Figure]:
    """Put of two records beside 10,000: at most 1.15 times beside 10. The newest by prefix: at most 1.3 times bare.

    Bare are ZRANGE of the names and HGET, one after the other, through the store's link.
    """
    async with bench.open() as (store, by_hand), bench.link() as link:
        puts: dict[str, Step] = {}
        for size in _SIZES:
            id = f"r{size}"
            await store.save(SessionAsset(id=id))
            keys = [f"checkpoint/{n:06d}" for n in range(size)]
            for start in range(0, size, 1000):
                await store.commit(id, put=dict.fromkeys(keys[start : start + 1000], b"x" * 200))
            pairs = [{keys[n]: b"y" * 200, keys[-1 - n]: b"z" * 200} for n in range(5)]
            puts[f"{size:,} records"] = repeating(partial(_put, store, id), pairs)
        partition = by_hand.partition(id)
        names, hash = partition.names(id), partition.records(id)

        async def newest() -> object:
            return (await store.records(id, "checkpoint/", limit=1, reverse=True))[0]

        async def bare() -> object:
            prefix = b"checkpoint/"
            (found,) = await link(
                ("ZRANGE", names, b"(" + prefix[:-1] + b"0", b"[" + prefix, "BYLEX", "REV", "LIMIT", "0", "1")
            )
            return await link(("HGET", hash, found[0]))

        assert await newest() == (keys[-1], (await bare())[0])  # type: ignore[index]
        times = await latencies(puts, bench.often(3000, 500))
        reads = await latencies({"records": newest, "ZRANGE and HGET": bare}, bench.often(3000, 500))
    yield _against("put of two beside 10,000 records", times, "10,000 records", "10 records", 1.15)
    yield _against("newest record by prefix", reads, "records", "ZRANGE and HGET", 1.3)


def _put(store: Store, id: str, records: dict[str, bytes]) -> Awaitable[object]:
    return store.commit(id, put=records)


@figure(26)
async def labels(bench: Bench) -> AsyncIterator[Figure]:
    """`list(limit=50, labels=)` and `count` of a user's 500 sessions among 100,000: at most 1.2 times among 1,000."""
    lists: dict[str, Step] = {}
    counts: dict[str, Step] = {}
    async with AsyncExitStack() as stack:
        for size in (1_000, 100_000):
            bench.say(f"filling {size:,} sessions")
            store = await stack.enter_async_context(
                await RedisSessionStore.connect(bench.server.url, namespace=bench.server.namespace(), deadline=60.0)
            )
            await _fill_labelled(bench, store, size, 500)
            found = await store.list(limit=50, labels={"user": "u1"})
            assert len(found) == 50
            assert await store.count(labels={"user": "u1"}) == 500
            lists[f"{size:,}"] = repeating(lambda store: store.list(limit=50, labels={"user": "u1"}), [store])
            counts[f"{size:,}"] = repeating(lambda store: store.count(labels={"user": "u1"}), [store])
        list_times = await latencies(lists, bench.often(1000, 200))
        count_times = await latencies(counts, bench.often(1000, 200))
    yield _against("list(limit=50, labels=) of 500 among 100,000 sessions", list_times, "100,000", "1,000", 1.2)
    yield _against("count(labels=) of 500 among 100,000 sessions", count_times, "100,000", "1,000", 1.2)


async def _fill_labelled(bench: Bench, store: Store, size: int, mine: int) -> None:
    """Store small sessions; so many of them, evenly spread, are one user's, and two of each other user's."""
    every = size // mine
    for start in range(0, size, 10_000):
        assets = []
        for n in range(start, min(size, start + 10_000)):
            asset = bench.source.small(f"s-{n:07d}")
            asset.metadata["labels"] = {"user": "u1" if n % every == 0 else f"v{n // 2}"}
            assets.append(asset)
        await fill(store, assets)


@figure(28)
async def partitions(bench: Bench) -> AsyncIterator[Figure]:
    """`list(limit=50)` of 5,000 sessions in 64 partitions: at most 6 times that in one."""
    calls: dict[str, Step] = {}
    async with AsyncExitStack() as stack:
        for number in (1, 64):
            store: Any = await stack.enter_async_context(
                await RedisSessionStore.connect(
                    bench.server.url, namespace=bench.server.namespace(), partitions=number, deadline=60.0
                )
            )
            await bench.fill_small(store, range(5_000))
            calls[f"{number}"] = repeating(lambda store: store.list(limit=50), [store])
        times = await latencies(calls, bench.often(1000, 200))
    yield _against("list(limit=50) in 64 partitions", times, "64", "1", 6.0)

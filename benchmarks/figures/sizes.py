"""What grows with the size of histories and namespaces, and what must not."""

from __future__ import annotations

import asyncio
import resource
import statistics
import sys
import time
import tracemalloc
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec

from orcs_redis import RedisSessionStore, SessionAsset, open_store
from orcs_redis.model.encoding import encode
from orcs_redis.protocol.keys import Keyspace

from ..harness import HISTORY, Step, latencies, medians, ratio_of_medians, repeating
from ..processes import Process
from ..report import Figure, at_most
from ..servers import Server
from .bench import Bench, Store, figure, fill
from .data import real_sessions


@figure(2)
async def lengths(bench: Bench) -> AsyncIterator[Figure]:
    """Append to histories of 10 to 100,000 turns: p50, and bytes both ways by the server's count.

    The most is at most 1.1 times the least.
    """
    repeats = bench.often(3000, 500)
    async with bench.open() as (store, _):
        calls: dict[str, Step] = {}
        first: dict[str, str] = {}
        append = bench.appending(store)
        for size in (10, 100, 1_000, 10_000, 100_000):
            # So many that none grows by more than a quarter while it is measured.
            ids = await bench.filled(store, f"n{size}", max(1, repeats * 4 // size), size)
            first[f"{size:,}"] = ids[0]
            calls[f"{size:,}"] = repeating(append, ids)
        times = await latencies(calls, repeats)
        turn, quiet = bench.source.turn(1), sum(bench.quiet())
        traffic: dict[str, float] = {}
        for name, id in first.items():
            before = sum(bench.server.traffic())
            for _ in range(100):
                await store.append(id, turn)
            traffic[name] = (sum(bench.server.traffic()) - before - quiet) / 100
    yield _extremes("append, time: slowest of 10 to 100,000 turns against quickest", times, 1.1)
    yield Figure(
        "append, bytes both ways: most against least",
        max(traffic.values()) / min(traffic.values()),
        target=at_most(1.1),
        detail={"bytes": dict(traffic)},
    )


def _extremes(name: str, times: dict[str, list[float]], most: float) -> Figure:
    """Return the slowest against the quickest."""
    p50 = medians(times)
    slowest, quickest = max(p50, key=p50.__getitem__), min(p50, key=p50.__getitem__)
    ratio = ratio_of_medians(times[slowest], times[quickest])
    return Figure(name, *ratio, target=at_most(most), detail={"p50 µs": p50})


@figure(3)
async def saves(bench: Bench) -> AsyncIterator[Figure]:
    """Bytes sent by a save of which one turn is new: of 1,000 turns at most 1.1 times those of 10."""
    repeats = bench.often(200, 50)
    sent: dict[str, float] = {}
    took: dict[str, list[float]] = {"1,000": [], "10": []}
    async with bench.open() as (store, _):
        quiet = bench.quiet()[0]
        turns = bench.source.turns(repeats)
        for size in took:
            asset = bench.source.session(f"s{size}", int(size.replace(",", "")))
            await store.save(asset)
            before = bench.server.traffic()[0]
            for turn in turns:
                asset.add_turn(turn)
                begin = time.perf_counter()
                await store.save(asset)
                took[size].append((time.perf_counter() - begin) * 1e6)
            sent[size] = (bench.server.traffic()[0] - before - quiet) / repeats
        before = bench.server.traffic()[0]
        for turn in turns:
            await store.append("s10", turn)
        append = (bench.server.traffic()[0] - before - quiet) / repeats
    yield Figure(
        "save of 1,000 turns and a new one: bytes sent, against 10 turns",
        sent["1,000"] / sent["10"],
        target=at_most(1.1),
        detail={"bytes": {**sent, "an append": append}, "p50 µs": medians(took)},
    )


@figure(4)
async def lists(bench: Bench) -> AsyncIterator[Figure]:
    """`list(limit=50)` among 1,000 to 1,000,000 sessions: the slowest at most 1.2 times the quickest.

    Beside it `list()` of 100,000 with its memory, in a process of its own, and the rate of `save_many`. The million is
    written directly: the hashes with COPY, the index with plain commands.
    """
    sizes = [1_000, 10_000, 100_000, *bench.often([1_000_000], [])]
    calls: dict[str, Step] = {}
    others: list[Figure] = []
    async with AsyncExitStack() as stack:
        for size in sizes:
            bench.say(f"filling {size:,} sessions")
            namespace = bench.server.namespace()
            store: Store = await stack.enter_async_context(
                await RedisSessionStore.connect(bench.server.url, namespace=namespace, deadline=60.0)
            )
            begin = time.perf_counter()
            if size > 100_000:
                await _fill_directly(bench, store, namespace, size)
            else:
                await bench.fill_small(store, range(size))
            if size == 100_000:
                rate = size / (time.perf_counter() - begin)
                others = [
                    await _list_all(bench, namespace),
                    Figure("save_many of sessions without turns", rate, unit="/s"),
                ]
            newest = await store.list(limit=50)
            assert [meta.id for meta in newest] == [f"s-{n:07d}" for n in range(size - 1, size - 51, -1)]
            calls[f"{size:,}"] = repeating(lambda store: store.list(limit=50), [store])
        times = await latencies(calls, bench.often(1000, 200))
    yield _extremes(f"list(limit=50) of 1,000 to {sizes[-1]:,}: slowest against quickest", times, 1.2)
    for other in others:
        yield other


async def _list_all(bench: Bench, namespace: str) -> Figure:
    with Process(f"{__name__}:list_all", bench.server.url, namespace) as process:
        found = await asyncio.to_thread(process.answer)
    assert found.pop("sessions") == 100_000
    return Figure("list() of 100,000", found.pop("seconds"), unit="s", detail={"memory MB": found})


async def list_all(url: str, namespace: str) -> dict[str, float]:
    """List in this process, so that the peak of its memory can be told."""
    async with open_store(url, namespace=namespace, deadline=60.0) as store:
        await store.list(limit=50)
        before, begin = peak_mb(), time.perf_counter()
        count = len(await store.list())
        seconds, peak = time.perf_counter() - begin, peak_mb() - before
        tracemalloc.start()
        again = await store.list()
        kept, traced = (size / 2**20 for size in tracemalloc.get_traced_memory())
        del again
    return {"sessions": count, "seconds": seconds, "more at the peak": peak, "the list": kept, "objects' peak": traced}


def peak_mb() -> float:
    """Return the most memory that this process has had."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux ru_maxrss begins with that of the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


_COPIES = """
local prefix, first, count = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
for n = first, first + count - 1 do redis.call('COPY', KEYS[1], prefix .. string.format('%07d', n)) end
"""


async def _fill_directly(bench: Bench, store: Store, namespace: str, size: int) -> None:
    """Write the keys that saving would, quicker: the hashes as copies of one, the index by plain commands."""
    client = bench.server.client
    partition = Keyspace(namespace, 1).partitions[0]
    template = bench.source.small("s-0000000")
    await store.save(template)
    packed: Any = client.hget(partition.meta, template.id)
    head, tail = packed[:1], packed[19:]  # what lies between are revision and time
    copies = client.register_script(_COPIES)
    for first in range(1, size, 1000):
        numbers = range(first, min(first + 1000, size))
        copies(keys=[partition.session(template.id)], args=[partition.session("s-"), first, len(numbers)])
        ids = {f"s-{n:07d}": n for n in numbers}
        times = {id: template.updated_at_ms + 7 * n for id, n in ids.items()}
        metas = {
            id: b"%b\xcf%b\xcf%b%b" % (head, (n + 1).to_bytes(8), times[id].to_bytes(8), tail) for id, n in ids.items()
        }
        client.zadd(partition.updated, times)
        client.zadd(partition.changes, {id: n + 1 for id, n in ids.items()})
        client.hset(partition.meta, mapping=metas)  # type: ignore[arg-type]  # it takes texts as keys
        await asyncio.sleep(0)
    client.hset(partition.state, "revision", size)


@figure(6)
async def memory(bench: Bench) -> AsyncIterator[Figure]:
    """Memory of a session of 50 turns, index and all without clients' buffers: at most 0.95 of its compact JSON.

    Made-up ones, saved and appended turn by turn, and real ones, if they are there. Then made-up ones with 20 keys of
    metadata of 40 bytes: at most 1.1 times the same with all of metadata in one field.
    """
    sessions = 1000
    made = [bench.source.session(f"m-{n}", HISTORY) for n in range(sessions)]
    for name, assets in (
        (f"{HISTORY} turns, saved", made),
        (f"{HISTORY} turns, each appended", made),
        ("real sessions, saved", list(real_sessions(sessions))),
    ):
        if not assets:
            bench.say("no real sessions")
            continue
        pretty = statistics.mean(len(asset.to_json().encode()) for asset in assets)
        compact = statistics.mean(len(_compact(asset)) for asset in assets)
        async with bench.open() as (store, _):
            before = _settled_memory(bench.server)
            if "appended" in name:
                await fill(store, [_without_turns(asset) for asset in assets])
                for n in range(HISTORY):
                    await asyncio.gather(*(store.append(asset.id, asset.history.turns[n]) for asset in assets))
            else:
                await fill(store, assets)
            used = (_settled_memory(bench.server) - before) / sessions
        yield Figure(
            f"memory of a session, {name}, against its compact JSON",
            used / compact,
            target=at_most(0.95),
            detail={"bytes": {"used": used, "compact JSON": compact, "as orcs writes it": pretty}},
        )
    yield await _keys_apart(bench, made)


async def _keys_apart(bench: Bench, assets: Sequence[SessionAsset]) -> Figure:
    for asset in assets:
        asset.metadata = {f"key-{n:02d}": bench.source.text(40)[:40] for n in range(20)}
    client = bench.server.client
    async with bench.open() as (store, by_hand):
        before = _settled_memory(bench.server)
        await fill(store, assets)
        apart = (_settled_memory(bench.server) - before) / len(assets)
        for asset in assets:
            key = by_hand.partition(asset.id).session(asset.id)
            client.hset(key, "metadata", encode(asset.metadata))
            client.hdel(key, ".born", ".reshaped", ".parts", *(f"metadata.{name}" for name in asset.metadata))
            client.restore(key, 0, client.dump(key) or b"", replace=True)  # as small as if it had never been larger
        together = (_settled_memory(bench.server) - before) / len(assets)
    return Figure(
        f"memory of a session, {HISTORY} turns and 20 keys of metadata, against metadata in one field",
        apart / together,
        target=at_most(1.1),
        detail={"bytes": {"a field each": apart, "one field": together}},
    )


def _compact(asset: SessionAsset) -> bytes:
    return msgspec.json.encode(msgspec.json.decode(asset.to_json()))


def _without_turns(asset: SessionAsset) -> SessionAsset:
    copy = SessionAsset.from_json(asset.to_json())
    copy.history.turns = []
    return copy


def _settled_memory(server: Server) -> int:
    """Return the bytes in use, without clients' buffers and what waits for the append-only file."""
    used = []
    for _ in range(3):
        time.sleep(0.2)
        info = server.info("memory")
        used.append(info["used_memory"] - info["mem_clients_normal"] - info.get("mem_aof_buffer", 0))
    return int(min(used))

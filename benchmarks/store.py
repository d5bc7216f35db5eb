"""The store's figures: what it should cost, beside the same work done by hand with redis-py."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import msgspec
import redis

from orcs_redis import SessionAsset
from orcs_redis import sync as blocking
from orcs_redis.protocol.keys import Keyspace

from .adapters import Orcs, RedisPy
from .bench import HISTORY, TASKS, Bench
from .data import real_sessions
from .report import Figure, Target
from .servers import Server
from .workloads import contest, latencies, ratio_by_round, ratio_of_medians, rotated


async def throughput(bench: Bench) -> list[Figure]:
    """1: 50 tasks in one process."""
    figures = []
    async with bench.open() as (ours, theirs):
        ids = await bench.filled(ours, "t")
        reading = await bench.filled(ours, "r")
        for name, target, calls, sessions in (
            ("append", 4.0, {a.name: bench.appending(a) for a in (ours, theirs)}, ids),
            ("load", 2.5, {ours.name: ours.load, theirs.name: theirs.load}, reading),
        ):
            bench.say(f"1: {name}, {TASKS} tasks")
            rounds, seconds = bench.often(11, 5), 0.6 if not bench.quick else 0.3
            samples = await contest(bench.server, calls, sessions, rounds, seconds)
            rates = {who: [s.rate for s in list_] for who, list_ in samples.items()}
            ratio, least, most = ratio_by_round(rates[ours.name], rates[theirs.name])
            detail = {
                who: {
                    field: round(statistics.median(getattr(s, field) for s in list_), 1)
                    for field in ("rate", "client_us", "server_us")
                }
                for who, list_ in samples.items()
            }
            figures.append(
                Figure(
                    number=1,
                    name=f"{name}, {TASKS} tasks, against redis-py",
                    measured=ratio,
                    spread=(least, most),
                    target=Target("at least", target),
                    note="; ".join(
                        f"{who} {d['rate']:,.0f}/s (CPU µs: client {d['client_us']}, server {d['server_us']})"
                        for who, d in detail.items()
                    ),
                    detail=detail,
                )
            )
    return figures


async def lengths(bench: Bench) -> list[Figure]:
    """2: append of one turn to short and long histories."""
    repeats = bench.often(3000, 500)
    sizes = (10, 100, 1_000, 10_000, 100_000)
    async with bench.open() as (ours, _):
        calls: dict[str, Callable[[], Awaitable[object]]] = {}
        some: dict[str, str] = {}
        for size in sizes:
            bench.say(f"2: filling histories of {size} turns")
            # So many that none grows by more than a quarter while it is measured.
            ids = await bench.filled(ours, f"n{size}", max(1, repeats * 4 // size), size)
            some[str(size)] = ids[0]
            calls[str(size)] = bench.appending_to(ours, ids)
        bench.say("2: append")
        times = await latencies(calls, repeats)
        quiet = _quiet_traffic(bench.server)
        traffic: dict[str, float] = {}
        turn_ = bench.source.turn(1)
        for size_, id in some.items():
            before = bench.server.traffic()
            for _ in range(100):
                await ours.append(id, turn_)
            after = bench.server.traffic()
            traffic[size_] = (after[0] - before[0] - quiet[0] + after[1] - before[1] - quiet[1]) / 100
    medians = {size: statistics.median(values) * 1e6 for size, values in times.items()}
    slowest, quickest = max(medians, key=lambda k: medians[k]), min(medians, key=lambda k: medians[k])
    ratio, least, most = ratio_of_medians(times[slowest], times[quickest])
    return [
        Figure(
            number=2,
            name="append, time: slowest of 10 to 100,000 turns against quickest",
            measured=ratio,
            spread=(least, most),
            target=Target("at most", 1.1),
            note="p50 µs: " + ", ".join(f"{int(size):,}: {value:.0f}" for size, value in medians.items()),
            detail={"p50_us": medians},
        ),
        Figure(
            number=2,
            name="append, bytes both ways: most against least",
            measured=max(traffic.values()) / min(traffic.values()),
            target=Target("at most", 1.1),
            note="bytes: " + ", ".join(f"{int(size):,}: {value:.0f}" for size, value in traffic.items()),
            detail={"bytes": traffic},
        ),
    ]


def _quiet_traffic(server: Server) -> tuple[float, float]:
    """Return what asking for the traffic adds to it."""
    asked = [server.traffic() for _ in range(5)]
    return (asked[-1][0] - asked[0][0]) / 4, (asked[-1][1] - asked[0][1]) / 4


async def saves(bench: Bench) -> list[Figure]:
    """3: save of an asset of which only one turn is new."""
    bench.say("3: save of one new turn")
    repeats = bench.often(200, 50)
    sent: dict[int, float] = {}
    took: dict[int, list[float]] = {10: [], 1000: []}
    async with bench.open() as (ours, _):
        quiet = _quiet_traffic(bench.server)
        turns = bench.source.turns(repeats)
        for size in (10, 1000):
            asset = bench.source.session(f"s{size}", size)
            await ours.store.save(asset)
            before = bench.server.traffic()
            for turn in turns:
                asset.add_turn(turn)
                begin = time.perf_counter()
                await ours.store.save(asset)
                took[size].append((time.perf_counter() - begin) * 1e6)
            sent[size] = (bench.server.traffic()[0] - before[0] - quiet[0]) / repeats
        before = bench.server.traffic()
        for turn in turns:
            await ours.append("s10", turn)
        append = (bench.server.traffic()[0] - before[0] - quiet[0]) / repeats
    p50 = {size: statistics.median(values) for size, values in took.items()}
    return [
        Figure(
            number=3,
            name="save of 1,000 turns and a new one: bytes sent, against 10 turns",
            measured=sent[1000] / sent[10],
            target=Target("at most", 1.1),
            note=f"bytes {sent[1000]:.0f} and {sent[10]:.0f} (append: {append:.0f}); "
            f"p50 µs {p50[1000]:.0f} and {p50[10]:.0f}",
            detail={
                "bytes": {str(k): v for k, v in sent.items()} | {"append": append},
                "p50_us": {str(k): v for k, v in p50.items()},
            },
        )
    ]


_COPIES = """
local prefix, first, count = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
for n = first, first + count - 1 do redis.call('COPY', KEYS[1], prefix .. string.format('%07d', n)) end
"""


async def lists(bench: Bench) -> list[Figure]:
    """4: the newest 50 of few and of many sessions; and all of 100,000."""
    sizes = (1_000, 10_000, 100_000) if bench.quick else (1_000, 10_000, 100_000, 1_000_000)
    figures = []
    calls: dict[str, Callable[[], Awaitable[object]]] = {}
    async with contextlib.AsyncExitStack() as stack:
        stores: dict[int, Orcs] = {}
        for size in sizes:
            bench.say(f"4: filling {size:,} sessions")
            ours = Orcs()
            namespace = bench.server.namespace()
            await ours.open(bench.server, namespace)
            stack.push_async_callback(ours.close)
            stores[size] = ours
            begin = time.perf_counter()
            if size <= 100_000:
                for start in range(0, size, 10_000):
                    await ours.fill([bench.source.small(f"s-{n:07d}") for n in range(start, min(start + 10_000, size))])
            else:
                await _fill_directly(bench, ours, namespace, size)
            took = time.perf_counter() - begin
            if size == 100_000:
                listed = await _list_all(bench, namespace)
                rate = size / took
            calls[str(size)] = lambda ours=ours: ours.store.list(limit=50)  # type: ignore[misc]
        bench.say("4: list(limit=50)")
        for size, ours in stores.items():
            newest = await ours.store.list(limit=50)
            assert [meta.id for meta in newest] == [f"s-{n:07d}" for n in range(size - 1, size - 51, -1)]
        times = await latencies(calls, bench.often(1000, 200))
    medians = {size: statistics.median(values) * 1e6 for size, values in times.items()}
    slowest, quickest = max(medians, key=lambda k: medians[k]), min(medians, key=lambda k: medians[k])
    ratio, least, most = ratio_of_medians(times[slowest], times[quickest])
    figures.append(
        Figure(
            number=4,
            name=f"list(limit=50) of 1,000 to {sizes[-1]:,}: slowest against quickest",
            measured=ratio,
            spread=(least, most),
            target=Target("at most", 1.2),
            note="p50 µs: "
            + ", ".join(f"{int(size):,}: {value:.0f}" for size, value in medians.items())
            + ("" if bench.quick else " (the million: same keys, written by plain commands and COPY)"),
            detail={"p50_us": medians},
        )
    )
    figures += listed
    figures.append(
        Figure(
            number=4,
            name="save_many of sessions without turns",
            measured=rate,
            unit="/s",
            note="one process, 500 at a time, made by the way",
        )
    )
    return figures


async def _list_all(bench: Bench, namespace: str) -> list[Figure]:
    bench.say("4: list() of 100,000, in a process of its own")
    command = [sys.executable, "-m", "benchmarks.listing", bench.server.url, namespace]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    found = json.loads(output)
    assert found["sessions"] == 100_000
    return [
        Figure(
            number=4,
            name="list() of 100,000",
            measured=found["seconds"],
            unit="s",
            note=f"peak memory {found['peak_mb']:.0f} MB more than before (RSS); "
            f"the list itself {found['kept_mb']:.0f} MB, "
            f"peak of Python's objects {found['traced_peak_mb']:.0f} MB (tracemalloc)",
            detail=found,
        )
    ]


async def _fill_directly(bench: Bench, ours: Orcs, namespace: str, size: int) -> None:
    """Write the keys that saving would, quicker: the hashes as copies of one, the index by plain commands."""
    client = bench.server.client
    partition = Keyspace(namespace, 1).partitions[0]
    template = bench.source.small("s-0000000")
    await ours.store.save(template)
    start_ms = template.updated_at_ms
    packed: Any = client.hget(partition.meta, template.id)
    head, tail = packed[:1], packed[19:]  # what lies between are revision and time
    copies = client.register_script(_COPIES)
    for first in range(1, size, 1000):
        count = min(1000, size - first)
        ids = [f"s-{n:07d}" for n in range(first, first + count)]
        times = [start_ms + 7 * n for n in range(first, first + count)]
        revisions = range(first + 1, first + count + 1)
        metas = [
            b"%b\xcf%b\xcf%b%b" % (head, revision.to_bytes(8), ms.to_bytes(8), tail)
            for revision, ms in zip(revisions, times, strict=True)
        ]
        copies(keys=[partition.session("s-0000000")], args=[partition.session("s-"), first, count])
        client.zadd(partition.updated, dict(zip(ids, times, strict=True)))
        client.zadd(partition.changes, dict(zip(ids, revisions, strict=True)))
        client.hset(partition.meta, mapping=dict(zip(ids, metas, strict=True)))
        if first % 100_000 == 1:
            await asyncio.sleep(0)
    client.hset(partition.state, "revision", size)


_UNCHECKED = """
local call = redis.call
call('HMGET', KEYS[1], 'incarnation', 'revision', 'compacted', 'forgotten', 'w123456789')
call('HMGET', KEYS[2], ARGV[1])
call('HMGET', KEYS[3], '.revision', 'version', '.turns', '.op')
call('TIME')
call('RPUSH', KEYS[4], ARGV[2])
call('ZADD', KEYS[5], ARGV[3], ARGV[1])
call('ZADD', KEYS[6], ARGV[3], ARGV[1])
call('HSET', KEYS[3], '.revision', ARGV[3], '.op', ARGV[4], '.turns', ARGV[3], 'updated_at_ms', ARGV[4])
call('HSET', KEYS[2], ARGV[1], ARGV[5])
call('HSET', KEYS[1], 'revision', ARGV[3], 'w123456789', ARGV[4])
call('PUBLISH', KEYS[6], ARGV[5])
"""


async def server_cost(bench: Bench) -> list[Figure]:
    """5: the script's CPU on the server, against its commands without any check: bare, and called from Lua."""
    bench.say("5: server's CPU per append")
    server = bench.server
    script: list[float] = []
    bare: list[float] = []
    inner: list[float] = []
    unchecked: list[float] = []
    sha = server.client.script_load(_UNCHECKED)
    commands = ("rpush", "hset", "zadd", "publish")
    async with bench.open() as (ours, _), bench.open() as (others, plain):
        ids = await bench.filled(ours, "c")
        other_ids = await bench.filled(others, "c")
        count = 0
        for n in range(bench.often(20, 6)):
            for who in rotated(["script", "bare", "unchecked"], n):
                before, before_inner = server.calls("evalsha", "exec", "multi"), server.calls(*commands)
                if who == "script":
                    for id in ids * 4:
                        await bench.appending(ours)(id)
                elif who == "unchecked":
                    for id in other_ids * 4:
                        count += 1
                        keys = plain.partition(id)
                        server.client.evalsha(
                            sha, 6, keys.state, keys.meta, keys.session(id), keys.turns(id), keys.updated, keys.changes,
                            id, next(bench.encoded), str(100_000 + count), b"o" * 12, b"m" * 75,
                        )  # fmt: skip
                else:
                    pipe = server.client.pipeline(transaction=True)
                    for id in other_ids * 4:
                        count += 1
                        partition = plain.partition(id)
                        pipe.rpush(partition.turns(id), next(bench.encoded))
                        fields: dict[Any, Any] = {
                            ".revision": 100_000 + count,
                            ".op": b"o" * 12,
                            ".turns": 1000 + count,
                            "updated_at_ms": b"\xcf12345678",
                        }
                        pipe.hset(partition.session(id), mapping=fields)
                        pipe.hset(partition.meta, id, b"m" * 75)
                        pipe.zadd(partition.updated, {id: 1_750_000_000_000 + count})
                        pipe.zadd(partition.changes, {id: 100_000 + count})
                        pipe.hset(partition.state, mapping={"revision": 100_000 + count, b"w123456789": b"w" * 20})
                        pipe.publish(partition.changes, b"p" * 40)
                        pipe.execute()
                after, after_inner = server.calls("evalsha", "exec", "multi"), server.calls(*commands)
                per = (after[1] - before[1]) / (len(ids) * 4)
                {"script": script, "bare": bare, "unchecked": unchecked}[who].append(per)
                if who == "bare":
                    inner.append((after_inner[1] - before_inner[1]) / (len(ids) * 4))
    ratio, least, most = ratio_by_round(script, bare)
    return [
        Figure(
            number=5,
            name="append: the script's CPU against the same commands in MULTI/EXEC",
            measured=ratio,
            spread=(least, most),
            target=Target("at most", 2.5),
            note=f"µs: EVALSHA {statistics.median(script):.1f}; MULTI and EXEC, which includes the 7 commands, "
            f"{statistics.median(bare):.1f} (the 7 by themselves {statistics.median(inner):.1f}); the script's 11 "
            f"commands called from Lua without a check {statistics.median(unchecked):.1f}; commandstats",
            detail={"script_us": script, "bare_us": bare, "commands_us": inner, "unchecked_us": unchecked},
        )
    ]


async def memory(bench: Bench) -> list[Figure]:
    """6: memory of a session against its text."""
    sessions = 1000
    figures = []
    made = [bench.source.session(f"m-{n}", HISTORY) for n in range(sessions)]
    real = list(real_sessions(sessions))
    for name, assets, appended in (
        (f"{HISTORY} turns, saved", made, False),
        (f"{HISTORY} turns, each appended", made, True),
        ("real sessions, saved", real, False),
    ):
        if not assets:
            bench.say(f"6: no {name}: skipped")
            continue
        bench.say(f"6: memory of {name}")
        pretty = [len(asset.to_json().encode()) for asset in assets]
        compact = [len(_compact(asset)) for asset in assets]
        async with bench.open() as (ours, _):
            before = _settled_memory(bench.server)
            if appended:
                await ours.fill([_without_turns(asset) for asset in assets])
                for n in range(HISTORY):
                    await asyncio.gather(*(ours.append(asset.id, asset.history.turns[n]) for asset in assets))
            else:
                await ours.fill(assets)
            used = (_settled_memory(bench.server) - before) / sessions
        per_pretty, per_compact = statistics.mean(pretty), statistics.mean(compact)
        figures.append(
            Figure(
                number=6,
                name=f"memory of a session, {name}, against its compact JSON",
                measured=used / per_compact,
                target=Target("at most", 1.0),
                note=f"{used:,.0f} bytes; JSON compact {per_compact:,.0f}, "
                f"pretty as orcs writes it {per_pretty:,.0f} ({used / per_pretty:.2f})",
                detail={
                    "bytes": used,
                    "compact": per_compact,
                    "pretty": per_pretty,
                    "against_pretty": used / per_pretty,
                },
            )
        )
    return figures


def _compact(asset: SessionAsset) -> bytes:
    return msgspec.json.encode(msgspec.json.decode(asset.to_json()))


def _without_turns(asset: SessionAsset) -> SessionAsset:
    copy = SessionAsset.from_json(asset.to_json())
    copy.history.turns = []
    return copy


def _settled_memory(server: Server) -> int:
    """Return the bytes in use, without clients' buffers and what waits for the append-only file."""
    least = None
    for _ in range(3):
        time.sleep(0.2)
        info = server.info("memory")
        used = int(info["used_memory"]) - int(info["mem_clients_normal"]) - int(info.get("mem_aof_buffer", 0))
        least = used if least is None else min(least, used)
    assert least is not None
    return least


async def alone(bench: Bench) -> list[Figure]:
    """7: one task alone, p50, in both forms."""
    repeats = bench.often(4000, 600)
    async with bench.open() as (ours, theirs):
        ids, reading = await bench.filled(ours, "a"), await bench.filled(ours, "b")
        namespace = ours.namespace
        writes, reads = itertools.cycle(ids), itertools.cycle(reading)
        bench.say("7: alone, asyncio")
        times = await latencies(
            {
                "append": lambda: bench.appending(ours)(next(writes)),
                "bare EVALSHA": lambda: theirs.append_raw(next(writes), next(bench.encoded)),
                "load": lambda: ours.load(next(reads)),
                "MULTI": lambda: theirs.load_raw(next(reads)),
                "MULTI, decoded": lambda: theirs.load_transaction(next(reads)),
            },
            repeats,
        )
    figures = list(_alone("asyncio", times))
    bench.say("7: alone, blocking")
    figures += _alone("blocking", _blocking_latencies(bench, namespace, theirs, ids, reading, repeats))
    return figures


def _alone(form: str, times: dict[str, list[float]]) -> Iterator[Figure]:
    p50 = {name: statistics.median(values) * 1e6 for name, values in times.items()}
    for name, other in (("append", "bare EVALSHA"), ("load", "MULTI"), ("load", "MULTI, decoded")):
        ratio, least, most = ratio_of_medians(times[name], times[other])
        what = {"MULTI": "bare MULTI HGETALL LRANGE, not decoded", "MULTI, decoded": "the same with decoding"}.get(
            other, other
        )
        yield Figure(
            number=7,
            name=f"{form}, {name} alone against redis-py's {what}",
            measured=ratio,
            spread=(least, most),
            target=Target("at most", 1.3),
            note=f"p50 µs: {p50[name]:.0f} and {p50[other]:.0f}",
            detail={"p50_us": p50},
        )


def _blocking_latencies(
    bench: Bench, namespace: str, arguments: RedisPy, ids: list[str], reading: list[str], repeats: int
) -> dict[str, list[float]]:
    client = redis.Redis.from_url(bench.server.plain)
    codec = arguments.codec
    writes, reads = itertools.cycle(ids), itertools.cycle(reading)

    def bare_append() -> object:
        keys, rest = arguments.append_arguments(next(writes), next(bench.encoded))
        reply: Any = client.evalsha(arguments.sha, len(keys), *keys, *rest)
        arguments.acknowledge(reply)
        return reply

    def bare_load(decode: bool) -> object:
        id = next(reads)
        partition = arguments.partition(id)
        pipe = client.pipeline(transaction=True)
        pipe.hgetall(partition.session(id))
        pipe.lrange(partition.turns(id), 0, -1)
        fields, turns = pipe.execute()
        return codec.decode(id, codec.sections(fields), turns) if decode else None

    with blocking.open_store(bench.server.url, namespace=namespace) as store:
        turns = itertools.cycle(bench.source.turns(1000))
        calls: dict[str, Callable[[], object]] = {
            "append": lambda: store.append(next(writes), next(turns)),
            "bare EVALSHA": bare_append,
            "load": lambda: store.load(next(reads)),
            "MULTI": lambda: bare_load(False),
            "MULTI, decoded": lambda: bare_load(True),
        }
        times: dict[str, list[float]] = {name: [] for name in calls}
        for n in range(-50, repeats):
            for name in rotated(list(calls), n):
                begin = time.perf_counter()
                calls[name]()
                if n >= 0:
                    times[name].append(time.perf_counter() - begin)
    client.close()
    return times


FIGURES: dict[int, Callable[[Bench], Awaitable[list[Figure]]]] = {
    1: throughput,
    2: lengths,
    3: saves,
    4: lists,
    5: server_cost,
    6: memory,
    7: alone,
}

"""The store against what bounds it: hiredis without a network, another core, bare commands, a bare text."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import itertools
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, cast

import hiredis
import msgspec

from orcs_redis import SessionAsset
from orcs_redis.protocol.codec import decode_meta
from orcs_redis.protocol.commands import Command, ScriptCall, merge, pack
from orcs_redis.transport.address import Address, parse_url
from orcs_redis.transport.connection import Link

from .bench import HISTORY, TASKS, Bench
from .report import Figure, Target
from .workloads import Call, Sample, contest, latencies, ratio_by_round, ratio_of_medians, rotated, throughput

_VALUE = b"x" * 600
_TOGETHER = 16  # calls that go out as one at most, which is what 50 tasks come to


@contextlib.asynccontextmanager
async def _link(bench: Bench) -> AsyncIterator[Link]:
    """Open a bare link to the server, without a store."""
    link = Link(cast(Address, parse_url(bench.server.plain)), 60.0)
    try:
        yield link
    finally:
        await link.close()


async def _call(link: Link, *commands: Command) -> list[Any]:
    return await link.call(commands, asyncio.get_running_loop().time() + 60)


def _median(samples: Sequence[Sample], field: str) -> float:
    return float(statistics.median(getattr(sample, field) for sample in samples))


async def client_floor(bench: Bench) -> list[Figure]:
    """8: the client's CPU for an append, against packing and parsing its frames without a network."""
    bench.say("8: client's CPU per append")
    figures = []
    async with bench.open() as (ours, _):
        ids = await bench.filled(ours, "f")
        operations = ours.store._core.sessions
        calls = []
        for id in ids[:_TOGETHER]:
            (call,) = operations.append(id, [bench.source.turn(1)], None, None).commands()
            calls.append(cast(ScriptCall, call))
        samples, floors = [], dict[int, list[float]]({1: [], _TOGETHER: []})
        await throughput(bench.server, bench.appending(ours), ids, 0.2)
        for _ in range(bench.often(15, 7)):
            samples.append(await throughput(bench.server, bench.appending(ours), ids, 0.4))
            for together in floors:
                floors[together].append(_floor(calls[:together]))
        for together, values in floors.items():
            ratio, least, most = ratio_by_round([sample.client_us for sample in samples], values)
            figures.append(
                Figure(
                    number=8,
                    name=f"append, {TASKS} tasks: client's CPU against hiredis' floor, {together} in a frame",
                    measured=ratio,
                    spread=(least, most),
                    target=Target("at most", 2.5),
                    note=f"µs: {_median(samples, 'client_us'):.1f} and {statistics.median(values):.2f}"
                    + ("; as they go out" if together > 1 else "; as a lone caller's"),
                )
            )
    return figures


def _floor(calls: Sequence[ScriptCall], repeats: int = 2000) -> float:
    """Return the µs of CPU that hiredis takes for one operation's share of a frame and of its reply."""
    frame, reader = merge(calls), hiredis.Reader()
    reply = b"*%d\r\n" % len(calls) + b"*3\r\n$2\r\nOK\r\n:1234567\r\n:1750000000000\r\n" * len(calls)
    repeats //= len(calls)
    begin = time.process_time()
    for _ in range(repeats):
        pack([frame])
        reader.feed(reply)
        reader.gets()
    return (time.process_time() - begin) / repeats / len(calls) * 1e6


async def bare_commands(bench: Bench) -> list[Figure]:
    """9: bare commands through the link, against valkey-glide's core in Rust."""
    bench.say("9: bare commands")
    script = "return redis.call('SET', KEYS[1], ARGV[1])"
    keys = [f"{bench.server.namespace()}:{n}" for n in range(TASKS)]
    async with _link(bench) as link, _glide(bench) as glide:
        (sha,) = await _call(link, ("SCRIPT", "LOAD", script))
        commands: dict[str, Callable[[str], Command]] = {
            "SET": lambda key: ("SET", key, _VALUE),
            "GET": lambda key: ("GET", key),
            "EVALSHA": lambda key: ("EVALSHA", sha, 1, key, _VALUE),
        }
        figures = []
        for name, command in commands.items():
            calls: dict[str, Call] = {"link": lambda key, command=command: _call(link, command(key))}  # type: ignore[misc]
            if glide is not None:
                calls["glide"] = lambda key, command=command: glide.custom_command(  # type: ignore[misc]
                    [part if isinstance(part, bytes) else str(part) for part in command(key)]
                )
            samples = await contest(bench.server, calls, keys, bench.often(9, 5), 0.4)
            rates = {who: [sample.rate for sample in found] for who, found in samples.items()}
            note = "; ".join(
                f"{who} {_median(found, 'rate'):,.0f}/s (client's CPU {_median(found, 'client_us'):.1f} µs)"
                for who, found in samples.items()
            )
            if glide is None:
                figures.append(
                    Figure(
                        number=9,
                        name=f"{name} of 600 bytes, {TASKS} tasks, through the link",
                        measured=statistics.median(rates["link"]),
                        unit="/s",
                        note=f"{note}; valkey-glide is not installed: pip install valkey-glide",
                    )
                )
                continue
            ratio, least, most = ratio_by_round(rates["link"], rates["glide"])
            figures.append(
                Figure(
                    number=9,
                    name=f"{name} of 600 bytes, {TASKS} tasks: our link against valkey-glide",
                    measured=ratio,
                    spread=(least, most),
                    target=Target("at least", 1.0),
                    note=note,
                )
            )
    return figures


@contextlib.asynccontextmanager
async def _glide(bench: Bench) -> AsyncIterator[Any]:
    """Open valkey-glide, which needs TCP; None if it is not installed."""
    try:
        glide: Any = importlib.import_module("glide")
    except ImportError:
        yield None
        return
    port = bench.server.port()
    if port is None:
        yield None
        return
    configuration = glide.GlideClientConfiguration([glide.NodeAddress("127.0.0.1", port)], request_timeout=10_000)
    client = await glide.GlideClient.create(configuration)
    try:
        yield client
    finally:
        await client.close()


async def loads(bench: Bench) -> list[Figure]:
    """10: load of 50 turns, against GET of one msgpack text of it and its typed decoding."""
    bench.say("10: load against GET and decode")
    decode = msgspec.msgpack.Decoder(SessionAsset).decode
    async with bench.open() as (ours, _), _link(bench) as link:
        ids = await bench.filled(ours, "g")
        for id in ids:
            asset = await ours.store.load(id)
            blob = msgspec.msgpack.encode(msgspec.json.decode(asset.to_json()))
            await _call(link, ("SET", f"{ours.namespace}:blob:{id}", blob))

        async def get(id: str) -> object:
            (data,) = await _call(link, ("GET", f"{ours.namespace}:blob:{id}"))
            return decode(data)

        one = itertools.cycle(ids)
        times = await latencies(
            {"load": lambda: ours.load(next(one)), "get": lambda: get(next(one))}, bench.often(3000, 600)
        )
        samples = await contest(bench.server, {"load": ours.load, "get": get}, ids, bench.often(11, 7), 0.4)
    alone = ratio_of_medians(times["load"], times["get"])
    p50 = {name: statistics.median(values) * 1e6 for name, values in times.items()}
    together = ratio_by_round(
        [1 / sample.rate for sample in samples["load"]], [1 / sample.rate for sample in samples["get"]]
    )
    cpu = {name: _median(found, "client_us") for name, found in samples.items()}
    return [
        Figure(
            number=10,
            name=f"load of {HISTORY} turns, alone, against GET of one text and typed decode",
            measured=alone[0],
            spread=alone[1:],
            target=Target("at most", 1.3),
            note=f"p50 µs: {p50['load']:.0f} and {p50['get']:.0f}",
        ),
        Figure(
            number=10,
            name=f"the same, {TASKS} tasks: time for each",
            measured=together[0],
            spread=together[1:],
            target=Target("at most", 1.3),
            note=f"client's CPU µs: {cpu['load']:.1f} and {cpu['get']:.1f}",
        ),
    ]


async def lists(bench: Bench) -> list[Figure]:
    """11: the newest 50 sessions, against one HMGET of 50 metadata."""
    sessions = 10_000
    bench.say(f"11: list of {sessions:,}")
    async with bench.open() as (ours, _), _link(bench) as link:
        await ours.fill([bench.source.small(f"s-{n:07d}") for n in range(sessions)])
        partition = ours.store._core.sessions._namespace.keyspace.partitions[0]
        ids = [meta.id for meta in await ours.store.list(limit=50)]

        async def hmget() -> object:
            (found,) = await _call(link, ("HMGET", partition.meta, *ids))
            return [decode_meta(id, packed) for id, packed in zip(ids, found, strict=True)]

        times = await latencies({"list": lambda: ours.store.list(limit=50), "hmget": hmget}, bench.often(3000, 600))
    p50 = {name: statistics.median(values) * 1e6 for name, values in times.items()}
    ratio, least, most = ratio_of_medians(times["list"], times["hmget"])
    return [
        Figure(
            number=11,
            name=f"list(limit=50) of {sessions:,}, against one HMGET of 50, decoded",
            measured=ratio,
            spread=(least, most),
            target=Target("at most", 2.0),
            note=f"p50 µs: {p50['list']:.0f} and {p50['hmget']:.0f}",
        )
    ]


async def server_together(bench: Bench) -> list[Figure]:
    """12: the server's CPU for an append of 50 tasks, against the same writes in MULTI and EXEC."""
    bench.say("12: server's CPU per append, 50 tasks")
    server, count = bench.server, itertools.count(100_000)
    async with bench.open() as (ours, _), bench.open() as (others, plain), _link(bench) as link:
        ids, other_ids = await bench.filled(ours, "c"), await bench.filled(others, "c")

        async def bare(id: str) -> object:
            n, partition = next(count), plain.partition(id)
            session: Command = (
                "HSET", partition.session(id), ".revision", n, ".op", b"o" * 12, ".turns", n,
                "updated_at_ms", b"\xcf12345678",
            )  # fmt: skip
            return await _call(
                link,
                ("MULTI",),
                ("RPUSH", partition.turns(id), next(bench.encoded)),
                session,
                ("HSET", partition.meta, id, b"m" * 75),
                ("ZADD", partition.updated, 1_750_000_000_000 + n, id),
                ("ZADD", partition.changes, n, id),
                ("HSET", partition.state, "revision", n, b"w123456789", b"w" * 20),
                ("PUBLISH", partition.changes, b"p" * 40),
                ("EXEC",),
            )

        usec: dict[str, list[float]] = {"script": [], "bare": []}
        samples: dict[str, list[Sample]] = {"script": [], "bare": []}
        for n in range(bench.often(15, 7)):
            for who in rotated(["script", "bare"], n):
                call, some = (bench.appending(ours), ids) if who == "script" else (bare, other_ids)
                commands = ("evalsha",) if who == "script" else ("multi", "exec")
                before = server.calls(*commands)[1]
                sample = await throughput(server, call, some, 0.4)
                usec[who].append((server.calls(*commands)[1] - before) / sample.done)
                samples[who].append(sample)
    ratio, least, most = ratio_by_round(usec["script"], usec["bare"])
    cpu = {who: _median(found, "server_us") for who, found in samples.items()}
    return [
        Figure(
            number=12,
            name=f"append, {TASKS} tasks: the script's CPU against the same commands in MULTI/EXEC",
            measured=ratio,
            spread=(least, most),
            target=Target("at most", 2.0),
            note=f"µs: {statistics.median(usec['script']):.1f} and {statistics.median(usec['bare']):.1f}; "
            f"all of the server's CPU {cpu['script']:.1f} and {cpu['bare']:.1f} ({cpu['script'] / cpu['bare']:.2f})",
        )
    ]


FIGURES: dict[int, Callable[[Bench], Awaitable[list[Figure]]]] = {
    8: client_floor,
    9: bare_commands,
    10: loads,
    11: lists,
    12: server_together,
}

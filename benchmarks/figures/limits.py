"""The store against what bounds it: bare commands, hiredis without a network, another core, a bare text."""

from __future__ import annotations

import importlib
import itertools
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import hiredis
import msgspec

from orcs_redis import SessionAsset
from orcs_redis.protocol.commands import Command, ScriptCall, merge, pack
from orcs_redis.protocol.index import decode_meta

from ..harness import (
    HISTORY,
    TASKS,
    Call,
    Sample,
    contest,
    in_turns,
    latencies,
    medians,
    of_samples,
    ratio,
    ratio_of_medians,
    repeating,
    together,
)
from ..report import Figure, at_least, at_most
from .bench import Bench, figure

_VALUE = b"x" * 600
_MERGED = 16  # calls that go out as one at most, which is what 50 tasks come to

# The commands of an append, from Lua, without a check.
_UNCHECKED = """
local call = redis.call
call('HMGET', KEYS[1], 'incarnation', 'revision', 'compacted', 'forgotten', 'w123456789012')
call('HMGET', KEYS[2], ARGV[1])
call('HMGET', KEYS[3], '.revision', 'version', '.turns', '.op')
call('TIME')
call('RPUSH', KEYS[4], ARGV[2])
call('ZADD', KEYS[5], ARGV[3], ARGV[1])
call('ZADD', KEYS[6], ARGV[3], ARGV[1])
call('HSET', KEYS[3], '.revision', ARGV[3], '.op', ARGV[4], '.turns', ARGV[3], 'updated_at_ms', ARGV[4])
call('HSET', KEYS[2], ARGV[1], ARGV[5])
call('HSET', KEYS[1], 'revision', ARGV[3], 'w123456789012', ARGV[4])
call('PUBLISH', KEYS[6], ARGV[5])
call('PUBLISH', KEYS[6] .. ARGV[1], ARGV[5])
"""


@figure(5)
async def server_alone(bench: Bench) -> AsyncIterator[Figure]:
    """The server's CPU for an append of one caller alone: at most 2.5 times the same writes in MULTI and EXEC.

    It is the usec of EVALSHA in commandstats, with the commands in it, and of EXEC with its 8. Beside it: the script's
    12 commands called from Lua without a check, and the 8 by themselves.
    """
    server = bench.server
    unchecked_sha = server.client.script_load(_UNCHECKED)
    numbers = itertools.count(100_000)
    async with bench.open() as (store, _), bench.open() as (other, plain):
        ids, other_ids = await bench.filled(store, "c"), await bench.filled(other, "c")
        append = bench.appending(store)

        async def unchecked(id: str) -> None:
            keys = plain.partition(id)
            server.client.evalsha(
                unchecked_sha, 6, keys.state, keys.meta, keys.session(id), keys.turns(id), keys.updated, keys.changes,
                id, next(bench.encoded), str(next(numbers)), b"o" * 20, b"m" * 75,
            )  # fmt: skip

        async def bare(id: str) -> None:
            pipe: Any = server.client.pipeline(transaction=True)
            for command in plain.writes(id, next(numbers), next(bench.encoded)):
                pipe.execute_command(*command)
            pipe.execute()

        sides: dict[str, tuple[Call, list[str]]] = {
            "script": (append, ids), "MULTI and EXEC": (bare, other_ids), "unchecked": (unchecked, other_ids)
        }  # fmt: skip
        usec: dict[str, list[float]] = {side: [] for side in [*sides, "the 8 commands"]}
        inner = ("rpush", "hset", "zadd", "publish")
        for side in in_turns(sides, bench.often(20, 6)):
            call, some = sides[side]
            before, before_inner = server.usec("evalsha", "exec", "multi"), server.usec(*inner)
            for id in some * 4:
                await call(id)
            count = len(some) * 4
            usec[side].append((server.usec("evalsha", "exec", "multi") - before) / count)
            if call is bare:
                usec["the 8 commands"].append((server.usec(*inner) - before_inner) / count)
    yield Figure(
        "append: the script's CPU against the same commands in MULTI/EXEC",
        *ratio(usec["script"], usec["MULTI and EXEC"]),
        target=at_most(2.5),
        detail={"µs": medians(usec)},
    )


@figure(12)
async def server_together(bench: Bench) -> AsyncIterator[Figure]:
    """The server's CPU for an append of 50 tasks, whose calls are merged: at most twice the same in MULTI and EXEC.

    Both by 50 tasks through the store's link.
    """
    server, numbers = bench.server, itertools.count(100_000)
    async with bench.open() as (store, _), bench.open() as (other, plain), bench.link() as link:

        async def bare(id: str) -> object:
            return await link(("MULTI",), *plain.writes(id, next(numbers), next(bench.encoded)), ("EXEC",))

        sides: dict[str, tuple[Call, list[str], tuple[str, ...]]] = {
            "script": (bench.appending(store), await bench.filled(store, "c"), ("evalsha",)),
            "bare": (bare, await bench.filled(other, "c"), ("multi", "exec")),
        }
        usec: dict[str, list[float]] = {side: [] for side in sides}
        samples: dict[str, list[Sample]] = {side: [] for side in sides}
        for side in in_turns(sides, bench.often(15, 7)):
            call, ids, commands = sides[side]
            before = server.usec(*commands)
            samples[side].append(await together(call, ids, 0.4, server))
            usec[side].append((server.usec(*commands) - before) / samples[side][-1].done)
    cpu = medians(of_samples(samples, "server_us"))
    yield Figure(
        f"append, {TASKS} tasks: the script's CPU against the same commands in MULTI/EXEC",
        *ratio(usec["script"], usec["bare"]),
        target=at_most(2.0),
        detail={"µs": medians(usec), "all of the server's CPU": cpu, "ratio of that": cpu["script"] / cpu["bare"]},
    )


@figure(8)
async def client_floor(bench: Bench) -> AsyncIterator[Figure]:
    """The client's CPU for an append of 50 tasks: at most 2.5 times hiredis' on the same frames without a network.

    16 operations in a frame, as they go out, and one, as a lone caller's.
    """
    async with bench.open() as (store, _):
        ids = await bench.filled(store, "f")
        calls: list[ScriptCall] = []
        for id in ids[:_MERGED]:
            calls += store._core.sessions.append(id, [bench.source.turn(1)], None, None).commands()  # type: ignore[arg-type]
        took: list[float] = []
        floors: dict[int, list[float]] = {1: [], _MERGED: []}
        await together(bench.appending(store), ids, 0.2, bench.server)  # warm
        for _ in range(bench.often(15, 7)):
            took.append((await together(bench.appending(store), ids, 0.4, bench.server)).client_us)
            for merged, values in floors.items():
                values.append(_floor(calls[:merged]))
    for merged, values in floors.items():
        yield Figure(
            f"append, {TASKS} tasks: client's CPU against hiredis' floor, {merged} in a frame",
            *ratio(took, values),
            target=at_most(2.5),
            detail={"µs": medians({"store": took, "hiredis": values})},
        )


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


@figure(9)
async def bare_commands(bench: Bench) -> AsyncIterator[Figure]:
    """Bare commands of 50 tasks through the store's link, against valkey-glide's core in Rust: at least as many.

    Without valkey-glide only what the link does.
    """
    keys = [f"{bench.server.namespace()}:{n}" for n in range(TASKS)]
    async with bench.link() as link, _glide(bench) as glide:
        (sha,) = await link(("SCRIPT", "LOAD", "return redis.call('SET', KEYS[1], ARGV[1])"))
        commands: dict[str, Callable[[str], tuple[Any, ...]]] = {
            "SET": lambda key: ("SET", key, _VALUE),
            "GET": lambda key: ("GET", key),
            "EVALSHA": lambda key: ("EVALSHA", sha, "1", key, _VALUE),
        }
        for name, command in commands.items():
            calls: dict[str, Call] = {"link": _sending(link, command)}
            if glide is not None:
                calls["glide"] = _sending(lambda parts: glide.custom_command(list(parts)), command)
            samples = await contest(calls, keys, bench.often(9, 5), 0.4, bench.server)
            rates = of_samples(samples, "rate")
            what = f"{name} of 600 bytes, {TASKS} tasks"
            cpu: dict[str, float | dict[str, float]] = {"client's CPU µs": medians(of_samples(samples, "client_us"))}
            if glide is None:
                note = "valkey-glide is not installed: pip install valkey-glide"
                yield Figure(
                    f"{what}, through the link", statistics.median(rates["link"]), unit="/s", detail=cpu, note=note
                )
            else:
                yield Figure(
                    f"{what}: our link against valkey-glide",
                    *ratio(rates["link"], rates["glide"]),
                    target=at_least(1.0),
                    detail={"a second": medians(rates), **cpu},
                )


def _sending(send: Callable[[Any], Awaitable[object]], command: Callable[[str], Command]) -> Call:
    return lambda key: send(command(key))


@asynccontextmanager
async def _glide(bench: Bench) -> AsyncIterator[Any]:
    """Open valkey-glide, which needs TCP; None if it is not installed."""
    try:
        glide: Any = importlib.import_module("glide")
    except ImportError:
        yield None
        return
    host, _, port = bench.tcp.removeprefix("redis://").partition("/")[0].rpartition(":")
    configuration = glide.GlideClientConfiguration([glide.NodeAddress(host, int(port))], request_timeout=10_000)
    client = await glide.GlideClient.create(configuration)
    try:
        yield client
    finally:
        await client.close()


@figure(10)
async def loads(bench: Bench) -> AsyncIterator[Figure]:
    """Load of 50 turns: at most 1.3 times GET of one msgpack text of the session and its typed decoding.

    Alone and by 50 tasks, through the same link.
    """
    decode = msgspec.msgpack.Decoder(SessionAsset).decode
    async with bench.open() as (store, by_hand), bench.link() as link:
        ids = await bench.filled(store, "g")
        key = f"{by_hand.namespace}:blob:"
        for id in ids:
            text = (await store.load(id)).to_json()
            await link(("SET", key + id, msgspec.msgpack.encode(msgspec.json.decode(text))))

        async def get(id: str) -> object:
            (data,) = await link(("GET", key + id))
            return decode(data)

        calls: dict[str, Call] = {"load": store.load, "GET": get}
        times = await latencies({name: repeating(call, ids) for name, call in calls.items()}, bench.often(3000, 600))
        samples = await contest(calls, ids, bench.often(11, 7), 0.4, bench.server)
    yield Figure(
        f"load of {HISTORY} turns, alone, against GET of one text and typed decode",
        *ratio_of_medians(times["load"], times["GET"]),
        target=at_most(1.3),
        detail={"p50 µs": medians(times)},
    )
    rates = of_samples(samples, "rate")
    yield Figure(
        f"the same, {TASKS} tasks: time for each",
        *ratio(rates["GET"], rates["load"]),
        target=at_most(1.3),
        detail={"client's CPU µs": medians(of_samples(samples, "client_us"))},
    )


@figure(11)
async def lists(bench: Bench) -> AsyncIterator[Figure]:
    """`list(limit=50)` of 10,000: at most twice one HMGET of 50 index metadata, decoded, through the same link."""
    sessions = 10_000
    async with bench.open() as (store, by_hand), bench.link() as link:
        await bench.fill_small(store, range(sessions))
        ids = [meta.id for meta in await store.list(limit=50)]
        key = by_hand.partition(ids[0]).meta

        async def hmget() -> object:
            (found,) = await link(("HMGET", key, *ids))
            return [decode_meta(id, packed) for id, packed in zip(ids, found, strict=True)]

        times = await latencies({"list": lambda: store.list(limit=50), "HMGET": hmget}, bench.often(3000, 600))
    yield Figure(
        f"list(limit=50) of {sessions:,}, against one HMGET of 50, decoded",
        *ratio_of_medians(times["list"], times["HMGET"]),
        target=at_most(2.0),
        detail={"p50 µs": medians(times)},
    )

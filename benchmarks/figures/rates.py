"""How quick it is, beside the same work done by hand with redis-py, and one form beside the other."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

import redis

import orcs_redis
from orcs_redis import SessionAsset
from orcs_redis import sync as blocking

from ..harness import (
    HISTORY,
    TASKS,
    Step,
    contest,
    in_turns,
    latencies,
    medians,
    of_samples,
    ratio,
    ratio_of_medians,
    repeating,
    waiting,
)
from ..report import Figure, at_least, at_most
from .bench import Bench, ByHand, figure


@figure(1)
async def throughput(bench: Bench) -> AsyncIterator[Figure]:
    """Append, and load of 50 turns, by 50 tasks in one process, against redis-py's asyncio client by hand.

    It has its default pool, and the same script, layout and codec; its loads are a pipeline without MULTI. Appends are
    to be 3.8 times as many, loads 3.
    """
    async with bench.open() as (store, by_hand):
        appended, loaded = await bench.filled(store, "t"), await bench.filled(store, "r")
        for name, target, ours, theirs, ids in (
            ("append", 3.8, bench.appending(store), bench.appending(by_hand), appended),
            ("load", 3.0, store.load, by_hand.load, loaded),
        ):
            calls = {"orcs_redis": ours, "redis-py": theirs}
            samples = await contest(calls, ids, bench.often(11, 5), bench.often(0.6, 0.3), bench.server)
            rates = of_samples(samples, "rate")
            yield Figure(
                f"{name}, {TASKS} tasks, against redis-py",
                *ratio(rates["orcs_redis"], rates["redis-py"]),
                target=at_least(target),
                detail={
                    "a second": medians(rates),
                    "CPU µs, client": medians(of_samples(samples, "client_us")),
                    "server": medians(of_samples(samples, "server_us")),
                },
            )


@figure(7)
async def alone(bench: Bench) -> AsyncIterator[Figure]:
    """One caller alone, in both forms, against redis-py: at most 1.3 times its p50.

    Append: EVALSHA of the same script with a turn already encoded. Load: MULTI, HGETALL, LRANGE, without decoding and
    with it.
    """
    async with bench.open() as (store, by_hand):
        appended, loaded = await bench.filled(store, "a"), await bench.filled(store, "b")
        asyncio_calls: dict[str, Step] = {
            "append": repeating(bench.appending(store), appended),
            "EVALSHA": repeating(lambda session: by_hand.append_raw(session, next(bench.encoded)), appended),
            "load": repeating(store.load, loaded),
            "MULTI": repeating(by_hand.load_raw, loaded),
            "MULTI, decoded": repeating(by_hand.load_transaction, loaded),
        }
        with (
            blocking.open_store(bench.server.url, namespace=by_hand.namespace) as other,
            redis.Redis.from_url(bench.server.plain) as client,
        ):
            blocking_calls = {
                "append": repeating(lambda session: other.append(session, next(bench.turns)), appended),
                "EVALSHA": repeating(
                    lambda session: _append_raw(client, by_hand, session, next(bench.encoded)), appended
                ),
                "load": repeating(other.load, loaded),
                "MULTI": repeating(lambda session: _load_raw(client, by_hand, session), loaded),
                "MULTI, decoded": repeating(
                    lambda session: by_hand.decoded(session, *_load_raw(client, by_hand, session)), loaded
                ),
            }
            for form, calls in (
                ("asyncio", asyncio_calls),
                ("blocking", {name: waiting(call) for name, call in blocking_calls.items()}),
            ):
                times = await latencies(calls, bench.often(4000, 600))
                for ours, theirs in (("append", "EVALSHA"), ("load", "MULTI"), ("load", "MULTI, decoded")):
                    yield Figure(
                        f"{form}, {ours} alone against redis-py's {theirs}",
                        *ratio_of_medians(times[ours], times[theirs]),
                        target=at_most(1.3),
                        detail={"p50 µs": medians({ours: times[ours], theirs: times[theirs]})},
                    )


def _append_raw(client: redis.Redis, by_hand: ByHand, id: str, data: bytes) -> object:
    keys, arguments = by_hand.append_arguments(id, data)
    reply: Any = client.evalsha(by_hand.sha, len(keys), *keys, *arguments)
    return by_hand.acknowledge(reply)


def _load_raw(client: redis.Redis, by_hand: ByHand, id: str) -> Any:
    pipe = client.pipeline(transaction=True)
    by_hand.reads(pipe, id)
    return pipe.execute()


@figure(13)
async def bulk(bench: Bench) -> AsyncIterator[Figure]:
    """`save_many` of 10,000 sessions of 50 turns, `load_many` of 20,000, and as many loads in one gather.

    With default options, asyncio against blocking: at least as many, and no errors.
    """
    count = bench.often(10_000, 2_000)
    turns = bench.source.turns(1000)
    ids = [f"m-{n % count}" for n in range(2 * count)]
    rates: dict[str, dict[str, list[float]]] = {"save_many": {}, "load_many": {}}
    errors = 0

    def assets() -> list[SessionAsset]:
        made = [bench.source.small(id) for id in ids[:count]]
        for n, asset in enumerate(made):
            asset.history.turns = turns[n % (1000 - HISTORY) :][:HISTORY]
        return made

    async def measure(form: str, call: str, size: int, do: Callable[..., Awaitable[Any]], *arguments: Any) -> None:
        nonlocal errors
        begin = time.perf_counter()
        results = await do(*arguments)
        rates[call].setdefault(form, []).append(size / (time.perf_counter() - begin))
        errors += sum(isinstance(result, BaseException) for result in results)

    for form in in_turns(("blocking", "asyncio"), bench.often(3, 1)):
        made, namespace = assets(), bench.server.namespace()
        if form == "asyncio":
            async with orcs_redis.open_store(bench.server.url, namespace=namespace) as store:
                await measure(form, "save_many", count, store.save_many, made)
                await measure(form, "load_many", 2 * count, store.load_many, ids)
                each = partial(asyncio.gather, return_exceptions=True)
                await measure("asyncio, gather", "load_many", 2 * count, each, *map(store.load, ids))
                await store.delete_many(set(ids))
        else:
            with blocking.open_store(bench.server.url, namespace=namespace) as other:
                await measure(form, "save_many", count, asyncio.to_thread, other.save_many, made)
                await measure(form, "load_many", 2 * count, asyncio.to_thread, other.load_many, ids)
                other.delete_many(set(ids))
    for call, found in rates.items():
        yield Figure(
            f"{call} of {count if call == 'save_many' else 2 * count:,}, asyncio against blocking",
            *ratio(found["asyncio"], found["blocking"]),
            target=at_least(1.0),
            detail={"a second": medians(found)},
        )
    yield Figure("errors of all these calls", errors, unit="", target=at_most(0))

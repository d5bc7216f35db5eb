"""Bulk calls with default options: errors and throughput, asyncio beside blocking."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Any

import orcs_redis
from orcs_redis import SessionAsset
from orcs_redis import sync as blocking

from .bench import HISTORY, Bench
from .report import Figure, Target
from .workloads import ratio_by_round


async def bulk(bench: Bench) -> list[Figure]:
    """13: save_many of 10,000 and load_many of 20,000 sessions of 50 turns, and as many calls in one gather."""
    count = 10_000 if not bench.quick else 2_000
    turns = bench.source.turns(1000)
    rates: dict[str, dict[str, list[float]]] = {}
    errors: dict[str, int] = {}

    def assets() -> list[SessionAsset]:
        made = [bench.source.small(f"m-{n}") for n in range(count)]
        for n, asset in enumerate(made):
            asset.history.turns = turns[n % (1000 - HISTORY) :][:HISTORY]
        return made

    def note(call: str, form: str, seconds: float, results: Iterable[Any], size: int) -> None:
        rates.setdefault(call, {}).setdefault(form, []).append(size / seconds)
        failed = sum(isinstance(result, BaseException) for result in results)
        errors[form] = errors.get(form, 0) + failed

    async def measure(form: str, call: str, size: int, do: Callable[..., Awaitable[Any]], *arguments: Any) -> None:
        bench.say(f"13: {call}, {form}")
        begin = time.perf_counter()
        results = await do(*arguments)
        note(call, form, time.perf_counter() - begin, results, size)

    ids = [f"m-{n % count}" for n in range(2 * count)]
    for n in range(bench.often(3, 1)):
        for form in ("asyncio", "blocking") if n % 2 else ("blocking", "asyncio"):
            namespace = bench.server.namespace()
            made = assets()
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
    figures = []
    for call, found in rates.items():
        ratio, least, most = ratio_by_round(found["asyncio"], found["blocking"])
        medians = {form: statistics.median(values) for form, values in found.items()}
        figures.append(
            Figure(
                number=13,
                name=f"{call} of {count if call == 'save_many' else 2 * count:,}, asyncio against blocking",
                measured=ratio,
                spread=(least, most),
                target=Target("at least", 1.0),
                note="; ".join(f"{form} {rate:,.0f}/s" for form, rate in medians.items()),
                detail=medians,
            )
        )
    figures.append(
        Figure(
            number=13,
            name="errors of all these calls",
            measured=sum(errors.values()),
            unit="",
            target=Target("at most", 0),
            detail=dict(errors),
        )
    )
    return figures


FIGURES: dict[int, Callable[[Bench], Awaitable[list[Figure]]]] = {13: bulk}

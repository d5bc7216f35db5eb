"""How things are timed: always interleaved, since the machine is shared and its pace drifts."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

import msgspec

from .servers import Server

Call = Callable[[str], Awaitable[object]]
"""One operation on the session of this id."""


class Sample(msgspec.Struct):
    """One round of many tasks."""

    done: int  # operations
    rate: float  # of them a second
    client_us: float  # CPU of this process per operation
    server_us: float  # CPU of the server per operation


async def throughput(server: Server, call: Call, ids: Sequence[str], seconds: float) -> Sample:
    """Run one task for each id, each with one operation at a time."""
    done = 0
    end = time.perf_counter() + seconds

    async def work(id: str) -> None:
        nonlocal done
        while time.perf_counter() < end:
            await call(id)
            done += 1

    server_cpu, cpu, begin = server.cpu(), time.process_time(), time.perf_counter()
    await asyncio.gather(*map(work, ids))
    took, cpu = time.perf_counter() - begin, time.process_time() - cpu
    return Sample(done, done / took, cpu / done * 1e6, (server.cpu() - server_cpu) / done * 1e6)


async def contest(
    server: Server, calls: Mapping[str, Call], ids: Sequence[str], rounds: int, seconds: float
) -> dict[str, list[Sample]]:
    """Let the calls take turns; the order changes from round to round."""
    samples: dict[str, list[Sample]] = {name: [] for name in calls}
    for call in calls.values():
        await throughput(server, call, ids, 0.1)  # warm
    for n in range(rounds):
        for name in rotated(list(calls), n):
            samples[name].append(await throughput(server, calls[name], ids, seconds))
    return samples


async def latencies(calls: Mapping[str, Callable[[], Awaitable[object]]], repeats: int) -> dict[str, list[float]]:
    """Time single operations one after the other, in turns; seconds."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for n in range(-max(5, repeats // 50), repeats):
        for name in rotated(names, n):
            begin = time.perf_counter()
            await calls[name]()
            took = time.perf_counter() - begin
            if n >= 0:  # before that it only gets warm
                times[name].append(took)
    return times


def rotated(names: list[str], n: int) -> list[str]:
    """Return the names, beginning with another one each time."""
    k = n % len(names)
    return names[k:] + names[:k]


def ratio_of_medians(above: Sequence[float], below: Sequence[float], parts: int = 7) -> tuple[float, float, float]:
    """Return the ratio of two medians, and the least and greatest that stretches of the run give."""
    ratios = []
    for a, b in zip(_stretches(above, parts), _stretches(below, parts), strict=True):
        ratios.append(statistics.median(a) / statistics.median(b))
    return statistics.median(above) / statistics.median(below), min(ratios), max(ratios)


def ratio_by_round(above: Sequence[float], below: Sequence[float]) -> tuple[float, float, float]:
    """Return the median of the rounds' ratios, their least and their greatest."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def _stretches(values: Sequence[float], parts: int) -> list[Sequence[float]]:
    cuts = [len(values) * n // parts for n in range(parts + 1)]
    return [values[a:b] for a, b in itertools.pairwise(cuts) if b > a]

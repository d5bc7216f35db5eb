"""How things are measured: what is compared takes turns, since the machine is shared and its pace drifts.

The figures and the peers' workers use it. Only the standard library: a worker runs in its own store's environment.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeAlias, TypeVar

TASKS = 50
HISTORY = 50
"""Turns of an ordinary session."""

Call: TypeAlias = Callable[[str], Awaitable[object]]
"""One operation on the session of this id."""
Step: TypeAlias = Callable[[], Awaitable[object]]
"""One operation."""
Side = TypeVar("Side")


class Spread(NamedTuple):
    """A median, and the least and greatest of what it is made from."""

    median: float
    least: float
    most: float


def spread(values: Sequence[float]) -> Spread:
    """Return the median of some rounds."""
    return Spread(statistics.median(values), min(values), max(values))


def ratio(above: Sequence[float], below: Sequence[float]) -> Spread:
    """Return the median of the rounds' ratios."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def ratio_of_medians(above: Sequence[float], below: Sequence[float], parts: int = 7) -> Spread:
    """Return the ratio of two medians; the least and greatest are those of stretches of the run."""
    size = max(1, len(above) // parts)
    ratios = [
        statistics.median(above[at : at + size]) / statistics.median(below[at : at + size])
        for at in range(0, size * min(parts, len(above)), size)
    ]
    return spread(ratios)._replace(median=statistics.median(above) / statistics.median(below))


def in_turns(sides: Iterable[Side], rounds: int) -> Iterator[Side]:
    """Yield each side once a round, beginning with another one each time."""
    sides = list(sides)
    for n in range(rounds):
        first = n % len(sides)
        yield from (*sides[first:], *sides[:first])


class Counters:
    """What a server has used, by a way to ask for a section of INFO; nothing, without one."""

    def __init__(self, info: Callable[[str], Mapping[str, Any]] = lambda _: {}) -> None:
        self.info = info

    def cpu(self) -> float:
        """Return the seconds of CPU."""
        info = self.info("cpu")
        return float(info.get("used_cpu_user", 0)) + float(info.get("used_cpu_sys", 0))

    def memory(self) -> int:
        """Return the bytes in use."""
        return int(self.info("memory").get("used_memory", 0))


class Sample(NamedTuple):
    """One round of many tasks."""

    done: int  # operations
    rate: float  # of them a second
    client_us: float  # CPU of this process per operation
    server_us: float  # CPU of the server per operation


async def together(
    call: Call, ids: Sequence[str], seconds: float, server: Counters, *, threads: bool = False
) -> Sample:
    """Run one task (or thread) for each id, each with one operation at a time."""

    async def work(id: str) -> int:
        done = 0
        while time.perf_counter() < end:
            await call(id)
            done += 1
        return done

    server_cpu, cpu, begin = server.cpu(), time.process_time(), time.perf_counter()
    end = begin + seconds
    if threads:
        with ThreadPoolExecutor(len(ids)) as pool:
            done = sum(pool.map(lambda each: asyncio.run(work(each)), ids))
    else:
        done = sum(await asyncio.gather(*map(work, ids)))
    took, cpu = time.perf_counter() - begin, time.process_time() - cpu
    return Sample(done, done / took, cpu / done * 1e6, (server.cpu() - server_cpu) / done * 1e6)


async def contest(
    calls: Mapping[str, Call], ids: Sequence[str], rounds: int, seconds: float, server: Counters
) -> dict[str, list[Sample]]:
    """Let many tasks do one thing, then the other, in turns."""
    samples: dict[str, list[Sample]] = {name: [] for name in calls}
    for call in calls.values():
        await together(call, ids, 0.1, server)  # warm
    for name in in_turns(calls, rounds):
        samples[name].append(await together(calls[name], ids, seconds, server))
    return samples


async def latencies(
    calls: Mapping[str, Step], repeats: int, over: Callable[[], bool] = lambda: False, warm: int = 50
) -> dict[str, list[float]]:
    """Time single operations in turns, after some to get warm, until there are enough or the time is over; µs."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for name in in_turns(calls, warm):
        await calls[name]()
    for name in in_turns(calls, repeats):
        begin = time.perf_counter()
        await calls[name]()
        times[name].append((time.perf_counter() - begin) * 1e6)
        if over():
            break
    return times


def medians(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the median of each side."""
    return {name: statistics.median(each) for name, each in values.items()}


def of_samples(samples: Mapping[str, Sequence[Sample]], field: str) -> dict[str, list[float]]:
    """Return one field of each side's samples."""
    return {name: [getattr(sample, field) for sample in each] for name, each in samples.items()}


def waiting(call: Callable[[], object]) -> Step:
    """Return a blocking operation as one that is awaited."""

    async def step() -> object:
        return call()

    return step


def repeating(call: Callable[[Side], Any], of: Iterable[Side]) -> Callable[[], Any]:
    """Return a call on one thing after the other, without end."""
    order = itertools.cycle(of)
    return lambda: call(next(order))

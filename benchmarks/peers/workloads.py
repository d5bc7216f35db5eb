"""What is done with each store. Only the standard library: this runs in every store's environment.

Each workload returns numbers by name; its text, where a number should be, says why there is none.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from ..harness import HISTORY, TASKS, Counters, Step, latencies, together
from ..processes import Process, race
from .interface import Store, turn

Numbers: TypeAlias = dict[str, Any]
WORKERS = 4
HOT = 4  # sessions on which the fleet's workers meet


class Place(NamedTuple):
    """Where a store is measured; `worker` names a function of a further process, and `job` is what it gets."""

    server: Counters
    folder: Path
    worker: Callable[[str], str] = str
    job: str = ""

    def memory(self) -> int:
        """Return the bytes in use, in the server and in files."""
        return self.server.memory() + sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())


class Budget:
    """The seconds that a step may take, so that a slow store does not hold up the rest."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._end = time.perf_counter() + seconds

    def over(self) -> bool:
        return time.perf_counter() > self._end

    def __str__(self) -> str:
        return f"more than {self._seconds:.0f} s"


def _server_us(store: Store, us: float) -> float | str:
    return "it has no server" if store.serverless else us


async def _alone(store: Store, place: Place, call: Step, repeats: int, budget: Budget) -> Numbers:
    """One caller alone."""
    await call()
    server_cpu, cpu = place.server.cpu(), time.process_time()
    times = (await latencies({"": call}, repeats, budget.over, warm=0))[""]
    return {
        "p50_us": statistics.median(times),
        "client_us": (time.process_time() - cpu) / len(times) * 1e6,
        "server_us": _server_us(store, (place.server.cpu() - server_cpu) / len(times) * 1e6),
    }


async def append(store: Store, place: Place, size: int, repeats: int, seconds: float) -> Numbers:
    """Append one turn to a history of `size`."""
    budget, id, number = Budget(seconds), f"append-{size}", size
    try:
        async with asyncio.timeout(seconds):  # some add turn by turn, each in proportion to those before
            await store.create(id, [turn(n, id) for n in range(size)])
    except TimeoutError:
        return {"p50_us": f"filling took {budget}"}

    async def once() -> None:
        nonlocal number
        await store.append(id, turn(number, id))
        number += 1

    numbers = await _alone(store, place, once, repeats, budget)
    _expect(len(await store.load(id)), number, "turns after appending")
    return numbers


async def load(store: Store, place: Place, size: int, repeats: int, seconds: float) -> Numbers:
    """Load a session whole, and its last 20 turns."""
    budget, id = Budget(seconds), f"load-{size}"
    turns = [turn(n, id) for n in range(size)]
    ids = [each["id"] for each in turns]
    await store.create(id, turns)
    _expect([store.turn_id(t) for t in await store.load(id)], ids, "turns")
    numbers = await _alone(store, place, lambda: store.load(id), repeats, budget)
    if "tail" in store.cannot:
        return numbers | {"tail_us": store.cannot["tail"]}
    _expect([store.turn_id(t) for t in await store.tail(id, 20)], ids[-20:], "tail")
    tail = await _alone(store, place, lambda: store.tail(id, 20), repeats, budget)
    return numbers | {"tail_us": tail["p50_us"]}


async def newest(store: Store, place: Place, size: int, repeats: int, seconds: float) -> Numbers:
    """The newest 50 of `size` sessions, each of two turns; those of smaller sizes are there as well."""
    if "newest" in store.cannot:
        return {"p50_us": store.cannot["newest"]}
    filling = Budget(4 * seconds)
    for n in range(size):
        await store.create(f"list-{size}-{n:06d}", [turn(0, "a"), turn(1, "b")])
        if filling.over():
            return {"p50_us": f"filling took {filling} for {n:,}"}
    await asyncio.sleep(1.1)  # some keep time in seconds
    changed = [f"list-{size}-{n:06d}" for n in random.Random(1).sample(range(size), 50)]
    for id in changed:
        await store.append(id, turn(2, id))
        await asyncio.sleep(0.002)  # most in milliseconds
    found = await store.newest(50)
    numbers = await _alone(store, place, lambda: store.newest(50), repeats, Budget(seconds))
    return numbers | {"answer": "right" if found == changed[::-1] else "wrong"}


async def tasks(store: Store, place: Place, seconds: float) -> Numbers:
    """50 tasks (threads, for a blocking store) in one process: loads of 50 turns, then appends."""
    ids = [f"task-{n}" for n in range(TASKS)]
    for id in ids:
        await store.create(id, [turn(n, id) for n in range(HISTORY)])
    numbers: Numbers = {}
    count = HISTORY

    async def adding(id: str) -> None:
        nonlocal count
        count += 1
        await store.append(id, turn(count, id))

    # Loads first: histories are to have the 50 turns.
    for name, call in (("load", store.load), ("append", adding)):
        await together(call, ids, 0.15, place.server, threads=store.blocking)
        sample = await together(call, ids, seconds, place.server, threads=store.blocking)
        numbers |= {
            f"{name}_per_s": sample.rate,
            f"{name}_client_us": sample.client_us,
            f"{name}_server_us": _server_us(store, sample.server_us),
        }
    return numbers


async def fleet(store: Store, place: Place, seconds: float) -> Numbers:
    """4 processes (`fleet_worker`): what they were told, held against what is stored."""
    for id in [f"hot-{n}" for n in range(HOT)] + [id for worker in range(WORKERS) for id in _own(worker)]:
        await store.create(id, [turn(n, id) for n in range(HISTORY)])
    workers = [(place.job, worker, seconds) for worker in range(WORKERS)]
    outcomes = await asyncio.to_thread(race, place.worker("fleet"), *workers)
    expected: dict[str, list[str]] = {}
    failures: dict[str, int] = {}
    for outcome in outcomes:
        for id, turn_id in outcome["acknowledged"]:
            expected.setdefault(id, []).append(turn_id)
        for name, times in outcome["failures"].items():
            failures[name] = failures.get(name, 0) + times
    lost = doubled = 0
    for id, turn_ids in expected.items():
        found = [store.turn_id(t) for t in await store.load(id)]
        lost += len(set(turn_ids) - set(found))
        doubled += len(found) - len(set(found))
    starts = {name: statistics.median(o[name] for o in outcomes) for name in ("import_ms", "open_ms", "first_load_ms")}
    return {
        "pairs_per_s": sum(len(outcome["acknowledged"]) / outcome["took"] for outcome in outcomes),
        "acknowledged": sum(map(len, expected.values())),
        "lost": lost,
        "doubled": doubled,
        "failed": sum(failures.values()),
        "failures": ", ".join(sorted(failures)),
        **starts,
    }


def _own(worker: int) -> list[str]:
    return [f"fleet-{worker}-{n}" for n in range(TASKS // 2)]


async def fleet_worker(store: Store, worker: int, seconds: float) -> Numbers:
    """One of the fleet's processes: 25 tasks, each loads a session and appends to it; one in five on a shared one."""
    acknowledged: list[tuple[str, str]] = []
    failures: dict[str, int] = {}
    rng, number = random.Random(worker), 0

    async def work(id: str) -> None:
        nonlocal number
        if rng.random() < 0.2:
            id = f"hot-{rng.randrange(HOT)}"
        number += 1
        new = turn(number, f"w{worker}")
        try:
            await store.load(id)
            await store.append(id, new)
            acknowledged.append((id, new["id"]))
        except Exception as exc:  # counted, and shown
            failures[type(exc).__name__] = failures.get(type(exc).__name__, 0) + 1

    begin = time.perf_counter()
    await together(work, _own(worker), seconds, Counters(), threads=store.blocking)
    return {"took": time.perf_counter() - begin, "acknowledged": acknowledged, "failures": failures}


async def notify(store: Store, place: Place, repeats: int) -> Numbers:
    """From the call of a write to its arrival at a peer in another process."""
    if type(store).watch is Store.watch:
        return {"p50_us": "it tells nobody of changes"}
    await store.create("notify", [turn(0)])
    with Process(place.worker("listen"), place.job) as process:
        arrivals: asyncio.Queue[float] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def read() -> None:
            for line in process.output:
                loop.call_soon_threadsafe(arrivals.put_nowait, float(line))

        async def arrival(seconds: float) -> float | None:
            try:
                return await asyncio.wait_for(arrivals.get(), seconds)
            except TimeoutError:
                return None

        reading = loop.run_in_executor(None, read)
        for number in range(100):  # until it listens
            await store.announce("notify", turn(number))
            if await arrival(0.1) is not None:
                break
        while await arrival(0.3) is not None:
            pass
        times = []
        for number in range(repeats):
            begin = time.perf_counter()
            await store.announce("notify", turn(number))
            came = await arrival(5.0)
            if came is None:
                raise RuntimeError("a change was not told")
            times.append(came - begin)
            await asyncio.sleep(0.002)
        process.end()
        await reading
    return {"p50_us": statistics.median(times) * 1e6}


async def memory(store: Store, place: Place, sessions: int) -> Numbers:
    """Bytes of a session of 50 turns, against its compact JSON; of a store without a server, those of its files."""
    size, before = 0, place.memory()
    for n in range(sessions):
        turns = [turn(m, f"m{n}") for m in range(HISTORY)]
        size += len(json.dumps({"id": f"memory-{n}", "turns": turns}, separators=(",", ":")))
        await store.create(f"memory-{n}", turns)
    used = place.memory() - before
    return {"against_json": used / size, "bytes": used / sessions}


def _expect(found: object, expected: object, what: str) -> None:
    if found != expected:
        raise RuntimeError(f"wrong answer: {what}")

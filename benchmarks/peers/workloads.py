"""What is done with each store. Only the standard library: this runs in every store's environment.

Each workload returns numbers by name; its text, where a number should be, says why there is none.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

from .interface import Store, turn

Numbers: TypeAlias = dict[str, Any]
TASKS = 50
HOT = 4  # sessions on which the fleet's workers meet
SESSION = 50  # turns of an ordinary session


class Server:
    """The CPU and memory of the store's server; None for stores without one."""

    def __init__(self, ask: Callable[[str], dict[str, str]] | None) -> None:
        self._ask = ask

    def per(self, before: float, count: int) -> float | str:
        """Return the µs for each of `count`, since it had used so many seconds."""
        return (self.cpu() - before) / count * 1e6 if self._ask is not None else "it has no server"

    def cpu(self) -> float:
        """Return the seconds it has used."""
        if self._ask is None:
            return 0.0
        info = self._ask("cpu")
        return float(info["used_cpu_user"]) + float(info["used_cpu_sys"])

    def memory(self) -> int:
        """Return the bytes in use."""
        return int(self._ask("memory")["used_memory"]) if self._ask is not None else 0


class Budget:
    """The seconds that a step may take, so that a slow store does not hold up the rest."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._end = time.perf_counter() + seconds

    def over(self) -> bool:
        return time.perf_counter() > self._end

    def __str__(self) -> str:
        return f"more than {self._seconds:.0f} s"


async def _timed(call: Callable[[], Awaitable[object]], server: Server, repeats: int, budget: Budget) -> Numbers:
    """One caller alone."""
    times: list[float] = []
    await call()
    server_cpu, cpu = server.cpu(), time.process_time()
    for _ in range(repeats):
        begin = time.perf_counter()
        await call()
        times.append(time.perf_counter() - begin)
        if budget.over():
            break
    return {
        "p50_us": statistics.median(times) * 1e6,
        "client_us": (time.process_time() - cpu) / len(times) * 1e6,
        "server_us": server.per(server_cpu, len(times)),
    }


async def append(store: Store, server: Server, size: int, repeats: int, seconds: float) -> Numbers:
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

    numbers = await _timed(once, server, repeats, budget)
    _expect(len(await store.load(id)), number, "turns after appending")
    return numbers


async def load(store: Store, server: Server, size: int, repeats: int, seconds: float) -> Numbers:
    """Load a session whole, and its last 20 turns."""
    budget, id = Budget(seconds), f"load-{size}"
    await store.create(id, [turn(n, id) for n in range(size)])
    _expect([store.turn_id(t) for t in await store.load(id)], [turn(n, id)["id"] for n in range(size)], "turns")
    numbers = await _timed(lambda: store.load(id), server, repeats, budget)
    if "tail" in store.cannot:
        return numbers | {"tail_us": store.cannot["tail"]}
    _expect(
        [store.turn_id(t) for t in await store.tail(id, 20)],
        [turn(n, id)["id"] for n in range(size - 20, size)],
        "tail",
    )
    return numbers | {"tail_us": (await _timed(lambda: store.tail(id, 20), server, repeats, budget))["p50_us"]}


async def newest(store: Store, server: Server, size: int, repeats: int, seconds: float) -> Numbers:
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
    numbers = await _timed(lambda: store.newest(50), server, repeats, Budget(seconds))
    return numbers | {"answer": "right" if found == changed[::-1] else "wrong"}


async def tasks(store: Store, server: Server, seconds: float) -> Numbers:
    """50 tasks (threads, for a blocking store) in one process: loads of 50 turns, then appends."""
    ids = [f"task-{n}" for n in range(TASKS)]
    for id in ids:
        await store.create(id, [turn(n, id) for n in range(SESSION)])
    numbers: Numbers = {}
    count = SESSION

    async def adding(id: str) -> None:
        nonlocal count
        count += 1
        await store.append(id, turn(count, id))

    async def loading(id: str) -> None:
        await store.load(id)

    # Loads first: histories are to have the 50 turns.
    for name, work in (("load", loading), ("append", adding)):
        await _many(store, work, ids, 0.15)
        server_cpu, cpu, begin = server.cpu(), time.process_time(), time.perf_counter()
        done = await _many(store, work, ids, seconds)
        took, cpu = time.perf_counter() - begin, time.process_time() - cpu
        numbers |= {
            f"{name}_per_s": done / took,
            f"{name}_client_us": cpu / done * 1e6,
            f"{name}_server_us": server.per(server_cpu, done),
        }
    return numbers


async def _many(
    store: Store, work: Callable[[str], Coroutine[Any, Any, None]], ids: Sequence[str], seconds: float
) -> int:
    """Let each id have its own task, which works on it again and again; return how often in all."""
    end = time.perf_counter() + seconds

    async def one(id: str) -> int:
        done = 0
        while time.perf_counter() < end:
            await work(id)
            done += 1
        return done

    if not store.blocking:
        return sum(await asyncio.gather(*map(one, ids)))
    with ThreadPoolExecutor(len(ids)) as threads:
        return sum(threads.map(lambda own: asyncio.run(one(own)), ids))


async def fleet(store: Store, worker: int, workers: int, seconds: float) -> Numbers:
    """One of the fleet's processes: 25 tasks, each loads a session and appends to it; one in five on a shared one."""
    own = [f"fleet-{worker}-{n}" for n in range(TASKS // 2)]
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
    await _many(store, work, own, seconds)
    return {"took": time.perf_counter() - begin, "acknowledged": acknowledged, "failures": failures}


async def prepare_fleet(store: Store, workers: int) -> None:
    """Make the fleet's sessions."""
    for id in [f"hot-{n}" for n in range(HOT)] + [f"fleet-{w}-{n}" for w in range(workers) for n in range(TASKS // 2)]:
        await store.create(id, [turn(n, id) for n in range(SESSION)])


async def judge(store: Store, outcomes: Sequence[Numbers]) -> Numbers:
    """Hold what the fleet was told against what is stored."""
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
    total = sum(map(len, expected.values()))
    return {
        "pairs_per_s": sum(len(outcome["acknowledged"]) / outcome["took"] for outcome in outcomes),
        "acknowledged": total,
        "lost": lost,
        "doubled": doubled,
        "failed": sum(failures.values()),
        "failures": ", ".join(sorted(failures)),
        "import_ms": statistics.median(o["import_s"] for o in outcomes) * 1e3,
        "open_ms": statistics.median(o["open_s"] for o in outcomes) * 1e3,
        "first_load_ms": statistics.median(o["first_load_s"] for o in outcomes) * 1e3,
    }


async def notify(
    store: Store, repeats: int, listen: Callable[[], tuple[Callable[[], None], Callable[[float], float | None]]]
) -> Numbers:
    """From the call of a write to its arrival at a peer in another process.

    `listen` starts that process, and returns what ends it and what waits for its next arrival (None: in vain).
    """
    if type(store).watch is Store.watch:
        return {"p50_us": "it tells nobody of changes"}
    await store.create("notify", [turn(0)])
    end, arrival = listen()
    try:
        for number in range(100):  # until it listens
            await store.announce("notify", turn(number))
            if await asyncio.to_thread(arrival, 0.1) is not None:
                break
        while await asyncio.to_thread(arrival, 0.3) is not None:
            pass
        times = []
        for number in range(repeats):
            begin = time.perf_counter()
            await store.announce("notify", turn(number))
            came = await asyncio.to_thread(arrival, 5.0)
            if came is None:
                raise RuntimeError("a change was not told")
            times.append(came - begin)
            await asyncio.sleep(0.002)
    finally:
        end()
    return {"p50_us": statistics.median(times) * 1e6}


async def memory(store: Store, server: Server, sessions: int, used: Callable[[], int]) -> Numbers:
    """Bytes of a session of 50 turns, against its compact JSON. `used` tells what a store without a server uses."""
    size = 0
    before = server.memory() + used()
    for n in range(sessions):
        turns = [turn(m, f"m{n}") for m in range(SESSION)]
        size += len(json.dumps({"id": f"memory-{n}", "turns": turns}, separators=(",", ":")))
        await store.create(f"memory-{n}", turns)
    return {
        "against_json": (server.memory() + used() - before) / size,
        "bytes": (server.memory() + used() - before) / sessions,
    }


def _expect(found: object, expected: object, what: str) -> None:
    if found != expected:
        raise RuntimeError(f"wrong answer: {what}")

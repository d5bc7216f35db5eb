"""The hybrid store: what it costs beside a folder and beside the shared store, and how soon each side has the other's.

The folders are in the system's temporary folder; each run says what a sync of a file costs there.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import statistics
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import aclosing, contextmanager
from importlib.resources import files
from pathlib import Path

from orcs_redis import HybridSessionStore, LocalFileStore, RedisSessionStore, SessionAsset, open_store

from ..harness import Step, latencies, medians, ratio_of_medians, repeating, spread
from ..processes import Process, ready
from ..report import Figure, at_least, at_most
from .bench import Bench, figure
from .data import real_sessions

_TURNS = 20
_BATCH = 32  # sessions: what a sync notes together


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="orcs-bench-") as folder:
        yield Path(folder)


def _fsync_ms(folder: Path) -> float:
    """Return what it costs to sync a small file."""
    times = []
    for n in range(50):
        path = folder / f".{n}.probe"
        with path.open("wb", buffering=0) as file:
            file.write(b"x" * 4096)
            begin = time.perf_counter()
            os.fsync(file.fileno())
            times.append((time.perf_counter() - begin) * 1000)
        path.unlink()
    return statistics.median(times)


def _about_disk(folder: Path) -> str:
    return f"fsync of a file {_fsync_ms(folder):.2f} ms here"


def _write(folder: Path, assets: Iterable[SessionAsset]) -> int:
    """Write orcs' files as of an hour ago; return their bytes."""
    size, then = 0, time.time() - 3600
    for asset in assets:
        file = folder / f"{asset.id}.json"
        size += file.write_bytes(asset.to_json().encode())
        os.utime(file, (then, then))
    return size


def _sessions(bench: Bench, count: int, turns: int) -> Iterator[SessionAsset]:
    return (bench.source.session(f"s-{n:05d}", turns) for n in range(count))


@figure(29)
async def first_syncs(bench: Bench) -> AsyncIterator[Figure]:
    """First `sync` of 10,000 sessions of 20 turns, up and down: at least 300 sessions a second each.

    Up again into another namespace, by a process that is killed at 40 %: what the next one does of what was there
    already is at most a batch of 32.
    """
    count = bench.often(10_000, 2_000)
    namespace, url = bench.server.namespace(), bench.server.url
    with _folder() as up, _folder() as down:
        about = _about_disk(up)
        _write(up, _sessions(bench, count, _TURNS))
        rates: dict[str, list[float]] = {}
        for way, folder in (("up", up), ("down", down)):
            bench.say(f"{count:,} sessions {way}")
            done = _Progress()
            async with HybridSessionStore(folder, url, live=False, namespace=namespace) as store:
                report = await store.sync(progress=done)
            assert len(report.uploaded if way == "up" else report.downloaded) == count, report
            rates[way] = done.rates
        assert {file.name for file in up.glob("*.json")} == {file.name for file in down.glob("*.json")}
        for way, tenths in rates.items():
            rate = len(tenths) / sum(1 / tenth for tenth in tenths)
            yield Figure(
                f"first sync of {count:,} sessions of {_TURNS} turns, {way}",
                rate,
                min(tenths),
                max(tenths),
                unit="/s",
                target=at_least(300.0),
                note=about,
            )
    yield await _killed(bench, count)


class _Progress:
    """Takes the time of each tenth of a sync."""

    def __init__(self) -> None:
        self.rates: list[float] = []  # sessions a second
        self.total = 0
        self._last = 0, time.perf_counter()

    def __call__(self, done: int, total: int) -> None:
        self.total = total
        if done - self._last[0] >= total / 10 or (done == total and done > self._last[0]):
            now = time.perf_counter()
            self.rates.append((done - self._last[0]) / (now - self._last[1]))
            self._last = done, now


async def _killed(bench: Bench, count: int) -> Figure:
    namespace, url = bench.server.namespace(), bench.server.url
    with _folder() as folder:
        _write(folder, _sessions(bench, count, _TURNS))
        with Process(f"{__name__}:sync_on", url, namespace, folder, count * 4 // 10) as process:
            await asyncio.to_thread(process.ready)
            await asyncio.sleep(0.02)  # into the next batch
        async with open_store(url, namespace=namespace) as peer:
            there = await peer.count()
        done = _Progress()
        async with HybridSessionStore(folder, url, live=False, namespace=namespace) as store:
            await store.sync(progress=done)
            assert await store.remote.count() == count
    return Figure(
        "first sync, killed at 40 %: sessions that the next one does though they were there",
        done.total - (count - there),
        unit="sessions",
        target=at_most(_BATCH),
        detail={"of": count, "there when killed": there, "done by the next": done.total},
    )


async def sync_on(url: str, namespace: str, folder: str, number: str) -> None:
    """Sync a folder in this process, which is ready once so many sessions are done, and goes on."""

    def progress(done: int, _: int) -> None:
        if done - _BATCH < int(number) <= done:
            ready()

    async with HybridSessionStore(folder, url, live=False, namespace=namespace) as store:
        await store.sync(progress=progress)


@figure(30)
async def idle(bench: Bench) -> AsyncIterator[Figure]:
    """`sync` of 10,000 sessions of which none has changed: at most 1 s.

    `list` of them: at most 2 times the Redis store's.
    """
    namespace, url = bench.server.namespace(), bench.server.url
    with _folder() as folder:
        _write(folder, (bench.source.small(f"s-{n:05d}") for n in range(10_000)))
        async with (
            HybridSessionStore(folder, url, live=False, namespace=namespace) as store,
            await RedisSessionStore.connect(url, namespace=namespace, deadline=60.0) as peer,
        ):
            bench.say("first sync of 10,000 sessions")
            await store.sync()
            assert [meta.id for meta in await store.list()] == [meta.id for meta in await peer.list()]
            lists: dict[str, Step] = {"hybrid": store.list, "Redis": peer.list}
            repeats = bench.often(50, 15)
            times = await latencies(lists, repeats, warm=2)
            syncs = await latencies({"sync": store.sync}, repeats, warm=2)
            assert not (await store.sync()).uploaded
    yield Figure(
        "sync of 10,000 sessions, nothing changed",
        *spread([each / 1e6 for each in syncs["sync"]]),
        unit="s",
        target=at_most(1.0),
    )
    yield Figure(
        "list() of 10,000 sessions, nothing changed, against the Redis store's",
        *ratio_of_medians(times["hybrid"], times["Redis"]),
        target=at_most(2.0),
        detail={"p50 ms": {name: each / 1000 for name, each in medians(times).items()}},
    )


@figure(31)
async def live(bench: Bench) -> AsyncIterator[Figure]:
    """Live: from a save here to a peer's watch, and from a peer's append to the file here: p50 at most 150 ms.

    A save waits 50 ms for others, so that they go out as one.
    """
    repeats = bench.often(200, 40)
    namespace, url = bench.server.namespace(), bench.server.url
    up: list[float] = []
    down: list[float] = []
    with _folder() as folder:
        async with (
            HybridSessionStore(folder, url, namespace=namespace) as store,
            await RedisSessionStore.connect(url, namespace=namespace) as peer,
        ):
            asset = bench.source.session("s", _TURNS)
            await peer.save(bench.source.small("other"))  # so that there is a namespace to follow
            async with aclosing(peer.watch(ids=["s"], since=await peer.cursor())) as changes:
                await store.save(asset)
                await anext(changes)
                for n in range(repeats):
                    asset.metadata["n"] = n
                    begin = time.perf_counter()
                    await store.save(asset)
                    await anext(changes)
                    up.append((time.perf_counter() - begin) * 1000)
            await store.sync()
            file = folder / "s.json"
            for turn in bench.source.turns(repeats):
                before = file.stat().st_mtime_ns
                begin = time.perf_counter()
                await peer.append("s", turn)
                while file.stat().st_mtime_ns == before:  # noqa: ASYNC110  # a file has no event
                    await asyncio.sleep(0.001)
                down.append((time.perf_counter() - begin) * 1000)
            assert len((await store.load("s")).history.turns) == _TURNS + repeats
    for name, times in (("save here to a peer's watch", up), ("a peer's append to the file here", down)):
        yield Figure(
            f"live: {name}, p50",
            *spread(times),
            unit="ms",
            target=at_most(150.0),
            detail={"p99 ms": statistics.quantiles(times, n=100)[98]},
        )


@figure(32)
async def offline(bench: Bench) -> AsyncIterator[Figure]:
    """Save and load while the server is unreachable, of 20 and 1,000 turns: at most 1.1 times LocalFileStore's.

    Each save has changed a key of metadata.
    """
    with _folder() as ours, _folder() as plain, socket.create_server(("127.0.0.1", 0)) as unused:
        about = _about_disk(ours)
        port = unused.getsockname()[1]
        unused.close()  # nobody listens there any more
        async with (
            HybridSessionStore(ours, f"redis://127.0.0.1:{port}") as hybrid,
            LocalFileStore(plain) as local,
        ):
            for turns in (_TURNS, 1_000):
                assets = [bench.source.session(f"s{turns}", turns) for _ in range(2)]
                assets[1] = SessionAsset.from_json(assets[0].to_json())
                saves: dict[str, Step] = {
                    "hybrid": _saving(hybrid.save, assets[0]),
                    "local": _saving(local.save, assets[1]),
                }
                id = assets[0].id
                loads: dict[str, Step] = {"hybrid": repeating(hybrid.load, [id]), "local": repeating(local.load, [id])}
                repeats = bench.often(2000, 400) if turns == _TURNS else bench.often(200, 60)
                for name, calls in (("save", saves), ("load", loads)):
                    times = await latencies(calls, repeats, warm=10)
                    yield Figure(
                        f"{name} of {turns:,} turns, server unreachable, against LocalFileStore's",
                        *ratio_of_medians(times["hybrid"], times["local"]),
                        target=at_most(1.1),
                        detail={"p50 ms": {side: each / 1000 for side, each in medians(times).items()}},
                        note=about,
                    )


def _saving(save: Callable[[SessionAsset], Awaitable[int]], asset: SessionAsset) -> Step:
    numbers = itertools.count()

    async def step() -> object:
        asset.metadata["n"] = next(numbers)
        return await save(asset)

    return step


@figure(33)
async def space(bench: Bench) -> AsyncIterator[Figure]:
    """Bytes beside the files once the store is closed: at most 0.05 of the files'.

    Of the demo's sessions, of real ones, if they are there, and of made-up ones of 20 and 1,000 turns.
    """
    count = bench.often(3_000, 600)
    for name, assets in (
        ("real sessions", real_sessions(count)),
        ("the demo's sessions", _samples(count)),
        (f"sessions of {_TURNS} turns", _sessions(bench, count, _TURNS)),
        ("sessions of 1,000 turns", _sessions(bench, max(count // 50, 1), 1_000)),
    ):
        with _folder() as folder:
            size = _write(folder, assets)
            if not size:
                bench.say(f"no {name}")
                continue
            async with HybridSessionStore(
                folder, bench.server.url, live=False, namespace=bench.server.namespace()
            ) as store:
                report = await store.sync()
            beside = sum(file.stat().st_size for file in folder.glob(".orcs-redis/**/*") if file.is_file())
        number = len(report.uploaded)
        yield Figure(
            f"bytes beside the files, {name}, against theirs",
            beside / size,
            target=at_most(0.05),
            detail={"sessions": number, "bytes of a session": {"file": size / number, "beside": beside / number}},
        )


def _samples(count: int) -> Iterator[SessionAsset]:
    """Yield the demo's sessions again and again, under ids of their own, and so are the turns'."""
    folder = files("orcs_redis.cli") / "demo_sessions"
    texts = [file.read_text() for file in folder.iterdir() if file.name.endswith(".json")]
    for text in itertools.islice(itertools.cycle(texts), count):
        asset = SessionAsset.from_json(text)
        asset.id = str(uuid.uuid4())
        for turn in asset.history.turns:
            turn.id = str(uuid.uuid4())
        yield asset

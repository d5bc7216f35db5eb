"""What a worker of the demo does in its process: tasks that work on shared sessions, and a log of it."""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import msgspec
from msgspec.structs import replace

from ..errors import OutcomeUnknownError, StorageError
from ..model.asset import SessionAsset
from ..model.sections import ConversationTurn
from ..stores.opening import open_store
from ..stores.redis import RedisSessionStore
from ..sync import RedisSessionStore as BlockingStore
from .verdict import COUNTER, NOTE, PHASES, Entry, Kind, state_of

__all__ = ["Job", "process"]

_TASKS = 8
_THINK_TIME = 0.04  # seconds between a task's operations, at most: agents think longer
_READ_TURNS = 10  # that a task reads before it goes on
_KEPT_SESSIONS = 2  # that a task keeps and refreshes, ...
_KEPT_TURNS, _MOST_TURNS = 20, 100  # ... with so many turns at first and at most
_COMPARISONS = 5  # attempts to find a session unchanged

_WEIGHTS: dict[Kind, int] = {"append": 5, "pop": 2, "rename": 1, "label": 1, "note": 1, "count": 1, "refresh": 2}


class Job(NamedTuple):
    """What a worker is started with."""

    name: str
    url: str
    namespace: str
    sessions: list[str]
    seconds: float
    log: Path
    blocking: bool  # with the blocking store, in threads


class InThreads:
    """A blocking store whose methods can be awaited: each call is in a thread."""

    def __init__(self, store: BlockingStore[SessionAsset], threads: ThreadPoolExecutor) -> None:
        self._store = store
        self._threads = threads

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        method = getattr(self._store, name)

        def call(*args: Any, **kwargs: Any) -> Awaitable[Any]:
            return asyncio.get_running_loop().run_in_executor(self._threads, partial(method, *args, **kwargs))

        return call


class Task:
    """One of a worker's tasks, which does one thing after the other."""

    def __init__(self, job: Job, number: int, store: RedisSessionStore[SessionAsset], log: BinaryIO) -> None:
        self._job = job
        self._number = number
        self._store = store
        self._log = log
        self._mine = random.sample(job.sessions, min(_KEPT_SESSIONS, len(job.sessions)))
        self._kept: dict[str, SessionAsset] = {}

    async def work(self, until: float) -> None:
        """Work until the loop's clock says so, or the parent is gone."""
        parent = multiprocessing.parent_process()
        for number in itertools.count():
            (kind,) = random.choices([*_WEIGHTS], [*_WEIGHTS.values()])
            await self._do(f"{self._job.name}-{self._number}-{number}", kind)
            await asyncio.sleep(random.uniform(0, _THINK_TIME))
            if asyncio.get_running_loop().time() > until or (parent and not parent.is_alive()):
                return

    async def _do(self, op: str, kind: Kind) -> None:
        """Write down what is tried, try it, write down how it ended."""
        id = random.choice(self._mine if kind in ("count", "refresh") else self._job.sessions)
        tried = self._plan(op, kind, id)
        self._write(tried)
        try:
            done = await getattr(self, f"_{kind}")(tried)
        except OutcomeUnknownError:
            self._kept.pop(id, None)  # it stays "tried"
        except StorageError:  # any other says that nothing was written
            self._kept.pop(id, None)
            self._write(replace(tried, outcome="refused"))
        else:
            self._write(replace(done, outcome="done"))

    def _plan(self, op: str, kind: Kind, id: str) -> Entry:
        tried = Entry(op, kind, "tried", id)
        match kind:
            case "append":
                return replace(tried, turns=tuple(f"{op}-{step}" for step in range(random.randint(1, 3))))
            case "pop":
                return replace(tried, pops=random.randint(1, 2))
            case "rename":
                return replace(tried, values={"name": op})
            case "label":
                return replace(tried, values={"label by": op, "label phase": random.choice(PHASES)})
            case "note":
                return replace(tried, values={"note": op})
            case "count":
                return replace(tried, increments=1)
            case "refresh":
                return tried

    def _write(self, entry: Entry) -> None:
        self._log.write(msgspec.json.encode(replace(entry, at=time.monotonic())) + b"\n")

    async def _append(self, tried: Entry) -> Entry:
        await self._store.load(tried.session, last=_READ_TURNS)  # as an agent does before it goes on
        turns = [ConversationTurn(id=id, role="assistant", content=f"This is {id}.") for id in tried.turns]
        return replace(tried, revision=await self._store.append(tried.session, *turns))

    async def _pop(self, tried: Entry) -> Entry:
        popped = await self._store.pop(tried.session, tried.pops)
        return replace(tried, turns=tuple(turn.id for turn in popped))

    async def _rename(self, tried: Entry) -> Entry:
        asset = await self._store.load(tried.session, last=0)
        asset.project_context.name = tried.values["name"]
        return replace(tried, revision=await self._store.save(asset))

    async def _label(self, tried: Entry) -> Entry:
        labels = {name.removeprefix("label "): value for name, value in tried.values.items()}
        return replace(tried, revision=(await self._store.commit(tried.session, labels=labels)).revision)

    async def _note(self, tried: Entry) -> Entry:
        parts = {f"metadata.{NOTE}": tried.values["note"]}
        return replace(tried, revision=(await self._store.commit(tried.session, set=parts)).revision)

    async def _count(self, tried: Entry) -> Entry:
        asset, revision = await self._refreshed(tried.session)
        asset.metadata[COUNTER] = asset.metadata.get(COUNTER, 0) + 1
        # Two that make 6 of 5 must not both succeed, as a save alone would have it: they have changed it equally.
        return replace(tried, revision=await self._store.save(asset, if_revision=revision))

    async def _refresh(self, tried: Entry) -> Entry:
        """Refresh a session that is kept, and hold it against what is loaded at the same revision."""
        for _ in range(_COMPARISONS):
            asset, revision = await self._refreshed(tried.session)
            loaded = await self._store.load(tried.session, last=len(asset.history))
            if await self._store.refresh(loaded) == revision:  # nothing came between
                return replace(tried, revision=revision, state=state_of(asset), loaded=state_of(loaded))
        return replace(tried, revision=revision)

    async def _refreshed(self, id: str) -> tuple[SessionAsset, int]:
        """Return a session that is kept, as it is now, and its revision."""
        asset = self._kept.get(id)
        if asset is None or len(asset.history) > _MOST_TURNS:
            asset = self._kept[id] = await self._store.load(id, last=_KEPT_TURNS)
        return asset, await self._store.refresh(asset)


def process(job: Job) -> None:
    """Be a worker: its tasks share a store."""

    async def work() -> None:
        async with _opened(job) as store:
            with job.log.open("ab", buffering=0) as log:  # unbuffered: written is written, even if we are killed
                until = asyncio.get_running_loop().time() + job.seconds
                await asyncio.gather(*(Task(job, number, store, log).work(until) for number in range(_TASKS)))

    try:
        asyncio.run(work())
    except StorageError as error:
        raise SystemExit(f"worker {job.name}: {error}") from None


@asynccontextmanager
async def _opened(job: Job) -> AsyncIterator[RedisSessionStore[SessionAsset]]:
    if not job.blocking:
        async with open_store(job.url, namespace=job.namespace) as store:
            yield store
        return
    connected = BlockingStore.connect(job.url, namespace=job.namespace)
    with ThreadPoolExecutor(_TASKS) as threads, connected as blocking:
        yield cast("RedisSessionStore[SessionAsset]", InThreads(blocking, threads))

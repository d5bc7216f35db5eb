"""A worker process: tasks that do mixed operations over one store, and a line in a log before and after each.

With --blocking it is one thread that does so over a blocking store, and SIGURG, which is ignored by default, makes
whatever the store is doing raise an exception.

A line is JSON. Before: {"call": uid, "at": ns, "kind", "session", ...arguments}. After: {"return": uid, "at": ns,
"outcome": "ok" or the error's class, ...result}. Times are of the monotonic clock, which all processes share.

Every session's metadata holds `born` (uid of the write that created it), `counter` (one more by each conditional save)
and `mark` (uid of the last save). A turn's id is its writer's uid, a dot, and its number in the write.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, TypeAlias, TypeVar

import orcs_redis.sync
from orcs_redis import (
    ConversationTurn,
    NotFoundError,
    PermissionDeniedError,
    RedisSessionStore,
    SessionAsset,
    StorageError,
    UnavailableError,
)
from orcs_redis.protocol.attempts import ConnectionLost
from orcs_redis.protocol.baseline import baseline_of
from orcs_redis.protocol.commands import Command, Reply
from orcs_redis.protocol.writes import Write, Written
from orcs_redis.stores.leasing import Lease
from orcs_redis.transport.sockets import SocketLink

DEADLINE = 3.0
LONG, MORTAL, STILL = 3, 4, 6
FULL = 400  # turns after which a long session is followed by another
LISTED = 100  # ids of histories up to this length are logged one by one
BOARDS = ("board", "board-1", "board-2", "board-3")  # are only ever saved whole, over whatever is there

T = TypeVar("T")
Call: TypeAlias = tuple[str, str, dict[str, Any]]  # uid, session, arguments
Store = RedisSessionStore[SessionAsset]
_told: ContextVar[list[int]] = ContextVar("told")


class Recorder:
    """The log of one process; what is written to it survives the process's kill."""

    def __init__(self, path: str, name: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._name = name
        self._number = 0

    def uid(self) -> str:
        self._number += 1
        return f"{self._name}-{self._number}"

    def call(self, uid: str, kind: str, session: str, **arguments: Any) -> None:
        self._line({"call": uid, "at": time.monotonic_ns(), "kind": kind, "session": session, **arguments})

    def done(self, uid: str, outcome: str, **result: Any) -> None:
        self._line({"return": uid, "at": time.monotonic_ns(), "outcome": outcome, **result})

    def close(self) -> None:
        os.close(self._file)

    def _line(self, line: dict[str, Any]) -> None:
        os.write(self._file, json.dumps(line, separators=(",", ":")).encode() + b"\n")


def digest(ids: Iterable[str]) -> str:
    """Return a fingerprint of a history."""
    return hashlib.sha1("".join(f"{id}\n" for id in ids).encode()).hexdigest()[:16]


def observed(asset: SessionAsset, revision: int) -> dict[str, Any]:
    """Return what the log tells of a session that was read."""
    ids = [turn.id for turn in asset.history.turns]
    seen: dict[str, Any] = {"revision": revision, "n": len(ids), "sum": digest(ids)}
    seen |= {key: asset.metadata.get(key) for key in ("born", "counter", "mark")}
    if len(ids) <= LISTED:
        seen["all"] = ids
    return seen


def made(uid: str, ids: list[str]) -> list[ConversationTurn]:
    """Return turns of these ids."""
    turns = []
    for id in ids:
        turn = ConversationTurn.user(f"of {uid}")
        turn.id = id
        turns.append(turn)
    return turns


def new_session(id: str, uid: str, ids: list[str]) -> SessionAsset:
    """Return a session that says who created it."""
    asset = SessionAsset(id=id)
    asset.metadata = {"born": uid, "counter": 0, "mark": uid}
    for turn in made(uid, ids):
        asset.add_turn(turn)
    return asset


# Mistakes that the checker has to find


def make_naive() -> None:
    """Give every attempt an operation id of its own."""
    commands = Write.commands

    def renewed(self: Write) -> Sequence[Command]:
        self.end()
        return commands(self)

    Write.commands = renewed  # type: ignore[method-assign]


def make_lying() -> None:
    """Say of some writes that were applied that they were denied."""
    decode, rng = Write.decode, random.Random(1)

    def lying(self: Write, replies: Sequence[Reply]) -> Written:
        written = decode(self, replies)
        if rng.random() < 0.02:
            raise PermissionDeniedError("planted")
        return written

    Write.decode = lying  # type: ignore[method-assign]


def make_faithful() -> None:
    """Stay with a server that takes no writes any more."""
    decode = Write.decode

    def faithful(self: Write, replies: Sequence[Reply]) -> Written:
        for reply in replies:
            if isinstance(reply, Exception) and "READONLY" in str(reply):
                raise UnavailableError("planted")
        return decode(self, replies)

    Write.decode = faithful  # type: ignore[method-assign]


def make_swallowing() -> None:
    """Take what a signal's handler raises for a lost connection."""
    call = SocketLink.call

    def swallowing(self: SocketLink, commands: Sequence[Command], expires: float) -> list[Reply]:
        with contextlib.suppress(*STRUCK):
            return call(self, commands, expires)
        raise ConnectionLost("planted", sent=True)  # here, where nothing leads to the handler any more

    SocketLink.call = swallowing  # type: ignore[method-assign, assignment]


PLANTS = {"naive": make_naive, "lying": make_lying, "faithful": make_faithful, "swallowing": make_swallowing}


class Struck(Exception):
    """What the signal's handler raises, as a framework's time limit does."""


class StruckInTime(TimeoutError):
    """The same, of a kind that libraries take for a lost connection."""


class StruckByKey(KeyboardInterrupt):
    """The same, as Ctrl-C."""


STRUCK = (Struck, StruckInTime, StruckByKey)


class Swallowed(Exception):
    """A call went on, or failed in another way, though the handler had raised."""


class Inline:
    """A blocking store with the asyncio one's methods. While one of them runs, SIGURG makes it raise."""

    def __init__(self, store: orcs_redis.sync.RedisSessionStore[SessionAsset], rng: random.Random) -> None:
        self._store = store
        self._rng = rng
        self._running = self._struck = False
        signal.signal(signal.SIGURG, self._strike)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)
        if not callable(method):
            return method

        async def call(*args: Any, **options: Any) -> Any:
            return self.run(partial(method, *args, **options))

        return call

    def lease(self, *args: Any, **options: Any) -> InlineLeasing:
        return InlineLeasing(self, self._store.lease(*args, **options))

    async def aclose(self) -> None:
        self._store.close()

    def run(self, call: Callable[[], T]) -> T:
        """Call, and see to it that nobody swallows what the handler raises."""
        self._struck = False
        self._running = True
        try:
            result = call()
        except BaseException as error:
            self._running = False
            if self._struck and not isinstance(error, STRUCK):
                raise Swallowed(repr(error)) from error
            raise
        self._running = False
        if self._struck:
            raise Swallowed
        return result

    def _strike(self, *_: object) -> None:
        if self._running and not self._struck:
            self._struck = True
            raise self._rng.choice(STRUCK)


class InlineLeasing:
    """A blocking store's `lease`, awaited."""

    def __init__(self, store: Inline, leasing: Any) -> None:
        self._store = store
        self._leasing = leasing

    async def __aenter__(self) -> Any:
        return self._store.run(self._leasing.__enter__)

    async def __aexit__(self, *error: object) -> None:
        self._store.run(partial(self._leasing.__exit__, *error))


def listen_to_revisions() -> None:
    """Let a task learn what its writes came to, since not all methods tell."""
    decode = Write.decode

    def telling(self: Write, replies: Sequence[Reply]) -> Written:
        written = decode(self, replies)
        if written.revision != written.before:  # else it changed nothing
            _told.get([]).append(written.revision)
        return written

    Write.decode = telling  # type: ignore[method-assign]


@contextlib.contextmanager
def told_revisions() -> Iterator[list[int]]:
    """Collect the revisions that writes of this task make."""
    revisions: list[int] = []
    token = _told.set(revisions)
    try:
        yield revisions
    finally:
        _told.reset(token)


class Worker:
    """What one process does. Its tasks share the store and what they know of the sessions."""

    def __init__(self, store: Any, log: Recorder, seed: int, pace: float) -> None:
        self._store = store
        self._incarnation: bytes = store._core.changes.namespace.incarnation
        self._log = log
        self._rng = random.Random(seed)
        self._pace = pace
        self._generation = [0] * LONG
        self._known: dict[str, int] = {}  # revisions last heard of
        self._listed = 1

    async def run(self, until: int) -> None:
        """Do one thing after the other until that moment of the monotonic clock."""
        actions: dict[Callable[[], Awaitable[None]], int] = {
            self.append: 40, self.save: 10, self.update: 8, self.load: 10, self.turns: 14, self.list: 4, self.page: 2,
            self.delete: 6, self.create: 4, self.put: 2, self.lease: 2, self.load_many: 2, self.save_many: 1,
        }  # fmt: skip
        names, weights = list(actions), list(actions.values())
        while time.monotonic_ns() < until:
            await self._rng.choices(names, weights)[0]()
            await asyncio.sleep(self._rng.uniform(0, self._pace))

    # Writes

    async def append(self, session: str | None = None, lease: Lease | None = None) -> None:
        session = session or self._session()
        uid = self._log.uid()
        ids = [f"{uid}.{n}" for n in range(self._rng.randint(1, 3))]
        base = self._known.get(session) if self._rng.random() < 0.05 else None
        told = {"ids": ids, "base": base, "lease": lease and lease.token}
        async with self._recorded(uid, "append", session, **told) as result:
            result["revision"] = await self._store.append(session, *made(uid, ids), if_revision=base, lease=lease)
        if result.get("outcome") == "NotFoundError" and self._rng.random() < 0.5:
            await self.create(session)

    async def create(self, session: str | None = None) -> None:
        session = session or f"mortal-{self._rng.randrange(MORTAL)}"
        uid = self._log.uid()
        ids = [f"{uid}.{n}" for n in range(self._rng.choice((0, 1, 5, 20)))]
        asset = new_session(session, uid, ids)
        async with self._recorded(uid, "create", session, ids=ids, base=0) as result:
            result["revision"] = await self._store.save(asset, if_revision=0)

    async def put(self) -> None:
        uid, board = self._log.uid(), self._rng.choice(BOARDS)
        ids = [f"{uid}.{n}" for n in range(self._rng.choice((0, 3, 20)))]
        async with self._recorded(uid, "put", board, ids=ids) as result:
            result["revision"] = await self._store.save(new_session(board, uid, ids))

    async def save_many(self) -> None:
        boards = self._rng.sample(BOARDS, self._rng.randint(2, len(BOARDS)))
        calls, assets = [], []
        for board in boards:
            uid = self._log.uid()
            ids = [f"{uid}.{n}" for n in range(self._rng.choice((0, 3, 20)))]
            calls.append((uid, board, {"ids": ids}))
            assets.append(new_session(board, uid, ids))
        async with self._recorded_all("put", calls) as results:
            for result, saved in zip(results, await self._store.save_many(assets), strict=True):
                result["error" if isinstance(saved, StorageError) else "revision"] = saved

    async def save(self) -> None:
        session = self._session()
        loaded = await self._loaded(session)
        if loaded is None:
            return
        asset, revision = loaded
        uid = self._log.uid()
        ids = [f"{uid}.0"] if self._rng.random() < 0.5 else []
        counter = asset.metadata["counter"] + 1
        if len(asset.history) < LISTED and self._rng.random() < 0.3:
            asset = SessionAsset.from_json(asset.to_json())  # knows nothing of what is stored: it goes whole
        asset.metadata |= {"counter": counter, "mark": uid}
        for turn in made(uid, ids):
            asset.add_turn(turn)
        told = {"ids": ids, "base": revision, "counter": counter, "born": asset.metadata["born"]}
        async with self._recorded(uid, "save", session, **told) as result:
            result["revision"] = await self._store.save(asset, if_revision=revision)

    async def update(self) -> None:
        session = self._session()
        uid = self._log.uid()
        ids = [f"{uid}.0"] if self._rng.random() < 0.5 else []
        made_it: dict[str, Any] = {}

        def change(asset: SessionAsset) -> None:
            asset.metadata |= {"counter": asset.metadata["counter"] + 1, "mark": uid}
            made_it.update(counter=asset.metadata["counter"], born=asset.metadata["born"])
            for turn in made(uid, ids):
                asset.add_turn(turn)

        async with self._recorded(uid, "update", session, ids=ids) as result:
            with told_revisions() as revisions:
                await self._store.update(session, change)
            result |= {"revision": revisions[-1], **made_it}

    async def delete(self) -> None:
        session = f"mortal-{self._rng.randrange(MORTAL)}"
        base = None
        if self._rng.random() < 0.6:
            loaded = await self._loaded(session)
            base = loaded[1] if loaded else None
        uid = self._log.uid()
        async with self._recorded(uid, "delete", session, base=base) as result:
            with told_revisions() as revisions:
                await self._store.delete(session, if_revision=base)
            result["revision"] = revisions[-1]
        if result.get("outcome") == "ok" and self._rng.random() < 0.7:
            await self.create(session)

    async def lease(self) -> None:
        """Hold a session for a while and write to it, perhaps for longer than the lease is kept."""
        session = self._session()
        ttl, wait = self._rng.uniform(0.3, 2), self._rng.choice((0.0, 0.5))
        leasing = self._store.lease(session, ttl=ttl, wait=wait)
        held: list[Lease] = []
        async with self._recorded(self._log.uid(), "acquire", session, ttl=ttl) as result:
            held.append(await leasing.__aenter__())
            result["token"] = held[0].token
        for lease in held:
            for _ in range(self._rng.randint(1, 3)):
                await self.append(session, lease)
                await asyncio.sleep(self._rng.uniform(0, 0.1))
            async with self._recorded(self._log.uid(), "release", session, token=lease.token):
                await leasing.__aexit__(None, None, None)

    # Reads

    async def load(self) -> None:
        await self._loaded(self._session())

    async def load_many(self) -> None:
        ids = [f"still-{n}" for n in range(STILL)] + [self._session() for _ in range(6)]
        calls: Sequence[Call] = [(self._log.uid(), id, {}) for id in ids]
        async with self._recorded_all("load", calls) as results:
            for result, loaded in zip(results, await self._store.load_many(ids), strict=True):
                if isinstance(loaded, StorageError):
                    result["error"] = loaded
                elif (stored := baseline_of(loaded, self._incarnation)) is not None:
                    result |= observed(loaded, stored.revision)

    async def turns(self) -> None:
        session, uid, last = self._session(), self._log.uid(), self._rng.randint(1, 12)
        async with self._recorded(uid, "turns", session, last=last) as result:
            result["ids"] = [turn.id for turn in await self._store.turns(session, -last)]

    async def list(self) -> None:
        if self._rng.random() > 40 / self._listed:
            return
        async with self._recorded(self._log.uid(), "list", "") as result:
            metas = await self._store.list()
            result["items"] = [[meta.id, meta.revision, meta.turn_count] for meta in metas]
            times = [meta.updated_at for meta in metas]
            result["sorted"] = times == sorted(times, reverse=True)
            self._listed = max(1, len(metas))

    async def page(self) -> None:
        if self._rng.random() > 40 / self._listed:
            return
        async with self._recorded(self._log.uid(), "page", "") as result:
            items, cursor = [], None
            while True:
                page = await self._store.page(4, cursor)
                items += [[meta.id, meta.revision, meta.turn_count] for meta in page.items]
                cursor = page.cursor
                if cursor is None:
                    break
            result["items"] = items

    # What they share

    def _session(self) -> str:
        draw = self._rng.random()
        if draw < 0.55:
            slot = self._rng.randrange(LONG)
            return f"long-{slot}.{self._generation[slot]}"
        return f"mortal-{self._rng.randrange(MORTAL)}" if draw < 0.92 else self._rng.choice(BOARDS)

    async def _loaded(self, session: str) -> tuple[SessionAsset, int] | None:
        uid = self._log.uid()
        loaded: list[tuple[SessionAsset, int]] = []
        async with self._recorded(uid, "load", session) as result:
            loaded.append(await self._store.load_versioned(session))
            result |= observed(*loaded[0])
        if not loaded:
            return None
        asset, revision = loaded[0]
        kind, _, place = session.partition("-")
        if kind == "long" and len(asset.history) >= FULL:
            slot, generation = map(int, place.split("."))
            self._generation[slot] = max(self._generation[slot], generation + 1)
        return asset, revision

    @asynccontextmanager
    async def _recorded(self, uid: str, kind: str, session: str, **arguments: Any) -> AsyncIterator[dict[str, Any]]:
        """Log a call, and how it ends. Now and then the caller loses patience and cancels it."""
        async with self._recorded_all(kind, [(uid, session, arguments)]) as (result,):
            yield result

    @asynccontextmanager
    async def _recorded_all(self, kind: str, calls: Sequence[Call]) -> AsyncIterator[Sequence[dict[str, Any]]]:
        """The same of a call for several sessions. A result is the item's own "error", or what it came to."""
        results: Sequence[dict[str, Any]] = [{} for _ in calls]
        patience = self._rng.uniform(0, 0.01) if self._rng.random() < 0.02 else None
        for uid, session, arguments in calls:
            self._log.call(uid, kind, session, **arguments)
        ended = {"outcome": "ok"}
        try:
            async with asyncio.timeout(patience) as timeout:
                yield results
        except STRUCK:
            ended = {"outcome": "Interrupted"}
        except Swallowed as error:
            ended = {"outcome": "Swallowed", "text": str(error)[:200]}
        except StorageError as error:
            ended = refusal(error) if len(calls) == 1 else {"outcome": f"raised {error!r}"[:300]}
        except TimeoutError as error:
            ended = {"outcome": "Cancelled" if timeout.expired() else repr(error)}
        except Exception as error:
            ended = {"outcome": repr(error)[:300]}
        for (uid, session, _), result in zip(calls, results, strict=True):
            told: dict[str, Any] = ended
            if ended["outcome"] == "ok":
                told = refusal(result["error"]) if "error" in result else ended | result
            self._log.done(uid, **told)
            result["outcome"] = told["outcome"]
            if kind == "delete":
                self._known.pop(session, None)
            elif "revision" in told:
                self._known[session] = told["revision"]


def refusal(error: StorageError) -> dict[str, Any]:
    """Return what the log tells of a call that failed."""
    told: dict[str, Any] = {"outcome": type(error).__name__}
    return told if isinstance(error, NotFoundError) else told | {"text": str(error)[:200]}


async def connected(options: argparse.Namespace) -> Store | Inline | None:
    """Open the store, however long a fault keeps it from that."""
    while time.monotonic_ns() < options.until:
        try:
            if not options.blocking:
                return await RedisSessionStore.connect(options.url, namespace=options.namespace, deadline=DEADLINE)
            connect = orcs_redis.sync.RedisSessionStore.connect
            store = connect(options.url, namespace=options.namespace, deadline=DEADLINE)
            return Inline(store, random.Random(options.seed))
        except StorageError:
            await asyncio.sleep(0.05)
    return None


async def work(options: argparse.Namespace) -> None:
    log = Recorder(options.log, options.name)
    store = await connected(options)
    if store is None:
        return
    worker = Worker(store, log, options.seed, options.pace)
    print("ready", flush=True)
    try:
        tasks = 1 if options.blocking else options.tasks
        await asyncio.gather(*(worker.run(options.until) for _ in range(tasks)))
    finally:
        await store.aclose()
        log.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--namespace", required=True)
    parser.add_argument("--log", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--until", type=int, required=True, help="ns of the monotonic clock")
    parser.add_argument("--tasks", type=int, default=6)
    parser.add_argument("--pace", type=float, default=0.02, help="seconds a task rests at most between operations")
    parser.add_argument("--plant", action="append", choices=PLANTS, default=[])
    parser.add_argument("--blocking", action="store_true")
    options = parser.parse_args()
    listen_to_revisions()
    for plant in options.plant:
        PLANTS[plant]()
    asyncio.run(work(options))


if __name__ == "__main__":
    main()

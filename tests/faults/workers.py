"""A worker process: tasks that do mixed operations over one store, and a line in a log before and after each.

With --blocking it is one thread that does so over a blocking store, and SIGURG, which is ignored by default, makes
whatever the store is doing raise an exception.

A line is JSON. Before: {"call": uid, "at": ns, "kind", "session", ...arguments}. After: {"return": uid, "at": ns,
"outcome": "ok" or the error's class, ...result}. A line {"note": uid, ...} adds to a call's arguments.
Times are of the monotonic clock, which all processes share.

Every session's metadata holds `born` (uid of the write that created it), `counter` (one more by each conditional save)
and `mark` (uid of the last save). A turn's id is its writer's uid, a dot, and its number in the write.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import orcs_redis.sync
from orcs_redis import RedisSessionStore, SessionAsset, StorageError
from orcs_redis.protocol.baseline import baseline_of
from orcs_redis.stores.leasing import Lease

from .editors import Editing, listed
from .plants import PLANTS
from .recorder import LISTED, Call, Recorder, listen_to_revisions, made, new_session, observed, told_revisions
from .signals import Inline

__all__ = ["DEADLINE"]

DEADLINE = 3.0
LONG, MORTAL, STILL = 3, 4, 6
FULL = 400  # turns after which a long session is followed by another
BOARDS = ("board", "board-1", "board-2", "board-3")  # are only ever saved whole, over whatever is there

Store = RedisSessionStore[SessionAsset]


class Worker(Editing):
    """What one process does. Its tasks share the store and what they know of the sessions."""

    def __init__(self, store: Any, log: Recorder, seed: int, pace: float) -> None:
        super().__init__(store, log, seed)
        self._pace = pace
        self._generation = [0] * LONG
        self.listed = 1

    async def run(self, until: int) -> None:
        """Do one thing after the other until that moment of the monotonic clock."""
        actions: dict[Callable[[], Awaitable[None]], int] = {
            self.append: 40, self.save: 10, self.update: 8, self.load: 10, self.turns: 14, self.list: 4, self.page: 2,
            self.delete: 6, self.create: 4, self.put: 2, self.lease: 2, self.load_many: 2, self.save_many: 1,
            self.edit: 60, self.follow: 4,
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

    async def follow(self) -> None:
        """Keep an asset of a long history: refresh it, which is a read, and save turns, which is an append."""
        loaded = await self._loaded(self._long())
        while loaded is not None and self._rng.random() < 0.7:
            asset, _ = loaded
            uid, result = self._log.uid(), {"outcome": ""}
            await asyncio.sleep(self._rng.uniform(0, 0.05))
            if self._rng.random() < 0.5:
                async with self._recorded(uid, "load", asset.id) as result:
                    result |= observed(asset, await self._store.refresh(asset))
            else:
                ids = [f"{uid}.{n}" for n in range(self._rng.randint(1, 3))]
                async with self._recorded(uid, "append", asset.id, ids=ids) as result:
                    for turn in made(uid, ids):
                        asset.add_turn(turn)
                    result["revision"] = await self._store.save(asset)
            if result["outcome"] != "ok":
                return

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
        if self._rng.random() > 40 / self.listed:
            return
        async with self._recorded(self._log.uid(), "list", "") as result:
            metas = await self._store.list()
            result["items"] = [*map(listed, metas)]
            times = [meta.updated_at for meta in metas]
            result["sorted"] = times == sorted(times, reverse=True)
            self.listed = max(1, len(metas))

    async def page(self) -> None:
        if self._rng.random() > 40 / self.listed:
            return
        async with self._recorded(self._log.uid(), "page", "") as result:
            items: list[Any] = []
            cursor = None
            while True:
                page = await self._store.page(4, cursor)
                items += map(listed, page.items)
                cursor = page.cursor
                if cursor is None:
                    break
            result["items"] = items

    # What they share

    def _session(self) -> str:
        draw = self._rng.random()
        if draw < 0.55:
            return self._long()
        return f"mortal-{self._rng.randrange(MORTAL)}" if draw < 0.92 else self._rng.choice(BOARDS)

    def _long(self) -> str:
        slot = self._rng.randrange(LONG)
        return f"long-{slot}.{self._generation[slot]}"

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

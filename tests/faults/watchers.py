"""A watcher process: watches over one store, and a line in a log for each change it is told of.

A line is JSON. When a watch begins or resumes: {"chain", "at": ns, "since": cursor, "ids"}. For a change: {"chain",
"at", "kind", "id", "revision", "cursor"}. When it ends unasked: {"chain", "at", "error"}.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import redis.asyncio

import orcs_redis.sync
from orcs_redis import Change, RedisSessionStore, SessionAsset, StorageError

from .workers import DEADLINE

HEARTBEAT = 1.0
SOME = ["mortal-0", "mortal-1", "board", "board-1"]


class Log:
    """The log of one process; what is written to it survives the process's kill."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def begun(self, chain: str, since: str, ids: Sequence[str] | None) -> None:
        self._line({"chain": chain, "at": time.monotonic_ns(), "since": since, "ids": ids})

    def told(self, chain: str, change: Change) -> None:
        told = {"kind": change.kind, "id": change.id, "revision": change.revision, "cursor": change.cursor}
        self._line({"chain": chain, "at": time.monotonic_ns(), **told})

    def failed(self, chain: str, error: str) -> None:
        self._line({"chain": chain, "at": time.monotonic_ns(), "error": error})

    def _line(self, line: dict[str, Any]) -> None:
        os.write(self._file, json.dumps(line, separators=(",", ":")).encode() + b"\n")


class Watcher:
    """What one process does."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._log = Log(options.log)
        self._rng = random.Random(options.seed)

    # asyncio: all changes, and those of some sessions in a second watch that rests and goes on; or of some alone

    async def run(self) -> None:
        options, name = self._options, self._options.name
        store = await self._connected()
        async with store:
            since = options.since or await self._cursor(store)
            tasks = [asyncio.create_task(self._steady(store, name, since))]
            if options.some:
                tasks.append(asyncio.create_task(self._some(store, f"{name} some", since)))
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGTERM, lambda: [task.cancel() for task in tasks])
            print("ready", flush=True)
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _connected(self) -> RedisSessionStore[SessionAsset]:
        options = self._options
        while True:
            with contextlib.suppress(StorageError):
                return await RedisSessionStore.connect(
                    options.url, namespace=options.namespace, deadline=DEADLINE, heartbeat=HEARTBEAT
                )
            await asyncio.sleep(0.05)

    @staticmethod
    async def _cursor(store: RedisSessionStore[SessionAsset]) -> str:
        while True:
            with contextlib.suppress(StorageError):
                return await store.cursor()

    async def _steady(self, store: RedisSessionStore[SessionAsset], chain: str, since: str) -> None:
        ids = SOME if self._options.ids else None
        self._log.begun(chain, since, ids)
        try:
            async for change in store.watch(since=since, ids=ids):
                self._log.told(chain, change)
            self._log.failed(chain, "ended by itself")
        except Exception as error:
            self._log.failed(chain, repr(error)[:300])

    async def _some(self, store: RedisSessionStore[SessionAsset], chain: str, since: str) -> None:
        try:
            while True:
                self._log.begun(chain, since, SOME)
                async with contextlib.aclosing(store.watch(since=since, ids=SOME)) as watch:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(self._rng.uniform(0.05, 2)):
                            async for change in watch:
                                self._log.told(chain, change)
                                since = change.cursor
                            self._log.failed(chain, "ended by itself")
                            return
                await asyncio.sleep(self._rng.uniform(0, 0.5))
        except Exception as error:
            self._log.failed(chain, repr(error)[:300])

    # Blocking, and slow now and then

    def run_blocking(self) -> None:
        options = self._options
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        connect = orcs_redis.sync.RedisSessionStore.connect
        store = None
        while store is None:
            with contextlib.suppress(StorageError):
                store = connect(options.url, namespace=options.namespace, deadline=DEADLINE, heartbeat=HEARTBEAT)
        with store:
            since = None
            while since is None:
                with contextlib.suppress(StorageError):
                    since = options.since or store.cursor()
            self._log.begun(options.name, since, None)
            print("ready", flush=True)
            try:
                for change in store.watch(since=since):
                    self._log.told(options.name, change)
                    if self._rng.random() < 0.01:
                        time.sleep(self._rng.uniform(0, 0.8))
                self._log.failed(options.name, "ended by itself")
            except Exception as error:
                self._log.failed(options.name, repr(error)[:300])

    # Naive: what pub/sub says, and nothing else

    async def run_naive(self) -> None:
        options, name = self._options, self._options.name
        async with await self._connected() as store:
            self._log.begun(name, await self._cursor(store), SOME if options.ids else None)
            namespace = store._core.changes.namespace
            channels = [namespace.channel(partition.changes) for partition in namespace.keyspace.partitions]
            if options.ids:
                channels = [store._core.changes.channel(id) for id in SOME]
        client = redis.asyncio.Redis.from_url(options.url)
        print("ready", flush=True)
        while True:
            with contextlib.suppress(redis.RedisError, OSError):
                async with client.pubsub() as pubsub:
                    await pubsub.subscribe(*channels)
                    async for message in pubsub.listen():
                        if message["type"] == "message" and message["data"]:
                            revision, _, kind, _, id = msgspec.msgpack.decode(message["data"])
                            told: Any = argparse.Namespace(
                                kind="deleted" if kind else "saved", id=id, revision=revision, cursor=""
                            )
                            self._log.told(name, told)
            await asyncio.sleep(0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--namespace", required=True)
    parser.add_argument("--log", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--since")
    parser.add_argument("--blocking", action="store_true")
    parser.add_argument("--some", action="store_true", help="beside all sessions, some of them in a second watch")
    parser.add_argument("--ids", action="store_true", help="some sessions alone")
    parser.add_argument("--naive", action="store_true")
    options = parser.parse_args()
    watcher = Watcher(options)
    if options.blocking:
        watcher.run_blocking()
    elif options.naive:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
        asyncio.run(watcher.run_naive())
    else:
        asyncio.run(watcher.run())


if __name__ == "__main__":
    main()

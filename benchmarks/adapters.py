"""What is compared: each adapter does the same work in its own way, behind one interface."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, cast

import redis.asyncio

from orcs_redis import ConversationTurn, RedisSessionStore, SessionAsset, StorageError
from orcs_redis.protocol.commands import ScriptCall, merge
from orcs_redis.protocol.keys import Partition
from orcs_redis.protocol.writes import APPEND, Write
from orcs_redis.scripts import WRITE

from .servers import Server

_FILL = 500  # sessions saved at a time


class Adapter(Protocol):
    """One way to keep sessions. Later ones (other libraries) bring what they can of it."""

    name: str

    async def open(self, server: Server, namespace: str) -> None:
        """Connect. Adapters that share a layout may be opened on one namespace."""

    async def close(self) -> None:
        """Disconnect."""

    async def fill(self, assets: Sequence[SessionAsset]) -> None:
        """Store sessions; not timed, unless the figure says so."""

    async def append(self, id: str, turn: ConversationTurn) -> object:
        """Add one turn to a session; return when it is acknowledged."""

    async def load(self, id: str) -> object:
        """Read a session, decoded."""


class Orcs:
    """The store of this package."""

    name = "orcs_redis"
    store: RedisSessionStore[SessionAsset]

    async def open(self, server: Server, namespace: str) -> None:
        self.namespace = namespace
        self.store = await RedisSessionStore.connect(server.url, namespace=namespace, deadline=60.0)

    async def close(self) -> None:
        await self.store.aclose()

    async def fill(self, assets: Sequence[SessionAsset]) -> None:
        for start in range(0, len(assets), _FILL):
            for result in await self.store.save_many(assets[start : start + _FILL]):
                if isinstance(result, StorageError):
                    raise result

    async def append(self, id: str, turn: ConversationTurn) -> object:
        return await self.store.append(id, turn)

    async def load(self, id: str) -> object:
        return await self.store.load(id)


class RedisPy:
    """redis-py's asyncio client with its default pool, as one would write it by hand: same layout, script and codec."""

    name = "redis-py"
    client: redis.asyncio.Redis

    def __init__(self, store: RedisSessionStore[SessionAsset]) -> None:
        """`store` has the namespace open that this is to work in."""
        operations = store._core.sessions
        self._namespace = operations._namespace
        self.codec = operations._codec
        # What is the same in every append to a session; each session has a writer of its own, with one write at a time.
        self._made: dict[str, tuple[list[str], list[Any], bytes, Iterator[int]]] = {}
        self.sha = WRITE.sha.decode()
        self.seen = 0

    async def open(self, server: Server, namespace: str) -> None:
        self.client = redis.asyncio.Redis.from_url(server.plain)
        await self.client.script_load(WRITE.source.decode())

    async def close(self) -> None:
        await self.client.aclose()

    async def fill(self, assets: Sequence[SessionAsset]) -> None:
        raise NotImplementedError("sessions are saved by the store")

    async def append(self, id: str, turn: ConversationTurn) -> object:
        return await self.append_raw(id, self.codec.turn(turn, "turn"))

    async def append_raw(self, id: str, data: bytes) -> object:
        """Call the script with a turn that is already encoded."""
        keys, arguments = self.append_arguments(id, data)
        reply: Any = await self.client.evalsha(self.sha, len(keys), *keys, *arguments)
        if reply[0][0] == b"FORGOTTEN":  # the first write knows of no revision yet
            self.seen = max(self.seen, reply[0][1])
            return await self.append_raw(id, data)
        self.acknowledge(reply)
        return reply[0][1]

    def acknowledge(self, reply: list[Any]) -> None:
        """Note the revision that the script answered."""
        (answer,) = reply
        if answer[0] != b"OK":
            raise RuntimeError(f"the script answered {answer[0]!r}")
        self.seen = max(self.seen, answer[1])

    def append_arguments(self, id: str, data: bytes) -> tuple[list[str], list[Any]]:
        """Return the script's keys and arguments (scripts/write.lua) to add one turn."""
        try:
            keys, made, writer, numbers = self._made[id]
        except KeyError:
            (call,) = Write(self._namespace, APPEND, id, None, (b"",)).commands()
            _, _, count, *parts = merge([cast(ScriptCall, call)])
            keys = [str(key) for key in parts[: int(count)]]
            made, writer, numbers = parts[int(count) :], os.urandom(8), itertools.count(1)
            self._made[id] = keys, made, writer, numbers
        incarnation, version, head, _ = made
        counter = next(numbers).to_bytes(4)
        head = head[:5] + writer + counter + self.seen.to_bytes(8) + counter + head[29:]
        return keys, [incarnation, version, head, data]

    async def load(self, id: str) -> object:
        partition = self._namespace.keyspace.of(id)
        pipe = self.client.pipeline(transaction=False)
        pipe.hgetall(partition.session(id))
        pipe.lrange(partition.turns(id), 0, -1)
        pipe.hget(partition.session(id), ".revision")
        return self._decoded(id, *await pipe.execute())

    async def load_raw(self, id: str) -> Any:
        """Read hash and list in MULTI and EXEC, and decode nothing."""
        partition = self._namespace.keyspace.of(id)
        pipe = self.client.pipeline(transaction=True)
        pipe.hgetall(partition.session(id))
        pipe.lrange(partition.turns(id), 0, -1)
        return await pipe.execute()

    async def load_transaction(self, id: str) -> object:
        """Read hash and list in MULTI and EXEC, decoded."""
        fields, turns = await self.load_raw(id)
        return self._decoded(id, fields, turns, fields[b".revision"])

    def _decoded(self, id: str, fields: dict[bytes, bytes], turns: list[bytes], revision: bytes) -> SessionAsset:
        if fields[b".revision"] != revision:
            raise RuntimeError("torn")
        return self.codec.decode(id, self.codec.sections(fields), turns)

    def partition(self, id: str) -> Partition:
        """Return the session's keys."""
        return self._namespace.keyspace.of(id)

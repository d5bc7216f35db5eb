"""What every figure has: its place in the list, a server, made-up sessions, and the same work done by hand."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any, TypeAlias, TypeVar, cast

import redis.asyncio

from orcs_redis import ConversationTurn, RedisSessionStore, SessionAsset
from orcs_redis.model.encoding import encode
from orcs_redis.protocol.commands import Command, ScriptCall, merge
from orcs_redis.protocol.keys import Partition
from orcs_redis.protocol.writes import WRITE as KIND
from orcs_redis.protocol.writes import Group, Write, _pack_header
from orcs_redis.scripts import WRITE
from orcs_redis.transport.address import Address, parse_url
from orcs_redis.transport.connection import Link

from ..harness import HISTORY, TASKS, Call
from ..report import Figure, Say
from ..servers import Server
from .data import Source

Store: TypeAlias = RedisSessionStore[SessionAsset]
Measure: TypeAlias = Callable[["Bench"], AsyncIterator[Figure]]
T = TypeVar("T")

FIGURES: dict[int, Measure] = {}
_PUSH = KIND + b"p" + (1).to_bytes(4)  # a write of one turn, as its header says it


def figure(number: int) -> Callable[[Measure], Measure]:
    """Give a measurement its number."""

    def add(measure: Measure) -> Measure:
        FIGURES[number] = measure
        return measure

    return add


class Skip(Exception):
    """There is no such figure here, and why."""


class Bench:
    """One server, how thorough to be, and where to say how far it is."""

    def __init__(self, server: Server, quick: bool, say: Say) -> None:
        self.server, self.quick, self.say = server, quick, say
        self.source = Source()
        turns = self.source.turns(1000)
        self.turns = itertools.cycle(turns)
        self.encoded = itertools.cycle([encode(turn) for turn in turns])

    @property
    def tcp(self) -> str:
        """The server's URL for what comes over TCP, as from other machines."""
        if self.server.tcp is None:
            raise Skip("it needs a server over TCP")
        return self.server.tcp

    def often(self, thorough: T, quick: T) -> T:
        """Return how often to repeat something, or how much of it to do."""
        return quick if self.quick else thorough

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[tuple[Store, ByHand]]:
        """Open the store, and what does the same by hand, on one new namespace."""
        url, namespace = self.server.url, self.server.namespace()
        async with (
            await RedisSessionStore.connect(url, namespace=namespace, deadline=60.0) as store,
            redis.asyncio.Redis.from_url(self.server.plain) as client,
        ):
            await client.script_load(WRITE.source.decode())
            yield store, ByHand(store, client)

    @contextlib.asynccontextmanager
    async def link(self) -> AsyncIterator[Callable[..., Awaitable[list[Any]]]]:
        """Open the store's bare link; what it yields sends commands."""
        link = Link(cast(Address, parse_url(self.server.plain)), 60.0)

        async def call(*commands: Command) -> list[Any]:
            return await link.call(commands, asyncio.get_running_loop().time() + 60)

        try:
            yield call
        finally:
            await link.close()

    async def filled(self, store: Store, prefix: str, sessions: int = TASKS, turns: int = HISTORY) -> list[str]:
        """Store sessions; return their ids."""
        assets = [self.source.session(f"{prefix}-{n}", turns) for n in range(sessions)]
        await fill(store, assets)
        return [asset.id for asset in assets]

    async def fill_small(self, store: Store, numbers: range) -> None:
        """Store sessions without turns, one later than the other."""
        for start in range(0, len(numbers), 10_000):
            await fill(store, [self.source.small(f"s-{n:07d}") for n in numbers[start : start + 10_000]])

    def appending(self, side: Store | ByHand) -> Call:
        """Return an operation that appends one of many turns."""
        return lambda session: side.append(session, next(self.turns))

    def quiet(self) -> tuple[float, float]:
        """Return what asking for the server's traffic adds to it."""
        asked = [self.server.traffic() for _ in range(5)]
        return (asked[-1][0] - asked[0][0]) / 4, (asked[-1][1] - asked[0][1]) / 4


async def fill(store: Store, assets: Sequence[SessionAsset]) -> None:
    """Store sessions, 500 at a time."""
    for start in range(0, len(assets), 500):
        for result in await store.save_many(assets[start : start + 500]):
            if isinstance(result, BaseException):
                raise result


class ByHand:
    """redis-py's asyncio client with its default pool, as one would write it by hand: same layout, script and codec."""

    sha = WRITE.sha.decode()

    def __init__(self, store: Store, client: redis.asyncio.Redis) -> None:
        """`store` has the namespace open that this is to work in."""
        self.client = client
        operations = store._core.sessions
        self._namespace = operations._namespace
        self.namespace = self._namespace.keyspace.namespace
        self.codec = operations._codec
        # What is the same in every append to a session; each session has a writer of its own, with one write at a time.
        self._made: dict[str, tuple[list[str], list[Any], bytes, Iterator[int]]] = {}
        self.seen = 0

    async def append(self, id: str, turn: ConversationTurn) -> object:
        """Add one turn."""
        return await self.append_raw(id, self.codec.turn(turn, "turn"))

    async def append_raw(self, id: str, data: bytes) -> object:
        """Call the script with a turn that is already encoded."""
        keys, arguments = self.append_arguments(id, data)
        reply: Any = await self.client.evalsha(self.sha, len(keys), *keys, *arguments)
        if reply[0][0] == b"FORGOTTEN":  # the first write knows of no revision yet
            self.seen = max(self.seen, reply[0][1])
            return await self.append_raw(id, data)
        return self.acknowledge(reply)

    def acknowledge(self, reply: list[Any]) -> int:
        """Note the revision that the script answered."""
        (answer,) = reply
        if answer[0] != b"OK":
            raise RuntimeError(f"the script answered {answer[0]!r}")
        self.seen = max(self.seen, answer[1])
        return int(answer[1])

    def append_arguments(self, id: str, data: bytes) -> tuple[list[str], list[Any]]:
        """Return the script's keys and arguments (scripts/write.lua) to add one turn."""
        if id not in self._made:
            (call,) = Write(self._namespace, id, [Group(b"p", (data,))]).commands()
            _, _, count, *parts = merge([cast(ScriptCall, call)])
            keys, shared = [str(key) for key in parts[: int(count)]], parts[int(count) : -2]
            self._made[id] = keys, shared, os.urandom(12), itertools.count(1)
        keys, shared, writer, counters = self._made[id]
        counter = next(counters)
        return keys, [*shared, _pack_header(1, 2, writer, counter, 0, self.seen, counter) + _PUSH, data]

    async def load(self, id: str) -> SessionAsset:
        """Read hash and list in a pipeline, decoded."""
        partition = self.partition(id)
        pipe = self.client.pipeline(transaction=False)
        self.reads(pipe, id)
        pipe.hget(partition.session(id), ".revision")
        return self.decoded(id, *await pipe.execute())

    async def load_raw(self, id: str) -> Any:
        """Read hash and list in MULTI and EXEC, and decode nothing."""
        pipe = self.client.pipeline(transaction=True)
        self.reads(pipe, id)
        return await pipe.execute()

    async def load_transaction(self, id: str) -> SessionAsset:
        """Read hash and list in MULTI and EXEC, decoded."""
        return self.decoded(id, *await self.load_raw(id))

    def reads(self, pipe: Any, id: str) -> None:
        """Ask a pipeline of either form for hash and list."""
        partition = self.partition(id)
        pipe.hgetall(partition.session(id))
        pipe.lrange(partition.turns(id), 0, -1)

    def decoded(
        self, id: str, fields: dict[bytes, bytes], turns: list[bytes], revision: bytes | None = None
    ) -> SessionAsset:
        """Return a session of what was read."""
        if revision not in (None, fields[b".revision"]):
            raise RuntimeError("torn")
        return self.codec.decode(id, self.codec.parts(fields), turns)

    def partition(self, id: str) -> Partition:
        """Return the session's keys."""
        return self._namespace.keyspace.of(id)

    def writes(self, id: str, number: int, data: bytes) -> list[tuple[Any, ...]]:
        """Return the commands that write what an append writes, without a check or a read."""
        keys = self.partition(id)
        session = (
            "HSET", keys.session(id), ".revision", number, ".op", b"o" * 20, ".turns", number,
            "updated_at_ms", b"\xcf12345678",
        )  # fmt: skip
        return [
            ("RPUSH", keys.turns(id), data),
            session,
            ("HSET", keys.meta, id, b"m" * 75),
            ("ZADD", keys.updated, 1_750_000_000_000 + number, id),
            ("ZADD", keys.changes, number, id),
            ("HSET", keys.state, "revision", number, b"w123456789012", b"w" * 32),
            ("PUBLISH", keys.changes, b"p" * 40),
            ("PUBLISH", f"{keys.changes}:{id}", b"p" * 40),
        ]

"""What every figure has: a server, made-up data, and the two adapters on one namespace."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable

from orcs_redis.model.encoding import encode

from .adapters import Orcs, RedisPy
from .data import Source
from .servers import Server
from .workloads import Call

TASKS = 50
HISTORY = 50  # turns

Say = Callable[[str], None]


class Bench:
    """One server, how thorough to be, and where to say how far it is."""

    def __init__(self, server: Server, quick: bool, say: Say) -> None:
        self.server = server
        self.quick = quick
        self.say = say
        self.source = Source()
        turns = self.source.turns(1000)
        self._turns = itertools.cycle(turns)
        self.encoded = itertools.cycle([encode(turn) for turn in turns])

    def often(self, thorough: int, quick: int) -> int:
        """Return how often to repeat something."""
        return quick if self.quick else thorough

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[tuple[Orcs, RedisPy]]:
        """Open both adapters on one new namespace."""
        namespace = self.server.namespace()
        ours = Orcs()
        await ours.open(self.server, namespace)
        theirs = RedisPy(ours.store)
        await theirs.open(self.server, namespace)
        try:
            yield ours, theirs
        finally:
            await theirs.close()
            await ours.close()

    async def filled(self, ours: Orcs, prefix: str, sessions: int = TASKS, turns: int = HISTORY) -> list[str]:
        """Store sessions; return their ids."""
        assets = [self.source.session(f"{prefix}-{n}", turns) for n in range(sessions)]
        await ours.fill(assets)
        return [asset.id for asset in assets]

    def appending(self, adapter: Orcs | RedisPy) -> Call:
        """Return an operation that appends one of many turns."""

        def append(id: str) -> Awaitable[object]:
            return adapter.append(id, next(self._turns))

        return append

    def appending_to(self, adapter: Orcs | RedisPy, ids: list[str]) -> Callable[[], Awaitable[object]]:
        """Return the same on one session after the other."""
        order = itertools.cycle(ids)
        return lambda: adapter.append(next(order), next(self._turns))

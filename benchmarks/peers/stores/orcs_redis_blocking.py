"""The store of this package, blocking."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from orcs_redis import ConversationTurn, SessionAsset
from orcs_redis.sync import RedisSessionStore

from ..interface import Store, Turn


class Adapter(Store):
    """A connection for each thread that waits."""

    blocking = True
    store: RedisSessionStore[SessionAsset]

    async def open(self, url: str, folder: str) -> None:
        self.store = RedisSessionStore.connect(url, deadline=60.0)

    async def close(self) -> None:
        self.store.close()

    async def create(self, id: str, turns: Sequence[Turn]) -> None:
        asset = SessionAsset(id=id)
        asset.history.turns = [ConversationTurn(**turn) for turn in turns]
        self.store.save(asset)

    async def append(self, id: str, turn: Turn) -> None:
        self.store.append(id, ConversationTurn(**turn))

    async def load(self, id: str) -> Sequence[Any]:
        return self.store.load(id).history.turns

    async def tail(self, id: str, count: int) -> Sequence[Any]:
        return self.store.turns(id, -count)

    async def newest(self, count: int) -> list[str]:
        return [meta.id for meta in self.store.list(limit=count)]

    async def watch(self, seen: Callable[[], None]) -> None:
        for _ in self.store.watch():
            seen()

    def turn_id(self, turn: Any) -> str:
        return str(turn.id)

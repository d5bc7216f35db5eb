"""The store of this package, asyncio."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from orcs_redis import ConversationTurn, RedisSessionStore, SessionAsset

from ..interface import Store, Turn


class Adapter(Store):
    """One connection for all tasks."""

    store: RedisSessionStore[SessionAsset]

    async def open(self, url: str, folder: str) -> None:
        self.store = await RedisSessionStore.connect(url, deadline=60.0)

    async def close(self) -> None:
        await self.store.aclose()

    async def create(self, id: str, turns: Sequence[Turn]) -> None:
        asset = SessionAsset(id=id)
        asset.history.turns = [ConversationTurn(**turn) for turn in turns]
        await self.store.save(asset)

    async def append(self, id: str, turn: Turn) -> None:
        await self.store.append(id, ConversationTurn(**turn))

    async def load(self, id: str) -> Sequence[Any]:
        return (await self.store.load(id)).history.turns

    async def tail(self, id: str, count: int) -> Sequence[Any]:
        return await self.store.turns(id, -count)

    async def newest(self, count: int) -> list[str]:
        return [meta.id for meta in await self.store.list(limit=count)]

    async def watch(self, seen: Callable[[], None]) -> None:
        async for _ in self.store.watch():
            seen()

    def turn_id(self, turn: Any) -> str:
        return str(turn.id)

"""openai-agents' RedisSession: an object for each session, on one client."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import redis.asyncio
from agents.extensions.memory import RedisSession

from ..interface import Store, Turn


class Adapter(Store):
    """Sessions are kept once made, as an application would: each has a lock of its own."""

    cannot = {"newest": "it has no list of sessions"}  # noqa: RUF012  # a constant
    client: Any

    async def open(self, url: str, folder: str) -> None:
        self.client = redis.asyncio.Redis.from_url(url)
        self._sessions: dict[str, Any] = {}

    async def close(self) -> None:
        await self.client.aclose()

    def _of(self, id: str) -> Any:
        if id not in self._sessions:
            self._sessions[id] = RedisSession(id, redis_client=self.client)
        return self._sessions[id]

    async def create(self, id: str, turns: Sequence[Turn]) -> None:
        await self._of(id).add_items(list(turns))

    async def append(self, id: str, turn: Turn) -> None:
        await self._of(id).add_items([turn])

    async def load(self, id: str) -> Sequence[Any]:
        items: Sequence[Any] = await self._of(id).get_items()
        return items

    async def tail(self, id: str, count: int) -> Sequence[Any]:
        items: Sequence[Any] = await self._of(id).get_items(limit=count)
        return items

    def turn_id(self, turn: Any) -> str:
        return str(turn["id"])

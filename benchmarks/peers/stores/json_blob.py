"""What people write first: a JSON text for each session with GET and SET, and a ZSET of them by time."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import redis.asyncio

from ..interface import Store, Turn


class Adapter(Store):
    """redis-py's asyncio client with its default pool."""

    cannot = {"tail": "a text is read whole"}  # noqa: RUF012  # a constant
    client: Any

    async def open(self, url: str, folder: str) -> None:
        self.client = redis.asyncio.Redis.from_url(url)

    async def close(self) -> None:
        await self.client.aclose()

    async def create(self, id: str, turns: Sequence[Turn]) -> None:
        pipe = self.client.pipeline(transaction=True)
        pipe.set(f"session:{id}", json.dumps({"id": id, "turns": list(turns)}))
        pipe.zadd("sessions", {id: time.time()})
        await pipe.execute()

    async def append(self, id: str, turn: Turn) -> None:
        turns = await self.load(id)
        await self.create(id, [*turns, turn])

    async def load(self, id: str) -> Sequence[Any]:
        turns: list[Turn] = json.loads(await self.client.get(f"session:{id}"))["turns"]
        return turns

    async def newest(self, count: int) -> list[str]:
        ids = [id.decode() for id in await self.client.zrange("sessions", 0, count - 1, desc=True)]
        texts = await self.client.mget([f"session:{id}" for id in ids])  # what a list shows is in the text
        return [json.loads(text)["id"] for text in texts]

    def turn_id(self, turn: Any) -> str:
        return str(turn["id"])

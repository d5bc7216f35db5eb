"""A limit, not a store: the same bytes with bare commands, without metadata, index, check or notification."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import redis.asyncio

from ..interface import Store, Turn


class Adapter(Store):
    """RPUSH and LRANGE of msgpack by redis-py's asyncio client with its default pool."""

    cannot = {"newest": "bare lists have no index"}  # noqa: RUF012  # a constant
    client: Any

    async def open(self, url: str, folder: str) -> None:
        self.client = redis.asyncio.Redis.from_url(url)

    async def close(self) -> None:
        await self.client.aclose()

    async def create(self, id: str, turns: Sequence[Turn]) -> None:
        if turns:
            await self.client.rpush(f"turns:{id}", *map(msgspec.msgpack.encode, turns))

    async def append(self, id: str, turn: Turn) -> None:
        await self.client.rpush(f"turns:{id}", msgspec.msgpack.encode(turn))

    async def load(self, id: str) -> Sequence[Any]:
        return list(map(msgspec.msgpack.decode, await self.client.lrange(f"turns:{id}", 0, -1)))

    async def tail(self, id: str, count: int) -> Sequence[Any]:
        return list(map(msgspec.msgpack.decode, await self.client.lrange(f"turns:{id}", -count, -1)))

    async def watch(self, seen: Callable[[], None]) -> None:
        async with self.client.pubsub(ignore_subscribe_messages=True) as subscription:
            await subscription.subscribe("changes")
            async for _ in subscription.listen():
                seen()

    async def announce(self, id: str, turn: Turn) -> None:
        await self.client.publish("changes", b"x" * 60)

    def turn_id(self, turn: Any) -> str:
        return str(turn["id"])

"""langgraph-checkpoint-redis' AsyncRedisSaver: a thread of checkpoints, each with the whole list of messages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from langchain_core.messages import AIMessage, HumanMessage
from langgraph.checkpoint.base import empty_checkpoint
from langgraph.checkpoint.redis.aio import AsyncRedisSaver

from ..interface import Store, Turn


def _message(turn: Turn) -> Any:
    return (AIMessage if turn["role"] == "assistant" else HumanMessage)(json.dumps(turn), id=turn["id"])


class Adapter(Store):
    """`append` is aget_tuple and one aput: the least; a graph puts several checkpoints for each turn.

    All of them stay. `create` puts one: that is the memory shown, while a session that grew has one for each turn.
    """

    cannot = {"tail": "a checkpoint is read whole"}  # noqa: RUF012  # a constant
    saver: Any

    async def open(self, url: str, folder: str) -> None:
        # A call uses up to three connections at once: redis-py's limit of 100 is too low for 50 tasks.
        self.saver = AsyncRedisSaver(redis_url=url, connection_args={"max_connections": 1000})
        await self.saver.setup()

    async def close(self) -> None:
        await self.saver.__aexit__(None, None, None)

    async def _put(self, config: Any, messages: list[Any]) -> None:
        versions = {"messages": self.saver.get_next_version(len(messages), None)}
        checkpoint = empty_checkpoint() | {"channel_values": {"messages": messages}, "channel_versions": versions}
        await self.saver.aput(config, checkpoint, {"source": "loop", "step": len(messages), "parents": {}}, versions)

    async def _get(self, id: str) -> Any:
        return await self.saver.aget_tuple({"configurable": {"thread_id": id}})

    async def create(self, id: str, turns: Sequence[Turn]) -> None:
        await self._put({"configurable": {"thread_id": id, "checkpoint_ns": ""}}, [_message(turn) for turn in turns])

    async def append(self, id: str, turn: Turn) -> None:
        newest = await self._get(id)
        await self._put(newest.config, [*newest.checkpoint["channel_values"]["messages"], _message(turn)])

    async def load(self, id: str) -> Sequence[Any]:
        messages: Sequence[Any] = (await self._get(id)).checkpoint["channel_values"]["messages"]
        return messages

    async def newest(self, count: int) -> list[str]:
        limit = count
        while True:  # it lists checkpoints of all threads, newest first; a thread may have many
            found = [item.config["configurable"]["thread_id"] async for item in self.saver.alist(None, limit=limit)]
            ids = list(dict.fromkeys(found))
            if len(ids) >= count or len(found) < limit:
                return ids[:count]
            limit *= 2

    def turn_id(self, turn: Any) -> str:
        return str(turn.id)

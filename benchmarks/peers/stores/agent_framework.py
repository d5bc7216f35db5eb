"""Microsoft agent-framework's RedisHistoryProvider: a list of messages for each session."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from agent_framework import Message
from agent_framework_redis import RedisHistoryProvider

from ..interface import Store, Turn


class Adapter(Store):
    """`append` is save_messages, which reads the history to leave out what is there."""

    cannot = {  # noqa: RUF012  # a constant
        "newest": "it has no list of sessions",
        "tail": "get_messages reads the whole list",
    }
    provider: Any

    async def open(self, url: str, folder: str) -> None:
        self.provider = RedisHistoryProvider(redis_url=url, application_id="bench")

    async def close(self) -> None:
        await self.provider.aclose()

    @staticmethod
    def _message(turn: Turn) -> Any:
        return Message(turn["role"], [json.dumps(turn)], message_id=turn["id"])

    async def create(self, id: str, turns: Sequence[Turn]) -> None:
        await self.provider.save_messages(id, [self._message(turn) for turn in turns])

    async def append(self, id: str, turn: Turn) -> None:
        await self.provider.save_messages(id, [self._message(turn)])

    async def load(self, id: str) -> Sequence[Any]:
        messages: Sequence[Any] = await self.provider.get_messages(id)
        return messages

    def turn_id(self, turn: Any) -> str:
        return str(turn.message_id)

"""google-adk-community's RedisSessionService: a JSON text for each session."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from google.adk.events.event import Event
from google.adk.sessions.base_session_service import GetSessionConfig
from google.adk_community.sessions.redis_session_service import RedisSessionService
from google.genai import types

from ..interface import Store, Turn

APP = {"app_name": "bench", "user_id": "u"}


def event(turn: Turn) -> Event:
    """Return a turn as an event whose text is the turn's JSON."""
    content = types.Content(role="user", parts=[types.Part(text=json.dumps(turn))])
    return Event(id=turn["id"], author=turn["role"], content=content, timestamp=time.time())


class Adapter(Store):
    """`append` is get_session and append_event, as its runner does it for each request."""

    service: Any

    def _open(self, url: str, folder: str) -> Any:
        return RedisSessionService(uri=url)

    async def open(self, url: str, folder: str) -> None:
        self.service = self._open(url, folder)

    async def create(self, id: str, turns: Sequence[Turn]) -> None:
        session = await self.service.create_session(**APP, session_id=id)
        if turns:
            session.events = [event(turn) for turn in turns[:-1]]  # the whole text is written with the last one
            await self.service.append_event(session, event(turns[-1]))

    async def _get(self, id: str, config: Any = None) -> Any:
        return await self.service.get_session(**APP, session_id=id, config=config)

    async def append(self, id: str, turn: Turn) -> None:
        await self.service.append_event(await self._get(id), event(turn))

    async def load(self, id: str) -> Sequence[Any]:
        events: Sequence[Any] = (await self._get(id)).events
        return events

    async def tail(self, id: str, count: int) -> Sequence[Any]:
        events: Sequence[Any] = (await self._get(id, GetSessionConfig(num_recent_events=count))).events
        return events

    async def newest(self, count: int) -> list[str]:
        sessions = (await self.service.list_sessions(**APP)).sessions
        sessions.sort(key=lambda session: session.last_update_time, reverse=True)  # it promises no order
        return [session.id for session in sessions[:count]]

    def turn_id(self, turn: Any) -> str:
        return str(turn.id)

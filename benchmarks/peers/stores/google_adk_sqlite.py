"""google-adk's DatabaseSessionService on SQLite: one machine, no server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from google.adk.sessions import DatabaseSessionService

from ..interface import Turn
from .google_adk_redis import APP, event
from .google_adk_redis import Adapter as Redis


class Adapter(Redis):
    """The same interface as the Redis service, of which it is the original."""

    serverless = True

    def _open(self, url: str, folder: str) -> Any:
        return DatabaseSessionService(db_url=f"sqlite+aiosqlite:///{folder}/sessions.db")

    async def create(self, id: str, turns: Sequence[Turn]) -> None:
        session = await self.service.create_session(**APP, session_id=id)
        for turn in turns:
            await self.service.append_event(session, event(turn))

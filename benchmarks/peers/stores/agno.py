"""agno's RedisDb: a turn is a run with a message, kept under a key of its own."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any

from agno.db.base import SessionType
from agno.db.redis import RedisDb
from agno.models.message import Message
from agno.run.agent import RunOutput
from agno.session import AgentSession

from ..interface import Store, Turn


class Adapter(Store):
    """Blocking. `append` is upsert_run, which agno calls its O(1) way; it leaves the session's time as it was."""

    blocking = True
    db: Any

    async def open(self, url: str, folder: str) -> None:
        self.db = RedisDb(db_url=url)
        self._index = itertools.count(1_000_000)

    def _run(self, id: str, turn: Turn) -> Any:
        text = str(turn["content"])
        message = Message(id=turn["id"], role=turn["role"], content=text)
        return RunOutput(
            run_id=turn["id"], session_id=id, agent_id="a", content=text, messages=[message], metadata=turn["metadata"]
        )

    async def create(self, id: str, turns: Sequence[Turn]) -> None:
        now = int(time.time())
        self.db.upsert_session(AgentSession(session_id=id, agent_id="a", created_at=now, updated_at=now))
        for number, turn in enumerate(turns):
            self.db.upsert_run(self._run(id, turn), session_id=id, run_index=number)

    async def append(self, id: str, turn: Turn) -> None:
        self.db.upsert_run(self._run(id, turn), session_id=id, run_index=next(self._index))

    async def load(self, id: str) -> Sequence[Any]:
        runs: Sequence[Any] = self.db.get_session(session_id=id, session_type=SessionType.AGENT).runs or []
        return runs

    async def tail(self, id: str, count: int) -> Sequence[Any]:
        session = self.db.get_session(session_id=id, session_type=SessionType.AGENT, runs_limit=count)
        runs: Sequence[Any] = session.runs or []
        return runs

    async def newest(self, count: int) -> list[str]:
        sessions = self.db.get_sessions(
            session_type=SessionType.AGENT, limit=count, sort_by="updated_at", sort_order="desc"
        )
        return [session.session_id for session in sessions]

    def turn_id(self, turn: Any) -> str:
        return str(turn.run_id)

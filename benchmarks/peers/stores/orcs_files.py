"""orcs' own way: a JSON file for each session, read and written whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orcs_redis import ConversationTurn, SessionAsset
from orcs_redis.sync import LocalFileStore

from ..interface import Store, Turn


class Adapter(Store):
    """Each write is fsynced, as orcs_redis does it; orcs itself does not."""

    blocking = True
    serverless = True
    cannot = {"tail": "a file is read whole"}  # noqa: RUF012  # a constant
    store: LocalFileStore[SessionAsset]

    async def open(self, url: str, folder: str) -> None:
        self.store = LocalFileStore(folder)

    async def create(self, id: str, turns: Sequence[Turn]) -> None:
        asset = SessionAsset(id=id)
        asset.history.turns = [ConversationTurn(**turn) for turn in turns]
        self.store.save(asset)

    async def append(self, id: str, turn: Turn) -> None:
        asset = self.store.load(id)
        asset.add_turn(ConversationTurn(**turn))
        self.store.save(asset)

    async def load(self, id: str) -> Sequence[Any]:
        return self.store.load(id).history.turns

    async def newest(self, count: int) -> list[str]:
        return [meta.id for meta in self.store.list()[:count]]

    def turn_id(self, turn: Any) -> str:
        return str(turn.id)

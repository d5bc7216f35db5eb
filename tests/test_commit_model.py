"""Random writes of several callers against a model in plain Python: what is stored, what is told, what lists say."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import secrets
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from orcs_redis import Committed, ConflictError, ConversationTurn, NotFoundError, SerializationError

from .conftest import ROWS, Place, connected

IDS = ("a", "b", "c")
KEYS = ("k", "k1", "k/1", "k/2", "z")
NAMES = ("l", "m", *(f"n{n}" for n in range(7)))


def numbered(number: int) -> ConversationTurn:
    turn = ConversationTurn.user(f"text {number}")
    turn.id = str(number)
    return turn


def some(*items: Any, most: int = 3) -> Any:
    return st.lists(st.sampled_from(items), unique=True, max_size=most)


@dataclasses.dataclass
class Session:
    """What a session is in the model."""

    revision: int
    turns: list[str] = dataclasses.field(default_factory=list)
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    labels: dict[str, str] = dataclasses.field(default_factory=dict)
    records: dict[str, bytes] = dataclasses.field(default_factory=dict)
    forked_from: dict[str, Any] | None = None


class Refused(Exception):
    """What the model says instead of a result."""


class Model:
    """One partition: sessions by id, and the revision of its last write."""

    def __init__(self) -> None:
        self.sessions: dict[str, Session] = {}
        self.revision = 0
        self.moved: dict[str, bool] = {}  # whether `updated_at` moves with the last write, by id

    def wrote(self, id: str, session: Session, *, moves: bool) -> None:
        self.revision += 1
        session.revision = self.revision
        self.sessions[id] = session
        self.moved[id] = moves

    def commit(self, id: str, create: bool, if_revision: int | None, if_last: str | None, changes: Any) -> Committed:
        found = self.sessions.get(id)
        current = found.revision if found else 0
        if if_revision not in (None, current):
            raise Refused(ConflictError)
        if not found and not create:
            raise Refused(NotFoundError)
        if if_last is not None and (not found or found.turns[-1:] != [if_last]):
            raise Refused(ConflictError)
        session = dataclasses.replace(found) if found else Session(0)
        turns = session.turns
        if changes["pop"]:
            turns = turns[: -changes["pop"]]
        if changes["truncate"] is not None:
            turns = turns[: changes["truncate"]]
        cut = len(turns) < len(session.turns)
        session.turns = [*turns, *(turn.id for turn in changes["append"])]
        others = [name for name, value in changes.items() if value and name not in ("pop", "truncate")]
        if found and not cut and not others:
            return Committed(current, created=False, placed={})
        session.labels = {**session.labels, **{k: v for k, v in changes["labels"].items() if v is not None}}
        for name, value in changes["labels"].items():
            if value is None:
                session.labels.pop(name, None)
        if len(session.labels) > 8:
            raise Refused(SerializationError)
        for field, part in (("metadata", "metadata."), ("extra", "extra.")):
            values = dict(getattr(session, field))
            values |= {k.removeprefix(part): v for k, v in changes["set"].items() if k.startswith(part)}
            for name in changes["unset"]:
                values.pop(name.removeprefix(part), None) if name.startswith(part) else None
            setattr(session, field, values)
        placed = {key: key not in session.records for key in changes["put_new"]}
        kept = set(changes["put"]) | set(changes["put_new"])
        session.records = {**changes["put_new"], **session.records, **changes["put"]}
        for key in changes["drop"]:
            if key.endswith("*"):
                session.records = {k: v for k, v in session.records.items() if k in kept or not k.startswith(key[:-1])}
            else:
                session.records.pop(key, None)
        self.wrote(id, session, moves=bool(cut or changes["append"] or not found))
        return Committed(self.revision, created=create and not found, placed=placed)

    def existing(self, id: str) -> Session:
        if id not in self.sessions:
            raise Refused(NotFoundError)
        return dataclasses.replace(self.sessions[id])

    def once(self, id: str, turns: list[ConversationTurn], create: bool) -> int:
        session = dataclasses.replace(self.sessions[id]) if id in self.sessions else Session(0)
        if id not in self.sessions and not create:
            raise Refused(NotFoundError)
        new = [turn.id for turn in turns if turn.id not in session.turns]
        if new:
            session.turns = [*session.turns, *new]
            self.wrote(id, session, moves=True)
        return self.sessions[id].revision

    def pop(self, id: str, count: int) -> list[str]:
        session = self.existing(id)
        popped = session.turns[-count:]
        if popped:
            session.turns = session.turns[:-count]
            self.wrote(id, session, moves=True)
        return popped

    def replace(self, id: str, turn: ConversationTurn) -> int:
        session = self.existing(id)
        if turn.id not in session.turns:
            raise Refused(NotFoundError)
        self.wrote(id, session, moves=True)
        return self.revision

    def touch(self, id: str) -> int:
        self.wrote(id, self.existing(id), moves=True)
        return self.revision

    def fork(self, id: str, new_id: str, length: int | None, records: bool) -> int:
        if new_id in self.sessions:
            raise Refused(ConflictError)
        session = self.existing(id)
        session.turns = session.turns[:length]
        session.forked_from = {"id": id, "revision": session.revision, "length": len(session.turns)}
        if not records:
            session.records = {}
        self.wrote(new_id, session, moves=True)
        return self.revision

    def delete(self, id: str) -> None:
        self.existing(id)
        self.revision += 1
        del self.sessions[id]


class Caller:
    """Draws writes, and makes each of them in a store and in the model."""

    def __init__(self, data: st.DataObject, stores: list[Any], model: Model) -> None:
        self._data = data
        self._stores = stores
        self._model = model
        self._number = 0

    def draw(self, strategy: Any) -> Any:
        return self._data.draw(strategy)

    def turns(self, least: int = 0) -> list[ConversationTurn]:
        count = self.draw(st.integers(least, 3))
        self._number += count
        return [numbered(self._number - n) for n in range(count)]

    async def step(self) -> None:
        kind = self.draw(st.sampled_from(["commit"] * 6 + ["once", "pop", "replace", "touch", "fork", "delete"]))
        await getattr(self, kind)(self.draw(st.sampled_from(self._stores)), self.draw(st.sampled_from(IDS)))

    async def same(self, call: Any, expect: Any) -> None:
        """What the store returns or raises is what the model says."""
        try:
            expected = expect()
        except Refused as refused:
            with pytest.raises(refused.args[0]):
                await call
            return
        result = await call
        if isinstance(result, list):
            result = [turn.id for turn in result]
        assert result == expected

    async def commit(self, store: Any, id: str) -> None:
        model = self._model.sessions.get(id)
        put = self.draw(some(*KEYS))
        new = [key for key in self.draw(some(*KEYS)) if key not in put]
        drop = [key for key in self.draw(some(*KEYS, "*", "k*", "k/*", "none*")) if key not in (*put, *new)]
        parts = self.draw(some("metadata.x", "metadata.y.z", "extra.x", "extra.a.b", most=4))
        changes = {
            "append": self.turns(),
            "pop": self.draw(st.sampled_from([0, 0, 0, 1, 2, 9])),
            "truncate": None,
            "set": {part: self.draw(st.sampled_from([1, None, "é", [{}]])) for part in parts},
            "unset": [part for part in self.draw(some("metadata.x", "extra.x", "metadata.n")) if part not in parts],
            "put": {key: secrets.token_bytes(3) for key in put},
            "put_new": {key: secrets.token_bytes(3) for key in new},
            "drop": drop,
            "labels": {name: self.draw(st.sampled_from(["1", "2", None])) for name in self.draw(some(*NAMES, most=8))},
        }
        if not changes["pop"]:
            changes["truncate"] = self.draw(st.sampled_from([None, None, 0, 1, 3]))
        if not any(value or (name == "truncate" and value == 0) for name, value in changes.items()):
            changes["set"] = {"metadata.x": 1}
        create = self.draw(st.booleans())
        revision = model.revision if model else 0
        if_revision = self.draw(st.sampled_from([None, None, None, revision, revision + 1]))
        last = model.turns[-1] if model and model.turns else "none"
        if_last = self.draw(st.sampled_from([None, None, None, last, "other"]))
        conditions = {"create": create, "if_revision": if_revision, "if_last": if_last}
        await self.same(
            store.commit(id, **changes, **conditions), lambda: self._model.commit(id, changes=changes, **conditions)
        )

    async def once(self, store: Any, id: str) -> None:
        model = self._model.sessions.get(id)
        turns = self.turns(1)
        if model and model.turns and self.draw(st.booleans()):
            turns.insert(self.draw(st.integers(0, 1)), numbered(int(self.draw(st.sampled_from(model.turns)))))
        create = self.draw(st.booleans())
        await self.same(store.append(id, *turns, once=True, create=create), lambda: self._model.once(id, turns, create))

    async def pop(self, store: Any, id: str) -> None:
        count = self.draw(st.sampled_from([1, 1, 2, 9]))
        await self.same(store.pop(id, count), lambda: self._model.pop(id, count))

    async def replace(self, store: Any, id: str) -> None:
        model = self._model.sessions.get(id)
        turn = numbered(int(self.draw(st.sampled_from([*(model.turns if model else []), "0"]))))
        await self.same(store.replace_turn(id, turn), lambda: self._model.replace(id, turn))

    async def touch(self, store: Any, id: str) -> None:
        await self.same(store.touch(id), lambda: self._model.touch(id))

    async def fork(self, store: Any, id: str) -> None:
        new_id = self.draw(st.sampled_from([each for each in IDS if each != id]))
        length, records = self.draw(st.sampled_from([None, 0, 1, 9])), self.draw(st.booleans())
        call = store.fork(id, new_id, length=length, records=records)
        await self.same(call, lambda: self._model.fork(id, new_id, length, records))

    async def delete(self, store: Any, id: str) -> None:
        await self.same(store.delete(id), lambda: self._model.delete(id))

    async def check(self, before: dict[str, Any]) -> dict[str, Any]:
        """All that a store reads is what the model has. Returns the metadata by id."""
        store, model = self.draw(st.sampled_from(self._stores)), self._model
        metas = {meta.id: meta for meta in await store.list()}
        assert metas.keys() == model.sessions.keys()
        for id, session in model.sessions.items():
            loaded, revision = await store.load_versioned(id)
            meta = metas[id]
            assert revision == meta.revision == session.revision
            assert [turn.id for turn in loaded.history.turns] == session.turns
            assert meta.turn_count == len(session.turns)
            assert loaded.metadata.pop("labels", {}) == meta.labels == session.labels
            assert loaded.metadata.pop("forked_from", None) == session.forked_from
            assert (loaded.metadata, loaded.extra) == (session.metadata, session.extra)
            assert dict(await store.records(id)) == session.records
            assert (loaded.updated_at, loaded.created_at) == (meta.updated_at, meta.created_at)
            assert meta.updated_at <= meta.written_at
            earlier = before.get(id)
            if earlier is not None and earlier.revision == revision:
                assert meta == earlier
            elif earlier is not None:
                assert meta.written_at >= earlier.written_at
                assert model.moved[id] or meta.updated_at == earlier.updated_at
        for name, value in itertools.product(NAMES[:2], ("1", "2")):
            expected = {id for id, session in model.sessions.items() if session.labels.get(name) == value}
            assert {meta.id for meta in await store.list(labels={name: value})} == expected
        return metas


@pytest.mark.parametrize("place", [ROWS[0], ROWS[2], ROWS[5]], ids=str, indirect=True)
@settings(
    phases=[Phase.generate, Phase.shrink],
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_against_a_model(place: Place, data: st.DataObject) -> None:
    """Whatever is written by whom: stored, told, listed and indexed is what the model has."""
    namespace = f"{place.namespace}-{secrets.token_hex(4)}"

    async def run() -> None:
        stores = [await connected(way, place.url, namespace=namespace) for way in ("async", "sync")]
        try:
            caller = Caller(data, stores, Model())
            metas: dict[str, Any] = {}
            for _ in range(data.draw(st.integers(1, 12))):
                await caller.step()
                metas = await caller.check(metas)
        finally:
            for store in stores:
                await store.aclose()

    asyncio.run(run())

"""Whatever was written, the keys of a partition agree with each other, as docs/protocol.md has them."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from orcs_redis import ConflictError, ConversationTurn, NotFoundError, SessionAsset

from .conftest import Connect, Place

IDS = ["a", "b", "é", "a:b"]
unpack = msgspec.msgpack.decode


def member(name: str, value: str, id: bytes) -> bytes:
    key, text = name.encode(), value.encode()
    return bytes([len(key)]) + key + len(text).to_bytes(4) + text + id


def check_partition(place: Place) -> None:
    """What is said twice is the same."""
    raw: Any = place.raw
    key = place.key

    def scores(name: str) -> dict[bytes, int]:
        return {id: int(score) for id, score in raw.zrange(key(name), 0, -1, withscores=True)}

    def ids(kind: str) -> set[bytes]:
        prefix = key(f"{kind}:").encode()
        return {name[len(prefix) :] for name in raw.scan_iter(match=key(f"{kind}:*"), count=1000)}

    state, metas, labels = raw.hgetall(key("state")), raw.hgetall(key("meta")), set()
    revision, changes, deleted = int(state[b"revision"]), scores("changes"), scores("deleted")
    assert ids("session") == metas.keys() == scores("updated").keys() == changes.keys() - deleted.keys()
    assert deleted.keys() <= changes.keys()
    assert deleted.keys() == raw.hgetall(key("deleted:meta")).keys()
    assert all(changes[id] == at for id, at in deleted.items())
    assert len({*changes.values()}) == len(changes)
    assert max(changes.values(), default=0) <= revision
    assert ids("turns") | ids("records") <= metas.keys()
    for id, packed in metas.items():
        name = id.decode()
        fields, turns = raw.hgetall(key(f"session:{name}")), raw.lrange(key(f"turns:{name}"), 0, -1)
        meta, context = unpack(packed), unpack(fields[b"project_context"])
        assert len(packed) == 52 + sum(len(msgspec.msgpack.encode(item)) for item in meta[6:])
        marks = [int(fields[mark]) for mark in (b".born", b".reshaped", b".parts", b".revision")]
        assert marks[0] <= min(marks[1:3]) <= max(marks[1:3]) <= marks[3] == changes[id] == meta[0]
        assert len(turns) == int(fields[b".turns"]) == meta[2]
        assert meta[1] == scores("updated")[id] <= meta[4]
        assert fields[b".op"][:8] == meta[3]
        assert meta[5] == unpack(fields[b"created_at_ms"])
        assert meta[6] == unpack(fields.get(b"metadata.labels", b"\x80"))
        assert list(meta[6]) == sorted(meta[6])
        assert meta[7:] == [context["name"], context["root_path"]]
        assert all(fields.values())
        assert all(turns)
        assert scores(f"names:{name}").keys() == raw.hgetall(key(f"records:{name}")).keys()
        labels |= {member(label, value, id) for label, value in meta[6].items()}
        if context["root_path"] is not None:
            labels.add(member("", context["root_path"], id))
    assert scores("labels").keys() == labels
    assert not ids("staging")
    windows = {field: value for field, value in state.items() if field[:1] == b"w" and len(field) == 13}
    assert sum(map(len, windows.values())) == int(state[b"dedup_bytes"])
    assert all(len(window) % 16 == 0 and len(window) >= 32 for window in windows.values())


class Writer:
    """Does at random whatever a store can do."""

    def __init__(self, store: Any, dice: random.Random) -> None:
        self.store, self.dice = store, dice
        self.loaded: dict[str, SessionAsset] = {}

    def id(self) -> str:
        return self.dice.choice(IDS)

    def text(self) -> str:
        return self.dice.choice(["x", "y", "é", "z" * 40])

    def turns(self, most: int = 3) -> list[ConversationTurn]:
        return [ConversationTurn.user(self.text()) for _ in range(self.dice.randint(1, most))]

    async def save_new(self) -> None:
        asset = SessionAsset(id=self.id(), updated_at_ms=self.dice.randrange(10**13))
        asset.history.turns = self.turns(20)
        asset.metadata = {"labels": {self.text(): self.text()}} if self.dice.random() < 0.5 else {}
        asset.project_context.root_path = self.dice.choice([None, "/p", "/q"])
        await self.store.save(asset)
        self.loaded[asset.id] = asset

    async def save_changes(self) -> None:
        asset = self.loaded.get(self.id()) or await self.store.load(self.id())
        for _ in range(self.dice.randint(1, 3)):
            match self.dice.randrange(6):
                case 0:
                    asset.add_turn(*self.turns(1))
                case 1:
                    asset.history.turns = asset.history.turns[self.dice.randrange(3) :]
                case 2:
                    asset.metadata[self.text()] = self.dice.random()
                case 3:
                    asset.metadata["labels"] = {self.text(): self.text()}
                case 4:
                    asset.project_context.root_path, asset.created_at_ms = self.text(), self.dice.randrange(10**13)
                case 5:
                    asset.metadata = {}
        await self.store.save(asset, overwrite=self.dice.random() < 0.2)
        self.loaded[asset.id] = asset

    async def refresh(self) -> None:
        if self.loaded:
            await self.store.refresh(self.dice.choice([*self.loaded.values()]))

    async def append(self) -> None:
        await self.store.append(
            self.id(), *self.turns(), create=self.dice.random() < 0.5, once=self.dice.random() < 0.5
        )

    async def cut(self) -> None:
        await self.dice.choice([self.store.pop, self.store.truncate])(self.id(), self.dice.randint(1, 5))

    async def commit(self) -> None:
        changes: dict[str, Any] = {}
        if self.dice.random() < 0.5:
            changes["labels"] = {self.text(): self.dice.choice([None, self.text()])}
        if self.dice.random() < 0.5:
            changes |= {"put": {self.text(): b"1"}, "put_new": {"new" + self.text(): b"2"}}
        if self.dice.random() < 0.3:
            changes["drop"] = self.dice.choice([["*"], ["a", "n*"], ["b"]])
        if self.dice.random() < 0.5 or not changes:
            changes |= {"append": self.turns(), "truncate": self.dice.randrange(9)}
        await self.store.commit(self.id(), create=self.dice.random() < 0.5, **changes)

    async def fork(self) -> None:
        new, length = self.id(), self.dice.choice([None, 0, 2])
        for id in IDS:
            if id != new:
                await self.store.fork(id, new, length=length, records=self.dice.random() < 0.5)
                break

    async def delete(self) -> None:
        await self.store.delete(self.id())

    async def touch(self) -> None:
        await self.store.touch(self.id())

    async def step(self) -> None:
        some: list[Callable[[], Awaitable[None]]] = [
            self.save_new, self.save_changes, self.save_changes, self.refresh, self.append, self.append, self.cut,
            self.commit, self.commit, self.fork, self.delete, self.touch,
        ]  # fmt: skip
        try:
            await self.dice.choice(some)()
        except ConflictError as error:
            self.loaded.pop(error.id, None)
        except NotFoundError as error:
            self.loaded.pop(error.id, None)


@pytest.mark.parametrize("seed", range(3))
async def test_keys_agree(place: Place, connect: Connect, seed: int) -> None:
    """After each of two stores' writes at random."""
    dice = random.Random(seed)
    writers = [Writer(await connect(), dice) for _ in range(2)]
    await writers[0].save_new()
    for _ in range(60):
        await dice.choice(writers).step()
        check_partition(place)
    for id in IDS:
        if await writers[0].store.exists(id):
            assert await writers[0].store.load(id) == await writers[1].store.load(id)

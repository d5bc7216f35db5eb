"""Assets of one session, changed and saved in a random order, against a model of what must be stored."""

from __future__ import annotations

import copy
import pickle
import random
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import pytest

from orcs_redis import (
    CompactedTurn,
    ComponentSnapshot,
    ConflictError,
    ConversationTurn,
    NotFoundError,
    SessionAsset,
    SkillConfig,
)
from orcs_redis.model.sections import now_ms

from .conftest import Connect

KEYS = ("", "k", "a.b", "x\ny")
ID = "s"
Turns: TypeAlias = list[tuple[str, str]]  # ids and contents


def parts_of(asset: SessionAsset) -> dict[str, Any]:
    """The parts that the test changes, by name."""
    context, preferences, history = asset.project_context, asset.preferences, asset.history
    found: dict[str, Any] = {f"metadata.{key}": value for key, value in asset.metadata.items()}
    found |= {f"extra.{key}": value for key, value in asset.extra.items()}
    found |= {f"preferences.custom.{key}": value for key, value in preferences.custom.items()}
    found |= {f"skill_configs.{key}": skill.params["n"] for key, skill in asset.skill_configs.items()}
    found |= {f"component_snapshots.{key}": each.state for key, each in asset.component_snapshots.items()}
    found |= {"project_context.name": context.name, "project_context.root_path": context.root_path}
    found |= {"preferences.communication.language": preferences.communication.language}
    found |= {"history.max_turns": history.max_turns, "history.compacted": [each.summary for each in history.compacted]}
    return {name: value for name, value in found.items() if value is not None}


def turns_of(asset: SessionAsset) -> Turns:
    return [(turn.id, turn.content) for turn in asset.history.turns]


@dataclass
class Version:
    """What was stored at a revision: of the turns, those from `skipped` on."""

    revision: int = 0  # 0: nothing
    born: int = 0
    parts: dict[str, Any] = field(default_factory=dict)
    turns: Turns = field(default_factory=list)
    skipped: int = 0


def collisions(base: Version, mine: Version, theirs: Version) -> set[str]:
    """The names of what both have changed, in different ways."""

    def differing(*versions: dict[str, Any]) -> set[str]:
        names = {name for version in versions for name in version}
        old, here, there = ([version.get(name) for name in names] for version in versions)
        rows = zip(names, old, here, there, strict=True)
        return {name for name, b, m, t in rows if b not in (m, t) and m != t} | {
            name for name, b, m, t in zip(names, old, here, there, strict=True) if b != m and b != t and m != t
        }

    known = dict(base.turns)
    sides = (known, *({id: text for id, text in side.turns if id in known} for side in (mine, theirs)))
    return differing(base.parts, mine.parts, theirs.parts) | {f"turn/{id}" for id in differing(*sides)}


def merge(base: Version, mine: Version, theirs: Version) -> Version:
    """What is to be stored, if nothing collides: theirs, with what mine has changed."""
    names = base.parts.keys() | mine.parts.keys() | theirs.parts.keys()
    chosen = {name: (theirs if mine.parts.get(name) == base.parts.get(name) else mine) for name in names}
    parts = {name: side.parts[name] for name, side in chosen.items() if name in side.parts}
    if theirs.turns in (base.turns, mine.turns):
        return replace(theirs, parts=parts, turns=list(mine.turns))
    known, here = dict(base.turns), dict(mine.turns)
    turns = []
    for id, text in theirs.turns:
        if id not in known:
            turns.append((id, text))
        elif id in here:
            turns.append((id, here[id] if here[id] != known[id] else text))
    added = [turn for turn in mine.turns if turn[0] not in known and turn not in theirs.turns]
    return replace(theirs, parts=parts, turns=turns + added)


class Run:
    """A session, some assets of it, and what must be stored."""

    def __init__(self, stores: list[Any], seed: int) -> None:
        self.stores = stores
        self.random = random.Random(seed)
        self.stored = Version()
        self.assets: list[tuple[Any, SessionAsset, Version]] = []  # its store, what it was made from
        self.number = 0
        self.log: list[str] = []
        self.reshaped = 0  # the revision that last changed turns other than by pushing
        self.listed: Any = None
        self.touched = False  # the last step may have moved updated_at
        self.whole = False  # or set it

    async def run(self, steps: int) -> None:
        for _ in range(steps):
            before, since, self.touched = self.stored, now_ms(), False
            self.whole = False
            weights = {
                self.change: 10, self.save: 6, self.refresh: 4, self.load: 3, self.copy: 2, self.append: 3,
                self.pop: 1, self.truncate: 0.5, self.replace_turn: 1, self.commit: 2, self.update: 1.5,
                self.delete: 0.3, self.overwrite: 0.3, self.exactly: 1,
            }  # fmt: skip
            step = self.random.choices(list(weights), list(weights.values()))[0]
            if not self.stored.revision:
                step = self.random.choice([self.create, self.save, self.refresh, self.load, self.change])
            self.log.append(step.__name__)
            await step()
            await self.check(before, since)

    def store(self) -> Any:
        return self.random.choice(self.stores)

    def wrote(self, revision: int, version: Version) -> None:
        """Note what is stored now."""
        old, new = self.stored.turns, version.turns
        if new[: len(old)] != old or not self.stored.revision:
            self.reshaped = revision
        assert revision > self.stored.revision
        self.stored = replace(version, revision=revision, skipped=0)

    async def check(self, before: Version, since: int) -> None:
        """What is stored is as it must be, and so are the times in lists."""
        store = self.store()
        if not self.stored.revision:
            with pytest.raises(NotFoundError):
                await store.load(ID)
            assert await store.list() == []
            self.listed = None
            return
        asset, revision = await store.load_versioned(ID)
        assert revision == self.stored.revision
        assert turns_of(asset) == self.stored.turns
        assert parts_of(asset) == self.stored.parts
        (listed,) = await store.list()
        assert (listed.revision, listed.turn_count) == (revision, len(self.stored.turns))
        assert (listed.name, listed.project_path) == (asset.project_context.name, asset.project_context.root_path)
        last, self.listed = self.listed, listed
        if last is None or revision == last.revision:
            assert last in (None, listed)
            return
        assert listed.updated_at >= last.updated_at
        assert listed.written_at >= last.written_at
        assert listed.written_at.timestamp() * 1000 >= since - 1
        if self.stored.turns != before.turns and not self.whole:
            assert listed.updated_at == listed.written_at
        elif not self.touched:
            assert listed.updated_at == last.updated_at

    # What is done with an asset

    def pick(self) -> int | None:
        return self.random.randrange(len(self.assets)) if self.assets else None

    async def load(self) -> None:
        if not self.stored.revision:
            with pytest.raises(NotFoundError):
                await self.store().load(ID, last=2)
            return
        store, last = self.store(), self.random.choice([None, None, None, 0, 2, 4])
        asset = await store.load(ID, last=last)
        start = 0 if last is None else max(len(self.stored.turns) - last, 0)
        assert asset.history.skipped == start
        base = replace(self.stored, turns=self.stored.turns[start:], skipped=start)
        self.assets.append((store, asset, base))
        del self.assets[: len(self.assets) - 4]

    async def copy(self) -> None:
        if (n := self.pick()) is None:
            return
        store, asset, base = self.assets[n]
        ways: list[Any] = [copy.copy, copy.deepcopy, lambda asset: pickle.loads(pickle.dumps(asset))]
        twin = self.random.choice(ways)(asset)
        self.log[-1] += f" {n}"
        assert twin == asset
        self.assets[n] = (self.store(), twin, base) if self.random.random() < 0.5 else (store, twin, base)

    def new_turn(self) -> ConversationTurn:
        self.number += 1
        return ConversationTurn.user(f"{self.number}" + "." * 40)

    async def change(self) -> None:
        if (n := self.pick()) is None:
            return
        _, asset, _ = self.assets[n]
        for _ in range(self.random.randint(1, 3)):
            kind = self.random.choice(
                [
                    "metadata",
                    "extra",
                    "custom",
                    "skill",
                    "snapshot",
                    "name",
                    "root",
                    "language",
                    "max",
                    "touch",
                    "add",
                    "add",
                    "edit",
                    "remove",
                    "insert",
                    "compact",
                    "twin",
                    "many",
                ]
            )
            self.log[-1] += f" {n}:{kind}"
            self.change_one(asset, kind)

    def change_one(self, asset: SessionAsset, kind: str) -> None:
        key, value = self.random.choice(KEYS), self.random.choice([None, 1, 2, 3])
        history, whole = asset.history, not asset.history.skipped
        turns = history.turns
        at = self.random.randrange(len(turns)) if turns else 0
        match kind:
            case "metadata":
                put(asset.metadata, key, value)
            case "extra":
                put(asset.extra, self.random.choice(["", "e", ".d", "..d.e", "metadata.k"]), value)
            case "custom":
                put(asset.preferences.custom, key, value)
            case "skill":
                put(asset.skill_configs, key, value and SkillConfig(skill_id=key, params={"n": value}))
            case "snapshot":
                put(asset.component_snapshots, key, value and ComponentSnapshot(component_fqn=key, state=value))
            case "name":
                asset.project_context.name = str(value) if value else None
            case "root":
                asset.project_context.root_path = f"/{value}" if value else None
            case "language":
                asset.preferences.communication.language = str(value) if value else None
            case "max":
                history.max_turns = value or 1000
            case "touch":
                asset.touch()
            case "add":
                asset.add_turn(self.new_turn())
            case "twin":  # one that others have added, too
                known = {turn.id for turn in turns}
                last = self.stored.turns[-1:]
                if last and last[0][0] not in known and whole:
                    turns.append(ConversationTurn(id=last[0][0], role="user", content=last[0][1], timestamp_ms=0))
                    turns.pop()
            case "edit" if turns:
                turns[at].content = self.new_turn().content
            case "many" if turns and len(turns) < 300 and self.random.random() < 0.1:
                turns.extend(self.new_turn() for _ in range(70))
            case "remove" if turns and whole:
                del turns[at]
            case "insert" if whole:
                turns.insert(at, self.new_turn())
            case "compact" if turns and whole:
                summary = CompactedTurn(
                    summary=f"{turns[at].id[:8]} {at}", turn_count=at, start_time_ms=0, end_time_ms=0
                )
                del turns[:at]
                history.compacted[:] = [*history.compacted[-1:], summary]

    def theirs(self, base: Version) -> Version | None:
        """What is stored as an asset sees it that was made from `base`; None if nothing can be said."""
        if not base.skipped:
            return self.stored
        if self.reshaped <= base.revision:
            return replace(self.stored, turns=self.stored.turns[base.skipped :], skipped=base.skipped)
        if not base.turns:
            return replace(self.stored, turns=[], skipped=len(self.stored.turns))
        places = {id: n for n, (id, _) in enumerate(self.stored.turns)}
        at = next((places[id] - n for n, (id, _) in enumerate(base.turns) if id in places), -1)
        return None if at < 0 else replace(self.stored, turns=self.stored.turns[at:], skipped=at)

    async def save(self) -> None:
        if (n := self.pick()) is None:
            return
        self.log[-1] += f" {n}"
        store, asset, base = self.assets[n]
        before = copy.deepcopy(asset)
        self.touched = True
        mine = Version(parts=parts_of(asset), turns=turns_of(asset))
        theirs = self.theirs(base)
        gone = not self.stored.revision or self.stored.born != base.born or theirs is None
        found = set() if gone or theirs is None else collisions(base, mine, theirs)
        if gone or found:
            with pytest.raises(ConflictError) as caught:
                await store.save(asset)
            error = caught.value
            assert set(error.parts) == found
            assert (error.expected, error.actual) == (base.revision, self.stored.revision)
            assert asset == before
            if gone:
                del self.assets[n]
            return
        assert theirs is not None
        result = merge(base, mine, theirs)
        revision = await store.save(asset)
        whole = replace(result, turns=self.stored.turns[: theirs.skipped] + result.turns)
        if (whole.parts, whole.turns) != (self.stored.parts, self.stored.turns) or revision != self.stored.revision:
            self.wrote(revision, whole)
        await self.is_stored(n, store, asset, theirs.skipped)

    async def is_stored(self, n: int, store: Any, asset: SessionAsset, start: int) -> None:
        loaded = await store.load(ID, last=len(self.stored.turns) - start)
        assert (asset, asset.history.skipped) == (loaded, start)
        self.assets[n] = (store, asset, replace(self.stored, turns=self.stored.turns[start:], skipped=start))

    async def refresh(self) -> None:
        if (n := self.pick()) is None:
            return
        self.log[-1] += f" {n}"
        store, asset, base = self.assets[n]
        mine = Version(parts=parts_of(asset), turns=turns_of(asset))
        theirs = self.theirs(base)
        if not self.stored.revision or self.stored.born != base.born or theirs is None:
            before = copy.deepcopy(asset)
            with pytest.raises((ConflictError, NotFoundError)) as caught:
                await store.refresh(asset)
            assert asset == before
            assert isinstance(caught.value, ConflictError) == bool(self.stored.revision)
            del self.assets[n]
            return
        assert await store.refresh(asset) == self.stored.revision
        found = collisions(base, mine, theirs)
        assert asset.history.skipped == theirs.skipped
        now = Version(parts=parts_of(asset), turns=turns_of(asset))
        if not found:
            result = merge(base, mine, theirs)
            assert (now.parts, now.turns) == (result.parts, result.turns)
            self.assets[n] = (store, asset, theirs)
            return
        names = base.parts.keys() | mine.parts.keys() | theirs.parts.keys()
        for name in names:
            holds = mine if name in found or mine.parts.get(name) != base.parts.get(name) else theirs
            assert now.parts.get(name) == holds.parts.get(name), name
        parts = {name: value for name, value in theirs.parts.items() if name not in found}
        parts |= {name: base.parts[name] for name in found if name in base.parts}
        turns = [turn for turn in theirs.turns if f"turn/{turn[0]}" not in found]
        turns += [turn for turn in base.turns if f"turn/{turn[0]}" in found]
        known, texts = dict(base.turns), dict(now.turns)
        assert len(texts) == len(now.turns)
        assert {id for id, _ in theirs.turns if id not in known} <= texts.keys()
        assert {id for id, _ in mine.turns if id not in known} <= texts.keys()
        for id, text in mine.turns:
            if f"turn/{id}" in found:
                assert texts[id] == text
        # Of a conflict that refresh has left, the next save must say the same.
        with pytest.raises(ConflictError) as left:
            await store.save(asset)
        assert set(left.value.parts) == found
        assert (turns_of(asset), parts_of(asset)) == (now.turns, now.parts)
        assert await store.refresh(asset) == self.stored.revision
        assert (turns_of(asset), parts_of(asset)) == (now.turns, now.parts)
        if found & {"history.compacted"} or any(name.startswith("turn/") for name in found):
            del self.assets[n]  # the model of one list is too simple for what follows
        else:
            self.assets[n] = (store, asset, replace(theirs, parts=parts, turns=turns))

    async def overwrite(self) -> None:
        if (n := self.pick()) is None or self.assets[n][1].history.skipped:
            return
        store, asset, _ = self.assets[n]
        self.touched = self.whole = True
        revision = await store.save(asset, overwrite=True)
        self.wrote(revision, Version(born=self.stored.born, parts=parts_of(asset), turns=turns_of(asset)))
        self.reshaped = revision
        await self.is_stored(n, store, asset, 0)

    async def exactly(self) -> None:
        if (n := self.pick()) is None or self.assets[n][1].history.skipped:
            return
        store, asset, base = self.assets[n]
        self.touched = self.whole = True
        mine = Version(born=self.stored.born, parts=parts_of(asset), turns=turns_of(asset))
        if base.revision != self.stored.revision:
            with pytest.raises(ConflictError) as caught:
                await store.save(asset, if_revision=base.revision)
            assert (caught.value.actual, caught.value.parts) == (self.stored.revision, ())
            return
        revision = await store.save(asset, if_revision=base.revision)
        if revision != self.stored.revision or (mine.parts, mine.turns) != (self.stored.parts, self.stored.turns):
            self.wrote(revision, mine)
        await self.is_stored(n, store, asset, 0)

    # What others do

    async def create(self) -> None:
        asset = SessionAsset(id=ID)
        for _ in range(self.random.randint(0, 6)):
            asset.add_turn(self.new_turn())
        asset.metadata["k"] = 1
        store = self.store()
        revision = await store.save(asset)
        self.wrote(revision, Version(born=revision, parts=parts_of(asset), turns=turns_of(asset)))
        self.reshaped = revision
        self.assets.append((store, asset, self.stored))

    async def append(self) -> None:
        turns = [self.new_turn() for _ in range(self.random.choice([1, 1, 2, 70]))]
        revision = await self.store().append(ID, *turns)
        added = [(turn.id, turn.content) for turn in turns]
        self.wrote(revision, replace(self.stored, turns=self.stored.turns + added))

    async def pop(self) -> None:
        store, turns = self.store(), self.stored.turns
        count = self.random.randint(1, 3)
        popped = await store.pop(ID, count)
        assert [(turn.id, turn.content) for turn in popped] == turns[-count:]
        if popped:
            self.wrote(self.stored.revision + 1, replace(self.stored, turns=turns[: -len(popped)]))

    async def truncate(self) -> None:
        length = max(len(self.stored.turns) - self.random.randint(0, 5), 0)
        revision = await self.store().truncate(ID, length)
        if length < len(self.stored.turns):
            self.wrote(revision, replace(self.stored, turns=self.stored.turns[:length]))

    async def replace_turn(self) -> None:
        if turns := list(self.stored.turns):
            at = self.random.randrange(len(turns))
            new = self.new_turn()
            new.id = turns[at][0]
            revision = await self.store().replace_turn(ID, new)
            turns[at] = (new.id, new.content)
            self.wrote(revision, replace(self.stored, turns=turns))
            self.reshaped = revision

    async def commit(self) -> None:
        name, value = f"metadata.{self.random.choice(KEYS)}", self.random.choice([None, 1, 2, 3])
        if value is None:
            committed = await self.store().commit(ID, unset=[name])
        else:
            committed = await self.store().commit(ID, set={name: value})
        parts = {key: known for key, known in self.stored.parts.items() if key != name}
        self.wrote(committed.revision, replace(self.stored, parts=parts if value is None else parts | {name: value}))

    async def update(self) -> None:
        kind = self.random.choice(["metadata", "name", "add", "edit", "remove", "compact", "custom"])
        self.touched = True
        updated = await self.store().update(ID, lambda asset: self.change_one(asset, kind))
        asset = updated.asset
        if updated.revision != self.stored.revision:
            self.wrote(updated.revision, replace(self.stored, parts=parts_of(asset), turns=turns_of(asset)))
        assert (turns_of(asset), parts_of(asset)) == (self.stored.turns, self.stored.parts)

    async def delete(self) -> None:
        await self.store().delete(ID)
        self.stored = Version()


def put(values: dict[str, Any], key: str, value: Any) -> None:
    if value is None:
        values.pop(key, None)
    else:
        values[key] = value


@pytest.mark.parametrize("seed", range(4))
async def test_saves_at_random(connect: Connect, seed: int) -> None:
    """No turn is lost or doubled, parts are as whoever changed them has them, and conflicts are told exactly."""
    run = Run([await connect(), await connect()], seed)
    try:
        await run.run(150)
    except BaseException:
        print("\n".join(run.log[-30:]))
        raise

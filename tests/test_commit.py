"""Commits and their faces: what a write says that it changes is changed, at once or not at all, and nothing else."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from orcs_redis import (
    Committed,
    ConflictError,
    ConversationTurn,
    InvalidIdError,
    LeaseLostError,
    NotFoundError,
    ProjectContext,
    SerializationError,
    SessionAsset,
    SkillConfig,
)
from orcs_redis.transport.lifecycle import Lifecycle

from .conftest import ROWS, Connect, Place
from .support import turn
from .test_bad_input import content
from .test_lease import leased

# What is judged alike in both forms.
few = pytest.mark.parametrize("place", [ROWS[1], ROWS[2], ROWS[5]], ids=str, indirect=True)
real = pytest.mark.parametrize("place", [ROWS[2], ROWS[5]], ids=str, indirect=True)


def numbered(*numbers: int) -> list[ConversationTurn]:
    """Turns whose ids are numbers."""
    turns = [turn(f"text {n}") for n in numbers]
    for n, each in zip(numbers, turns, strict=True):
        each.id = str(n)
    return turns


async def ids(store: Any, id: str = "s") -> list[int]:
    return [int(each.id) for each in await store.turns(id)]


async def meta_of(store: Any, id: str = "s") -> Any:
    return next(meta for meta in await store.list() if meta.id == id)


@pytest.fixture
async def s(store: Any) -> Any:
    """The store with a session "s" of five turns, some parts, records and labels."""
    await store.commit(
        "s",
        append=numbered(*range(5)),
        set={"metadata.old": 1, "metadata.kept": [1], "extra.note": "x"},
        put={"a": b"a", "b/1": b"b1", "b/2": b"b2"},
        labels={"user": "u1"},
        create=True,
    )
    return store


async def test_all_at_once(s: Any) -> None:
    """One commit changes turns, parts, records and labels, and says what came of it; everything else is as it was."""
    before = await s.load("s")
    came = await s.commit(
        "s",
        append=numbered(5, 6),
        pop=2,
        set={"metadata.new": {"x": None}, "skill_configs.k": SkillConfig(skill_id="k"), "extra.more": 1.5,
             "extra.d.o.t": 1, "project_context": ProjectContext(name="n", root_path="/p")},
        unset=["metadata.old", "extra.note", "metadata.never"],
        put={"a": b"\0\xff", "z": b"z"},
        put_new={"b/3": b"b3", "a2": b"a2"},
        drop=["b/1", "b/*", "none"],
        labels={"team": "t", "user": None},
    )  # fmt: skip
    assert came == Committed(2, created=False, placed={"b/3": True, "a2": True})
    after, revision = await s.load_versioned("s")
    assert revision == 2
    assert [each.id for each in after.history.turns] == ["0", "1", "2", "5", "6"]
    assert after.metadata == {"new": {"x": None}, "kept": [1], "labels": {"team": "t"}}
    assert after.skill_configs == {"k": SkillConfig(skill_id="k")}
    assert after.extra == {"more": 1.5, "d.o.t": 1}
    assert after.project_context == ProjectContext(name="n", root_path="/p")
    assert after.preferences == before.preferences
    assert after.created_at_ms == before.created_at_ms
    assert await s.records("s") == [("a", b"\0\xff"), ("a2", b"a2"), ("b/3", b"b3"), ("z", b"z")]
    meta = await meta_of(s)
    assert (meta.turn_count, meta.name, meta.project_path, meta.labels) == (5, "n", "/p", {"team": "t"})
    assert [meta.id for meta in await s.list(labels={"team": "t"}, project_path="/p")] == ["s"]
    assert await s.count(labels={"user": "u1"}) == 0


async def test_creation(store: Any) -> None:
    """A session that a commit makes has what a new asset has, and what the commit says. None is made unasked."""
    for make in (store.append("s", turn()), store.commit("s", put={"k": b"1"}), store.pop("s"), store.touch("s"),
                 store.commit("s", put={"k": b"1"}, if_last="1"),
                 store.truncate("s", 1), store.replace_turn("s", turn()), store.commit("s", set={"metadata.x": 1}),
                 store.append("s", turn(), once=True), store.fork("s", "t"), store.delete("s")):  # fmt: skip
        with pytest.raises(NotFoundError) as caught:
            await make
        assert caught.value.id == "s"
    with pytest.raises(ConflictError):
        await store.commit("s", create=True, if_last="1", put={"k": b"1"})
    with pytest.raises(ConflictError):
        await store.commit("s", create=True, if_revision=3, put={"k": b"1"})
    earliest = int(time.time() * 1000) - 60_000
    made = await store.commit("s", create=True, if_revision=0, put_new={"k": b"1"}, labels={"a": "1"})
    assert made == Committed(1, created=True, placed={"k": True})
    assert await store.commit("s", create=True, put_new={"k": b"2"}) == Committed(2, created=False, placed={"k": False})
    loaded = await store.load("s")
    expected = SessionAsset(id="s", metadata={"labels": {"a": "1"}})
    expected.created_at_ms, expected.updated_at_ms = loaded.created_at_ms, loaded.updated_at_ms
    assert loaded == expected
    assert loaded.created_at_ms >= earliest
    assert (await meta_of(store)).created_at == loaded.created_at
    with pytest.raises(ConflictError) as conflict:
        await store.commit("s", create=True, if_revision=0, put={"k": b"1"})
    assert conflict.value.actual == 2
    assert await store.append("made", *numbered(1, 2), create=True) == 3
    assert await store.append("made", *numbered(3), create=True) == 4
    assert await ids(store, "made") == [1, 2, 3]


async def test_conditions(s: Any) -> None:
    """With a condition that is not met nothing is written, and the error has the revision."""
    for conditions in ({"if_revision": 7}, {"if_revision": 0}, {"if_last": "3"}, {"if_last": ""}):
        with pytest.raises(ConflictError) as caught:
            await s.commit("s", put={"x": b"1"}, **conditions)
        assert (caught.value.id, caught.value.actual) == ("s", 1)
    for call in (s.append("s", turn(), if_revision=2), s.append("s", turn(), if_revision=2, once=True),
                 s.pop("s", if_revision=2), s.truncate("s", 0, if_revision=2), s.touch("s", if_revision=2),
                 s.replace_turn("s", numbered(4)[0], if_revision=2), s.fork("s", "t", if_revision=2),
                 s.replace_turn("s", numbered(0)[0], if_revision=2)):  # fmt: skip
        with pytest.raises(ConflictError) as caught:
            await call
        assert (caught.value.id, caught.value.expected, caught.value.actual) == ("s", 2, 1)
    assert (await s.load_versioned("s")).revision == 1
    assert (await s.commit("s", append=numbered(5), if_last="4", if_revision=1)).revision == 2
    assert [each.id for each in await s.pop("s", if_revision=2)] == ["5"]
    assert await s.replace_turn("s", numbered(0)[0], if_revision=3) == 4
    async with leased(s, "s") as lease:
        assert (await s.commit("s", append=numbered(5), lease=lease)).revision == 5
        assert len(await s.pop("s", 2, lease=lease)) == 2
        assert await s.append("s", *numbered(4), lease=lease, once=True) == 7
    for call in (s.commit("s", put={"x": b"1"}, lease=lease), s.pop("s", lease=lease), s.touch("s", lease=lease),
                 s.append("s", *numbered(8), lease=lease, once=True), s.truncate("s", 1, lease=lease),
                 s.replace_turn("s", numbered(4)[0], lease=lease)):  # fmt: skip
        with pytest.raises(LeaseLostError):
            await call
    assert await ids(s) == [0, 1, 2, 3, 4]


async def test_pop(s: Any) -> None:
    """The last turns come in the order of the history, as many as there are; an empty history gives none."""
    expected = await s.turns("s")
    assert await s.pop("s") == expected[4:]
    assert await s.pop("s", 2) == expected[2:4]
    assert await s.pop("s", 2**70) == expected[:2]
    revision = (await s.load_versioned("s")).revision
    assert await s.pop("s") == await s.pop("s", 5) == await s.turns("s") == []
    assert await s.commit("s", pop=3) == Committed(revision, created=False, placed={})
    assert (await s.load_versioned("s")).revision == revision
    assert (await meta_of(s)).turn_count == 0
    await s.append("s", *expected)
    assert await s.turns("s") == expected


async def test_truncate(s: Any) -> None:
    """The first turns stay; where there are no more than that, nothing is written, with `create` too."""
    for length in (5, 6, 2**70):
        assert await s.truncate("s", length) == 1
        assert await s.commit("s", truncate=length, create=True) == Committed(1, created=False, placed={})
    assert await s.truncate("s", 2) == 2
    assert await ids(s) == [0, 1]
    assert (await s.commit("s", truncate=0, append=numbered(7, 8))).revision == 3
    assert await ids(s) == [7, 8]
    assert await s.truncate("s", 0) == 4
    assert await ids(s) == []
    assert (await s.commit("s", truncate=0, append=numbered(9))).revision == 5
    assert await ids(s) == [9]
    made = await s.commit("t", truncate=3, create=True)
    assert made == Committed(6, created=True, placed={})


async def test_replace_turn(s: Any) -> None:
    """A turn takes the place of the last one with its id, however far that is; without one nothing is written."""
    new = numbered(4)[0]
    new.content = "new"
    assert await s.replace_turn("s", new) == 2
    assert (await s.turns("s"))[4] == new
    with pytest.raises(NotFoundError):
        await s.replace_turn("s", turn())
    assert (await s.load_versioned("s")).revision == 2
    await s.append("s", *numbered(*range(5, 700)), *numbered(3))
    for number in (0, 3, 690, 350):
        new = numbered(number)[0]
        new.content = f"again {number}"
        await s.replace_turn("s", new)
    changed = [(n, each.content) for n, each in enumerate(await s.turns("s")) if each.content.startswith("again")]
    assert changed == [(0, "again 0"), (350, "again 350"), (690, "again 690"), (700, "again 3")]
    with pytest.raises(NotFoundError):
        await s.replace_turn("s", *numbered(10_000))


async def test_a_turn_that_moves(s: Any) -> None:
    """A turn that others move meanwhile is found where it is; one that is gone in the end is not found."""
    await s.append("s", *numbered(*range(5, 300)))
    done = asyncio.Event()

    async def move() -> None:
        number = 1000
        while not done.is_set():
            await s.append("s", *numbered(number))
            asset = await s.load("s")
            del asset.history.turns[0]
            await s.save(asset)
            number += 1

    moving = asyncio.ensure_future(move())
    target = numbered(250)[0]
    for n in range(10):
        target.content = f"new {n}"
        async with asyncio.timeout(20):
            await s.replace_turn("s", target)
        assert [each.content for each in await s.turns("s") if each.id == "250"] == [f"new {n}"]
    done.set()
    await moving
    assert [each.id for each in await s.turns("s")].count("250") == 1


async def test_times(s: Any) -> None:
    """`updated_at` moves with turns and touches, not with parts, labels and records; `written_at` moves with all."""

    async def moved(*, updated: bool, write: Any) -> None:
        before = await meta_of(s)
        await asyncio.sleep(0.003)
        await write
        after = await meta_of(s)
        assert after.written_at > before.written_at
        assert (after.updated_at > before.updated_at) == updated
        assert (after.updated_at == before.updated_at) != updated
        assert (await s.load("s")).updated_at == after.updated_at
        assert abs((datetime.now(UTC) - after.written_at).total_seconds()) < 60

    for change in ({"set": {"metadata.x": 1}}, {"unset": ["metadata.x"]}, {"put": {"k": b"1"}},
                   {"put_new": {"k": b"1"}}, {"drop": ["*"]}, {"labels": {"l": "x"}}, {"labels": {"l": None}},
                   {"set": {"project_context": ProjectContext(name="n")}}):  # fmt: skip
        await moved(updated=False, write=s.commit("s", **change))
    await moved(updated=True, write=s.append("s", turn()))
    await moved(updated=True, write=s.append("s", turn(), once=True))
    await moved(updated=True, write=s.pop("s"))
    await moved(updated=True, write=s.replace_turn("s", numbered(4)[0]))
    await moved(updated=True, write=s.truncate("s", 3))
    await moved(updated=True, write=s.touch("s"))
    await moved(updated=True, write=s.commit("s", pop=1, set={"metadata.x": 1}))
    ahead = int(time.time() * 1000) + 86_400_000
    await s.commit("s", set={"updated_at_ms": ahead, "created_at_ms": 5})
    loaded, meta = await s.load("s"), await meta_of(s)
    assert (loaded.updated_at_ms, loaded.created_at_ms, meta.created_at) == (ahead, 5, loaded.created_at)
    assert meta.updated_at <= meta.written_at
    await s.commit("s", set={"updated_at_ms": 7})
    assert (await s.load("s")).updated_at_ms == 7
    assert (await meta_of(s)).updated_at == meta.updated_at


async def test_deletes(connect: Connect) -> None:
    """Of what a list has found, only what is still at that revision is deleted; the others are conflicts or gone."""
    store = await connect(partitions=3)
    for n in range(30):
        await store.append(f"{n}", turn(), create=True)
    metas = sorted(await store.list(), key=lambda meta: int(meta.id))
    for n in range(0, 30, 3):
        await store.commit(f"{n}", put={"k": b"1"})
    for n in range(1, 30, 3):
        await store.delete(f"{n}")
    await store.append("1", turn(), create=True)
    errors = await store.delete_many([*metas, "0", "none"])
    changed = [error for n, error in enumerate(errors[:30]) if n % 3 == 0]
    assert [type(error) for error in changed] == [ConflictError] * 10
    assert [error.expected for error in changed] == [meta.revision for meta in metas[::3]]
    assert [type(error) for error in errors[1:30:3]] == [ConflictError] * 10
    assert [error.actual for error in errors[4:30:3]] == [0] * 9
    assert errors[2:30:3] == [None] * 10
    assert (errors[30], type(errors[31])) == (None, NotFoundError)
    assert {meta.id for meta in await store.list()} == {"1", *(f"{n}" for n in range(3, 30, 3))}


# Labels


async def test_labels(s: Any) -> None:
    """They are set by name, beside those that are there; None removes one; beyond eight nothing is written."""
    await s.commit("s", labels={f"l{n}": "x" for n in range(7)})
    before = await s.load_versioned("s")
    assert len(before.asset.metadata["labels"]) == 8
    with pytest.raises(SerializationError) as caught:
        await s.commit("s", labels={"ninth": "x"}, append=[turn()], put={"k": b"1"})
    assert caught.value.field == "metadata.labels"
    assert await s.load_versioned("s") == before
    assert await s.get_records("s", ["k"]) == {}
    # All eight are replaced by eight others.
    others = {f"n{n}": "y" for n in range(8)}
    await s.commit("s", labels={**dict.fromkeys(before.asset.metadata["labels"]), **others})
    assert (await s.load("s")).metadata["labels"] == others == (await meta_of(s)).labels
    assert await s.count(labels={"user": "u1"}) == await s.count(labels={"l0": "x"}) == 0
    assert await s.count(labels=others) == 1
    await s.commit("s", labels=dict.fromkeys(others))
    assert "labels" not in (await s.load("s")).metadata
    assert (await meta_of(s)).labels == {}
    assert await s.count(labels={"n0": "y"}) == 0
    await s.commit("s", labels={"none": None})


async def test_largest_labels(place: Place, s: Any) -> None:
    """Eight labels of 200 bytes of any script, and others whose bytes could be taken for lengths."""
    largest = {"é" * 99 + f"{n:02}": "日" * 66 + "ab" for n in range(8)}
    await s.commit("s", labels={"user": None, **largest})
    assert (await meta_of(s)).labels == largest
    for name, value in largest.items():
        assert await s.count(labels={name: value}) == 1
        assert await s.count(labels={name: "日" * 66}) == 0
    await s.delete("s")
    assert place.raw.exists(place.key("labels")) == 0
    odd = {"\0": "\0", "\x01": "\0\0", "a": "\0\0\0\x01a", "\x7f" * 31: "\x80" * 16, "x" * 32: "y" * 128}
    await s.commit("odd", labels=odd, create=True)
    assert (await meta_of(s, "odd")).labels == odd
    assert [await s.count(labels={name: value}) for name, value in odd.items()] == [1] * 5


async def test_labels_as_a_whole(s: Any) -> None:
    """Set as metadata they are labels too, if they can be; else they are metadata, which removing a label leaves."""
    await s.commit("s", set={"metadata.labels": {"b": "2", "a": "1"}})
    assert (await meta_of(s)).labels == {"a": "1", "b": "2"}
    assert (await s.count(labels={"user": "u1"}), await s.count(labels={"b": "2"})) == (0, 1)
    for ordinary in (
        ["b"],
        "b",
        {"b": 2},
        {"b": ""},
        {f"{n}": "x" for n in range(9)},
        {"": "x"},
        {"b": "x" * 201},
        None,
    ):
        await s.commit("s", set={"metadata.labels": ordinary})
        assert (await s.load("s")).metadata["labels"] == ordinary
        assert (await meta_of(s)).labels == {}
        assert await s.count(labels={"b": "2"}) == 0
        await s.commit("s", labels={"b": None})
        assert (await s.load("s")).metadata["labels"] == ordinary
    await s.commit("s", set={"metadata.labels": {}}, append=[turn()])
    await s.commit("s", labels={"c": "3"})
    assert (await s.load("s")).metadata["labels"] == {"c": "3"} == (await meta_of(s)).labels
    await s.commit("s", unset=["metadata.labels"])
    assert (await meta_of(s)).labels == {}
    assert await s.count(labels={"c": "3"}) == 0


# Records


async def test_drops(s: Any) -> None:
    """A key drops one record, a prefix all that begin so but those that the same commit puts."""

    async def keys() -> list[str]:
        return [key for key, _ in await s.records("s")]

    await s.commit("s", put={"b*x": b"1", "b": b"1", "\U0010ffff": b"1", "c": b"1"})
    await s.commit("s", drop=["b*x", "none"])
    assert await keys() == ["a", "b", "b/1", "b/2", "c", "\U0010ffff"]
    await s.commit("s", drop=["b/*"], put={"b/2": b"new"}, put_new={"b/3": b"new"})
    assert await s.records("s", "b") == [("b", b"1"), ("b/2", b"new"), ("b/3", b"new")]
    await s.commit("s", drop=["b*", "b", "c*"])
    assert await keys() == ["a", "\U0010ffff"]
    came = await s.commit("s", drop=["*"], put_new={"a": b"other"})
    assert came.placed == {"a": False}
    assert await s.records("s") == [("a", b"a")]
    await s.commit("s", drop=["*"])
    await s.commit("s", drop=["*", "a"])
    assert await keys() == []
    await s.commit("s", put={"a": b"again"})
    await s.delete("s")
    await s.commit("s", create=True, put_new={"b": b"1"})
    assert await keys() == ["b"]


async def test_many_records(place: Place, s: Any) -> None:
    """Ten thousand are put, and dropped, in one commit."""
    number = 500 if place.row.server == "memory" else 10_000
    records = {f"r/{n:05}": b"%d" % n for n in range(number)}
    await s.commit("s", put=records)
    assert await s.records("s", "r/") == list(records.items())
    came = await s.commit("s", put_new={**records, "r/new": b"1"})
    assert [key for key, put in came.placed.items() if put] == ["r/new"]
    await s.commit("s", drop=[*list(records)[: number - 100], "r/new"])
    assert await s.records("s", "r/") == list(records.items())[-100:]
    await s.commit("s", put=records)
    await s.commit("s", drop=["r/*"], put={"r/0": b"last"})
    assert [key for key, _ in await s.records("s")] == ["a", "b/1", "b/2", "r/0"]


async def test_bounds(place: Place, s: Any) -> None:
    """As much as is allowed in one commit: thousands of turns and parts, the longest keys, the largest record."""
    memory = place.row.server == "memory"
    number = 500 if memory else 9001
    await s.commit("s", append=numbered(*range(5, number)))
    assert await ids(s) == [*range(number)]
    await s.commit("s", pop=1, append=numbered(*range(number)))
    assert await ids(s) == [*range(number - 1), *range(number)]
    await s.commit("s", truncate=0, append=numbered(*range(number)))
    assert await ids(s) == [*range(number)]
    parts = {f"metadata.{n}": n for n in range(500 if memory else 5000)}
    await s.commit("s", set=parts)
    loaded = await s.load("s")
    assert {f"metadata.{key}": value for key, value in loaded.metadata.items() if key.isdigit()} == parts
    await s.commit("s", unset=[*parts], set={"metadata." + "k" * 1000: 1})
    assert set((await s.load("s")).metadata) == {"kept", "labels", "old", "k" * 1000}
    longest = ["k" * 1024, "é" * 512, "\n" * 1024]
    await s.commit("s", put=dict.fromkeys(longest, b"1"), put_new={"日" * 341: b"1"})
    assert await s.get_records("s", longest) == dict.fromkeys(longest, b"1")
    largest = secrets.token_bytes(16 << 20)
    await s.commit("s", put={"largest": largest})
    assert await s.get_records("s", ["largest"]) == {"largest": largest}
    with pytest.raises(SerializationError):
        await s.commit("s", put={"larger": largest + b"x"})


async def test_a_type_of_ones_own(connect: Connect) -> None:
    """A session can be made of a type whose fields have defaults; of another one, `create` is a ValueError."""

    class Own(SessionAsset):
        mood: str = "good"
        notes: list[str] = msgspec.field(default_factory=list)

    class Strict(SessionAsset, kw_only=True):
        mood: str

    store, strict = await connect(asset_type=Own), await connect(asset_type=Strict)
    await store.commit("s", set={"notes": ["x"]}, create=True)
    made = await store.load("s")
    assert (type(made), made.mood, made.notes) == (Own, "good", ["x"])
    await store.commit("s", set={"mood": "bad"}, unset=["notes"])
    assert ((await store.load("s")).mood, (await store.load("s")).notes) == ("bad", [])
    with pytest.raises(ValueError, match="Strict"):
        await strict.commit("t", put={"k": b"1"}, create=True)
    with pytest.raises(ValueError, match="Strict"):
        await strict.append("t", turn(), create=True)
    with pytest.raises(ValueError, match="unset"):
        await strict.commit("s", unset=["mood"])
    await strict.commit("s", set={"mood": "strict"})
    assert (await strict.load("s")).mood == "strict"
    assert not await strict.exists("t")


# Bad input

X = turn()
BAD_COMMITS: list[dict[str, Any]] = [
    {}, {"append": []}, {"pop": 0}, {"labels": {}}, {"set": {}, "put": {}, "drop": []},
    {"pop": -1}, {"pop": True}, {"pop": "1"}, {"pop": 1.0}, {"truncate": -1}, {"truncate": True}, {"truncate": 1.0},
    {"pop": 1, "truncate": 1}, {"append": X}, {"append": [None]}, {"append": ["text"]}, {"append": iter([X])},
    {"set": ["metadata.x"]}, {"set": {"nothing": 1}}, {"set": {"metadata": {}}}, {"set": {"history": 1}},
    {"set": {"turn/1": X}}, {"set": {"history.turns": []}}, {"set": {"id": "x"}}, {"set": {"version": 2}},
    {"set": {"extra.metadata": 1}}, {"set": {"project_context.name": "x"}}, {"set": {1: 1}}, {"set": {"\udc80": 1}},
    {"set": {"metadata.\udc80": 1}}, {"set": {"metadata.x": object()}}, {"set": {"metadata.x": float("nan")}},
    {"set": {"metadata.x": b"bytes"}}, {"set": {"project_context": {"name": "x"}}}, {"set": {"updated_at_ms": -1}},
    {"set": {"created_at_ms": 2**64}}, {"set": {"updated_at_ms": True}}, {"set": {"skill_configs.x": {"enabled": 1}}},
    {"set": {"metadata.x": 1}, "unset": ["metadata.x"]}, {"unset": ["metadata.x", "metadata.x"]},
    {"unset": "metadata.x"}, {"unset": ["project_context"]}, {"unset": ["turn/1"]}, {"unset": ["metadata"]},
    {"unset": None}, {"unset": [1]},
    {"labels": {"": "x"}}, {"labels": {"x": ""}}, {"labels": {"x": 1}}, {"labels": {1: "x"}}, {"labels": {1: None}},
    {"labels": {"x" * 201: None}}, {"labels": {"x" * 201: "x"}}, {"labels": {"x": "é" * 101}}, {"labels": ["x"]},
    {"labels": {f"{n}": "x" for n in range(9)}}, {"labels": {"\udc80": "x"}}, {"labels": {"x": "\udc80"}},
    {"labels": "x"}, {"labels": {"x": "1"}, "set": {"metadata.labels": {}}},
    {"labels": {"x": None}, "unset": ["metadata.labels"]},
    {"put": {"": b"x"}}, {"put": {"k" * 1025: b"x"}}, {"put": {"é" * 513: b"x"}}, {"put": {"\udc80": b"x"}},
    {"put": {"k*": b"x"}}, {"put": {"*": b"x"}}, {"put": {1: b"x"}}, {"put": {b"k": b"x"}}, {"put": {"k": "text"}},
    {"put": {"k": b""}}, {"put": {"k": None}}, {"put": {"k": 5}}, {"put": ["k"]}, {"put": "k"}, {"put_new": {"": b"x"}},
    {"put_new": {"k": bytearray()}}, {"put_new": ["k"]}, {"put": {"k": b"1"}, "put_new": {"k": b"1"}},
    {"put": {"k": b"1"}, "drop": ["k"]}, {"put_new": {"k": b"1"}, "drop": ["k"]}, {"drop": ["k", "k"]},
    {"drop": ["k*", "k*"]}, {"drop": ["a*b*"]}, {"drop": ["**"]}, {"drop": [""]}, {"drop": ["\udc80*"]},
    {"drop": ["k" * 1025]}, {"drop": ["k" * 1025 + "*"]}, {"drop": "k"}, {"drop": [b"k"]}, {"drop": [None]},
    {"append": [X], "if_revision": -1}, {"append": [X], "if_revision": True}, {"append": [X], "if_revision": "1"},
    {"append": [X], "if_revision": 2**63}, {"append": [X], "if_last": 1}, {"append": [X], "if_last": "\udc80"},
]  # fmt: skip


def bad_calls(store: Any, asset: SessionAsset) -> list[Callable[[], Any]]:
    """Bad input of the faces."""
    unnamed, one, other = turn(), turn(), turn()
    unnamed.id, other.id = "", one.id
    return [
        lambda: store.pop("s", 0), lambda: store.pop("s", -1), lambda: store.pop("s", True),
        lambda: store.pop("s", 1.0), lambda: store.pop("s", None), lambda: store.truncate("s", -1),
        lambda: store.truncate("s", None),
        lambda: store.truncate("s", "1"), lambda: store.truncate("s", False), lambda: store.append("s"),
        lambda: store.append("s", once=True), lambda: store.append("s", unnamed, once=True),
        lambda: store.append("s", one, other, once=True),
        lambda: store.append("s", one, unnamed, once=True, create=True),
        lambda: store.append("s", "text", once=True), lambda: store.append("s", None, create=True),
        lambda: store.append("s", one, if_revision=-1, once=True), lambda: store.replace_turn("s", None),
        lambda: store.replace_turn("s", "text"), lambda: store.replace_turn("s", one, if_revision=-1),
        lambda: store.touch("s", if_revision=-1), lambda: store.fork("s", "s"), lambda: store.fork("s", "a/b"),
        lambda: store.fork("a/b", "t"), lambda: store.fork("s", "t", length=-1),
        lambda: store.fork("s", "t", length=1.0),
        lambda: store.fork("s", "t", length=True), lambda: store.fork("s", "t", if_revision=-1),
        lambda: store.fork("s", None), lambda: store.commit("a/b", put={"k": b"1"}), lambda: store.commit(None, pop=1),
        lambda: store.pop(""), lambda: store.truncate("../s", 1), lambda: store.touch("\0"), lambda: store.delete(5),
        lambda: store.replace_turn(".s", one), lambda: store.delete("s", if_revision=1.0),
    ]  # fmt: skip


@pytest.mark.parametrize("existing", [False, True], ids=["in an absent namespace", "in one that is there"])
async def test_bad_input(place: Place, store: Any, existing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused before anything is sent, and what is quoted of it is short."""
    if existing:
        await store.commit("s", append=numbered(1), put={"k": b"1"}, create=True)
    before, sent = content(place), 0
    begin = Lifecycle.begin

    def counting(*arguments: Any) -> None:
        nonlocal sent
        sent += 1
        begin(*arguments)

    monkeypatch.setattr(Lifecycle, "begin", counting)
    calls = [lambda arguments=arguments: store.commit("s", create=True, **arguments) for arguments in BAD_COMMITS]
    calls += [lambda arguments=arguments: store.commit("s", **arguments) for arguments in BAD_COMMITS]
    for number, call in enumerate([*calls, *bad_calls(store, SessionAsset())]):
        what = (BAD_COMMITS * 2)[number] if number < len(calls) else number - len(calls)
        with pytest.raises((ValueError, TypeError, SerializationError)) as caught:
            print(what, await call())
        assert len(str(caught.value)) < 200, what
        assert sent == 0, what
    assert content(place) == before
    errors = await store.delete_many(["a/b", None])
    assert [type(error) for error in errors] == [InvalidIdError, InvalidIdError]
    assert sent == 0
    await store.exists("s")
    assert sent > 0

"""Forks: a new session with the same parts, within a partition and into another one."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import pytest

from orcs_redis import ConflictError, CorruptSessionError, NotFoundError, ProjectContext, SessionAsset

from .conftest import ROWS, Connect, Place
from .support import turn

few = pytest.mark.parametrize("place", [ROWS[1], ROWS[2], ROWS[5]], ids=str, indirect=True)


@pytest.fixture(params=[1, 16], ids=lambda count: f"{count} partitions")
def partitions(request: pytest.FixtureRequest) -> int:
    count: int = request.param
    return count


@pytest.fixture
async def store(connect: Connect, partitions: int) -> Any:
    return await connect(partitions=partitions)


RECORDS = {"a": b"\0", "b/1": b"1", "é": b"2"}


async def source(store: Any, length: int = 20) -> SessionAsset:
    asset = SessionAsset(id="s", metadata={"labels": {"user": "u1"}, "x": {"y": [1, None]}}, extra={"d.o.t": 1, "z": 2})
    asset.project_context = ProjectContext(name="n", root_path="/p")
    asset.created_at_ms = 1000
    for n in range(length):
        asset.add_turn(turn(str(n)))
    await store.save(asset)
    await store.commit("s", put=RECORDS)
    loaded: SessionAsset = await store.load("s")
    return loaded


def other_ids(number: int = 6) -> list[str]:
    """Ids of which some are of other partitions than that of "s"."""
    return [f"fork {n}" for n in range(number)]


@pytest.mark.parametrize("length", [None, 0, 1, 3, 20, 21, 2**70])
async def test_what_a_fork_has(store: Any, length: int | None) -> None:
    """Parts and labels go along, as many of the first turns as asked for, and where it comes from."""
    original, earliest = await source(store), int(time.time() * 1000) - 60_000
    kept = 20 if length is None else min(length, 20)
    for id in other_ids():
        revision = await store.fork("s", id, length=length)
        forked, found = await store.load_versioned(id)
        assert found == revision
        assert forked.history.turns == original.history.turns[:kept]
        source_revision = (await store.load_versioned("s")).revision
        assert forked.metadata.pop("forked_from") == {"id": "s", "revision": source_revision, "length": kept}
        assert forked.metadata == original.metadata
        assert (forked.extra, forked.project_context) == (original.extra, original.project_context)
        assert forked.created_at_ms >= earliest
        assert forked.updated_at_ms >= earliest
        assert await store.records(id) == []
        assert await store.append(id, turn("more")) > revision
        assert len(await store.turns(id)) == kept + 1
    assert await store.load("s") == original
    assert await store.records("s") == sorted(RECORDS.items())
    metas = {meta.id: meta for meta in await store.list(labels={"user": "u1"}, project_path="/p")}
    assert metas.keys() == {"s", *other_ids()}
    for id in other_ids():
        assert (metas[id].name, metas[id].turn_count, metas[id].labels) == ("n", kept + 1, {"user": "u1"})
        assert metas[id].created_at >= metas["s"].created_at
    await store.delete(other_ids()[0])
    assert await store.count(labels={"user": "u1"}) == len(other_ids())


async def test_with_records(store: Any) -> None:
    """Records go along if that is asked for, and are the fork's own; also without any turn."""
    await source(store)
    for id in other_ids():
        await store.fork("s", id, records=True, length=0)
        assert await store.records(id) == sorted(RECORDS.items())
        await store.commit(id, drop=["*"], put={"own": b"1"})
        assert await store.records(id) == [("own", b"1")]
    assert await store.records("s") == sorted(RECORDS.items())
    await store.commit("s", drop=["*"])
    await store.fork("s", "without", records=True)
    assert await store.records("without") == []
    assert len(await store.turns("without")) == 20


async def test_forks_of_forks(store: Any) -> None:
    """A fork can be forked, changed and saved; `forked_from` is that of the last one."""
    await source(store)
    before = "s"
    for n, id in enumerate(other_ids()):
        await store.fork(before, id, length=19 - n)
        loaded, revision = await store.load_versioned(id)
        assert loaded.metadata["forked_from"]["id"] == before
        loaded.metadata["own"] = n
        loaded.history.turns[0].content = f"edited {n}"
        assert await store.save(loaded) > revision
        await store.commit(id, labels={"user": id})
        before = id
    assert (await store.turns("s"))[0].content == "0"
    assert await store.count(labels={"user": "u1"}) == 1


async def test_errors(store: Any) -> None:
    """No source, an id that is taken, another revision: nothing is written, and the error says whose it is."""
    for id in other_ids():
        for expected in (None, 3):
            with pytest.raises(NotFoundError) as missing:
                await store.fork("s", id, if_revision=expected)
            assert missing.value.id == "s"
    await source(store)
    revision = (await store.load_versioned("s")).revision
    taken = {}
    for id in other_ids():
        taken[id] = await store.append(id, turn("mine"), create=True)
        conditions: dict[str, Any]
        for conditions in ({}, {"if_revision": revision}, {"length": 0}, {"records": True}):
            with pytest.raises(ConflictError) as caught:
                await store.fork("s", id, **conditions)
            assert (caught.value.id, caught.value.expected, caught.value.actual) == (id, 0, taken[id])
        for wrong in (0, revision + 1):
            with pytest.raises(ConflictError) as caught:
                await store.fork("s", f"new {id}", if_revision=wrong)
            assert (caught.value.id, caught.value.expected, caught.value.actual) == ("s", wrong, revision)
        with pytest.raises(NotFoundError) as missing:
            await store.fork("absent", f"new {id}")
        assert missing.value.id == "absent"
        assert (await store.load_versioned(id)).revision == taken[id]
        await store.delete(id)
        assert await store.fork("s", id, if_revision=revision) > taken[id]
    assert {meta.id for meta in await store.list()} == {"s", *other_ids()}


@pytest.mark.parametrize("place", [ROWS[2], ROWS[3], ROWS[4], ROWS[5]], ids=str, indirect=True)
async def test_at_one_moment(store: Any) -> None:
    """Turns, parts and records of a fork are of one revision, whatever is written meanwhile."""
    await store.commit("s", append=[turn("0")], set={"metadata.n": 0}, put={"n": b"0"}, create=True)
    done = asyncio.Event()

    async def write() -> None:
        n = 0
        while not done.is_set():
            n += 1
            await store.commit("s", append=[turn(str(n))], set={"metadata.n": n}, put={"n": b"%d" % n}, truncate=n % 50)

    writing = asyncio.ensure_future(write())
    for n in range(40):
        await store.fork("s", f"fork {n}", records=True)
    done.set()
    await writing
    seen = set()
    for n in range(40):
        forked, records = await store.load(f"fork {n}"), dict(await store.records(f"fork {n}"))
        assert records == {"n": b"%d" % forked.metadata["n"]}
        assert forked.history.turns[-1].content == str(forked.metadata["n"])
        assert forked.metadata["forked_from"]["length"] == len(forked.history.turns)
        seen.add(forked.metadata["n"])
    assert len(seen) > 5


async def test_raced(store: Any) -> None:
    """Of many who fork to one id one does, and the others are told; it is whole."""
    await source(store)
    for id in other_ids(4):
        came = await asyncio.gather(
            *(store.fork("s", id, length=n, records=True) for n in range(8)), return_exceptions=True
        )
        assert sum(isinstance(each, int) for each in came) == 1
        assert sum(isinstance(each, ConflictError) for each in came) == 7
        (length,) = [n for n, each in enumerate(came) if isinstance(each, int)]
        assert [turn.content for turn in await store.turns(id)] == [str(n) for n in range(length)]
        assert await store.records(id) == sorted(RECORDS.items())


@few
async def test_what_is_no_session(place: Place, store: Any, partitions: int) -> None:
    """A source of which something is gone or foreign is refused, by its id, and nothing is made of it."""
    for part, spoil in (
        ("history.turns", lambda key: place.raw.delete(key("turns:s"))),
        ("history.turns", lambda key: place.raw.lpop(key("turns:s"))),
        ("history.turns", lambda key: place.raw.set(key("turns:s"), "x")),
        ("records", lambda key: place.raw.set(key("records:s"), "x")),
        ("session", lambda key: place.raw.set(key("session:s"), "x")),
        (".revision", lambda key: place.raw.hdel(key("session:s"), ".revision")),
    ):
        await source(store)
        (number,) = [n for n in range(partitions) if place.raw.exists(place.key("session:s", n))]
        spoil(lambda rest, number=number: place.key(rest, number))
        for id in other_ids(4):
            with pytest.raises((CorruptSessionError, NotFoundError)) as caught:
                await store.fork("s", id, records=True)
            error: Any = caught.value
            assert error.id == "s"
            assert not isinstance(error, CorruptSessionError) or error.field == part
            assert not await store.exists(id)
        for key in (f"{what}:s" for what in ("session", "turns", "records", "names")):
            place.raw.delete(place.key(key, number))
        with contextlib.suppress(NotFoundError):
            await store.delete("s")

"""Lists, pages and counts: order, filters, cursors, labels."""

from __future__ import annotations

import asyncio
import itertools
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orcs_redis import ConversationTurn, LayoutError, LocalFileStore, SessionAsset, SessionMeta, open_store, sync
from orcs_redis.model.labels import labels_of, valid_labels

from .conftest import Connect, Place, Threaded

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def at(ms: int) -> datetime:
    return EPOCH + timedelta(milliseconds=ms)


def session(
    id: str, updated_at_ms: int, project: str | None = None, labels: dict[str, str] | None = None
) -> SessionAsset:
    asset = SessionAsset(id=id, created_at_ms=1, updated_at_ms=updated_at_ms)
    asset.project_context.root_path = project
    if labels is not None:
        asset.metadata["labels"] = labels
    return asset


async def pages(store: Any, limit: int, **filters: Any) -> list[SessionMeta]:
    found: list[SessionMeta] = []
    cursor = None
    while True:
        page = await store.page(limit, cursor, **filters)
        found += page.items
        cursor = page.cursor
        if cursor is None:
            assert len(page.items) <= limit
            return found
        assert len(page.items) == limit


async def test_order(store: Any) -> None:
    """The newest comes first; equal times are ordered by id, descending in UTF-8."""
    times = {"b": 5, "a": 5, "ä": 5, "\U0001f600": 5, "\uffff": 5, "old": 1, "new": 9, "B": 5}
    await store.save_many([session(id, ms) for id, ms in times.items()])
    expected = sorted(times, key=lambda name: (times[name], name.encode()), reverse=True)
    assert [meta.id for meta in await store.list()] == expected
    assert [meta.id for meta in await store.list(limit=100)] == expected
    assert [meta.id for meta in await pages(store, 2)] == expected


async def test_limits(store: Any) -> None:
    """A limit of none or more is kept to, others are refused."""
    await store.save_many([session(str(n), n) for n in range(5)])
    assert [meta.id for meta in await store.list(limit=2)] == ["4", "3"]
    assert await store.list(limit=0) == []
    for bad in (-1, 1.5, "2"):
        with pytest.raises(ValueError, match="limit"):
            await store.list(limit=bad)
    for bad in (0, -1):
        with pytest.raises(ValueError, match="limit"):
            await store.page(bad)


async def test_filters(store: Any) -> None:
    """Bounds of time include the first and exclude the last; a project is matched exactly."""
    await store.save_many([session(f"s{n}", n * 10, "/p" if n % 2 else "/p2") for n in range(10)])

    async def ids(**filters: Any) -> list[str]:
        found = [meta.id for meta in await store.list(**filters)]
        assert found == [meta.id for meta in await pages(store, 3, **filters)]
        assert found[:2] == [meta.id for meta in await store.list(limit=2, **filters)]
        return found

    assert await ids(updated_after=at(70)) == ["s9", "s8", "s7"]
    assert await ids(updated_before=at(30)) == ["s2", "s1", "s0"]
    assert await ids(updated_after=at(30), updated_before=at(50)) == ["s4", "s3"]
    assert await ids(updated_after=at(30) + timedelta(microseconds=1), updated_before=at(50)) == ["s4"]
    assert await ids(updated_after=at(50), updated_before=at(30)) == []
    assert await ids(project_path="/p") == ["s9", "s7", "s5", "s3", "s1"]
    assert await ids(project_path="/p", updated_after=at(40)) == ["s9", "s7", "s5"]
    assert await ids(project_path="/") == []


async def test_naive_datetimes_are_refused(store: Any) -> None:
    """A time without a zone could mean anything."""
    naive = datetime(2026, 1, 1)  # what is tested
    with pytest.raises(ValueError, match="time zone"):
        await store.list(updated_after=naive)
    with pytest.raises(ValueError, match="time zone"):
        await store.page(1, updated_before=naive)


async def test_bad_cursors_are_refused(store: Any) -> None:
    """A string that is no cursor is an error, not the first page."""
    for bad in ("", "x", "AAAA", "\udc80", "ä"):
        with pytest.raises(ValueError, match="cursor"):
            await store.page(1, bad)


async def test_pages_under_writes(store: Any) -> None:
    """Whatever is updated, deleted or added meanwhile, what stays unchanged comes exactly once."""
    await store.save_many([session(f"s{n:03}", n // 10) for n in range(100)])
    seen: list[str] = []
    cursor = None
    touched = set()
    for n in range(1000):
        page = await store.page(7, cursor)
        seen += [meta.id for meta in page.items]
        cursor = page.cursor
        if cursor is None:
            break
        last, updated, deleted = page.items[-1].id, f"s{n:03}", f"s{99 - n * 7 - 3:03}"
        for id in {last, updated}:
            await store.append(id, ConversationTurn.user("x")) if await store.exists(id) else None
        if await store.exists(deleted):
            await store.delete(deleted)
        await store.save(session(f"added{n}", n))
        touched |= {last, updated, deleted}
    unchanged = [f"s{n:03}" for n in range(100) if f"s{n:03}" not in touched]
    assert len(unchanged) > 40
    for id in unchanged:
        assert seen.count(id) == 1, id


async def test_a_broken_entry_hides_no_other(place: Place, store: Any) -> None:
    """Where one session's metadata is garbage or gone, the others are listed and paged as ever."""
    await store.save_many([session(f"s{n}", n) for n in range(6)])
    place.raw.hset(place.key("meta"), "s5", b"\xc1garbage")
    place.raw.hset(place.key("meta"), "s2", b"")
    place.raw.hdel(place.key("meta"), "s0")
    assert [meta.id for meta in await store.list()] == ["s4", "s3", "s1"]
    assert [meta.id for meta in await store.list(limit=9)] == ["s4", "s3", "s1"]
    cursor, seen = None, []
    while True:
        page = await store.page(1, cursor)
        seen += [meta.id for meta in page.items]
        cursor = page.cursor
        if cursor is None:
            break
    assert seen == ["s4", "s3", "s1"]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    times=st.dictionaries(st.text("aB:{}*é😀 '", min_size=1, max_size=4), st.integers(0, 5), max_size=12),
    limit=st.integers(1, 5),
    after=st.none() | st.integers(0, 5),
    before=st.none() | st.integers(0, 5),
    partitions=st.sampled_from([1, 3]),
)
@pytest.mark.parametrize("server", ["memory"])
def test_pages_are_the_list_in_parts(
    server: str, times: dict[str, int], limit: int, after: int | None, before: int | None, partitions: int
) -> None:
    """For any sessions, ties, bounds and page size, the pages together are the sorted list."""

    async def run() -> None:
        async with open_store(f"{server}://", partitions=partitions) as store:
            await store.save_many([session(id, ms) for id, ms in times.items()])
            filters: dict[str, Any] = {
                "updated_after": None if after is None else at(after),
                "updated_before": None if before is None else at(before),
            }
            expected = sorted(
                (id for id, ms in times.items() if ms >= (after or 0) and (before is None or ms < before)),
                key=lambda name: (times[name], name.encode()),
                reverse=True,
            )
            assert [meta.id for meta in await store.list(**filters)] == expected
            assert [meta.id for meta in await pages(store, limit, **filters)] == expected

    asyncio.run(run())


async def test_concurrent_lists(connect: Connect) -> None:
    """Lists while others write show each session once."""
    store = await connect()
    await store.save_many([session(f"s{n}", n) for n in range(50)])

    async def write() -> None:
        for n in range(50):
            await store.append(f"s{n}", ConversationTurn.user("x"))

    async def read() -> None:
        for _ in range(10):
            ids = [meta.id for meta in await store.list()]
            assert len(ids) == len(set(ids)) == 50

    await asyncio.gather(write(), read())


@pytest.mark.parametrize("count", [64, 1024])
async def test_partitions_are_asked_at_the_same_time(place: Place, connect: Connect, count: int) -> None:
    """The newest, all, a page, leases, a cursor and changes are as in one partition, in a few round trips."""
    if place.row.server == "memory":
        count = 16  # fakeredis takes its time
    store = await connect(partitions=count)
    times = {f"s{n:03}": n % 150 for n in range(200)}
    await store.save_many([session(id, ms, "/p" if ms % 2 else None) for id, ms in times.items()])
    order = sorted(times, key=lambda name: (times[name], name), reverse=True)
    odd = [id for id in order if times[id] % 2]
    calls = 0
    link = (store if place.row.form == "async" else store._store)._driver.link
    call = link.call

    def counting(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return call(*arguments)

    link.call = counting
    assert [meta.id for meta in await store.list()] == order
    assert [meta.id for meta in await store.list(limit=50)] == order[:50]
    assert [meta.id for meta in await store.list(limit=50, project_path="/p")] == odd[:50]
    assert [meta.id for meta in await store.list(updated_before=at(150))] == order
    assert [meta.id for meta in (await store.page(20)).items] == order[:20]
    assert await store.leases() == []
    changes = await store.changes(limit=10_000)
    assert sorted(change.id for change in changes) == sorted(times)
    some = await store.changes(limit=30)
    rest = await store.changes(some[-1].cursor, limit=10_000)
    assert len(some) == 30
    assert sorted(change.id for change in some + rest) == sorted(times)
    assert await store.changes(await store.cursor()) == []
    if place.row.server != "memory":
        place.raw.script_flush()  # all are told that the script is unknown, and sent it, together
    assert [meta.id for meta in await store.list(limit=50)] == order[:50]
    assert calls <= 26


async def test_clocks(store: Any) -> None:
    """A session is never listed later than the server's now, nor does a save of a loaded one bring it further back."""
    ahead = SessionAsset(id="ahead", updated_at_ms=4_000_000_000_000)
    await store.save(ahead)
    await store.save(SessionAsset(id="now"))
    metas = await store.list(limit=2)
    assert [meta.id for meta in metas] == ["now", "ahead"]
    assert all(meta.updated_at <= datetime.now(UTC) + timedelta(seconds=5) for meta in metas)
    loaded = await store.load("ahead")
    assert loaded.updated_at_ms == 4_000_000_000_000
    listed = metas[1].updated_at
    for loaded.updated_at_ms in (1000, 2000):  # by a clock that is behind
        loaded.metadata["n"] = loaded.updated_at_ms
        await store.save(loaded)
        assert (await store.load("ahead")).updated_at_ms == loaded.updated_at_ms
        assert {meta.id: meta.updated_at for meta in await store.list()}["ahead"] == listed
    await store.save(SessionAsset(id="ahead", updated_at_ms=5000))  # a new one brings its own time
    assert {meta.id: meta.updated_at for meta in await store.list()}["ahead"] == datetime.fromtimestamp(5, UTC)


async def test_labels(store: Any) -> None:
    """Those that have all of the labels, whatever others have; names and values are matched exactly."""
    await store.save_many(
        session(f"s{n:02}", n // 2, "/p" if n % 3 else None, {"user": f"u{n % 2}", "kind": "k" * (n % 4 + 1)})
        for n in range(12)
    )
    await store.save(session("other", 3, "", {"use": "ru0", "userk": "u0", "r": "user"}))
    await store.save(session("root", 4, "/"))

    async def ids(**filters: Any) -> list[str]:
        found = [meta.id for meta in await store.list(**filters)]
        assert found == [meta.id for meta in await pages(store, 3, **filters)]
        assert found[:2] == [meta.id for meta in await store.list(limit=2, **filters)]
        assert len(found) == await store.count(**filters)
        return found

    assert await ids(labels={"user": "u0"}) == ["s10", "s08", "s06", "s04", "s02", "s00"]
    assert await ids(labels={"kind": "kk"}) == ["s09", "s05", "s01"]
    assert await ids(labels={"user": "u1", "kind": "kk"}) == ["s09", "s05", "s01"]
    assert await ids(labels={"user": "u0", "kind": "kk"}) == []
    assert await ids(labels={"user": "u1"}, project_path="/p") == ["s11", "s07", "s05", "s01"]
    assert await ids(labels={"user": "u1"}, updated_after=at(1), updated_before=at(5)) == ["s09", "s07", "s05", "s03"]
    assert await ids(project_path="/p", updated_before=at(1)) == ["s01"]
    assert await ids(project_path="") == ["other"]
    assert await ids(project_path="/") == ["root"]
    assert await ids(labels={"r": "user"}) == ["other"]
    assert await ids(labels={"user": "u"}) == await ids(labels={"nobody": "u0"}) == await ids(project_path="/p/") == []
    assert len(await ids(labels={})) == len(await ids()) == 14
    assert len(await ids(updated_after=at(4))) == 5
    assert (await store.list(labels={"r": "user"}))[0].labels == {"use": "ru0", "userk": "u0", "r": "user"}
    assert len(set(await store.list())) == 14  # they can be in a set


async def test_labels_that_change(store: Any) -> None:
    """A session is found by the labels and the project that it has now, and says when it was written."""
    asset = session("s", 5, "/p", {"a": "1", "b": "1"})
    await store.save(asset)
    (before,) = await store.list(labels={"a": "1"}, project_path="/p")
    assert abs(before.written_at - datetime.now(UTC)) < timedelta(seconds=20)
    asset.metadata["labels"] = {"a": "2", "c": "1"}
    asset.project_context.root_path = None
    await store.save(asset)
    for gone in ({"labels": {"a": "1"}}, {"labels": {"b": "1"}}, {"project_path": "/p"}):
        assert await store.count(**gone) == 0
    (after,) = await store.list(labels={"a": "2", "c": "1"})
    assert (after.labels, after.project_path) == ({"a": "2", "c": "1"}, None)
    assert (after.updated_at, after.written_at >= before.written_at) == (before.updated_at, True)
    asset.metadata["labels"] = ["no", "labels"]
    await store.save(asset)
    assert [meta.labels for meta in await store.list()] == [{}]
    assert await store.count(labels={"c": "1"}) == 0
    await store.delete("s")
    assert await store.count() == 0


async def test_bad_filters(store: Any) -> None:
    """Labels that can't be are refused, and so is what is no filter."""
    good = {f"n{n}": "v" * 200 for n in range(8)}
    assert await store.list(labels=good) == []
    bad: list[Any] = [
        good | {"n8": "v"}, {"": "v"}, {"n": ""}, {"n" * 201: "v"}, {"n": "é" * 101}, {"n": 1}, {1: "v"}, {"n": None},
        {"n": "\udc80"}, "text", ["n"], 1,
    ]  # fmt: skip
    for labels in bad:
        for call in (store.list, store.count, lambda **filters: store.page(5, **filters)):
            with pytest.raises(ValueError, match="labels are"):
                await call(labels=labels)
    for path in ("\udc80", 1, Path("/p")):
        with pytest.raises(ValueError, match="path"):
            await store.count(project_path=path)
    with pytest.raises(TypeError):
        await store.list(project="/p")


async def test_a_broken_entry_among_labelled_ones(place: Place, store: Any) -> None:
    """Where the metadata of a session is garbage or gone, the others with its label are listed and paged as ever."""
    await store.save_many(session(f"s{n}", n, labels={"a": "b"}) for n in range(6))
    place.raw.hset(place.key("meta"), "s5", b"\xc1garbage")
    place.raw.hset(place.key("meta"), "s2", b"\x99" + bytes(9) + b"\xcf" + bytes(20))
    place.raw.hdel(place.key("meta"), "s4")
    for filters in ({}, {"labels": {"a": "b"}}):
        assert [meta.id for meta in await store.list(**filters)] == ["s3", "s1", "s0"]
        assert [meta.id for meta in await store.list(limit=2, **filters)] == ["s3", "s1"]
        assert [meta.id for meta in await pages(store, 1, **filters)] == ["s3", "s1", "s0"]


async def test_an_index_of_another_type(place: Place, store: Any) -> None:
    """It is no index of this layout."""
    place.raw.set(place.key("labels"), "x")
    for call in (store.list, store.count):
        with pytest.raises(LayoutError, match="index"):
            await call(labels={"a": "b"})
        place.raw.set(place.key("labels"), "x")


@pytest.mark.parametrize("chunk", [1000, 7, 1])
async def test_labels_and_equal_times(store: Any, chunk: int) -> None:
    """Where many were updated at the same time, the first by id, descending, come first, however they are read."""
    ids = [f"{n * 7 % 30:02}" for n in range(30)]
    await store.save_many(session(id, 5, labels={"user": "me", "even": str(int(id) % 2)}) for id in ids)
    with mock.patch("orcs_redis.protocol.lists._LEAST", 1), mock.patch("orcs_redis.protocol.lists._CHUNK", chunk):
        for labels, order in (({"user": "me"}, sorted(ids)[::-1]), ({"user": "me", "even": "1"}, sorted(ids)[::-2])):
            for filters in ({"labels": labels}, {"labels": labels, "updated_after": at(5), "updated_before": at(6)}):
                for limit in (1, 4, 11):
                    assert [meta.id for meta in await store.list(limit=limit, **filters)] == order[:limit]
                    assert [meta.id for meta in await pages(store, limit, **filters)] == order
                assert await store.count(**filters) == len(order)


async def test_frequent_labels(store: Any) -> None:
    """Those with a frequent label are found among the newest, and by the label if these turn out not to have it."""
    await store.save_many(session(f"s{n:03}", n, labels={"place": "everywhere"} if n % 10 else {}) for n in range(100))
    await store.save_many(
        session(f"t{n:03}", n, labels={"time": "old"} if n < 60 or n == 97 else {}) for n in range(100)
    )
    with mock.patch("orcs_redis.protocol.lists._LEAST", 1), mock.patch("orcs_redis.protocol.lists._CHUNK", 5):
        for name, value, order in (
            ("place", "everywhere", [f"s{n:03}" for n in range(99, 0, -1) if n % 10]),
            ("time", "old", ["t097", *[f"t{n:03}" for n in range(59, -1, -1)]]),
        ):
            for limit in (1, 2, 7, 1000):
                found = await store.list(limit=limit, labels={name: value})
                assert [meta.id for meta in found] == order[:limit]
            assert [meta.id for meta in await pages(store, 3, labels={name: value})] == order
            assert await store.count(labels={name: value}, updated_after=at(20)) == len(
                [id for id in order if int(id[1:]) >= 20]
            )


async def test_what_others_have_costs_nothing(place: Place, connect: Connect) -> None:
    """A list, page or count by label takes the same commands however many other sessions there are."""
    store = await connect()
    await store.save_many(session(f"s{n:02}", n, "/p", {"user": "me"}) for n in range(40))
    assert len(await store.list(project_path="/p")) == 40  # the server knows the script from here on
    link = (store if place.row.form == "async" else store._store)._driver.link
    call = link.call
    asked: list[list[int]] = []

    def counting(commands: Any, expires: float) -> Any:
        asked[-1].append(len(commands))
        return call(commands, expires)

    for _ in range(2):
        asked.append([])
        link.call = counting
        for filters in ({"labels": {"user": "me"}}, {"project_path": "/p", "updated_after": at(7)}):
            await store.list(limit=5, **filters)
            await store.list(**filters)
            await store.page(5, **filters)
            await store.count(**filters)
        link.call = call
        await store.save_many(session(f"other{n}", n % 50, labels={"user": "you"}) for n in range(300))
    assert asked[0] == asked[1]


async def test_labelled_pages_under_writes(store: Any) -> None:
    """Whatever comes and goes meanwhile, what stays unchanged comes exactly once."""
    mine = {"user": "me"}
    await store.save_many(session(f"s{n:02}", n // 4, labels=mine if n % 3 else {"user": "you"}) for n in range(60))
    seen: list[str] = []
    cursor, gone = None, set()
    with mock.patch("orcs_redis.protocol.lists._LEAST", 1), mock.patch("orcs_redis.protocol.lists._CHUNK", 5):
        for n in itertools.count():
            page = await store.page(7, cursor, labels=mine)
            seen += [meta.id for meta in page.items]
            cursor = page.cursor
            if cursor is None:
                break
            for id in (page.items[-1].id, f"s{n * 5:02}"):
                if await store.exists(id):
                    await store.delete(id)
                gone.add(id)
            await store.save(session(f"new{n}", n, labels=mine))
    unchanged = [f"s{n:02}" for n in range(60) if n % 3 and f"s{n:02}" not in gone]
    assert len(unchanged) > 20
    assert [id for id in seen if id in unchanged] == sorted(unchanged, reverse=True)


SESSIONS = st.dictionaries(
    st.text("aB:\xff*é😀", min_size=1, max_size=3),
    st.tuples(
        st.integers(0, 3),
        st.sampled_from([None, "", "/", "/p"]),
        st.dictionaries(st.sampled_from(["a", "ab"]), st.sampled_from(["x", "bx", "é"])),
    ),
    max_size=24,
)


@settings(max_examples=100)
@given(
    sessions=SESSIONS,
    project=st.sampled_from([None, None, "", "/", "/p"]),
    labels=st.dictionaries(st.sampled_from(["a", "ab", "b"]), st.sampled_from(["x", "bx", "é"]), max_size=2),
    after=st.none() | st.integers(0, 4),
    before=st.none() | st.integers(0, 4),
    limit=st.integers(1, 4),
    partitions=st.sampled_from([1, 3]),
    chunk=st.integers(1, 4),
)
def test_filters_against_a_model(
    sessions: dict[str, tuple[int, str | None, dict[str, str]]],
    project: str | None,
    labels: dict[str, str],
    after: int | None,
    before: int | None,
    limit: int,
    partitions: int,
    chunk: int,
) -> None:
    """For any sessions, filters and page size, however few are looked at at once: lists, pages and counts agree."""

    def wanted(id: str) -> bool:
        ms, path, own = sessions[id]
        return (
            project in (None, path)
            and labels.items() <= own.items()
            and (after is None or ms >= after)
            and (before is None or ms < before)
        )

    filters: dict[str, Any] = {"project_path": project, "labels": labels}
    filters["updated_after"] = None if after is None else at(after)
    filters["updated_before"] = None if before is None else at(before)
    order = sorted(filter(wanted, sessions), key=lambda name: (sessions[name][0], name.encode()), reverse=True)

    async def run() -> None:
        async with open_store("memory://", partitions=partitions) as store:
            await store.save_many([session(id, *about) for id, about in sessions.items()])
            assert [meta.id for meta in await store.list(**filters)] == order
            assert [meta.id for meta in await store.list(limit=limit, **filters)] == order[:limit]
            assert [meta.id for meta in await pages(store, limit, **filters)] == order
            assert await store.count(**filters) == len(order)

    with mock.patch("orcs_redis.protocol.lists._LEAST", chunk), mock.patch("orcs_redis.protocol.lists._CHUNK", 1):
        asyncio.run(run())


def test_which_maps_are_labels() -> None:
    """At most 8 names to strings of 1 to 200 bytes; anything else in their place is ordinary metadata."""
    asset = SessionAsset()
    assert labels_of(asset) == {}
    most = {"é" * 100: "v" * 200} | {f"n{n}": "v" for n in range(7)}
    for labels in ({}, {"b": "2", "a": "1", "é": "3"}, most):
        asset.metadata["labels"] = labels
        assert labels_of(asset) == labels
        assert list(labels_of(asset)) == sorted(labels, key=str.encode)
        assert SessionMeta.from_asset(asset).labels == labels
    others: list[Any] = [
        None,
        [],
        "x",
        most | {"z": "v"},
        {"": "v"},
        {"n": ""},
        {"n": "v" * 201},
        {"n": ["v"]},
        {"n": 1},
    ]
    for other in others:
        asset.metadata["labels"] = other
        assert not valid_labels(other)
        assert labels_of(asset) == {}


@pytest.mark.parametrize("form", ["async", "sync"])
async def test_files_are_filtered_alike(tmp_path: Path, form: str) -> None:
    """A file's labels are its metadata's, and it was written when it was modified."""
    files: Any = LocalFileStore(tmp_path) if form == "async" else Threaded(sync.LocalFileStore(tmp_path))
    for n in range(6):
        asset = session(f"s{n}", n, "/p" if n % 2 else None)
        asset.metadata["labels"] = {"user": f"u{n % 3}"} if n else {"user": 1}
        await files.save(asset)
    os.utime(tmp_path / "s4.json", ns=(0, 5_000_000_000))

    async def ids(**filters: Any) -> list[str]:
        found = [meta.id for meta in await files.list(**filters)]
        assert found[:1] == [meta.id for meta in await files.list(limit=1, **filters)]
        assert len(found) == await files.count(**filters)
        return found

    assert await ids() == ["s5", "s4", "s3", "s2", "s1", "s0"]
    assert await ids(labels={"user": "u1"}) == ["s4", "s1"]
    assert await ids(labels={"user": "u0"}, project_path="/p") == ["s3"]
    assert await ids(updated_after=at(2), updated_before=at(4)) == ["s3", "s2"]
    (meta,) = await files.list(labels={"user": "u1"}, updated_after=at(4))
    assert (meta.labels, meta.written_at) == ({"user": "u1"}, at(5000))
    for bad in ({"limit": -1}, {"labels": {"": ""}}, {"updated_after": datetime(2026, 1, 1)}):
        with pytest.raises(ValueError, match=r"limit|labels|time zone"):
            await files.list(**bad)
    with pytest.raises(TypeError):
        await files.count(user="u1")

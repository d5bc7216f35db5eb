"""Opening creates nothing: a namespace is made by its first write, and taken as it is by `reopen`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from typing import Any

import pytest

from orcs_redis import (
    Change,
    ConflictError,
    LayoutError,
    NotFoundError,
    PermissionDeniedError,
    SessionAsset,
    StorageError,
    StoreResetError,
    UnavailableError,
)
from orcs_redis.model.filters import Filters
from orcs_redis.protocol.lists import Lists
from orcs_redis.protocol.namespace import Create, ReadLayout, on_namespace
from orcs_redis.protocol.request import Together
from orcs_redis.protocol.writer import Namespace

from .conftest import Connect, Place, Server, every_server
from .faults.proxy import SWALLOW, Proxy
from .support import turn, until
from .test_lease import leased
from .test_watch import take, watched

OpenIn = Callable[..., Awaitable[Any]]
forms = pytest.mark.parametrize("form", ["async", "sync"])


def keys(place: Place) -> list[bytes]:
    raw: Any = place.raw
    return sorted(raw.scan_iter(match=f"*{place.namespace}*", count=10_000))


def partitions(place: Place) -> bytes:
    raw: Any = place.raw
    found: bytes = raw.hget(f"{place.namespace}:layout", "partitions")
    return found


def wipe(place: Place) -> None:
    place.raw.delete(*keys(place))


async def next_of(changes: AsyncGenerator[Change, None]) -> Change:
    async with asyncio.timeout(20):
        return await anext(changes)


@pytest.mark.parametrize("options", [{}, {"partitions": 4}], ids=str)
async def test_reading_creates_nothing(place: Place, connect: Connect, options: Any) -> None:
    """A namespace that is not there is empty, to every read; nor do writes create it that need a session."""
    store = await connect(**options)
    assert await store.list() == []
    assert await store.list(limit=5, project_path="/p") == []
    assert (await store.page(5)).items == []
    assert not await store.exists("s")
    assert await store.leases() == []
    assert await store.changes() == []
    assert await store.changes(await store.cursor()) == []
    for reading in (
        store.load("s"),
        store.turns("s"),
        store.append("s", turn()),
        store.delete("s"),
        store.update("s", lambda asset: asset.touch()),
    ):
        with pytest.raises(NotFoundError):
            await reading
    with pytest.raises(ConflictError) as caught:
        await store.save(SessionAsset(id="s"), if_revision=3)
    assert (caught.value.expected, caught.value.actual) == (3, 0)
    assert [type(each) for each in await store.load_many(["s", ""])] != []
    assert [type(each) for each in await store.delete_many(["s"])] == [NotFoundError]
    with pytest.raises(TimeoutError):
        await store.wait_for("s", revision=1, timeout=0.05)
    with pytest.raises(ValueError, match="cursor"):
        await store.changes("x")
    assert await store.ping() > 0
    assert keys(place) == []


@every_server
@forms
async def test_an_empty_database_stays_empty(start_server: Callable[..., Server], open_in: OpenIn, form: str) -> None:
    """Opening and reading leave DBSIZE 0."""
    server = start_server()
    store = await open_in(form, server.url)
    assert await store.list() == []
    assert server.raw().dbsize() == 0


async def all_of(calls: Iterable[Any]) -> list[Any]:
    return [*await asyncio.gather(*calls)]


WRITES: dict[str, Callable[[Any], Any]] = {
    "save": lambda store: store.save(SessionAsset(id="s")),
    "save_many": lambda store: store.save_many([SessionAsset(id=f"s{n}") for n in range(300)]),
    "at once": lambda store: all_of(store.save(SessionAsset(id=f"s{n}")) for n in range(50)),
    "if absent": lambda store: store.save(SessionAsset(id="s"), if_revision=0),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
async def test_the_first_write_creates(place: Place, connect: Connect, write: Any) -> None:
    """It is done, once, and its origin is the store's as it was before."""
    store = await connect(partitions=3)
    origin = store.origin
    start = await store.cursor()
    result = await write(store)
    assert not [each for each in (result if isinstance(result, list) else [result]) if isinstance(each, StorageError)]
    assert partitions(place) == b"3"
    found = await store.changes(start)
    assert len(found) == len(await store.list())
    assert {change.origin for change in found} == {origin}


async def test_a_lease_creates(place: Place, connect: Connect) -> None:
    """The taking of a lease is a write; its end is none."""
    store, other = await connect(), await connect()
    async with leased(store, "s") as lease:
        assert [held.id for held in await other.leases()] == ["s"]
        assert await store.save(SessionAsset(id="s"), lease=lease) == 1
        wipe(place)
        await store.reopen()
    assert keys(place) == []


@pytest.mark.parametrize("since", ["now", "cursor", "nothing"])
async def test_a_watch_sees_the_first_write(connect: Connect, since: str) -> None:
    """A watch of a namespace that is not there begins with the first write of whoever makes it."""
    store = await connect(heartbeat=600.0)
    start = None if since == "now" else await store.cursor()
    async with contextlib.aclosing(watched(store, since=start)) as changes:
        first = asyncio.ensure_future(next_of(changes))
        if since != "nothing":
            await asyncio.sleep(0.3)
        other = await connect(partitions=5)
        await other.save(SessionAsset(id="s"))
        assert (await first).id == "s"
        await other.append("s", turn())
        change = await next_of(changes)
        assert (change.id, change.revision, change.origin) == ("s", 2, other.origin)
    assert [each.revision for each in await store.changes(start)] == [2]
    assert await store.changes(change.cursor) == []
    assert await store.wait_for("s", revision=2, timeout=5) == 2


async def test_waiting_for_the_first_write(connect: Connect) -> None:
    """`wait_for` waits for the namespace, too."""
    store, other = await connect(heartbeat=600.0), await connect(partitions=5)
    waiting = asyncio.ensure_future(store.wait_for("s", revision=1, timeout=20))
    await asyncio.sleep(0.2)
    assert await other.save(SessionAsset(id="s")) == 1
    assert await waiting == 1


async def test_closing_ends_a_watch_of_nothing(place: Place, connect: Connect) -> None:
    """A watch that waits for its namespace ends with the store."""
    store = await place.connect(heartbeat=600.0)
    watching = asyncio.ensure_future(take(store, 1))
    await asyncio.sleep(0.2)
    await place.close(store)
    assert await watching == []


@pytest.mark.parametrize("given", [None, 16])
async def test_what_another_has_made_is_adopted(place: Place, connect: Connect, given: int | None) -> None:
    """A store takes the partitions that it finds, in its reads and in its writes."""
    reader, writer, asker = await connect(), await connect(partitions=given), await connect()
    assert await reader.list() == []
    maker = await connect(partitions=16)
    await maker.save_many([SessionAsset(id=f"s{n}") for n in range(40)])
    assert len(await reader.list()) == 40
    assert await asker.append("s1", turn()) > 1
    assert await writer.save(SessionAsset(id="s41")) > 0
    assert len(await maker.list()) == 41
    assert len((await asker.load("s1")).history) == 1
    assert partitions(place) == b"16"


async def test_another_number_was_first(place: Place, connect: Connect) -> None:
    """Who asked for another number of partitions than there are is told, at each read and write, and writes nothing."""
    store, maker = await connect(partitions=4), await connect(partitions=16)
    await maker.save(SessionAsset(id="s"))
    before = keys(place)
    for call in (store.save(SessionAsset(id="t")), store.list(), store.append("s", turn()), store.cursor()):
        with pytest.raises(LayoutError, match="16 partitions, not 4"):
            await call
    assert keys(place) == before


@pytest.mark.parametrize("given", [None, 7])
async def test_a_race_of_equals(place: Place, connect: Connect, given: int | None) -> None:
    """Stores that make a namespace at once make one, and all their writes are in it."""
    stores = [await connect(partitions=given) for _ in range(6)]
    revisions = await asyncio.gather(*(store.save(SessionAsset(id=f"s{n}")) for n, store in enumerate(stores)))
    assert all(revisions)
    assert int(partitions(place)) == (given or 1)
    for store in stores:
        assert {meta.id for meta in await store.list()} == {f"s{n}" for n in range(6)}


async def test_a_race_of_unequals(place: Place, connect: Connect) -> None:
    """One number of partitions wins; the stores that asked for another get an error and write nothing."""
    stores = [await connect(partitions=2 + n % 2) for n in range(6)]
    outcomes = await asyncio.gather(
        *(store.save(SessionAsset(id=f"s{n}")) for n, store in enumerate(stores)), return_exceptions=True
    )
    won = int(partitions(place))
    assert [isinstance(outcome, LayoutError) for outcome in outcomes] == [2 + n % 2 != won for n in range(6)]
    assert {meta.id for meta in await stores[won].list()} == {f"s{n}" for n in range(6) if 2 + n % 2 == won}


@forms
@pytest.mark.parametrize("strikes", [1, 2])
async def test_lost_replies(start_server: Callable[..., Server], open_in: OpenIn, form: str, strikes: int) -> None:
    """If replies to the first write are lost, that of the creation among them, it is done once."""
    server = start_server()
    raw: Any = server.raw()
    with Proxy(server.port) as proxy:
        store = await open_in(form, f"redis://127.0.0.1:{proxy.port}", partitions=2)
        proxy.strike(SWALLOW)
        writing = asyncio.ensure_future(store.save(SessionAsset(id="s")))
        await until(lambda: raw.exists("orcs:layout"))
        incarnation = raw.hget("orcs:layout", "incarnation")
        if strikes == 2:
            proxy.strike(SWALLOW, existing=0, new=True)
            proxy.cut()
            await asyncio.sleep(0.1)
            proxy.heal()
        proxy.cut()
        assert await writing == 1
        assert raw.hget("orcs:layout", "incarnation") == incarnation
        assert len(await store.list()) == 1


@forms
async def test_no_reply_in_time(start_server: Callable[..., Server], open_in: OpenIn, form: str) -> None:
    """A creation without an answer is no write of the session: that was certainly not applied."""
    server = start_server()
    with Proxy(server.port) as proxy:
        store = await open_in(form, f"redis://127.0.0.1:{proxy.port}", deadline=0.5)
        proxy.strike(SWALLOW, new=True)
        with pytest.raises(UnavailableError, match="nothing was written"):
            await store.save(SessionAsset(id="s"))
        proxy.heal()
        proxy.cut()
        assert await store.list() == []
        assert await store.save(SessionAsset(id="s")) == 1


async def test_a_wiped_namespace_is_reopened(place: Place, connect: Connect) -> None:
    """After a wipe writes are refused until the store is opened anew; then it goes on with what there is."""
    store = await connect(heartbeat=0.3)
    await store.save(SessionAsset(id="s"))
    origin, start = store.origin, await store.cursor()
    watching = asyncio.ensure_future(take(store, 2))
    await asyncio.sleep(0.2)
    wipe(place)
    for call in (
        store.save(SessionAsset(id="t")),
        store.append("s", turn()),
        store.delete("s"),
    ):
        with pytest.raises(StoreResetError):
            await call
    with pytest.raises(StoreResetError):
        async with leased(store, "s"):
            pass
    assert keys(place) == []
    await store.reopen()
    assert keys(place) == []
    assert store.origin != origin
    assert await store.list() == []
    with pytest.raises(StoreResetError):
        await store.changes(start)
    assert await store.save(SessionAsset(id="s")) == 1
    with pytest.raises(StoreResetError):
        await watching
    assert (await store.load("s")).id == "s"
    with pytest.raises(StoreResetError):
        await store.changes(start)
    wipe(place)
    other = await connect(partitions=16)
    await other.save_many([SessionAsset(id=f"s{n}") for n in range(20)])
    with pytest.raises(StoreResetError):
        await store.save(SessionAsset(id="t"))
    await store.reopen()
    assert await store.save(SessionAsset(id="t")) > 0
    assert {meta.id for meta in await store.list()} == {"t", *(f"s{n}" for n in range(20))}


async def test_reopening_in_vain(place: Place, connect: Connect) -> None:
    """Where the namespace can't be taken, the store remains as it was."""
    store = await connect(partitions=2)
    await store.save(SessionAsset(id="s"))
    wipe(place)
    await (await connect(partitions=3)).save(SessionAsset(id="s"))
    origin = store.origin
    with pytest.raises(LayoutError, match="3 partitions, not 2"):
        await store.reopen()
    assert store.origin == origin
    with pytest.raises(StoreResetError):
        await store.save(SessionAsset(id="t"))


async def test_reopening_what_is_well(connect: Connect) -> None:
    """Opened anew without need, a store goes on: its data, its assets and its watches are as before."""
    store = await connect()
    asset = SessionAsset(id="s")
    await store.save(asset)
    async with contextlib.aclosing(watched(store, since=await store.cursor())) as changes:
        await store.reopen()
        asset.metadata["a"] = 1
        assert await store.save(asset) == 2
        assert (await next_of(changes)).revision == 2


@every_server
@forms
@pytest.mark.parametrize("denied", ["-hset", "-@write", "-evalsha", "-rpush"])
async def test_rights_that_are_missing(
    start_server: Callable[..., Server], open_in: OpenIn, form: str, denied: str
) -> None:
    """Who may not write reads an absent namespace as an empty one, and creates nothing."""
    server = start_server()
    raw: Any = server.raw()
    raw.execute_command("ACL", "SETUSER", "worker", "reset", "on", ">pw", "~*", "&*", "+@all", denied)
    url = f"redis://worker:pw@127.0.0.1:{server.port}"
    try:
        store = await open_in(form, url)
    except PermissionDeniedError:
        assert denied == "-evalsha"
        return
    assert await store.list() == []
    for _ in range(2):
        with pytest.raises(PermissionDeniedError):
            await store.save(SessionAsset(id="s"))
    assert raw.dbsize() == 0
    raw.execute_command("ACL", "SETUSER", "worker", "+@all")
    await asyncio.sleep(1.1)
    assert await store.save(SessionAsset(id="s")) == 1


@every_server
async def test_who_may_not_publish(start_server: Callable[..., Server], open_in: OpenIn) -> None:
    """A namespace is created without the message that says so, and a watch finds it at its heartbeat."""
    server = start_server()
    raw: Any = server.raw()
    watcher = await open_in("async", server.url, heartbeat=0.3)
    watching = asyncio.ensure_future(take(watcher, 1))
    raw.execute_command("ACL", "SETUSER", "worker", "reset", "on", ">pw", "~*", "+@all", "resetchannels")
    store = await open_in("async", f"redis://worker:pw@127.0.0.1:{server.port}")
    store._driver.lifecycle._denied_until = 0.0  # ask, do not remember
    await store.save(SessionAsset(id="s"))
    assert [change.id for change in await watching] == ["s"]


def test_a_read_that_came_too_early() -> None:
    """What was read of an absent namespace is read again if it was made meanwhile, then of all its partitions."""
    namespace = Namespace("orcs", 1)
    plan = on_namespace(namespace, lambda: Lists(namespace).list(None, Filters()))
    early = next(plan)
    assert isinstance(early, Together)
    assert len(early.commands()) == 1
    assert isinstance(plan.send([[]]), ReadLayout)
    plan.send({b"version": b"2", b"partitions": b"16", b"incarnation": b"x"})
    late = plan.send(None)
    assert isinstance(late, Together)
    assert len(late.commands()) == 16


def test_bad_input_before_anything_is_sent() -> None:
    """A plan that refuses its arguments asks for nothing, where the namespace is absent, too."""
    namespace = Namespace("orcs", 1)
    with pytest.raises(ValueError, match="limit"):
        next(on_namespace(namespace, lambda: Lists(namespace).page(0, None, Filters())))


def test_two_ways_to_the_same() -> None:
    """A namespace that another task has found while this one created it is taken once."""
    namespace = Namespace("orcs", 1)

    def write() -> Any:
        yield Create("orcs", 1)

    plan = on_namespace(namespace, write)
    assert isinstance(next(plan), Create)
    namespace.adopt(4, b"theirs")
    window = namespace._windows[0]
    plan.send((False, {b"version": b"1", b"partitions": b"4", b"incarnation": b"theirs"}))
    assert namespace._windows[0] is window
    assert len(namespace.keyspace.partitions) == 4


def test_each_attempt_has_an_incarnation_of_its_own() -> None:
    """What an earlier attempt has made may have been used and wiped: the next one makes another."""
    create: Any = Create("orcs", 1)
    assert create.commands()[0][-1] != create.commands()[0][-1]


def test_what_is_known_is_not_created() -> None:
    """A write that begins when another task has found the namespace takes that one."""
    namespace = Namespace("orcs", 1)

    def write() -> Any:
        yield ReadLayout("orcs")
        yield Create("orcs", 1)

    plan = on_namespace(namespace, write)
    next(plan)
    namespace.adopt(1, b"theirs")
    assert isinstance(plan.send({}), ReadLayout)

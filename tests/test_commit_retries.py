"""Commits whose replies are lost, or that a server refuses: once or not at all, and it is told."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest

from orcs_redis import (
    Committed,
    CorruptSessionError,
    LayoutError,
    NotFoundError,
    OutcomeUnknownError,
    RedisSessionStore,
    SessionAsset,
    StoreFullError,
)
from orcs_redis.protocol.turns import decode_turns
from orcs_redis.protocol.writes import PopUnseen

from .conftest import ROWS, Place, Server, connected, every_server
from .faults.proxy import SWALLOW, Proxy
from .support import turn, until
from .test_bad_input import content
from .test_commit import ids, numbered
from .test_rights import dump

StartServer = Callable[..., Server]
forms = pytest.mark.parametrize("form", ["async", "sync"])


# Lost replies

MANY = {f"k{n}": b"%d" % n for n in range(200)}


def asset() -> SessionAsset:
    made = SessionAsset(id="s", metadata={"x": 1, "labels": {"l": "1"}})
    made.history.turns = numbered(*range(5))
    return made


# Each face, with what it is to return, given the revision that it makes.
LOST: dict[str, tuple[Callable[[Any], Awaitable[Any]], Callable[[int], Any]]] = {
    "append": (lambda store: store.append("s", *numbered(5)), lambda revision: revision),
    "append, made": (lambda store: store.append("new", *numbered(5), create=True), lambda revision: revision),
    "append once": (lambda store: store.append("s", *numbered(4, 5), once=True), lambda revision: revision),
    "append once, made": (
        lambda store: store.append("new", *numbered(5), once=True, create=True),
        lambda revision: revision,
    ),
    "pop": (lambda store: store.pop("s"), lambda revision: [4]),
    "pop all": (lambda store: store.pop("s", 7), lambda revision: [0, 1, 2, 3, 4]),
    "truncate": (lambda store: store.truncate("s", 2), lambda revision: revision),
    "replace_turn": (lambda store: store.replace_turn("s", *numbered(4)), lambda revision: revision),
    "replace_turn, far": (lambda store: store.replace_turn("s", *numbered(1)), lambda revision: revision),
    "touch": (lambda store: store.touch("s"), lambda revision: revision),
    "fork": (lambda store: store.fork("s", "new", length=3, records=True), lambda revision: revision),
    "delete": (lambda store: store.delete("s"), lambda revision: None),
    "put new": (
        lambda store: store.commit("s", put_new={**MANY, "there": b"other"}),
        lambda revision: Committed(revision, created=False, placed={**dict.fromkeys(MANY, True), "there": False}),
    ),
    "put new, made": (
        lambda store: store.commit("new", put_new=MANY, create=True),
        lambda revision: Committed(revision, created=True, placed=dict.fromkeys(MANY, True)),
    ),
    "create": (
        lambda store: store.commit("s", put_new={"there": b"other"}, create=True),
        lambda revision: Committed(revision, created=False, placed={"there": False}),
    ),
    "everything": (
        lambda store: store.commit("s", append=numbered(5), pop=2, set={"metadata.y": 1}, unset=["metadata.x"],
                                   put={"p": b"1"}, drop=["there"], labels={"l": None, "m": "1"}, if_last="4"),
        lambda revision: Committed(revision, created=False, placed={}),
    ),
}  # fmt: skip


def plain(result: Any) -> Any:
    """Turns as the numbers that their ids are."""
    return [int(each.id) for each in result] if isinstance(result, list) else result


class Strikes:
    """Lets the replies be lost from a store's next request on, or a later one: after so many."""

    def __init__(self, store: Any, proxy: Proxy, after: int) -> None:
        self._lifecycle = getattr(store, "_store", store)._driver.lifecycle
        self._begin = self._lifecycle.begin
        self._proxy = proxy
        self.left = after
        self._lifecycle.begin = self._note

    def _note(self, *arguments: Any) -> None:
        if self.left == 0:
            self._proxy.strike(SWALLOW)
        self.left -= 1
        self._begin(*arguments)

    def end(self) -> None:
        self._lifecycle.begin = self._begin


@forms
@every_server
@pytest.mark.parametrize("pops", [4, 0], ids=["a calm session", "a busy session"])
async def test_lost_replies(start_server: StartServer, form: str, pops: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever reply of a face is lost, it is done once, and what it returns is what it did the first time."""
    monkeypatch.setattr("orcs_redis.protocol.sessions._POPS", pops)
    server = start_server()
    raw: Any = server.raw()
    near = await connected("async", server.url)
    proxy = Proxy(server.port)
    far = await connected(form, f"redis://127.0.0.1:{proxy.port}/0", deadline=20.0)
    lost = 0
    for name, (write, expected) in LOST.items():
        # The reply of its first request is lost, then that of its second one, and so on. That the last turn is not the
        # one to replace may change before an attempt arrives of which nothing was heard: so that outcome is unknown.
        step = 1 if name == "replace_turn, far" else 0
        while True:
            for id in ("s", "new"):
                if await near.exists(id):
                    await near.delete(id)
            await near.save(asset())
            await near.commit("s", put={"there": b"1"})
            await far.exists("s")
            before = int(raw.hget("{orcs/0}:state", "revision"))
            strikes = Strikes(far, proxy, step)
            calls = all_calls(raw)
            writing = asyncio.ensure_future(write(far))
            await until(partial(reached, writing, strikes, partial(all_calls, raw), calls + step))
            if strikes.left < 0:
                proxy.cut()
            result = await writing
            strikes.end()
            proxy.heal()
            after = int(raw.hget("{orcs/0}:state", "revision"))
            assert after == before + 1, name
            assert plain(result) == expected(after), name
            if strikes.left >= 0:
                break
            lost += 1
            step += 1
    assert lost == len(LOST) + (5 if pops else 3)
    for store in (near, far):
        await store.aclose()
    proxy.close()


@every_server
async def test_popped_too_late(start_server: StartServer) -> None:
    """What a pop from a busy session removes can be read for a minute; an attempt after that does not say "none"."""
    server = start_server()
    raw: Any = server.raw()
    async with await RedisSessionStore.connect(server.url) as store:
        await store.save(asset())
        request = PopUnseen(store._core.sessions._namespace, "s", 2, None)
        expires = asyncio.get_running_loop().time() + 5
        for _ in range(2):
            replies = await store._driver.link.call(request.commands(), expires)
            assert [each.id for each in decode_turns("s", request.decode(replies).popped)] == ["3", "4"]
        (key,) = raw.keys("*:staging:*")
        assert 50_000 < raw.pttl(key) <= 60_000
        raw.delete(key)  # as if its time was over
        replies = await store._driver.link.call(request.commands(), expires)
        with pytest.raises(OutcomeUnknownError):
            request.decode(replies)
        assert await ids(store) == [0, 1, 2]


def reached(writing: asyncio.Future[Any], strikes: Strikes, calls: Callable[[], int], before: int) -> bool:
    """Whether the server has executed the request whose reply is lost, or there is none."""
    return writing.done() or (strikes.left < 0 and calls() > before)


def all_calls(raw: Any) -> int:
    """How many scripts and reads were executed."""
    stats = raw.info("commandstats")
    return sum(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("evalsha", "lrange", "hgetall"))


# What the server refuses


@pytest.mark.parametrize("place", [ROWS[1], ROWS[2], ROWS[5]], ids=str, indirect=True)
async def test_foreign_types(place: Place, store: Any) -> None:
    """Whichever key is of another type: a write that would use it is refused whole; all others are done."""
    everything: dict[str, Any] = {
        "append": [turn()], "pop": 1, "set": {"metadata.y": 1}, "unset": ["metadata.x"], "put": {"p": b"1"},
        "put_new": {"q": b"1"}, "drop": ["there", "b*"], "labels": {"l": None, "m": "1"},
    }  # fmt: skip
    writes: list[Callable[[], Awaitable[Any]]] = [
        lambda: store.commit("s", **everything),
        lambda: store.commit("s", truncate=0, append=[turn()]),
        lambda: store.commit("s", put={"k": b"1"}),
        lambda: store.commit("s", drop=["*"]),
        lambda: store.commit("s", labels={"m": "1"}),
        lambda: store.append("s", turn()),
        lambda: store.append("new", turn(), create=True),
        lambda: store.append("s", turn(), once=True),
        lambda: store.pop("s"),
        lambda: store.truncate("s", 1),
        lambda: store.replace_turn("s", *numbered(4)),
        lambda: store.replace_turn("s", *numbered(1)),
        lambda: store.touch("s"),
        lambda: store.fork("s", "new", records=True),
        lambda: store.fork("s", "new", length=0),
        lambda: store.delete("s"),
    ]
    keys = ("session:s", "turns:s", "records:s", "names:s", "updated", "meta", "changes", "deleted", "deleted:meta",
            "labels", "turns:new", "records:new", "names:new")  # fmt: skip
    refused = Counter[str]()
    for key in keys:
        for write in writes:
            left: Any
            for left in place.raw.keys(place.key("*")):
                if not left.endswith(b":state"):
                    place.raw.delete(left)
            await store.save(asset())
            await store.commit("s", put={"there": b"1", "b1": b"1"})
            await store.append("gone", turn(), create=True)
            await store.delete("gone")
            place.raw.delete(place.key(key))
            place.raw.set(place.key(key), "x") if key != "session:s" else place.raw.rpush(place.key(key), "x")
            before = content(place)
            try:
                await write()
            except (CorruptSessionError, LayoutError, NotFoundError):
                refused[key] += 1
                assert content(place) == before, key
            else:
                place.raw.delete(place.key(key))
    assert all(refused[key] >= 1 for key in keys[:-2]), refused


@forms
@every_server
async def test_full_memory(start_server: StartServer, form: str) -> None:
    """What a full server refuses is written nowhere; a deletion is done; with room again all goes on."""
    server = start_server("--maxmemory-policy", "noeviction")
    raw: Any = server.raw()
    store = await connected(form, server.url)
    await store.save(asset())
    await store.commit("s", put={"there": b"1", "b1": b"1"})
    writes: list[Callable[[Any], Awaitable[Any]]] = [
        *(write for name, (write, _) in LOST.items() if name != "delete"),
        lambda store: store.commit("s", drop=["*"]),
        lambda store: store.commit("s", labels={"l": None}),
        lambda store: store.commit("s", truncate=0, append=[turn()]),
        lambda store: store.save(SessionAsset(id="s")),
    ]
    raw.config_set("maxmemory", 1)
    before = dump(raw)
    for n, write in enumerate(writes):
        with pytest.raises(StoreFullError):
            await write(store)
        assert dump(raw) == before, n
    await store.delete("s")
    assert raw.keys("*:s") == []
    raw.config_set("maxmemory", 0)
    assert await store.append("s", *numbered(1), create=True) == 4
    await store.aclose()

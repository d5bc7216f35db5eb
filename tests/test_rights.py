"""Rights that are missing: each write is whole or absent, and says which."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from orcs_redis import (
    LeaseHeldError,
    PermissionDeniedError,
    ProjectContext,
    RedisSessionStore,
    SessionAsset,
    StorageError,
    UnsupportedServerError,
    scripts,
)
from orcs_redis.protocol import namespace
from orcs_redis.protocol.writes import PopUnseen

from .conftest import Server, every_server
from .support import turn

# What the scripts call, read from their texts.
CALLED = {
    name.lower()
    for script in (scripts.WRITE, scripts.LEASE)
    for name in (*re.findall(r"(?:call|pcall)\('([A-Z]+)'", script.source.decode()), "PUBLISH", "EVALSHA")
} | {"zcard", "hget"}
ALL = sorted(CALLED | {"exec", "multi"})  # and what goes ahead of them

StartServer = Callable[..., Server]


def test_every_command_is_probed() -> None:
    """What a script calls is among what is asked for when a store opens."""
    probed = {name.lower() for name in namespace._WRITE_COMMANDS + namespace._OTHER_COMMANDS}
    assert probed >= CALLED
    assert {"hset", "rpush", "zadd", "unlink", "rename", "persist", "pexpire", "publish", "ltrim", "lset"} < CALLED


def asset(id: str, *texts: str) -> SessionAsset:
    made = SessionAsset(id=id)
    for text in texts:
        made.add_turn(turn(text))
    return made


async def edited(store: Any, known: SessionAsset) -> int:
    """A save that changes, removes and adds turns, and removes a section."""
    known.history.turns[1].content = "edited"
    del known.history.turns[0]
    known.add_turn(turn("after"))
    known.extra.pop("x", None)
    return int(await store.save(known))


async def renewed(store: Any, known: SessionAsset) -> int:
    known.history.turns[1].content = "renewed"
    return int(await store.replace_turn("s", known.history.turns[1]))


EVERYTHING: dict[str, Any] = {
    "set": {"metadata.set": 1, "project_context": ProjectContext(name="n", root_path="/elsewhere")},
    "unset": ["metadata.gone", "extra.x"],
    "put": {"put": b"1"},
    "put_new": {"a": b"other", "new": b"1"},
    "drop": ["b", "c*"],
}

# Kinds of writes: together they use every group of arguments of the script.
CASES: dict[str, Callable[[Any, SessionAsset], Any]] = {
    "append": lambda store, known: store.append("s", turn("new")),
    "append if absent": lambda store, known: store.append("n", turn("new"), create=True),
    "append once": lambda store, known: store.append("s", known.history.turns[0], turn("new"), once=True),
    "save over": lambda store, known: store.save(asset("s", "x")),
    "save nothing over": lambda store, known: store.save(asset("s")),
    "staged save": lambda store, known: store.save(asset("s", *map(str, range(20)))),
    "edit": edited,
    "delete": lambda store, known: store.delete("s"),
    "pop": lambda store, known: store.pop("s"),
    "pop unseen": lambda store, known: store._driver.send(PopUnseen(store._core.sessions._namespace, "s", 2, None)),
    "pop all": lambda store, known: store.pop("s", 3),
    "truncate": lambda store, known: store.truncate("s", 1),
    "replace a turn": renewed,
    "touch": lambda store, known: store.touch("s"),
    "fork": lambda store, known: store.fork("s", "n", length=1, records=True),
    "commit": lambda store, known: store.commit("s", append=[turn("new")], pop=1, **EVERYTHING),
    "commit over": lambda store, known: store.commit("s", append=[turn("new")], truncate=0, **EVERYTHING),
    "commit anew": lambda store, known: store.commit("n", append=[turn("new")], create=True, **EVERYTHING),
    "commit if last": lambda store, known: store.commit("s", pop=1, if_last=known.history.turns[-1].id),
    "label": lambda store, known: store.commit("s", labels={"l": "other", "m": "1"}),
    "last label": lambda store, known: store.commit("s", labels={"l": None}),
    "records alone": lambda store, known: store.commit("s", put={"put": b"1"}),
    "drop": lambda store, known: store.commit("s", drop=["*"]),
}


def dump(raw: Any) -> dict[bytes, Any]:
    """Every key but what comes and goes by itself: its content and whether it lives for ever."""
    found = {}
    for key in raw.keys("*"):
        if b":staging:" in key:
            assert raw.pttl(key) > 0, key
            continue
        kind = raw.type(key)
        found[key] = (
            {
                b"hash": raw.hgetall,
                b"list": lambda key: raw.lrange(key, 0, -1),
                b"zset": lambda key: raw.zrange(key, 0, -1, withscores=True),
                b"string": raw.get,
            }[kind](key),
            raw.pttl(key) > 0,
        )
    return found


async def seen(store: RedisSessionStore[SessionAsset]) -> dict[str, Any]:
    """What a caller sees of all sessions, but for times and revisions."""
    found: dict[str, Any] = {}
    for meta in await store.list():
        loaded = await store.load(meta.id)
        loaded.metadata.pop("forked_from", None)
        found[meta.id] = (
            [each.content for each in loaded.history.turns],
            meta.turn_count,
            loaded.metadata,
            loaded.extra,
            loaded.project_context,
            meta.labels,
            meta.name,
            meta.project_path,
            await store.records(meta.id),
        )
    for name, value in (("l", "1"), ("l", "other"), ("m", "1")):
        found[f"{name}={value}"] = [meta.id for meta in await store.list(labels={name: value})]
    found["project"] = [meta.id for meta in await store.list(project_path="/elsewhere")]
    return found


async def check(raw: Any, admin: RedisSessionStore[SessionAsset], store: Any, name: str, expected: Any) -> None:
    """Try a write, and see that it is as it says."""
    known = await store.load("s")
    before = dump(raw)
    try:
        await CASES[name](store, known)
    except (PermissionDeniedError, UnsupportedServerError):
        assert dump(raw) == before
    else:
        assert await seen(admin) == expected


async def settled(admin: RedisSessionStore[SessionAsset]) -> None:
    for meta in await admin.list():
        if meta.id != "beside":
            await admin.delete(meta.id)
    first = asset("s", "a", "b", "c")
    first.extra["x"] = 1
    first.metadata |= {"gone": 1, "labels": {"l": "1"}}
    await admin.save(first)
    await admin.commit("s", put={"a": b"a", "b": b"b", "c1": b"c", "c2": b"c"})
    if not await admin.exists("beside"):
        await admin.save(asset("beside", "untouched"))


@pytest.fixture
async def admin(start_server: StartServer) -> AsyncIterator[tuple[Server, RedisSessionStore[SessionAsset]]]:
    server = start_server()
    async with await RedisSessionStore.connect(server.url) as store:
        yield server, store


def limited(server: Server, *rules: str) -> str:
    """Set the user's rights and return a URL for it."""
    raw: Any = server.raw()
    raw.execute_command("ACL", "SETUSER", "worker", "reset", "on", ">pw", "~*", "&*", "+@all", *rules)
    return f"redis://worker:pw@127.0.0.1:{server.port}"


@every_server
@pytest.mark.parametrize("when", ["before opening", "after opening"])
async def test_rights_taken(admin: tuple[Server, RedisSessionStore[SessionAsset]], when: str) -> None:
    """Of each command in turn the right is taken away: every write is whole or absent, and says which."""
    server, full = admin
    raw: Any = server.raw()
    expected, called = {}, {}
    for name, write in CASES.items():
        await settled(full)
        known = await full.load("s")
        raw.config_resetstat()
        await write(full, known)
        called[name] = {command.removeprefix("cmdstat_") for command in raw.info("commandstats")}
        expected[name] = await seen(full)
    for command in ALL:
        if when == "before opening":
            url = limited(server, f"-{command}")
            await settled(full)
            try:
                store = await RedisSessionStore.connect(url)
            except PermissionDeniedError:
                assert command in ("hgetall", "evalsha", "hget")
                continue
        else:
            store = await RedisSessionStore.connect(limited(server))
        async with store:
            for name in CASES:
                if command not in called[name] or command in ("hgetall", "hget", "lrange"):
                    continue  # or it can't even load
                raw.execute_command("ACL", "SETUSER", "worker", "+@all")
                await settled(full)
                raw.execute_command("ACL", "SETUSER", "worker", f"-{command}")
                store._driver.lifecycle._denied_until = 0.0  # ask, do not remember
                await check(raw, full, store, name, expected[name])
        left = await full.load("beside")
        assert [each.content for each in left.history.turns] == ["untouched"]
        assert [each for each in dump(raw).items() if each[1][1]] == []


@every_server
async def test_channels_taken(admin: tuple[Server, RedisSessionStore[SessionAsset]]) -> None:
    """A user who may no longer publish writes all the same, once a call, and a watch sees it at its heartbeat."""
    server, full = admin
    await settled(full)
    async with (
        await RedisSessionStore.connect(limited(server)) as store,
        await RedisSessionStore.connect(server.url, heartbeat=0.3) as watcher,
    ):
        limited(server, "resetchannels")
        cursor = await watcher.cursor()
        revisions = [await store.append("s", turn(str(n))) for n in range(3)]
        async with asyncio.timeout(10):
            async for change in watcher.watch(since=cursor):
                if change.revision == revisions[-1]:
                    break
        revision = await store.append("s", turn("3"))
        assert await watcher.wait_for("s", revision=revision, timeout=5) == revision
    loaded = await full.load("s")
    assert [each.content for each in loaded.history.turns] == ["a", "b", "c", "0", "1", "2", "3"]


@every_server
@pytest.mark.parametrize("command", sorted({name for name in ALL if name != "evalsha"}))
async def test_rights_of_leases(start_server: StartServer, command: str) -> None:
    """Whatever a user may not do, there is no lease that never ends, and who was refused holds none."""
    server = start_server()
    raw: Any = server.raw()
    async with await RedisSessionStore.connect(limited(server)) as store:
        await settled(store)
        limited(server, f"-{command}")
        async with await RedisSessionStore.connect(server.url) as full:
            try:
                async with store.lease("s", ttl=0.5) as lease:
                    with pytest.raises(LeaseHeldError):
                        async with full.lease("s"):
                            pass
                    assert int(raw.get("{orcs/0}:fence")) == lease.token
            except PermissionDeniedError:
                assert raw.exists("{orcs/0}:lease:s") == 0
            for key in raw.keys("{orcs/0}:lease:*"):
                assert raw.pttl(key) > 0
            limited(server)
            async with full.lease("s", wait=5) as lease:
                assert lease.token >= 1


@every_server
@pytest.mark.parametrize("command", ["rename", "publish", "unlink", "zadd", "pexpire", "persist", "hset", "evalsha"])
async def test_renamed_before_opening(start_server: StartServer, command: str) -> None:
    """A server without a command that the store needs is refused, and the command named."""
    server = start_server("--rename-command", command, '""')
    with pytest.raises(UnsupportedServerError, match=command.upper()):
        await RedisSessionStore.connect(server.url)
    assert server.raw().keys("*{orcs/0}:session:*") == []


@every_server
async def test_denied_and_named(admin: tuple[Server, RedisSessionStore[SessionAsset]]) -> None:
    """A user who may only read opens a store and reads; a write says which right is missing, until it is given."""
    server, full = admin
    await settled(full)
    async with await RedisSessionStore.connect(limited(server, "-@write")) as store:
        assert (await store.load("s")).id == "s"
        with pytest.raises(PermissionDeniedError, match="HSET"):
            await store.append("s", turn("no"))
        limited(server)
        async with asyncio.timeout(10):
            while True:
                try:
                    await store.append("s", turn("yes"))
                    break
                except PermissionDeniedError:
                    await asyncio.sleep(0.05)
    assert [each.content for each in (await full.load("s")).history.turns] == ["a", "b", "c", "yes"]


@every_server
async def test_no_more_than_once_a_second(admin: tuple[Server, RedisSessionStore[SessionAsset]]) -> None:
    """A store that may not write asks its server for it once a second at most."""
    server, full = admin
    raw: Any = server.raw()
    await settled(full)
    async with await RedisSessionStore.connect(limited(server, "-hset")) as store:
        calls = raw.info("commandstats")["cmdstat_evalsha"]["calls"]
        for _ in range(300):
            with pytest.raises(StorageError):
                await store.append("s", turn("no"))
        assert raw.info("commandstats")["cmdstat_evalsha"]["calls"] - calls <= 3

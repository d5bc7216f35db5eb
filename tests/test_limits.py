"""How large things may be, and how long others wait while they are moved."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import pytest

from orcs_redis import (
    ConversationTurn,
    SerializationError,
    SessionAsset,
)
from orcs_redis.transport import embedded

from .conftest import Server

MIB = 1024 * 1024
PAYLOAD = "a payload that is in no error"

Open: TypeAlias = Callable[..., Awaitable[Any]]

forms = pytest.mark.parametrize("way", ["async", "sync"])


def turn(size: int) -> ConversationTurn:
    """A turn of about so many bytes; exactly so with the few dozen that its other fields take."""
    return ConversationTurn.user(PAYLOAD + "x" * (size - len(PAYLOAD)))


@pytest.fixture(params=["redis", "embedded"])
def url(request: pytest.FixtureRequest, embedded_server: embedded.Attachment) -> str:
    """The test's own redis-server, and the embedded one."""
    if request.param == "embedded":
        return f"embedded://{embedded_server.folder}"
    server: Server = request.getfixturevalue("start_server")()
    return server.url


def received(raw: Any) -> int:
    """How many commands a server has been sent, by others than `raw`."""
    commands = raw.info("commandstats")
    return sum(int(entry["calls"]) for name, entry in commands.items() if not name.startswith("cmdstat_info"))


async def refused(raw: Any, call: Awaitable[object], field: str) -> None:
    """Expect a SerializationError of that field, and that the server has not been asked anything."""
    before = received(raw)
    with pytest.raises(SerializationError) as caught:
        await call
    assert caught.value.field == field
    assert PAYLOAD not in str(caught.value)
    assert received(raw) == before


@forms
async def test_nothing_too_large_is_sent(start_server: Callable[..., Server], open_in: Open, way: str) -> None:
    """Turns, assets and numbers of fields over their limits are refused without asking the server; at them they go."""
    server = start_server()
    raw = server.raw()
    raw.ping()
    options = {"max_turn_bytes": 2000, "max_asset_bytes": 20_000, "max_fields": 15}
    store = await open_in(way, server.url, **options)
    asset = SessionAsset(id="s")
    asset.add_turn(turn(1800))
    await store.save(asset)
    known = await store.load("s")

    await refused(raw, store.append("s", turn(2000)), "turn")
    await refused(raw, store.append("s", turn(10), turn(2000)), "turns[1]")
    await refused(raw, store.append("s", *[turn(1800)] * 12), "turns")
    for each in (asset, known, SessionAsset(id="new")):
        kept = list(each.history.turns)
        each.history.turns[:] = [*kept, turn(2000)]
        await refused(raw, store.save(each), f"history.turns[{len(kept)}]")
        each.history.turns[:] = [*kept, *[turn(1800)] * 12]
        await refused(raw, store.save(each, if_revision=1), "asset")
        each.history.turns[:] = kept
        each.metadata["x"] = PAYLOAD + "x" * 20_000
        await refused(raw, store.save(each), "asset")
        each.metadata.clear()
        each.extra.update({f"field {n}": n for n in range(15)})
        await refused(raw, store.save(each), "extra")
        each.extra.clear()

    await store.append("s", *[turn(1800)] * 9)
    asset.history.turns[:] = [turn(1800)] * 9
    asset.extra["field"] = 1
    with pytest.raises(SerializationError):  # together with what was appended
        await store.save(asset)
    await store.save(asset, overwrite=True)
    assert await store.load("s") == asset


@forms
async def test_updates_keep_to_the_limits(start_server: Callable[..., Server], open_in: Open, way: str) -> None:
    """An update that makes a session too large writes nothing."""
    store = await open_in(way, start_server().url, max_asset_bytes=5000)
    asset = SessionAsset(id="s")
    await store.save(asset)
    with pytest.raises(SerializationError):
        await store.update("s", lambda asset: asset.metadata.update(x="x" * 5000))
    assert await store.load("s") == asset


@forms
@pytest.mark.parametrize("option", ["max_turn_bytes", "max_asset_bytes", "max_fields"])
@pytest.mark.parametrize("value", [0, -1, 401 * MIB])
async def test_limits_that_cannot_be(way: str, option: str, value: int, open_in: Open) -> None:
    """A limit is more than nothing, and less than what a server takes."""
    with pytest.raises(ValueError, match=r"more than 0|at most|400 MiB"):
        await open_in(way, "redis://127.0.0.1:1", **{option: value})


@forms
async def test_a_hundred_thousand_turns(url: str, open_in: Open, way: str) -> None:
    """A session of 100,000 turns is saved, appended to, read in part and whole, changed and deleted."""
    count = 100_000
    store = await open_in(way, url, deadline=30.0, namespace=f"turns-{way}")
    asset = SessionAsset(id="s")
    asset.history.turns.extend(ConversationTurn.user(f"turn {n}") for n in range(count))
    times = {}

    async def timed(name: str, call: Awaitable[Any]) -> Any:
        began = time.monotonic()
        result = await call
        times[name] = time.monotonic() - began
        return result

    await timed("save", store.save(asset))
    await timed("append", store.append("s", ConversationTurn.user("last")))
    tail = await timed("tail", store.turns("s", -20))
    assert [turn.content for turn in tail] == [*(f"turn {n}" for n in range(count - 19, count)), "last"]
    loaded = await timed("load", store.load("s"))
    assert loaded.history.turns[:-1] == asset.history.turns
    loaded.add_turn(ConversationTurn.user("more"))
    loaded.history.turns[5].content = "changed"
    await timed("save 2 changes", store.save(loaded))
    changed = await store.turns("s", 5, 5)
    assert changed[0].content == "changed"
    (meta,) = await store.list()
    assert meta.turn_count == count + 2
    await timed("delete", store.delete("s"))
    print(f"\n100,000 turns, {url.partition(':')[0]} {way}: " + ", ".join(f"{k} {v:.3f} s" for k, v in times.items()))
    assert times["append"] < 1
    assert times["tail"] < 1


def large(kind: str) -> SessionAsset:
    """An asset of 64 MiB."""
    asset = SessionAsset(id="large")
    match kind:
        case "turns of 64 KiB":
            asset.history.turns.extend(ConversationTurn.user("x" * 64 * 1024) for _ in range(1024))
        case "turns of 15 MiB":
            asset.history.turns.extend(ConversationTurn.user("x" * 15 * MIB) for _ in range(4))
            asset.metadata["rest"] = "x" * 4 * MIB
        case _:
            asset.metadata["all"] = "x" * 64 * MIB
    return asset


@pytest.mark.parametrize("kind", ["turns of 64 KiB", "turns of 15 MiB", "metadata"])
async def test_stall(url: str, open_in: Open, kind: str) -> None:
    """While a task saves and loads 64 MiB, the others on the same store wait for a bounded time."""
    store = await open_in("async", url, deadline=30.0, namespace=f"stall-{kind}")
    await store.save(SessionAsset(id="small"))
    asset = large(kind)
    done = False
    delays: dict[str, list[float]] = {}
    phase = "idle"

    async def beside() -> None:
        number = 0
        while not done:
            number += 1
            now, began = phase, time.monotonic()
            await (store.append("small", ConversationTurn.user("x")) if number % 2 else store.turns("small", -1))
            delays.setdefault(now, []).append(time.monotonic() - began)
            await asyncio.sleep(0.002)

    working = asyncio.ensure_future(beside())
    await asyncio.sleep(0.2)
    times = {}
    for phase, call in (("save", store.save(asset)), ("load", store.load("large"))):
        began = time.monotonic()
        result = await call
        times[phase] = time.monotonic() - began
        await asyncio.sleep(0.05)
    done = True
    await working
    assert result == asset
    told = [f"{name} {times[name]:.2f} s, others wait {max(delays[name]):.2f} s at most" for name in times]
    print(f"\n64 MiB, {kind}, {url.partition(':')[0]}: " + "; ".join(told))
    assert max(map(max, delays.values())) < 5
    await store.delete("large")


async def test_stall_of_threads(start_server: Callable[..., Server], open_in: Open) -> None:
    """A blocking store's other threads have connections of their own, and wait for the server alone."""
    store = await open_in("sync", start_server().url, deadline=30.0)
    await store.save(SessionAsset(id="small"))
    asset = large("turns of 64 KiB")
    saving = asyncio.ensure_future(store.save(asset))
    worst = 0.0
    while not saving.done():
        began = time.monotonic()
        await store.append("small", ConversationTurn.user("x"))
        worst = max(worst, time.monotonic() - began)
    await saving
    assert await store.load("large") == asset
    print(f"\n64 MiB, saved by a thread: others wait {worst:.2f} s at most")
    assert worst < 5

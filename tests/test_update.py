"""`update`: compare-and-set on what was changed, however busy the session is."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from orcs_redis import LeaseLostError, NotFoundError, SessionAsset

from .conftest import Connect, Place, Server
from .faults.proxy import HOLD, Proxy
from .support import turn
from .test_lease import leased

Open = Callable[..., Awaitable[Any]]
HOUR = 3_600_000


def session(turns: int = 3) -> SessionAsset:
    asset = SessionAsset()
    for n in range(turns):
        asset.add_turn(turn(f"turn {n}"))
    return asset


def contents(asset: SessionAsset) -> list[str]:
    return [turn.content for turn in asset.history.turns]


class Interrupted:
    """A change before whose first call is over another one is made."""

    def __init__(self, change: Callable[[SessionAsset], object], *between: Callable[[], Any]) -> None:
        self.calls = 0
        self._change = change
        self._between = list(between)

    def __call__(self, asset: SessionAsset) -> None:
        self.calls += 1
        self._change(asset)
        if self._between:
            self._between.pop(0)()


def blocking(place: Place, id: str) -> Any:
    """What changes a session at once, from another thread with a store of its own."""

    def run(change: Callable[[Any], Awaitable[Any]]) -> Callable[[], None]:
        async def once() -> None:
            store = await place.connect()
            try:
                await change(store)
            finally:
                await place.close(store)

        def do() -> None:
            thread = threading.Thread(target=lambda: asyncio.run(once()))
            thread.start()
            thread.join()

        return do

    return run


def increment(asset: SessionAsset) -> None:
    asset.metadata["n"] = asset.metadata.get("n", 5) + 1


def push(asset: SessionAsset) -> None:
    asset.add_turn(turn("mine"))


def set_name(asset: SessionAsset) -> None:
    asset.project_context.name = "mine"


async def test_equal_changes_are_two(place: Place, store: Any) -> None:
    """Two increments of 5 make 7."""
    asset = session()
    await store.save(asset)
    between = blocking(place, asset.id)
    change = Interrupted(increment, between(lambda peer: peer.commit(asset.id, set={"metadata.n": 6})))
    updated = await store.update(asset.id, change)
    assert (updated.asset.metadata["n"], change.calls) == (7, 2)
    assert await store.load_versioned(asset.id) == updated


@pytest.mark.parametrize("change", [increment, push, set_name])
async def test_other_parts_do_not_make_it_run_again(place: Place, store: Any, change: Any) -> None:
    """What others push and other parts that they change are taken over, and the change runs once."""
    asset = session()
    await store.save(asset)
    between = blocking(place, asset.id)
    once = Interrupted(
        change, between(lambda peer: peer.commit(asset.id, append=[turn("theirs")], set={"metadata.k": 1}))
    )
    updated = await store.update(asset.id, once)
    assert contents(updated.asset)[3] == "theirs"
    assert updated.asset.metadata["k"] == 1
    assert await store.load_versioned(asset.id) == updated
    if place.row.server != "memory":  # there nothing is known of parts but that some have changed
        assert once.calls == 1


async def test_no_turn_is_lost(place: Place, store: Any) -> None:
    """Turns are cut only if nobody has pushed meanwhile."""
    asset = session()
    await store.save(asset)
    between = blocking(place, asset.id)
    change = Interrupted(
        lambda asset: asset.history.turns.pop(), between(lambda peer: peer.append(asset.id, turn("theirs")))
    )
    updated = await store.update(asset.id, change)
    assert change.calls == 2
    assert contents(updated.asset) == ["turn 0", "turn 1", "turn 2"]


async def test_made_anew_and_gone(place: Place, store: Any) -> None:
    """Of a session that was made anew it changes the new one; of one that is gone it says so."""
    asset = session()
    await store.save(asset)
    between = blocking(place, asset.id)

    async def anew(peer: Any) -> None:
        await peer.delete(asset.id)
        await peer.save(SessionAsset(id=asset.id))

    change = Interrupted(increment, between(anew))
    updated = await store.update(asset.id, change)
    assert (updated.asset.metadata, contents(updated.asset), change.calls) == ({"n": 6}, [], 2)
    change = Interrupted(increment, between(lambda peer: peer.delete(asset.id)))
    with pytest.raises(NotFoundError):
        await store.update(asset.id, change)
    assert not await store.exists(asset.id)


@pytest.mark.parametrize("change", [increment, push, set_name])
async def test_it_ends_under_any_load(connect: Connect, change: Any) -> None:
    """Peers that append all the time don't keep it from ending, nor lose anything."""
    store, *peers = [await connect() for _ in range(4)]
    asset = session(200)
    await store.save(asset)
    done = asyncio.Event()

    async def append(peer: Any) -> int:
        count = 0
        while not done.is_set():
            await peer.append(asset.id, turn("theirs"))
            count += 1
        return count

    appending = [asyncio.create_task(append(peer)) for peer in peers]
    try:
        for _ in range(10):
            await asyncio.wait_for(store.update(asset.id, change), 10)
    finally:
        done.set()
    counts = await asyncio.gather(*appending)
    loaded = await store.load(asset.id)
    found = contents(loaded)
    assert found.count("theirs") == sum(counts)
    assert found.count("mine") == (10 if change is push else 0)
    assert loaded.metadata.get("n", 15) == 15


async def test_under_a_lease(store: Any) -> None:
    """It and a save are refused once the lease is over, and change nothing."""
    asset = session()
    revision = await store.save(asset)
    async with leased(store, asset.id) as lease:
        revision = (await store.update(asset.id, increment, lease=lease)).revision
        asset.metadata["k"] = 1
        revision = await store.save(asset, lease=lease)
    asset.metadata["k"] = 2
    for write in (store.update(asset.id, increment, lease=lease), store.save(asset, lease=lease)):
        with pytest.raises(LeaseLostError):
            await write
    assert (await store.load_versioned(asset.id)).revision == revision
    assert asset.metadata == {"n": 6, "k": 2}


# Replies that are lost on the way


class LosesAnAnswer(Proxy):
    """Cuts the connection in place of the first answer that a write was applied, and then lets nothing pass."""

    def __init__(self, target: int) -> None:
        super().__init__(target)
        self.armed = False
        self.lost = threading.Event()

    async def _carry(self, pair: Any, data: bytes, writer: Any, *, up: bool) -> None:
        if not up and self.armed and b"$2\r\nOK\r\n" in data:
            self.armed, self._mode = False, HOLD
            pair.abort()
            self.lost.set()
        else:
            await super()._carry(pair, data, writer, up=up)


@pytest.fixture
def proxy(shared_server: Server) -> Iterator[LosesAnAnswer]:
    proxy = LosesAnAnswer(shared_server.port)
    with proxy:
        yield proxy


def add(asset: SessionAsset) -> None:
    asset.add_turn(turn("mine"))


def cut(asset: SessionAsset) -> None:
    del asset.history.turns[:2]
    add(asset)


def rewrite(asset: SessionAsset) -> None:
    asset.history.turns = [turn("mine") for _ in range(40)]


@pytest.mark.parametrize("form", ["async", "sync"])
@pytest.mark.parametrize("change", [add, cut, rewrite, increment])
@pytest.mark.parametrize("peer", ["idle", "pushes", "pops", "pushes before and after"])
@pytest.mark.parametrize("write", ["save", "exactly", "overwrite", "update"])
async def test_lost_replies(
    proxy: LosesAnAnswer, shared_server: Server, open_in: Open, form: str, change: Any, peer: str, write: str
) -> None:
    """Whatever a save had to do, and whatever others did before and after it, it is applied once."""
    namespace = f"lost-{form}-{change.__name__}-{peer.replace(' ', '-')}-{write}"
    near = await open_in("async", shared_server.url, namespace=namespace)
    far = await open_in(form, f"redis://127.0.0.1:{proxy.port}/0", namespace=namespace, deadline=15)
    asset = session()
    await near.save(asset)
    mine = await far.load(asset.id)
    if peer.startswith("pushes"):
        await near.append(asset.id, turn("before"))
    elif peer == "pops":
        await near.pop(asset.id)
    if write == "exactly":
        await far.refresh(mine)
    before = (await near.load_versioned(asset.id)).revision
    change(mine)
    calls = {
        "save": lambda: far.save(mine),
        "exactly": lambda: far.save(mine, if_revision=before),
        "overwrite": lambda: far.save(mine, overwrite=True),
        "update": lambda: far.update(asset.id, change),
    }
    expected = contents(mine)
    if write in ("save", "update"):
        loaded = await near.load(asset.id)
        if write == "update":
            change(loaded)
            expected = contents(loaded)
        elif change is not rewrite:
            theirs = contents(loaded)
            expected = [text for text in expected[:-1] if text in theirs] if change is not increment else theirs
            if change is not increment:
                expected += [text for text in theirs if text == "before"] + ["mine"]
        else:
            expected = [text for text in contents(loaded) if text == "before"] + expected
    proxy.armed = True
    task = asyncio.create_task(calls[write]())
    assert await asyncio.to_thread(proxy.lost.wait, 10)
    if peer == "pushes before and after":
        await near.append(asset.id, turn("after"))
        expected.append("after")
    proxy.heal()
    await task
    loaded = await near.load(asset.id)
    assert contents(loaded) == expected
    assert loaded.metadata == ({"n": 6} if change is increment else {})
    if write != "update":
        await far.refresh(mine)
        assert mine == loaded

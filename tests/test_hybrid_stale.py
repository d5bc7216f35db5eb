"""Files that are written from an old version, and sendings that others were faster than: nothing comes back or goes."""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import orcs_redis.sync
from orcs_redis import OutcomeUnknownError, SessionAsset
from orcs_redis.stores.hybrid.shared import Shared

from .conftest import Place
from .machines import TABLE, Machines, asset, contents, idle, open_machines, setting, told
from .support import turn

pytestmark = pytest.mark.parametrize("place", TABLE, indirect=True, ids=str)


@pytest.fixture
async def machines(place: Place, tmp_path: Path) -> AsyncIterator[Machines]:
    async with open_machines(tmp_path, place) as opened:
        yield opened


async def test_what_was_removed_stays_away(machines: Machines) -> None:
    """A file written from an old version brings back what it lacks, but not what was removed through the API."""
    a, peer = await machines.synced(sessions=[asset("a", "b", "c")])
    memory = a.read()
    loaded = await a.load("s")
    del loaded.history.turns[2]
    await a.save(loaded)
    del memory.history.turns[1:]
    memory.add_turn(turn("d"))
    a.write(memory)
    await a.sync()
    assert a.texts() == contents(await peer.load("s")) == ["a", "b", "d"]
    await idle(a)


async def test_what_came_back_was_not_removed(machines: Machines) -> None:
    """Turns of a session that was deleted here and came back are put back into a file that lacks them."""
    a, peer = await machines.synced(sessions=[asset("a", "b")])
    memory = a.read()
    await a.delete("s")
    await peer.append("s", turn("c"))
    assert told(await a.sync()) == {"revived": ["s"]}
    del memory.history.turns[1]
    memory.add_turn(turn("d"))
    a.write(memory)
    await a.sync()
    assert a.texts() == contents(await peer.load("s")) == ["a", "b", "c", "d"]
    await idle(a)


async def test_compacted_from_memory(machines: Machines) -> None:
    """A program that sums up what it has in memory does not remove a turn that came meanwhile."""
    a, peer = await machines.synced(sessions=[asset("a")])
    memory = a.read()
    await peer.append("s", turn("b"))
    await a.sync()
    memory.history.max_turns = 0
    memory.history.compact(lambda turns: "a")
    memory.add_turn(turn("d"))
    a.write(memory)
    await a.sync()
    assert a.texts() == contents(await peer.load("s")) == ["a", "b", "d"]
    await idle(a)


async def test_another_machine_was_faster(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sending that was refused has not arrived, though another machine has brought the very turn of it."""
    a, peer = await machines.synced(sessions=[asset("a", x=1, y=1)])
    new = turn("b")
    await a.append("s", new)
    await a.update("s", setting(x=2))
    real, faster = Shared.put, [copy.deepcopy(new)]

    def put(self: Any, *args: Any) -> Any:
        if faster:
            namespace = machines.place.namespace
            with orcs_redis.sync.open_store(machines.place.url, namespace=namespace) as store:
                store.append("s", faster.pop())
        return (yield from real(self, *args))

    monkeypatch.setattr(Shared, "put", put)
    await a.sync()
    stored = await peer.load("s")
    assert a.texts() == contents(stored) == ["a", "b"]
    assert stored.metadata == a.read().metadata == {"x": 2, "y": 1}
    await idle(a)


async def test_removed_before_it_is_here(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a merge has sent, and a peer removed before the merge was written here, does not come back."""
    a, peer = await machines.synced(sessions=[asset("a", x=1)])
    await a.append("s", turn("b"))
    await peer.append("s", turn("c"))
    real, left = Shared.put, [1]

    def put(self: Any, *args: Any) -> Any:
        mark = yield from real(self, *args)
        if left:
            left.pop()
            a.edit(setting(x=2))  # so the merge is not written over it
            with orcs_redis.sync.open_store(machines.place.url, namespace=machines.place.namespace) as store:
                assert contents(store.load("s")) == ["a", "c", "b"]
                store.truncate("s", 2)
        return mark

    monkeypatch.setattr(Shared, "put", put)
    assert told(await a.sync()) == {"merged": ["s"]}
    stored = await peer.load("s")
    assert a.texts() == contents(stored) == ["a", "c"]
    assert stored.metadata == a.read().metadata == {"x": 2}
    await idle(a)


async def test_made_earlier_and_edited(machines: Machines) -> None:
    """A session is the same though it was made earlier, by a merge, and each turn of it was edited there."""
    a, peer = await machines.synced(sessions=[asset("a", x=1)])
    stored = await peer.load("s")
    stored.created_at_ms -= 1000
    stored.history.turns[0].content = "A"
    await peer.save(stored)
    await a.update("s", setting(x=2))
    assert told(await a.sync()) == {"merged": ["s"]}
    assert a.texts() == contents(await peer.load("s")) == ["A"]
    assert a.read().metadata == {"x": 2}
    await idle(a)


async def test_an_edited_turn_was_not_sent(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn that was edited here has not arrived because it is there as it was before."""
    a, peer = await machines.synced(sessions=[asset("a", x=1)])

    def edit(session: SessionAsset) -> None:
        session.history.turns[0].content = "A"

    await a.update("s", edit)

    def put(self: Any, *args: Any) -> Any:
        yield from ()
        raise OutcomeUnknownError("s")

    with monkeypatch.context() as patch:
        patch.setattr(Shared, "put", put)
        assert told(await a.sync()) == {"failed": {"s": OutcomeUnknownError}}
    await peer.update("s", setting(x=2))
    assert told(await a.sync()) == {"merged": ["s"]}
    stored = await peer.load("s")
    assert a.texts() == contents(stored) == ["A"]
    assert stored.metadata == {"x": 2}
    await idle(a)

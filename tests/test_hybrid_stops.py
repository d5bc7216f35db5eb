"""Rounds of the hybrid store that were stopped at each of their steps, and then one side goes on before the next round.

What the next round makes of it where nothing else has happened, test_hybrid_stopped.py says.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import pytest

from orcs_redis import CompactedTurn, ComponentSnapshot, SessionAsset

from .conftest import Place
from .machines import TABLE, Machine, Machines, asset, contents, idle, open_machines, setting, told
from .support import turn

# What a plan yields does not depend on the form, nor what is stored on the server.
ROWS = [row for row in TABLE if (row.server == "memory") == (row.form == "async")]
pytestmark = pytest.mark.parametrize("place", ROWS, indirect=True, ids=str)

Change: TypeAlias = Callable[[SessionAsset], object]
Act: TypeAlias = Callable[[Machine, Any, str], Awaitable[object]]


@pytest.fixture
async def machines(place: Place, tmp_path: Path) -> AsyncIterator[Machines]:
    async with open_machines(tmp_path, place) as opened:
        yield opened


class KilledError(BaseException):
    """The process ends here."""


class Stops:
    """Ends whatever a store does before its so manieth step."""

    def __init__(self, machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = 0
        kind: Any = machines.module.HybridSessionStore
        do = kind._do

        def struck(store: Any, step: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                raise KilledError
            return do(store, step)

        monkeypatch.setattr(kind, "_do", struck)


# What is done


async def nothing(a: Machine, peer: Any, id: str) -> None:
    pass


def here(change: Change) -> Act:
    async def act(a: Machine, peer: Any, id: str) -> None:
        await a.update(id, change)

    return act


def there(change: Change) -> Act:
    async def act(a: Machine, peer: Any, id: str) -> None:
        await peer.update(id, change)

    return act


def behind(change: Change) -> Act:
    async def act(a: Machine, peer: Any, id: str) -> None:
        a.edit(change, id)

    return act


def add(text: str) -> Change:
    return lambda session: session.add_turn(turn(text))


def cut(count: int) -> Change:
    def change(session: SessionAsset) -> None:
        del session.history.turns[:count]
        made = CompactedTurn(summary=f"{count} turns", turn_count=count, start_time_ms=0, end_time_ms=0)
        session.history.compacted.append(made)

    return change


def snapshot(state: int) -> Change:
    return lambda session: session.save_snapshot(ComponentSnapshot(component_fqn="c", state=state))


def path(root: str) -> Change:
    def change(session: SessionAsset) -> None:
        session.project_context.root_path = root

    return change


async def save_here(a: Machine, peer: Any, id: str) -> None:
    await a.save(asset("new", id=id))


async def save_there(a: Machine, peer: Any, id: str) -> None:
    await peer.save(asset("new", id=id))


async def delete_here(a: Machine, peer: Any, id: str) -> None:
    await a.delete(id)


async def delete_there(a: Machine, peer: Any, id: str) -> None:
    await peer.delete(id)


async def renew_here(a: Machine, peer: Any, id: str) -> None:
    await a.delete(id)
    await a.save(SessionAsset(id=id, created_at_ms=7, metadata={"new": 1}))


async def renew_there(a: Machine, peer: Any, id: str) -> None:
    await peer.delete(id)
    await peer.save(SessionAsset(id=id, created_at_ms=7, metadata={"new": 1}))


def forget(text: str) -> Change:
    """A program that had the session before this was in it, and another turn."""

    def change(session: SessionAsset) -> None:
        session.history.turns = [each for each in session.history.turns if each.content != text]
        session.add_turn(turn("stale"))

    return change


class Case(NamedTuple):
    """What happens on both sides of a session that both have, or of one that neither has; the rules of the store."""

    here: Act
    there: Act
    base: bool = True
    prefer: str | None = None


CASES = {
    "a new session here": Case(save_here, nothing, base=False),
    "a new session there": Case(nothing, save_there, base=False),
    "an edit here": Case(here(setting(x=2)), nothing),
    "a turn here": Case(here(add("h")), nothing),
    "a turn there": Case(nothing, there(add("t"))),
    "turns on both": Case(here(add("h")), there(add("t"))),
    "different keys": Case(here(setting(x=2)), there(setting(y=2))),
    "the same edit": Case(here(setting(x=2)), there(setting(x=2))),
    "a key, here preferred": Case(here(setting(x=2)), there(setting(x=3)), prefer="local"),
    "a key, there preferred": Case(here(setting(x=2)), there(setting(x=3)), prefer="remote"),
    "compacted here": Case(here(cut(1)), there(add("t"))),
    "compacted on both": Case(here(cut(1)), there(cut(2))),
    "snapshots of one component": Case(here(snapshot(1)), there(snapshot(2))),
    "root paths": Case(here(path("/h")), there(path("/t"))),
    "a turn removed here": Case(here(lambda session: session.history.turns.pop(0)), there(add("t"))),
    "a turn removed there": Case(here(add("h")), there(lambda session: session.history.turns.pop(0))),
    "overwritten from memory": Case(behind(forget("b")), there(add("t"))),
    "deleted here": Case(delete_here, nothing),
    "deleted there": Case(nothing, delete_there),
    "deleted on both": Case(delete_here, delete_there),
    "deleted here, edited there": Case(delete_here, there(add("t"))),
    "deleted there, edited here": Case(here(add("h")), delete_there),
    "made anew here": Case(renew_here, nothing),
    "made anew there": Case(nothing, renew_there),
}


async def play(case: Case, a: Machine, peer: Any, id: str) -> None:
    """Bring a session to where the next round has something to do."""
    if case.base:
        await peer.save(asset("a", "b", "c", id=id, x=1, y=1))
        assert told(await a.sync()) == {"downloaded": [id]}  # and nothing of what was before
    await case.here(a, peer, id)
    await case.there(a, peer, id)


async def texts_of(a: Machine, peer: Any, id: str) -> set[str]:
    """The turns that either side has."""
    here = a.texts(id) if a.file(id).exists() else []
    return {*here, *(contents(await peer.load(id)) if await peer.exists(id) else [])}


async def stopped(a: Machine, stops: Stops, number: int) -> bool:
    """Run a round, and end it before a step; say whether it had so many."""
    stops.left = number
    try:
        await a.sync()
    except KilledError:
        return True
    finally:
        stops.left = 0
    return False


ADDING = ("a turn here", "turns on both", "different keys", "overwritten from memory")


@pytest.mark.parametrize("then", ["here", "there"])
@pytest.mark.parametrize("name", CASES)
async def test_stopped_and_edited(machines: Machines, monkeypatch: pytest.MonkeyPatch, name: str, then: str) -> None:
    """What is added on one side after a round was stopped is there once in the end, and with it all else, unasked."""
    case = CASES[name]
    a, peer = await machines.open(prefer=case.prefer), await machines.peer()
    stops = Stops(machines, monkeypatch)
    for number in itertools.count(1):
        id = f"s{number}"
        await play(case, a, peer, id)
        before = await texts_of(a, peer, id)
        if not await stopped(a, stops, number):
            break
        a = await machines.reopen(a, prefer=case.prefer)
        if added := a.file(id).exists() if then == "here" else await peer.exists(id):
            await (a if then == "here" else peer).append(id, turn("z"))
        report = await a.sync()
        assert (report.conflicts, report.failed) == ([], []), number
        texts = contents(await peer.load(id)) if await peer.exists(id) else []
        assert ("z" in texts) == added, number
        assert len(texts) == len({*texts}), number
        assert {*texts} <= {*before, "z"}, number
        if name in ADDING:
            assert before <= {*texts}, number
    await a.sync()
    await idle(a)

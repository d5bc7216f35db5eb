"""Partial assets, `load(id, last=n)`: what can be changed in them and saved, and what is refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from orcs_redis import ConflictError, SessionAsset

from .conftest import Connect
from .support import turn


async def saved(store: Any, turns: int) -> SessionAsset:
    asset = SessionAsset()
    for n in range(turns):
        asset.add_turn(turn(str(n)))
    await store.save(asset)
    return asset


def contents(asset: SessionAsset) -> str:
    return " ".join(turn.content for turn in asset.history.turns)


async def stored(store: Any, id: str) -> str:
    return contents(await store.load(id))


async def is_as_loaded(store: Any, asset: SessionAsset) -> None:
    """It equals what would be loaded, and knows what it lacks."""
    loaded = await store.load(asset.id, last=len(asset.history.turns))
    assert asset == loaded
    assert asset.history.skipped == loaded.history.skipped


@pytest.mark.parametrize(
    ("last", "skipped", "found"), [(0, 5, ""), (2, 3, "3 4"), (5, 0, "0 1 2 3 4"), (9, 0, "0 1 2 3 4")]
)
async def test_the_last_turns(store: Any, last: int, skipped: int, found: str) -> None:
    """So many of the last turns are there, and how many are not."""
    asset = await saved(store, 5)
    loaded = await store.load(asset.id, last=last)
    assert (contents(loaded), loaded.history.skipped) == (found, skipped)
    if not skipped:
        assert loaded == asset
        loaded.to_json()


@pytest.mark.parametrize("last", [-1, 1.0, True, "1"])
async def test_no_number_of_turns(store: Any, last: Any) -> None:
    """Anything else is refused."""
    with pytest.raises(ValueError, match="last"):
        await store.load("s", last=last)


async def test_what_can_be_saved(store: Any) -> None:
    """Turns are added and edited, however many, and sections changed; what was not loaded stays."""
    asset = await saved(store, 100)
    loaded = await store.load(asset.id, last=80)
    for each in loaded.history.turns[:70]:
        each.content += "!"
    loaded.add_turn(turn("new"))
    loaded.metadata["title"] = "t"
    await store.save(loaded)
    await is_as_loaded(store, loaded)
    before = [str(n) for n in range(20)]
    assert await stored(store, asset.id) == " ".join([*before, contents(loaded)])
    await store.save(loaded)
    loaded.history.turns[0].content = "again"
    await store.save(loaded)
    assert (await stored(store, asset.id)).split()[19:22] == ["19", "again", "21!"]


async def test_reordered(store: Any) -> None:
    """Loaded turns in another order are stored in that order."""
    asset = await saved(store, 5)
    loaded = await store.load(asset.id, last=3)
    loaded.history.turns.append(loaded.history.turns.pop(0))
    await store.save(loaded)
    assert await stored(store, asset.id) == "0 1 3 4 2"


def adding_before_popping(at: int, *contents: str) -> Callable[[list[Any]], object]:
    def change(turns: list[Any]) -> None:
        turns.extend(map(turn, contents))
        turns.pop(at)

    return change


REMOVALS: dict[str, Callable[[list[Any]], object]] = {
    "the first": lambda turns: turns.pop(0),
    "the last": lambda turns: turns.pop(),
    "one in between": lambda turns: turns.pop(1),
    "all": lambda turns: turns.clear(),
    "one, another is added": adding_before_popping(1, "new"),
    "the first, another is added": adding_before_popping(0, "new"),
    "one is replaced": lambda turns: turns.__setitem__(1, turn("new")),
    "one, two are added": adding_before_popping(1, "a", "b"),
}


@pytest.mark.parametrize("peer", ["idle", "appends", "pops"])
@pytest.mark.parametrize("removal", REMOVALS.values(), ids=REMOVALS)
async def test_no_loaded_turn_can_be_removed(connect: Connect, removal: Callable[[Any], object], peer: str) -> None:
    """It is refused, whatever others do meanwhile, and nothing is written."""
    store = await connect()
    asset = await saved(store, 6)
    loaded = await store.load(asset.id, last=3)
    removal(loaded.history.turns)
    if peer == "appends":
        await (await connect()).append(asset.id, turn("theirs"))
    elif peer == "pops":
        await (await connect()).pop(asset.id)
    before, mine = await store.load_versioned(asset.id), copy.deepcopy(loaded)
    with pytest.raises(ValueError, match="partial"):
        await store.save(loaded)
    assert await store.load_versioned(asset.id) == before
    assert loaded == mine


async def test_elsewhere(connect: Connect) -> None:
    """It is not a whole session: JSON, another id, another namespace and overwriting are refused."""
    store = await connect()
    other = await connect(namespace="partial-elsewhere")
    asset = await saved(store, 5)
    loaded = await store.load(asset.id, last=2)
    loaded.metadata["x"] = 1
    twin = copy.deepcopy(loaded)
    twin.id = "twin"
    revision = (await store.load_versioned(asset.id)).revision
    later = await store.append(asset.id, turn("theirs"))
    refused: list[Callable[[], Any]] = [
        lambda: store.save(twin),
        lambda: other.save(loaded),
        lambda: store.save(loaded, overwrite=True),
        lambda: store.save(loaded, if_revision=0),
        lambda: store.save(loaded, if_revision=later),
    ]
    for save in refused:
        with pytest.raises(ValueError, match="partial"):
            await save()
    with pytest.raises(ValueError, match="partial"):
        loaded.to_json()
    assert not await store.exists("twin")
    assert not await other.exists(asset.id)
    with pytest.raises(ConflictError):
        await store.save(loaded, if_revision=revision)
    assert (await store.load_versioned(asset.id)).revision == later


@pytest.mark.parametrize("sent", [False, True], ids=["here", "pickled"])
async def test_others_write_meanwhile(connect: Connect, sent: bool) -> None:
    """What others push, edit and drop is taken over, by a save and by a refresh."""
    store, peer = await connect(), await connect()
    asset = await saved(store, 10)
    loaded = await store.load(asset.id, last=3)
    if sent:
        loaded = pickle.loads(pickle.dumps(loaded))
    assert loaded.history.skipped == 7

    await peer.append(asset.id, turn("a"))
    await store.refresh(loaded)
    assert (contents(loaded), loaded.history.skipped) == ("7 8 9 a", 7)
    theirs = await peer.load(asset.id)
    theirs.history.turns[8].content = "8!"
    await peer.save(theirs)
    loaded.add_turn(turn("mine"))
    await store.save(loaded)
    assert contents(loaded) == "7 8! 9 a mine"
    await is_as_loaded(store, loaded)

    theirs = await peer.load(asset.id)
    del theirs.history.turns[:4]
    theirs.add_turn(turn("b"))
    await peer.save(theirs)
    for text in ("x", "y"):
        loaded.add_turn(turn(text))
    await store.save(loaded)
    assert (contents(loaded), loaded.history.skipped) == ("7 8! 9 a mine b x y", 3)
    await is_as_loaded(store, loaded)
    loaded.history.turns[0].content = "7!"
    await store.save(loaded)
    assert await stored(store, asset.id) == "4 5 6 7! 8! 9 a mine b x y"

    await peer.truncate(asset.id, 5)
    await store.refresh(loaded)
    assert (contents(loaded), loaded.history.skipped) == ("7! 8!", 3)
    await is_as_loaded(store, loaded)


@pytest.mark.parametrize("length", [0, 3])
@pytest.mark.parametrize("change", [True, False])
async def test_cut_below_what_is_loaded(connect: Connect, length: int, change: bool) -> None:
    """Of a history that others cut deeper than what is loaded, nothing can be said: ConflictError."""
    store, peer = await connect(), await connect()
    asset = await saved(store, 10)
    loaded = await store.load(asset.id, last=3)
    revision = (await store.load_versioned(asset.id)).revision
    later = await peer.truncate(asset.id, length)
    if change:
        loaded.add_turn(turn("mine"))
    mine = copy.deepcopy(loaded)
    for attempt in (store.save, store.refresh):
        with pytest.raises(ConflictError) as caught:
            await attempt(loaded)
        assert (caught.value.expected, caught.value.actual, caught.value.parts) == (revision, later, ())
        assert loaded == mine


async def test_the_sections_alone(connect: Connect) -> None:
    """With none of the turns, sections and new turns can be saved, and what others push is taken over."""
    store, peer = await connect(), await connect()
    asset = await saved(store, 3)
    loaded = await store.load(asset.id, last=0)
    loaded.project_context.name = "named"
    await peer.append(asset.id, turn("theirs"))
    loaded.add_turn(turn("mine"))
    await store.save(loaded)
    assert (contents(loaded), loaded.history.skipped) == ("theirs mine", 3)
    assert await stored(store, asset.id) == "0 1 2 theirs mine"
    assert (await store.load(asset.id)).project_context.name == "named"


@pytest.mark.parametrize("last", [0, 1])
async def test_a_turn_of_a_lost_save(store: Any, last: int) -> None:
    """What a save has stored whose answer was lost is not stored again, though turns were changed meanwhile."""
    asset = await saved(store, 2)
    partial = await store.load(asset.id, last=last)
    partial.history.turns.append(turn("new"))
    await store.save(copy.deepcopy(partial))
    edited = asset.history.turns[0]
    edited.content = "edited"
    await store.replace_turn(asset.id, edited)
    partial.metadata["title"] = "x"
    await store.save(partial)
    assert await stored(store, asset.id) == "edited 1 new"
    await is_as_loaded(store, partial)

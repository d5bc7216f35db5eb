"""The rows of the hybrid store's state table, and what becomes of each kind of part that both sides have changed."""

from __future__ import annotations

import asyncio
import copy
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import msgspec
import pytest

from orcs_redis import (
    CommandGrant,
    ComponentSnapshot,
    ContextInjection,
    ConversationTurn,
    CorruptSessionError,
    LearnedFact,
    SessionAsset,
    SkillConfig,
    SyncMode,
    SyncState,
    SyncStoppedError,
    VersionIncompatibleError,
)

from .conftest import Place
from .machines import TABLE, Machine, Machines, asset, contents, idle, open_machines, setting, told
from .support import turn

pytestmark = pytest.mark.parametrize("place", TABLE, indirect=True, ids=str)

Act: TypeAlias = Callable[[Machine, Any], Awaitable[object]]

FIRST = asset("a", x=1, y=1)


@pytest.fixture
async def machines(place: Place, tmp_path: Path) -> AsyncIterator[Machines]:
    async with open_machines(tmp_path, place) as opened:
        yield opened


def more(*texts: str, **metadata: Any) -> SessionAsset:
    """The first session, with more turns and other metadata."""
    made = copy.deepcopy(FIRST)
    made.history.turns += [turn(text) for text in texts]
    made.metadata.update(metadata)
    return made


def other() -> SessionAsset:
    """Another session of the same id."""
    made = asset("z")
    made.created_at_ms = FIRST.created_at_ms + 7
    return made


SAME = more("b")


def damage(place: Place, id: str = "s") -> None:
    """Spoil what is stored of a session."""
    place.raw.hset(place.key(f"session:{id}"), "preferences", b"\xc1")


async def nothing(a: Machine, peer: Any) -> None:
    pass


def write(session: SessionAsset | bytes) -> Act:
    async def act(a: Machine, peer: Any) -> None:
        a.write(session)

    return act


def store(session: SessionAsset) -> Act:
    async def act(a: Machine, peer: Any) -> None:
        await peer.save(copy.deepcopy(session), overwrite=True)

    return act


async def store_damaged(a: Machine, peer: Any) -> None:
    await peer.save(more("b"), overwrite=True)
    assert a.place is not None
    damage(a.place)


async def delete_here(a: Machine, peer: Any) -> None:
    await a.delete("s")


async def delete_there(a: Machine, peer: Any) -> None:
    await peer.delete("s")


class Case(NamedTuple):
    """A row: what both had, what happened here and there, how it looks, what a round does."""

    name: str
    base: bool
    here: Act
    there: Act
    state: SyncState | None
    pending: tuple[int, int, list[str]]
    report: dict[str, Any] | None  # None: it is not said
    texts: list[str] | None  # of both sides in the end; None: they are not equal, or absent
    ends: SyncState | None = SyncState.SYNCED
    listed: bool = True  # of a file that was never read a list has nothing to show


S = ["s"]
REFUSED = {"conflicts": S}
CONFLICT = (0, 0, S)
HALF = b'{"id": "s", "version'

CASES = [
    Case("1", False, nothing, nothing, None, (0, 0, []), {}, None, None),
    Case("2", False, write(FIRST), nothing, SyncState.LOCAL_ONLY, (1, 0, []), {"uploaded": S}, ["a"]),
    Case("3", False, nothing, store(FIRST), SyncState.REMOTE_AHEAD, (0, 1, []), {"downloaded": S}, ["a"]),
    Case("4", False, write(FIRST), store(FIRST), SyncState.SYNCED, (0, 0, []), {}, ["a"]),
    Case(
        "5", False, write(more("b")), store(more("c")), SyncState.LOCAL_AHEAD, (1, 1, []), {"merged": S},
        ["a", "c", "b"],
    ),
    Case(
        "5 without turns here", False, write(asset(k=1)), store(asset("a", x=1)), SyncState.LOCAL_AHEAD, (1, 1, []),
        {"merged": S}, ["a"],
    ),
    Case("6", False, write(FIRST), store(other()), SyncState.CONFLICT, CONFLICT, REFUSED, None, SyncState.CONFLICT),
    Case(
        "6 one session, a part collides", False, write(more("b", x=2)), store(more("c", x=3)), SyncState.CONFLICT,
        CONFLICT, REFUSED, None, SyncState.CONFLICT,
    ),
    Case("7", True, nothing, nothing, SyncState.SYNCED, (0, 0, []), {}, ["a"]),
    Case("8", True, write(more("b")), nothing, SyncState.LOCAL_AHEAD, (1, 0, []), {"uploaded": S}, ["a", "b"]),
    Case("8 a turn lacks", True, write(asset("b")), nothing, SyncState.LOCAL_AHEAD, (1, 0, []), None, ["a", "b"]),
    Case("9", True, nothing, store(more("b")), SyncState.REMOTE_AHEAD, (0, 1, []), {"downloaded": S}, ["a", "b"]),
    Case("10", True, write(SAME), store(SAME), SyncState.SYNCED, (0, 0, []), {}, ["a", "b"]),
    Case(
        "11", True, write(more("b", x=2)), store(more("c", y=2)), SyncState.LOCAL_AHEAD, (1, 1, []), {"merged": S},
        ["a", "c", "b"],
    ),
    Case(
        "12", True, write(more("b", x=2)), store(more("c", x=3)), SyncState.CONFLICT, CONFLICT, REFUSED, None,
        SyncState.CONFLICT,
    ),
    Case("13", True, delete_here, nothing, None, (1, 0, []), {"deleted": S}, None, None),
    Case("14", True, delete_here, store(more("b")), SyncState.REMOTE_AHEAD, (0, 1, []), {"revived": S}, ["a", "b"]),
    Case("15", True, nothing, delete_there, SyncState.REMOTE_AHEAD, (0, 1, []), {"deleted": S}, None, None),
    Case("16", True, write(more("b")), delete_there, SyncState.LOCAL_AHEAD, (1, 0, []), {"revived": S}, ["a", "b"]),
    Case("17", True, delete_here, delete_there, None, (0, 0, []), {}, None, None),
    Case("18 new", False, write(HALF), nothing, SyncState.CONFLICT, CONFLICT, REFUSED, None, SyncState.CONFLICT,
         False),
    Case("18", True, write(HALF), nothing, SyncState.CONFLICT, CONFLICT, REFUSED, None, SyncState.CONFLICT),
    Case("18 new on both", False, write(HALF), store(FIRST), SyncState.CONFLICT, CONFLICT, REFUSED, None,
         SyncState.CONFLICT, False),
    Case("18 changed there", True, write(HALF), store(more("b")), SyncState.CONFLICT, CONFLICT, REFUSED, None,
         SyncState.CONFLICT),
    Case("18 deleted there", True, write(HALF), delete_there, SyncState.CONFLICT, CONFLICT, REFUSED, None,
         SyncState.CONFLICT),
    Case("19", True, nothing, store_damaged, SyncState.CONFLICT, CONFLICT, REFUSED, None, SyncState.CONFLICT),
    Case("19 changed here", True, write(more("c")), store_damaged, SyncState.CONFLICT, CONFLICT, REFUSED, None,
         SyncState.CONFLICT),
    Case("19 new here", False, write(FIRST), store_damaged, SyncState.CONFLICT, CONFLICT, REFUSED, None,
         SyncState.CONFLICT),
    Case("19 not here", False, nothing, store_damaged, SyncState.CONFLICT, CONFLICT, REFUSED, None,
         SyncState.CONFLICT),
    Case("19 deleted here", True, delete_here, store_damaged, SyncState.CONFLICT, CONFLICT, REFUSED, None,
         SyncState.CONFLICT),
]  # fmt: skip


async def stored_texts(peer: Any) -> list[str] | None:
    return contents(await peer.load("s")) if await peer.exists("s") else None


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"row {case.name}")
async def test_rows(machines: Machines, case: Case) -> None:
    """Each row: the state and the counts that are seen, what a round reports, and both sides after it."""
    a, peer = await machines.open(), await machines.peer()
    if case.base:
        await peer.save(copy.deepcopy(FIRST))
        await a.sync()
        assert a.texts() == ["a"]
    await case.here(a, peer)
    await case.there(a, peer)
    before = a.traces()
    await a.sync(dry_run=True)
    assert a.traces() == before
    assert await a.state() is (case.state if case.listed else None)
    assert a.pending() == case.pending
    report = await a.sync()
    if case.report is not None:
        assert told(report) == case.report
    assert await a.state() is (case.ends if case.listed else None)
    if case.ends is SyncState.CONFLICT:
        assert a.traces() == before
        assert a.pending() == CONFLICT
        about = await a.conflict("s")
        if case.name.startswith("18"):
            assert about.reason.startswith("the file can't be read")
            assert about.local is None
        elif case.name.startswith("19"):
            assert about.reason.startswith("what is stored can't be read")
            assert about.remote is None
        else:
            assert about.parts == ([] if case.name == "6" else ["metadata.x"])
        await idle(a, conflicts=["s"])
    else:
        assert await stored_texts(peer) == (a.texts() if a.file().exists() else None) == case.texts
        assert a.pending() == (0, 0, [])
        await idle(a)


# Parts that both sides have changed


def learn(key: str, value: str) -> Callable[[SessionAsset], None]:
    return lambda session: session.project_context.learn(LearnedFact(key=key, value=value, source="", learned_at_ms=0))


def inject(id: str) -> Callable[[SessionAsset], None]:
    return lambda session: session.project_context.add_persistent_context(
        ContextInjection(id=id, timing="always", content=id)
    )


def named(**fields: Any) -> Callable[[SessionAsset], None]:
    def change(session: SessionAsset) -> None:
        for name, value in fields.items():
            setattr(session.project_context, name, value)

    return change


def extra(**fields: Any) -> Callable[[SessionAsset], None]:
    return lambda session: session.extra.update(fields)


def custom(**fields: Any) -> Callable[[SessionAsset], None]:
    return lambda session: session.preferences.custom.update(fields)


def style(**fields: Any) -> Callable[[SessionAsset], None]:
    def change(session: SessionAsset) -> None:
        for name, value in fields.items():
            setattr(session.preferences.coding_style, name, value)

    return change


def grant(*patterns: str) -> Callable[[SessionAsset], None]:
    def change(session: SessionAsset) -> None:
        session.granted_commands = [CommandGrant.persistent(pattern) for pattern in patterns]

    return change


def skill(id: str, **params: Any) -> Callable[[SessionAsset], None]:
    return lambda session: session.set_skill_config(id, SkillConfig(skill_id=id, params=params))


def snapshot(fqn: str, state: Any) -> Callable[[SessionAsset], None]:
    return lambda session: session.save_snapshot(ComponentSnapshot(component_fqn=fqn, state=state))


Read: TypeAlias = Callable[[SessionAsset], Any]

_technologies: Read = lambda session: session.project_context.technologies  # noqa: E731  # a table of them
_facts: Read = lambda session: {each.key: each.value for each in session.project_context.learned_facts}  # noqa: E731

MERGES: dict[str, tuple[Any, Any, Any, Read, Any]] = {
    "lists of strings are sets": (
        named(technologies=["a", "b"]), named(technologies=["b", "c"]), named(technologies=["a", "b", "d"]),
        _technologies, ["b", "d", "c"],
    ),
    "grants are a set": (
        grant("a"), grant("a", "b"), grant("a", "c"),
        lambda session: [each.pattern for each in session.granted_commands], ["a", "c", "b"],
    ),
    "facts by key": (learn("f", "1"), learn("g", "here"), learn("h", "there"), _facts,
                     {"f": "1", "h": "there", "g": "here"}),
    "of one fact the first": (nothing, learn("f", "here"), learn("f", "there"), _facts, {"f": "there"}),
    "contexts by id": (
        inject("a"), inject("b"), inject("c"),
        lambda session: [each.id for each in session.project_context.persistent_contexts], ["a", "c", "b"],
    ),
    "fields of a section": (
        named(name="n"), named(name="here"), style(indent="tabs"),
        lambda session: (session.project_context.name, session.preferences.coding_style.indent), ("here", "tabs"),
    ),
    "skills by key": (
        nothing, skill("a", n=1), skill("b", n=2),
        lambda session: {id: config.params for id, config in session.skill_configs.items()},
        {"a": {"n": 1}, "b": {"n": 2}},
    ),
    "custom by key": (
        custom(a=1, b=1), custom(a=2), custom(b=2), lambda session: session.preferences.custom, {"a": 2, "b": 2}
    ),
    "unknown fields by name": (extra(a=1, b=1), extra(a=2), extra(b=2), lambda session: session.extra,
                               {"a": 2, "b": 2}),
    "snapshots by component": (
        snapshot("a", 1), snapshot("a", 2), snapshot("b", 3),
        lambda session: {fqn: each.state for fqn, each in session.component_snapshots.items()}, {"a": 2, "b": 3},
    ),
}  # fmt: skip


async def changed_on_both(machines: Machines, base: Any, here: Any, there: Any, **options: Any) -> tuple[Machine, Any]:
    """A machine and a peer that have changed one session differently."""
    first = copy.deepcopy(FIRST)
    if base is not nothing:
        base(first)
    a, peer = await machines.synced(sessions=[first])
    if options:
        a = await machines.reopen(a, **options)
    await a.update("s", here)
    await peer.update("s", there)
    return a, peer


@pytest.mark.parametrize("name", MERGES)
async def test_parts_are_merged(machines: Machines, name: str) -> None:
    """What both sides have changed in a section is merged as far down as it goes, and nothing is lost."""
    base, here, there, read, expected = MERGES[name]
    a, peer = await changed_on_both(machines, base, here, there)
    report = await a.sync()
    assert (report.conflicts, report.failed) == ([], [])
    assert read(a.read()) == read(await peer.load("s")) == expected
    await idle(a)


COLLISIONS: dict[str, tuple[Any, Any, Any, list[str]]] = {
    "a field": (named(name="n"), named(name="here"), named(name="there"), ["project_context.name"]),
    "a skill": (skill("a", n=1), skill("a", n=2), skill("a", n=3), ["skill_configs.a"]),
    "two keys": (
        custom(a=1, b=1),
        custom(a=2, b=2),
        custom(a=3, b=3),
        ["preferences.custom.a", "preferences.custom.b"],
    ),
    "an unknown field": (extra(a=1), extra(a=2), extra(a=3), ["extra.a"]),
    "a removed key": (setting(k=1), lambda session: session.metadata.pop("k"), setting(k=2), ["metadata.k"]),
}


@pytest.mark.parametrize("name", COLLISIONS)
async def test_parts_that_collide(machines: Machines, name: str) -> None:
    """What both sides have changed differently is named, and nothing is written until it is resolved."""
    base, here, there, parts = COLLISIONS[name]
    a, _ = await changed_on_both(machines, base, here, there)
    assert told(await a.sync()) == REFUSED
    assert (await a.conflict("s")).parts == parts
    await idle(a, conflicts=["s"])
    await a.resolve("s", keep="remote")
    await idle(a)


async def test_snapshots_of_one_component(machines: Machines) -> None:
    """Of a component's snapshots ours stands, as the component runs on here; theirs is kept."""
    a, peer = await changed_on_both(machines, snapshot("c", 1), snapshot("c", 2), snapshot("c", 3))
    report = await a.sync()
    assert (report.conflicts, report.failed) == ([], [])
    for session in (a.read(), await peer.load("s")):
        assert session.component_snapshots["c"].state == 2
    kept = [await a.load_kept(each) for each in a.kept("s") if each.side == "there"]
    assert [each.component_snapshots["c"].state for each in kept] == [3]
    assert report.kept == [each.path for each in a.kept("s")]
    await idle(a)


async def test_root_paths(machines: Machines) -> None:
    """The path of the project differs by machine: that of the shared store stands, ours is kept."""
    a, peer = await changed_on_both(machines, named(root_path="/"), named(root_path="/h"), named(root_path="/t"))
    report = await a.sync()
    assert (report.conflicts, report.failed) == ([], [])
    for session in (a.read(), await peer.load("s")):
        assert session.project_context.root_path == "/t"
    kept = [await a.load_kept(each) for each in a.kept("s") if each.side == "here"]
    assert [each.project_context.root_path for each in kept] == ["/h"]
    await idle(a)


async def test_times(machines: Machines) -> None:
    """Of two times of the last update the later one holds."""

    def at(ms: int) -> Callable[[SessionAsset], None]:
        def change(session: SessionAsset) -> None:
            session.updated_at_ms = ms
            session.metadata[f"at {ms}"] = ms

        return change

    a, peer = await changed_on_both(machines, at(1000), at(3000), at(2000))
    assert told(await a.sync()) == {"merged": ["s"]}
    assert a.read().updated_at_ms == (await peer.load("s")).updated_at_ms == 3000
    await idle(a)


# Turns


def edit(text: str, to: str) -> Callable[[SessionAsset], None]:
    def change(session: SessionAsset) -> None:
        (found,) = [each for each in session.history.turns if each.content == text]
        found.content = to

    return change


def remove(text: str) -> Callable[[SessionAsset], None]:
    def change(session: SessionAsset) -> None:
        session.history.turns = [each for each in session.history.turns if each.content != text]

    return change


async def test_a_turn_edited_on_one_side(machines: Machines) -> None:
    """A turn that one side has edited is as that side has it, whatever the other has added."""
    a, peer = await changed_on_both(machines, nothing, edit("a", "A"), lambda session: session.add_turn(turn("b")))
    assert told(await a.sync()) == {"merged": ["s"]}
    assert a.texts() == contents(await peer.load("s")) == ["A", "b"]
    await idle(a)


async def test_a_turn_edited_on_both(machines: Machines) -> None:
    """A turn that both have edited differently is a conflict that names it."""
    a, _ = await changed_on_both(machines, nothing, edit("a", "here"), edit("a", "there"))
    assert told(await a.sync()) == REFUSED
    assert (await a.conflict("s")).parts == [f"turn/{FIRST.history.turns[0].id}"]
    await idle(a, conflicts=["s"])


async def test_a_turn_removed_there(machines: Machines) -> None:
    """A turn that was removed there goes here too, and the file that had it is kept."""
    a, peer = await machines.synced(sessions=[asset("a", "b")])
    await peer.update("s", remove("a"))
    assert told(await a.sync()) == {"downloaded": ["s"]}
    assert a.texts() == ["b"]
    assert await a.load_kept_texts() == [["a", "b"]]
    await idle(a)


async def test_a_turn_removed_here(machines: Machines) -> None:
    """A turn that was removed here knowingly stays away when others add turns."""
    a, peer = await changed_on_both(machines, nothing, remove("a"), lambda session: session.add_turn(turn("b")))
    report = await a.sync()
    assert (report.conflicts, report.failed) == ([], [])
    assert a.texts() == contents(await peer.load("s")) == ["b"]
    await idle(a)


async def test_one_new_id_twice(machines: Machines) -> None:
    """Turns that both sides have added under one id, chosen by hand, both stay."""

    def add(content: str) -> Callable[[SessionAsset], None]:
        return lambda session: session.add_turn(ConversationTurn(id="chosen", role="user", content=content))

    a, peer = await changed_on_both(machines, nothing, add("here"), add("there"))
    assert told(await a.sync()) == {"merged": ["s"]}
    assert a.texts() == contents(await peer.load("s")) == ["a", "there", "here"]
    await idle(a)


async def test_without_merging(machines: Machines) -> None:
    """With merging off, changes on both sides are a conflict, of whatever parts; resolving it merges nothing else."""
    a, peer = await changed_on_both(machines, nothing, setting(x=2), setting(y=2), merge=False)
    assert told(await a.sync()) == REFUSED
    await idle(a, conflicts=["s"])
    await peer.append("s", turn("b"))
    await a.resolve("s", keep="remote")
    assert a.texts() == ["a", "b"]
    await idle(a)


async def test_preferring_what_is_here(machines: Machines) -> None:
    """With this side preferred, it holds for the part that collides; the rest is merged, and the loser kept."""
    a, peer = await changed_on_both(machines, nothing, setting(x=2), setting(x=3, y=2), prefer="local")
    report = await a.sync()
    assert (report.conflicts, report.failed) == ([], [])
    assert a.read().metadata == (await peer.load("s")).metadata == {"x": 2, "y": 2}
    assert await a.kept_values("x") == {3}
    await idle(a)


async def test_a_preferred_side_does_not_mix_sessions(machines: Machines) -> None:
    """Two sessions of one id are a conflict also where a side is preferred: that is of parts that collide."""
    a, peer = await machines.open(prefer="remote"), await machines.peer()
    await a.save(copy.deepcopy(FIRST))
    await peer.save(other())
    assert told(await a.sync()) == REFUSED
    assert (a.texts(), contents(await peer.load("s"))) == (["a"], ["z"])
    await idle(a, conflicts=["s"])


# Deleted and made anew


async def test_made_anew_here(machines: Machines) -> None:
    """A session that was deleted here and made anew has none of the old one's turns, here and there."""
    a, peer = await machines.synced()
    await a.delete("s")
    await a.save(other())
    report = await a.sync()
    assert (report.conflicts, report.failed) == ([], [])
    assert a.texts() == contents(await peer.load("s")) == ["z"]
    await idle(a)


async def test_made_anew_there(machines: Machines) -> None:
    """A session that was deleted and made anew there replaces the unchanged one here, whose file is kept."""
    a, peer = await machines.synced()
    await peer.delete("s")
    await peer.save(other())
    assert told(await a.sync()) == {"downloaded": ["s"]}
    assert a.texts() == ["z"]
    assert await a.load_kept_texts() == [["a"]]
    await idle(a)


async def test_made_anew_there_and_edited_here(machines: Machines) -> None:
    """A session that was made anew there and the old one, edited here, are two sessions: a conflict."""
    a, peer = await machines.synced()
    await a.append("s", turn("b"))
    await peer.delete("s")
    await peer.save(other())
    assert told(await a.sync()) == REFUSED
    assert (a.texts(), contents(await peer.load("s"))) == (["a", "b"], ["z"])
    await idle(a, conflicts=["s"])
    await a.resolve("s", keep="local")
    assert a.texts() == contents(await peer.load("s")) == ["a", "b"]
    assert ["z"] in await a.load_kept_texts()
    await idle(a)


# What can't be read


NEWER = json.dumps({"id": "s", "version": 2, "of": "the future"}).encode()


async def make_folder(a: Machine) -> None:
    a.file().mkdir()


async def make_pipe(a: Machine) -> None:
    os.mkfifo(a.file())


UNREADABLE: dict[str, bytes | Callable[[Machine], Awaitable[None]]] = {
    "empty": b"",
    "not UTF-8": b"\xff{}",
    "not JSON": b"{secret",
    "not a session": b"[]",
    "another's id": asset("a", id="t").to_json().encode(),
    "newer": NEWER,
    "a folder": make_folder,
    "a pipe": make_pipe,
}


@pytest.mark.parametrize("kind", UNREADABLE)
async def test_unreadable_files(machines: Machines, kind: str) -> None:
    """What can't be read here is told, and neither sent nor overwritten nor taken for a deletion; the rest goes on."""
    a, peer = await machines.synced()
    original = a.data()
    a.file().unlink()
    made = UNREADABLE[kind]
    if isinstance(made, bytes):
        a.write(made)
    else:
        await made(a)
    await peer.append("s", turn("b"))
    await peer.save(asset("c", id="other"))
    before = a.signature()
    assert told(await a.sync()) == {"downloaded": ["other"], "conflicts": ["s"]}
    about = await a.conflict("s")
    assert about.reason.startswith("the file can't be read")
    assert "secret" not in about.reason
    assert a.signature() == before
    assert contents(await peer.load("s")) == ["a", "b"]
    assert await a.state() is SyncState.CONFLICT
    with pytest.raises((CorruptSessionError, VersionIncompatibleError)):
        await a.load("s")
    await (asyncio.to_thread(a.file().rmdir) if a.file().is_dir() else asyncio.to_thread(a.file().unlink))
    a.write(original)
    assert told(await a.sync()) == {"downloaded": ["s"]}
    await idle(a)


async def test_a_newer_file_is_never_overwritten(machines: Machines) -> None:
    """A file of a newer version stays as it is, also when it is resolved against."""
    a, _ = await machines.synced()
    a.write(NEWER)
    assert told(await a.sync()) == REFUSED
    with pytest.raises(VersionIncompatibleError):
        await a.resolve("s", keep="remote")
    assert a.data() == NEWER
    await idle(a, conflicts=["s"])


async def test_a_newer_session_is_never_overwritten(machines: Machines) -> None:
    """What is stored in a newer version stays as it is, also when it is resolved against."""
    a, peer = await machines.synced()
    await peer.append("s", turn("b"))
    place = machines.place
    key = place.key("session:s")
    place.raw.hset(key, "version", msgspec.msgpack.encode(2))
    stored = place.raw.hgetall(key)
    a = await machines.reopen(a)  # it remembers nothing that it need not read
    assert told(await a.sync()) == REFUSED
    assert (await a.conflict("s")).reason.startswith("what is stored can't be read")
    with pytest.raises(VersionIncompatibleError):
        await a.resolve("s", keep="local")
    assert place.raw.hgetall(key) == stored
    assert a.texts() == ["a"]
    await idle(a, conflicts=["s"])


# The brake


def many(count: int) -> list[SessionAsset]:
    return [asset(f"turn of {n}", id=f"s{n:02}") for n in range(count)]


async def test_many_deleted_there(machines: Machines) -> None:
    """A round that would delete more than half of what is here, and more than 10, does the rest and stops."""
    sessions = many(21)
    a, peer = await machines.synced(sessions=sessions)
    await peer.delete_many([session.id for session in sessions[:11]])
    await peer.append("s20", turn("more"))
    with pytest.raises(SyncStoppedError):
        await a.sync()
    assert a.texts("s20") == ["turn of 20", "more"]
    assert all(a.file(session.id).exists() for session in sessions)
    assert a.sync_status().mode is SyncMode.ERROR
    assert a.pending() == (0, 11, [])
    report = await a.sync(deletions=True)
    assert told(report) == {"deleted": [session.id for session in sessions[:11]]}
    assert len(report.kept) == 11
    await idle(a)


@pytest.mark.parametrize(("count", "deleted"), [(10, 10), (22, 11)])
async def test_not_so_many_deleted_there(machines: Machines, count: int, deleted: int) -> None:
    """Ten deletions, or half of all, are done without asking."""
    sessions = many(count)
    a, peer = await machines.synced(sessions=sessions)
    await peer.delete_many([session.id for session in sessions[:deleted]])
    assert told(await a.sync()) == {"deleted": [session.id for session in sessions[:deleted]]}
    await idle(a)


async def test_many_deleted_by_calls(machines: Machines) -> None:
    """Sessions that were deleted by calls of the store are no accident, however many they are."""
    sessions = many(15)
    a, peer = await machines.synced(sessions=sessions)
    assert await a.delete_many([session.id for session in sessions]) == [None] * 15
    assert told(await a.sync()) == {"deleted": [session.id for session in sessions]}
    assert await peer.list() == []
    await idle(a)

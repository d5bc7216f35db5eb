"""The scenarios of the hybrid store, by number, at both kinds of server and in both forms.

Each ends with a round that does nothing.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from orcs_redis import (
    CompactedTurn,
    LearnedFact,
    NotFoundError,
    SessionAsset,
    SyncMode,
    SyncState,
)

from .conftest import Place
from .machines import TABLE, Machine, Machines, asset, contents, copied, idle, open_machines, setting, told
from .support import turn

pytestmark = pytest.mark.parametrize("place", TABLE, indirect=True, ids=str)


@pytest.fixture
async def machines(place: Place, tmp_path: Path) -> AsyncIterator[Machines]:
    async with open_machines(tmp_path, place) as opened:
        yield opened


def without(text: str) -> Callable[[SessionAsset], None]:
    """A change: the turns that say this are removed."""

    def change(session: SessionAsset) -> None:
        session.history.turns = [each for each in session.history.turns if each.content != text]

    return change


def compacted(session: SessionAsset) -> None:
    session.history.compact(lambda old: " ".join(each.content for each in old))


# Alone, and with a peer


async def test_01_saved_offline_then_synced(machines: Machines) -> None:
    """What was saved offline is here alone until a round; the round leaves the file as it is."""
    a, peer = await machines.open(), await machines.peer()
    saved = asset("a")
    assert await a.save(saved) == a.file().stat().st_mtime_ns
    assert a.data() == saved.to_json().encode()
    assert await a.state() is SyncState.LOCAL_ONLY
    assert a.sync_status().mode is SyncMode.OFFLINE
    assert a.pending() == (1, 0, [])
    before = (a.data(), a.signature())
    assert told(await a.sync()) == {"uploaded": ["s"]}
    assert (a.data(), a.signature()) == before
    assert await a.state() is SyncState.SYNCED
    assert a.sync_status().is_fully_synced()
    assert await peer.load_versioned("s") == (saved, 1)
    await idle(a)


async def test_02_a_peers_session_comes(machines: Machines) -> None:
    """A peer's session is known after a dry run and here after a round."""
    a, peer = await machines.open(), await machines.peer()
    await peer.save(asset("a"))
    await a.sync(dry_run=True)
    assert await a.state() is SyncState.REMOTE_AHEAD
    assert not a.file().exists()
    assert a.pending() == (0, 1, [])
    assert told(await a.sync()) == {"downloaded": ["s"]}
    assert a.data() == (await peer.load("s")).to_json().encode()
    assert await a.state() is SyncState.SYNCED
    await idle(a)


async def test_03_appended_offline(machines: Machines) -> None:
    """A turn that was appended here is read here at once, and by peers after a round, which writes once."""
    a, peer = await machines.synced()
    revision = (await peer.load_versioned("s")).revision
    await a.append("s", turn("b"))
    assert await a.state() is SyncState.LOCAL_AHEAD
    assert a.pending() == (1, 0, [])
    assert contents(await a.load("s")) == ["a", "b"]
    assert contents(await peer.load("s")) == ["a"]
    assert told(await a.sync()) == {"uploaded": ["s"]}
    stored = await peer.load_versioned("s")
    assert (contents(stored.asset), stored.revision) == (["a", "b"], revision + 1)
    await idle(a)


async def test_04_a_peer_appends(machines: Machines) -> None:
    """What a peer appends is read here after a round, not before."""
    a, peer = await machines.synced()
    await peer.append("s", turn("b"))
    await a.sync(dry_run=True)
    assert await a.state() is SyncState.REMOTE_AHEAD
    assert a.pending() == (0, 1, [])
    assert contents(await a.load("s")) == ["a"]
    assert told(await a.sync()) == {"downloaded": ["s"]}
    assert a.texts() == ["a", "b"]
    await idle(a)


@pytest.mark.parametrize("shift", [0, -3600, 3600], ids=["05", "06 slow", "06 fast"])
async def test_05_06_both_append(machines: Machines, monkeypatch: pytest.MonkeyPatch, shift: int) -> None:
    """The shared store's order stands, and what is new here goes after it, whatever the clocks say."""
    a, b, peer = await machines.synced("a", "b")
    await peer.append("s", turn("c"))
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() + shift * 10**9)
    shifted = turn("b")
    shifted.timestamp_ms += shift * 1000
    await a.append("s", shifted)
    await a.sync(dry_run=True)
    assert await a.state() is SyncState.LOCAL_AHEAD
    assert a.pending() == (1, 1, [])
    assert told(await a.sync()) == {"merged": ["s"]}
    assert a.texts() == contents(await peer.load("s")) == ["a", "c", "b"]
    assert a.kept("s") == []
    assert told(await b.sync()) == {"downloaded": ["s"]}
    await idle(a, b)


async def test_07_different_keys(machines: Machines) -> None:
    """Edits of two keys are both kept."""
    a, peer = await machines.synced()
    await a.update("s", setting(x=2))
    await peer.update("s", setting(y=2))
    assert told(await a.sync()) == {"merged": ["s"]}
    assert a.read().metadata == (await peer.load("s")).metadata == {"x": 2, "y": 2}
    assert a.kept("s") == []
    await idle(a)


async def in_conflict(machines: Machines, **options: Any) -> tuple[Machine, Any]:
    """A machine with x=2 and a peer with x=3, where both had 1."""
    a, peer = await machines.synced()
    if options:
        a = await machines.reopen(a, **options)
    await a.update("s", setting(x=2))
    await peer.update("s", setting(x=3))
    return a, peer


async def test_08_the_same_key(machines: Machines) -> None:
    """Two edits of one key are a conflict: both sides stay as they are, and it says which part."""
    a, peer = await in_conflict(machines)
    revision = (await peer.load_versioned("s")).revision
    assert told(await a.sync()) == {"conflicts": ["s"]}
    assert await a.state() is SyncState.CONFLICT
    assert a.pending() == (0, 0, ["s"])
    assert a.read().metadata["x"] == 2
    stored = await peer.load_versioned("s")
    assert (stored.asset.metadata["x"], stored.revision) == (3, revision)
    about = await a.conflict("s")
    assert (about.id, about.parts) == ("s", ["metadata.x"])
    assert (about.local, about.remote) == (a.read(), stored.asset)
    await idle(a, conflicts=["s"])


@pytest.mark.parametrize("with_turns", [False, True])
async def test_09_resolved_for_here(machines: Machines, with_turns: bool) -> None:
    """What is here holds for the parts that collide, the rest is merged, and what lost is kept."""
    a, peer = await in_conflict(machines)
    if with_turns:
        await a.append("s", turn("b"))
        await peer.append("s", turn("c"))
    assert told(await a.sync()) == {"conflicts": ["s"]}
    a = await machines.reopen(a)
    await a.resolve("s", keep="local")
    assert a.sync_status().mode is SyncMode.ONLINE
    assert contents(await a.remote.load("s")) == a.texts()
    assert a.read().metadata == (await peer.load("s")).metadata == {"x": 2, "y": 1}
    assert a.texts() == contents(await peer.load("s")) == (["a", "c", "b"] if with_turns else ["a"])
    assert 3 in await a.kept_values("x")
    assert await a.state() is SyncState.SYNCED
    assert a.pending() == (0, 0, [])
    await idle(a)


async def test_10_preferring_the_shared_store(machines: Machines) -> None:
    """With a side preferred there is no conflict; what lost is kept."""
    a, peer = await in_conflict(machines, prefer="remote")
    report = await a.sync()
    assert (report.conflicts, report.failed) == ([], [])
    assert a.read().metadata["x"] == (await peer.load("s")).metadata["x"] == 3
    assert await a.kept_values("x") == {2}
    assert len(report.kept) == 1
    await idle(a)


async def test_11_the_same_edit(machines: Machines) -> None:
    """Equal edits on both sides are none: nothing is sent, nothing written."""
    a, peer = await machines.synced()
    await a.update("s", setting(x=2))
    changed = await peer.update("s", setting(x=2))
    before = a.traces()
    assert told(await a.sync()) == {}
    assert a.traces() == before
    assert (await peer.load_versioned("s")).revision == changed.revision
    assert await a.state() is SyncState.SYNCED
    await idle(a)


# Deletions


async def test_12_deleted_here(machines: Machines) -> None:
    """A session that was deleted here is gone at once, and there after a round."""
    a, peer = await machines.synced()
    await a.delete("s")
    assert await a.list() == []
    assert await a.exists("s") is False
    assert not a.file().exists()
    assert a.pending() == (1, 0, [])
    assert told(await a.sync()) == {"deleted": ["s"]}
    assert not await peer.exists("s")
    await idle(a)


async def test_13_deleted_there(machines: Machines) -> None:
    """What a peer deleted goes here too, into the kept copies, and does not come back."""
    a, peer = await machines.synced()
    await peer.delete("s")
    await a.sync(dry_run=True)
    assert await a.state() is SyncState.REMOTE_AHEAD
    assert a.pending() == (0, 1, [])
    assert a.texts() == ["a"]
    report = await a.sync()
    assert told(report) == {"deleted": ["s"]}
    assert not a.file().exists()
    assert [copy.path for copy in a.kept("s")] == report.kept
    assert await a.load_kept_texts() == [["a"]]
    await idle(a)
    assert not await peer.exists("s")


async def test_14_deleted_here_edited_there(machines: Machines) -> None:
    """An edit there beats a deletion here."""
    a, peer = await machines.synced()
    await a.delete("s")
    revision = await peer.append("s", turn("b"))
    assert told(await a.sync()) == {"revived": ["s"]}
    assert a.texts() == ["a", "b"]
    assert (await peer.load_versioned("s")).revision == revision
    await idle(a)


async def test_15_deleted_there_edited_here(machines: Machines) -> None:
    """An edit here beats a deletion there."""
    a, peer = await machines.synced()
    await peer.delete("s")
    await a.append("s", turn("b"))
    await a.sync(dry_run=True)
    assert await a.state() is SyncState.LOCAL_AHEAD
    assert told(await a.sync()) == {"revived": ["s"]}
    assert contents(await peer.load("s")) == ["a", "b"]
    await idle(a)


async def test_16_deleted_on_both(machines: Machines) -> None:
    """What both have deleted is forgotten."""
    a, peer = await machines.synced()
    await a.delete("s")
    await peer.delete("s")
    assert told(await a.sync()) == {}
    assert a.pending() == (0, 0, [])
    assert await a.exists("s") is False
    with pytest.raises(NotFoundError):
        await a.load("s")
    await idle(a)


async def test_17_after_the_tombstones(machines: Machines) -> None:
    """A machine that comes back when nothing in the shared store remembers the deletion deletes all the same."""
    a, b, peer = await machines.synced("a", "b")
    await a.delete("s")
    await a.sync()
    raw: Any = machines.place.raw
    place = machines.place
    assert raw.zcard(place.key("deleted")) == 1
    # As the script does when there are more than it keeps.
    for key in ("deleted", "deleted:meta"):
        raw.delete(place.key(key))
    raw.zrem(place.key("changes"), "s")
    raw.hset(place.key("state"), "compacted", raw.hget(place.key("state"), "revision"))
    await peer.save(asset("a", id="other"))
    assert told(await b.sync()) == {"deleted": ["s"], "downloaded": ["other"]}
    assert not b.file().exists()
    assert await b.load_kept_texts() == [["a"]]
    await idle(b)


# The stale writer


async def test_18_overwritten_from_memory(machines: Machines) -> None:
    """A program that writes what it has in memory removes no turn that came meanwhile."""
    a, peer = await machines.synced(sessions=[asset("a", "b")])
    memory = a.read()
    await peer.append("s", turn("c"))
    await a.sync()
    assert a.texts() == ["a", "b", "c"]
    memory.add_turn(turn("d"))
    a.write(memory)
    await a.sync()
    assert a.texts() == contents(await peer.load("s")) == ["a", "b", "c", "d"]
    await idle(a)


async def test_19_saved_from_memory(machines: Machines) -> None:
    """A save of an asset that was loaded before a round keeps what the round has brought, again and again."""
    a, peer = await machines.synced(sessions=[asset("a", "b")])
    memory = await a.load("s")
    await peer.append("s", turn("c"))
    await a.sync()
    memory.add_turn(turn("d"))
    await a.save(memory)
    assert a.texts() == ["a", "b", "c", "d"]
    memory.add_turn(turn("e"))
    await a.save(memory)
    assert a.texts() == ["a", "b", "c", "d", "e"]
    assert told(await a.sync()) == {"uploaded": ["s"]}
    assert contents(await peer.load("s")) == ["a", "b", "c", "d", "e"]
    await idle(a)


async def test_20_removed_by_a_save(machines: Machines) -> None:
    """A turn that a save removes is removed everywhere, for good."""
    a, b, peer = await machines.synced("a", "b", sessions=[asset("a", "b")])
    loaded = await a.load("s")
    without("b")(loaded)
    await a.save(loaded)
    assert a.texts() == ["a"]
    assert told(await a.sync()) == {"uploaded": ["s"]}
    assert contents(await peer.load("s")) == ["a"]
    await b.sync()
    assert b.texts() == ["a"]
    await idle(a, b)
    assert a.texts() == contents(await peer.load("s")) == ["a"]


async def test_21_removed_by_hand(machines: Machines) -> None:
    """A turn that was cut out of the file comes back with the next round; resolving with an asset removes it."""
    a, b, peer = await machines.synced("a", "b", sessions=[asset("a", "b")])
    a.edit(without("b"))
    await a.sync()
    assert a.texts() == contents(await peer.load("s")) == ["a", "b"]
    loaded = await a.load("s")
    without("b")(loaded)
    await a.resolve("s", keep=loaded)
    assert a.texts() == contents(await peer.load("s")) == ["a"]
    await b.sync()
    assert b.texts() == ["a"]
    await idle(a, b)


def cut_to(count: int, *texts: str) -> SessionAsset:
    session = asset(*texts)
    session.history.max_turns = count
    return session


@pytest.mark.parametrize("behind", [False, True], ids=["saved", "by orcs"])
async def test_22_compacted_here_appended_there(machines: Machines, behind: bool) -> None:
    """A compaction here and a turn from there: both hold, the compacted turns stay away."""
    a, peer = await machines.synced(sessions=[cut_to(2, "a", "b", "c")])
    if behind:
        a.edit(compacted)
    else:
        await a.update("s", compacted)
    await peer.append("s", turn("d"))
    assert told(await a.sync()) == {"merged": ["s"]}
    stored = await peer.load("s")
    assert contents(stored) == a.texts() == ["b", "c", "d"]
    assert [each.summary for each in stored.history.compacted] == ["a"]
    await idle(a)


@pytest.mark.parametrize("ours_cuts", [1, 3])
async def test_23_compacted_on_both(machines: Machines, ours_cuts: int) -> None:
    """Of two compactions that of the shared store stands, with all its turns and our new ones; our file is kept."""

    def cut(count: int) -> Callable[[SessionAsset], None]:
        def change(session: SessionAsset) -> None:
            old = session.history.turns[:count]
            del session.history.turns[:count]
            made = CompactedTurn(summary=f"{count} turns", turn_count=count, start_time_ms=0, end_time_ms=0)
            session.history.compacted.append(made)
            assert len(old) == count

        return change

    a, peer = await machines.synced(sessions=[asset("a", "b", "c", "d")])
    await a.update("s", cut(ours_cuts))
    await a.append("s", turn("e"))
    await peer.update("s", cut(2))
    await peer.append("s", turn("f"))
    before = a.data()
    report = await a.sync()
    assert (report.conflicts, report.failed) == ([], [])
    stored = await peer.load("s")
    assert contents(stored) == a.texts() == ["c", "d", "f", "e"]
    assert [each.summary for each in stored.history.compacted] == ["2 turns"]
    assert before in [copy.path.read_bytes() for copy in a.kept("s")]
    await idle(a)


# Identity


async def test_24_two_sessions_of_one_id(machines: Machines) -> None:
    """Two machines that made a session of the same id offline are not mixed: the second one is asked."""
    a, b, peer = await machines.open("a"), await machines.open("b"), await machines.peer()
    ours, other = asset("a"), asset("b")
    other.created_at_ms = ours.created_at_ms + 1
    await a.save(ours)
    await b.save(other)
    assert told(await b.sync()) == {"uploaded": ["s"]}
    assert told(await a.sync()) == {"conflicts": ["s"]}
    assert await a.state() is SyncState.CONFLICT
    assert (a.texts(), contents(await peer.load("s"))) == (["a"], ["b"])
    await idle(a, conflicts=["s"])
    await a.resolve("s", keep="remote")
    assert a.texts() == contents(await peer.load("s")) == ["b"]
    assert ["a"] in await a.load_kept_texts()
    await idle(a, b)


@pytest.mark.parametrize("with_state", [True, False])
async def test_25_a_copied_folder(machines: Machines, with_state: bool) -> None:
    """A copy of the folder, with its state or without, takes what is new from the shared store, and asks nothing."""
    a, peer = await machines.synced(sessions=[asset("a"), asset("a", id="t", x=1), asset("a", id="u")])
    await a.aclose()
    copied(a, machines.folder("b"), state=with_state)
    a = await machines.open("a")
    await a.append("s", turn("b"))
    await a.append("t", turn("b"))
    await a.update("t", setting(x=2))
    assert told(await a.sync()) == {"uploaded": ["s", "t"]}
    b = await machines.open("b")
    assert told(await b.sync()) == {"downloaded": ["s", "t"]}
    assert b.texts() == contents(await peer.load("s")) == ["a", "b"]
    assert b.read("t").metadata == {"x": 2}
    await idle(a, b)


# What is a change, and what is none


async def test_43_within_one_tick(machines: Machines) -> None:
    """An edit of the same size, with the file's time set back, is found."""
    a, peer = await machines.synced()
    before = a.file().stat()
    data = a.data()
    position = data.index(b'"a"')
    with a.file().open("r+b") as file:
        file.seek(position + 1)
        file.write(b"z")
    os.utime(a.file(), ns=(before.st_atime_ns, before.st_mtime_ns))
    after = a.file().stat()
    same = (before.st_ino, before.st_size, before.st_mtime_ns)
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == same
    assert told(await a.sync()) == {"uploaded": ["s"]}
    assert contents(await peer.load("s")) == a.texts() == ["z"]
    await idle(a)


async def test_44_what_json_changes(machines: Machines) -> None:
    """What orcs' JSON does not hold exactly, and another order of keys, are no changes."""
    a, peer = await machines.open(), await machines.peer()
    made = asset("a", x=1, y=2, z={"p": 1, "q": 2})
    made.project_context.learn(LearnedFact.new("k", "v", "peer").with_confidence(0.1 + 0.2))
    await peer.save(made)
    assert told(await a.sync()) == {"downloaded": ["s"]}
    await idle(a)
    assert told(await a.sync(verify=True)) == {}
    assert await a.state() is SyncState.SYNCED
    fields = json.loads(a.data())
    fields["metadata"] = {"z": {"q": 2, "p": 1}, "y": 2, "x": 1}
    a.write(json.dumps(dict(reversed(fields.items())), indent=1).encode())
    assert told(await a.sync()) == {}
    assert await a.state() is SyncState.SYNCED
    await idle(a)


async def test_45_touched(machines: Machines) -> None:
    """The time of the last update by itself is no change; it goes along with the next edit."""
    a, peer = await machines.synced()
    stored = await peer.load_versioned("s")
    later = stored.asset.updated_at_ms + 5

    def touch(session: SessionAsset) -> None:
        session.updated_at_ms = later

    a.edit(touch)
    assert told(await a.sync()) == {}
    assert await a.state() is SyncState.SYNCED
    assert (await peer.load_versioned("s")).revision == stored.revision
    assert a.read().updated_at_ms == later
    await idle(a)
    a.edit(setting(x=2))
    assert told(await a.sync()) == {"uploaded": ["s"]}
    assert (await peer.load("s")).updated_at_ms == later
    await idle(a)

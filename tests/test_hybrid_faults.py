"""The scenarios of the hybrid store in which something breaks, and what else a server, a disk or a network does.

As those of test_hybrid.py, each ends with a round that does nothing.
"""

from __future__ import annotations

import asyncio
import resource
import secrets
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from orcs_redis import (
    LayoutError,
    OutcomeUnknownError,
    PermissionDeniedError,
    SerializationError,
    SessionAsset,
    StoreFullError,
    StoreResetError,
    SyncMode,
    SyncState,
    SyncStoppedError,
    UnavailableError,
)
from orcs_redis.stores.hybrid.shared import Shared

from .conftest import Place, Server
from .faults.proxy import REFUSE, Proxy
from .hybrid_workers import append_often, killed_at_a_call, killed_at_a_write, start
from .machines import TABLE, Machine, Machines, asset, contents, idle, open_machines, setting, told, until_true
from .support import turn, until

tabled = pytest.mark.parametrize("place", TABLE, indirect=True, ids=str)
over_tcp = pytest.mark.parametrize("place", [row for row in TABLE if row.server == "redis"], indirect=True, ids=str)


@pytest.fixture
async def machines(place: Place, tmp_path: Path) -> AsyncIterator[Machines]:
    async with open_machines(tmp_path, place) as opened:
        yield opened


async def ended(process: Any) -> int:
    """Wait for a process, and return how it ended."""
    await asyncio.to_thread(process.join, 60)
    assert process.exitcode is not None, "it hangs"
    return int(process.exitcode)


async def killed(machines: Machines, machine: Machine, work: Callable[..., None], *arguments: Any) -> Machine:
    """Let another process run a round on a machine's folder and be killed in it; open the folder again."""
    await machine.aclose()
    place = machines.place
    assert await ended(start(work, place.row.form, machine.folder, place.url, place.namespace, *arguments)) == -9
    return await machines.open(machine.folder.name)


# Killed


@over_tcp
@pytest.mark.parametrize("first", [True, False], ids=["new", "edited"])
async def test_26_killed_after_a_push(machines: Machines, first: bool) -> None:
    """A push that was applied and not noted is recognised: nothing is sent again."""
    if first:
        a, peer = await machines.open(), await machines.peer()
        await a.save(asset("a"))
    else:
        a, peer = await machines.synced()
        await a.append("s", turn("b"))
    a = await killed(machines, a, killed_at_a_write, 1)
    revision = (await peer.load_versioned("s")).revision
    report = await a.sync()
    assert (report.conflicts, report.failed, report.kept) == ([], [], [])
    stored = await peer.load_versioned("s")
    assert stored.revision == revision
    assert contents(stored.asset) == a.texts() == (["a"] if first else ["a", "b"])
    assert await a.state() is SyncState.SYNCED
    await idle(a)


@over_tcp
async def test_26_killed_after_a_merge(machines: Machines) -> None:
    """A merge that arrived there and not here arrives here."""
    a, peer = await machines.synced()
    await a.append("s", turn("b"))
    await peer.append("s", turn("c"))
    a = await killed(machines, a, killed_at_a_write, 1)
    revision = (await peer.load_versioned("s")).revision
    report = await a.sync()
    assert (report.conflicts, report.failed, report.kept) == ([], [], [])
    stored = await peer.load_versioned("s")
    assert stored.revision == revision
    assert contents(stored.asset) == a.texts() == ["a", "c", "b"]
    await idle(a)


@over_tcp
async def test_26_killed_after_a_deletion(machines: Machines) -> None:
    """A deletion that was done there and not noted is not a deletion by others."""
    a, peer = await machines.synced()
    await a.delete("s")
    a = await killed(machines, a, killed_at_a_write, 1)
    assert told(await a.sync()) == {}
    assert not await peer.exists("s")
    await idle(a)


@over_tcp
async def test_27_and_edited_before_the_next_round(machines: Machines) -> None:
    """What is changed again after the crash is sent, and is no conflict with what was sent before it."""
    a, peer = await machines.synced()
    await a.update("s", setting(x=2))
    a = await killed(machines, a, killed_at_a_write, 1)
    await a.update("s", setting(x=3))
    assert told(await a.sync()) == {"uploaded": ["s"]}
    assert (await peer.load("s")).metadata["x"] == 3
    await idle(a)


@over_tcp
@pytest.mark.parametrize("again", [False, True])
async def test_28_and_a_peer_appended(machines: Machines, again: bool) -> None:
    """What a peer appends to what was sent before the crash is merged; no turn is there twice."""
    a, peer = await machines.synced()
    await a.append("s", turn("b"))
    a = await killed(machines, a, killed_at_a_write, 1)
    await peer.append("s", turn("c"))
    if again:
        await a.append("s", turn("d"))
    report = await a.sync()
    assert (report.conflicts, report.failed) == ([], [])
    assert a.texts() == contents(await peer.load("s")) == ["a", "b", "c", *(["d"] if again else [])]
    await idle(a)


@over_tcp
async def test_28_and_the_file_was_overwritten(machines: Machines) -> None:
    """A program that then overwrites the file with what it had before removes nothing that was sent."""
    a, peer = await machines.synced()
    memory = a.read()
    await a.append("s", turn("b"))
    a = await killed(machines, a, killed_at_a_write, 1)
    memory.add_turn(turn("c"))
    a.write(memory)
    report = await a.sync()
    assert (report.conflicts, report.failed) == ([], [])
    assert a.texts() == contents(await peer.load("s")) == ["a", "b", "c"]
    await idle(a)


@over_tcp
@pytest.mark.parametrize("kind", ["pull", "deletion"])
@pytest.mark.timeout(300)
async def test_29_killed_in_a_pull(machines: Machines, kind: str) -> None:
    """At whatever point of a pull it is killed, the file is one version whole, and the next round settles it."""
    a, peer = await machines.synced()
    for count in range(1, 200):
        if not await peer.exists("s"):
            await peer.save(asset("a"))
            await a.sync()
        old = a.data()
        if kind == "pull":
            await peer.append("s", turn(str(count)))
            new: bytes | None = (await peer.load("s")).to_json().encode()
        else:
            await peer.delete("s")
            new = None
        await a.aclose()
        shutil.rmtree(a.folder / ".orcs-redis" / "kept", ignore_errors=True)  # the more copies, the more calls
        place = machines.place
        process = start(killed_at_a_call, place.row.form, a.folder, place.url, place.namespace, count)
        code = await ended(process)
        found = a.data() if a.file().exists() else None
        assert found in (old, new), count
        a = await machines.open()
        report = await a.sync()
        assert (report.conflicts, report.failed, report.uploaded, report.revived) == ([], [], [], []), count
        assert (a.data() if a.file().exists() else None) == new, count
        await idle(a)
        if code == 0:
            break
        assert code == -9
    assert (code, count > 30) == (0, True)


@over_tcp
async def test_30_killed_in_a_first_round(machines: Machines) -> None:
    """A first round that was killed half-way is gone on with: what was done is not done again."""
    a, peer = await machines.open(), await machines.peer()
    ids = [f"s{n:03}" for n in range(300)]
    await a.save_many([asset("a", id=id) for id in ids])
    a = await killed(machines, a, killed_at_a_write, 120)
    done = {meta.id: meta.revision for meta in await peer.list()}
    assert 120 <= len(done) < 300
    report = await a.sync()
    assert (report.conflicts, report.failed) == ([], [])
    assert 300 - len(done) <= len(report.uploaded) <= 300 - len(done) + 32
    after = {meta.id: meta.revision for meta in await peer.list()}
    assert sorted(after) == ids
    assert {id: after[id] for id in done} == done
    await idle(a)


# Lost replies


def lose_replies(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Let each reply to a write of session "s" be lost, after it was applied."""
    write = getattr(Shared, method)

    def losing(self: Any, *arguments: Any) -> Any:
        result = yield from write(self, *arguments)
        if "s" in (arguments[0], getattr(arguments[0], "id", None)):
            raise OutcomeUnknownError
        return result

    monkeypatch.setattr(Shared, method, losing)


@tabled
async def test_31_the_reply_of_a_push_is_lost(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    """A push of which the outcome is unknown does not stop the round; the next one finds it there."""
    a, peer = await machines.synced(sessions=[asset("a", id=id) for id in "stu"])
    for id in "stu":
        await a.append(id, turn("b"))
    revision = (await peer.load_versioned("s")).revision
    with monkeypatch.context() as patched:
        lose_replies(patched, "put")
        report = await a.sync()
    assert told(report) == {"uploaded": ["t", "u"], "failed": {"s": OutcomeUnknownError}}
    stored = await peer.load_versioned("s")
    assert (contents(stored.asset), stored.revision > revision) == (["a", "b"], True)
    report = await a.sync()
    assert (report.conflicts, report.failed, report.kept) == ([], [], [])
    assert (await peer.load_versioned("s")).revision == stored.revision
    assert a.texts() == ["a", "b"]
    await idle(a)


@tabled
async def test_31_the_reply_of_a_deletion_is_lost(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deletion of which the outcome is unknown does not stop the round; the next one finds it done."""
    a, peer = await machines.synced(sessions=[asset("a", id=id) for id in "st"])
    await a.delete("s")
    await a.append("t", turn("b"))
    with monkeypatch.context() as patched:
        lose_replies(patched, "remove")
        report = await a.sync()
    assert told(report) == {"uploaded": ["t"], "failed": {"s": OutcomeUnknownError}}
    assert told(await a.sync()) == {}
    assert not await peer.exists("s")
    await idle(a)


# Damaged


@tabled
async def test_32_half_a_file(machines: Machines) -> None:
    """Half a file is a conflict that names it; resolved, it is kept as it was, and the session is here again."""
    a, peer = await machines.synced()
    whole = a.data()
    half = whole[: len(whole) // 2]
    a.write(half)
    revision = (await peer.load_versioned("s")).revision
    assert told(await a.sync()) == {"conflicts": ["s"]}
    assert (await a.conflict("s")).reason.startswith("the file can't be read")
    assert a.data() == half
    assert (await peer.load_versioned("s")).revision == revision
    await idle(a, conflicts=["s"])
    await a.resolve("s", keep="remote")
    assert a.data() == whole
    assert half in [copy.path.read_bytes() for copy in a.kept("s")]
    assert await a.state() is SyncState.SYNCED
    await idle(a)


@tabled
async def test_33_damaged_there(machines: Machines) -> None:
    """What is stored and can't be read is a conflict; resolved for this side, it is what the file has."""
    a, peer = await machines.synced()
    await peer.append("s", turn("b"))
    place = machines.place
    place.raw.hset(place.key("session:s"), "preferences", b"\xc1")
    a = await machines.reopen(a)  # it remembers nothing that it need not read
    before = a.data()
    assert told(await a.sync()) == {"conflicts": ["s"]}
    assert (await a.conflict("s")).reason.startswith("what is stored can't be read")
    assert a.data() == before
    await idle(a, conflicts=["s"])
    await a.resolve("s", keep="local")
    assert a.data() == before
    assert await peer.load("s") == a.read()
    await idle(a)


# Another past


def wipe(place: Place) -> None:
    keys = [*place.raw.scan_iter(match=f"*{place.namespace}*", count=10_000)]
    place.raw.delete(*keys)


class Backup:
    """What a namespace has, to be put back."""

    def __init__(self, place: Place) -> None:
        raw: Any = place.raw
        self._place = place
        self._kept = {key: raw.dump(key) for key in raw.scan_iter(match=f"*{place.namespace}*", count=10_000)}

    def restore(self) -> None:
        wipe(self._place)
        for key, data in self._kept.items():
            self._place.raw.restore(key, 0, data)


@tabled
async def test_34_wiped(machines: Machines) -> None:
    """A wiped server is told and nothing is done about it; adopting it, all that is here goes up."""
    sessions = [asset("a", id=id) for id in "stu"]
    a, _ = await machines.synced(sessions=sessions)
    wipe(machines.place)
    before = a.traces()
    for _ in range(2):
        with pytest.raises(StoreResetError):
            await a.sync()
    assert a.sync_status().mode is SyncMode.ERROR
    assert a.traces() == before
    await a.append("s", turn("b"))
    await a.save(asset("new", id="v"))
    a = await machines.reopen(a)
    with pytest.raises(StoreResetError):
        await a.sync()
    assert told(await a.sync(adopt=True)) == {"uploaded": ["s", "t", "u", "v"]}
    peer = await machines.peer()
    assert contents(await peer.load("s")) == ["a", "b"]
    await idle(a)


@tabled
async def test_35_restored(machines: Machines) -> None:
    """A server that went back in time is told; adopting it, what is newer here goes up again, and nothing else."""
    a, peer = await machines.synced(sessions=[asset("a", id=id) for id in "stu"])
    backup = Backup(machines.place)
    await a.append("s", turn("b"))
    assert told(await a.sync()) == {"uploaded": ["s"]}
    await peer.append("t", turn("c"))
    assert told(await a.sync()) == {"downloaded": ["t"]}
    backup.restore()
    with pytest.raises(StoreResetError):
        await a.sync()
    assert (a.texts("s"), a.texts("t")) == (["a", "b"], ["a", "c"])
    peer = await machines.peer()
    revision = (await peer.load_versioned("u")).revision
    report = await a.sync(adopt=True)
    assert (report.conflicts, report.failed, report.deleted) == ([], [], [])
    assert "u" not in told(report).get("uploaded", [])
    assert [contents(await peer.load(id)) for id in "stu"] == [["a", "b"], ["a", "c"], ["a"]]
    assert (await peer.load_versioned("u")).revision == revision
    await idle(a)


@tabled
async def test_a_dry_run_adopts_nothing(machines: Machines) -> None:
    """A dry run says what adopting would do, and the next round stops as before: nothing was sent, nothing noted."""
    a, peer = await machines.synced(sessions=[asset("a", id=id) for id in "st"])
    backup = Backup(machines.place)
    last = a.sync_status().last_sync
    await a.append("s", turn("b"))
    wipe(machines.place)
    peer = await machines.peer()
    await peer.save(asset("z", id="other"))
    expected = {"uploaded": ["s", "t"], "downloaded": ["other"]}
    assert told(await a.sync(dry_run=True, adopt=True)) == expected
    assert a.sync_status().last_sync == last
    with pytest.raises(StoreResetError):
        await a.sync()
    assert [meta.id for meta in await peer.list()] == ["other"]
    a = await machines.reopen(a)
    with pytest.raises(StoreResetError):
        await a.sync()
    assert (await a.state("s"), await a.state("t")) == (SyncState.LOCAL_AHEAD, SyncState.SYNCED)
    backup.restore()  # it was all a mistake
    a = await machines.reopen(a)
    assert told(await a.sync()) == {"uploaded": ["s"]}
    await idle(a)


@tabled
async def test_36_another_namespace(machines: Machines) -> None:
    """Another namespace is told; adopting it, both have the union, and the old one is untouched."""
    place = machines.place
    a, peer = await machines.synced(sessions=[asset("a", id="s"), asset("a", id="t")])
    name = f"{place.namespace}-other"
    there = await machines.peer(namespace=name)
    await there.save(asset("z", id="u"))
    a = await machines.reopen(a, namespace=name)
    before = {meta.id: meta.revision for meta in await peer.list()}
    with pytest.raises(StoreResetError):
        await a.sync()
    assert sorted(path.stem for path in a.folder.glob("*.json")) == ["s", "t"]
    assert told(await a.sync(adopt=True)) == {"uploaded": ["s", "t"], "downloaded": ["u"]}
    assert sorted(meta.id for meta in await there.list()) == ["s", "t", "u"]
    assert {meta.id: meta.revision for meta in await peer.list()} == before
    await idle(a)


# Files gone


def many(count: int) -> list[SessionAsset]:
    return [asset(f"turn of {n}", id=f"s{n:02}") for n in range(count)]


@tabled
async def test_37_many_files_removed(machines: Machines) -> None:
    """Files that are gone in great number are an accident until it is said that they are not."""
    sessions = many(40)
    a, peer = await machines.synced(sessions=sessions)
    gone = [session.id for session in sessions[:30]]
    for id in gone:
        a.file(id).unlink()
    await a.append("s39", turn("more"))
    await peer.save(asset("new", id="t"))
    with pytest.raises(SyncStoppedError):
        await a.sync()
    assert contents(await peer.load("s39")) == ["turn of 39", "more"]
    assert a.texts("t") == ["new"]
    assert len(await peer.list()) == 41
    assert a.sync_status().mode is SyncMode.ERROR
    assert a.pending() == (30, 0, [])
    with pytest.raises(SyncStoppedError):
        await a.sync()
    assert told(await a.sync(deletions=True)) == {"deleted": gone}
    assert len(await peer.list()) == 11
    await idle(a)


@tabled
async def test_37_some_files_removed(machines: Machines) -> None:
    """Some files that are gone were deleted."""
    sessions = many(40)
    a, peer = await machines.synced(sessions=sessions)
    gone = [session.id for session in sessions[:9]]
    for id in gone:
        a.file(id).unlink()
    assert a.pending() == (0, 0, [])
    await a.sync(dry_run=True)
    assert a.pending() == (9, 0, [])
    assert told(await a.sync()) == {"deleted": gone}
    assert len(await peer.list()) == 31
    await idle(a)


@tabled
async def test_38_a_renamed_file(machines: Machines) -> None:
    """A file that was renamed is unreadable under its new name, and its session is not taken for deleted."""
    a, peer = await machines.synced(sessions=[asset("a", id="a")])
    a.file("a").rename(a.file("b"))
    report = await a.sync()
    assert (report.uploaded, report.deleted, report.failed) == ([], [], [])
    assert "b" in report.conflicts
    assert (await a.conflict("b")).reason.startswith("the file can't be read")
    assert contents(await peer.load("a")) == ["a"]
    assert [meta.id for meta in await peer.list()] == ["a"]
    before = a.traces()
    await a.sync()
    assert a.traces() == before
    a.file("b").rename(a.file("a"))
    assert told(await a.sync()) == {}
    assert a.pending() == (0, 0, [])
    await idle(a)


# Full disks, full servers, missing rights


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """Let no file grow beyond a size: the disk of the poor."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@tabled
async def test_39_a_full_disk(machines: Machines) -> None:
    """What does not fit here is told and stays as it was; what is sent is sent; with room again all is done."""
    a, peer = await machines.synced(sessions=[asset("a", id=id) for id in "stu"])
    await peer.append("s", turn("x" * 8_000_000))
    await peer.append("t", turn("small"))
    await a.append("u", turn("b"))
    await a.save(asset("new", id="v"))
    before = a.data("s")
    with small_files(4_000_000):
        report = await a.sync()
    assert told(report) == {"downloaded": ["t"], "uploaded": ["u", "v"], "failed": {"s": StoreFullError}}
    assert a.data("s") == before
    assert await a.state("s") is SyncState.REMOTE_AHEAD
    assert a.pending() == (0, 1, [])
    assert [path.name for path in a.folder.iterdir() if path.suffix == ".tmp"] == []
    assert told(await a.sync()) == {"downloaded": ["s"]}
    await idle(a)


@pytest.fixture
def user(place: Place) -> Iterator[Callable[..., str]]:
    """Give a user rights beyond all, and return a URL for it."""
    name = f"user-{secrets.token_hex(4)}"
    raw: Any = place.raw

    def allow(*rules: str) -> str:
        raw.execute_command("ACL", "SETUSER", name, "reset", "on", ">pw", "~*", "&*", "+@all", *rules)
        return place.url.replace("//", f"//{name}:pw@")

    yield allow
    raw.execute_command("ACL", "DELUSER", name)


async def synced_in_the_end(machine: Machine) -> dict[str, Any]:
    """Rounds until nothing fails any more: a right is asked for again after a second."""
    done: dict[str, Any] = {}

    async def some() -> bool:
        nonlocal done
        report = await machine.sync()
        done |= {name: sorted({*done.get(name, []), *ids}) for name, ids in told(report).items() if name != "failed"}
        return not report.failed

    await until_true(some)
    return done


@over_tcp
async def test_40_read_only(machines: Machines, user: Callable[..., str]) -> None:
    """Who may only read receives; what can't be sent says so, and is sent as soon as it may be."""
    a, peer = await machines.synced(sessions=[asset("a", id=id) for id in "st"])
    a = await machines.reopen(a, url=user("-@write"))
    await peer.append("s", turn("b"))
    await a.append("t", turn("c"))
    await a.save(asset("new", id="u"))
    report = await a.sync()
    failed = {"t": PermissionDeniedError, "u": PermissionDeniedError}
    assert told(report) == {"downloaded": ["s"], "failed": failed}
    assert (await a.state("t"), await a.state("u")) == (SyncState.LOCAL_AHEAD, SyncState.LOCAL_ONLY)
    assert a.pending() == (2, 0, [])
    assert a.texts("s") == ["a", "b"]
    user()
    assert await synced_in_the_end(a) == {"uploaded": ["t", "u"]}
    assert contents(await peer.load("t")) == ["a", "c"]
    await idle(a)


@over_tcp
async def test_a_full_server(machines: Machines, start_server: Callable[..., Server]) -> None:
    """What does not fit there is told and stays ahead; with room again it is sent."""
    server = start_server()
    raw: Any = server.raw()
    a = await machines.open(url=server.url)
    await a.save(asset("a"))
    assert told(await a.sync()) == {"uploaded": ["s"]}
    await a.append("s", turn("b"))
    raw.config_set("maxmemory", 1)
    report = await a.sync()
    assert told(report) == {"failed": {"s": StoreFullError}}
    assert await a.state() is SyncState.LOCAL_AHEAD
    raw.config_set("maxmemory", 0)
    assert told(await a.sync()) == {"uploaded": ["s"]}
    assert contents(await a.remote.load("s")) == ["a", "b"]


@tabled
async def test_too_large_for_there(machines: Machines) -> None:
    """A session that is larger than what is stored is told, and the others are sent."""
    a = await machines.open(max_asset_bytes=10_000)
    await a.save(asset("x" * 20_000))
    await a.save(asset("a", id="t"))
    assert told(await a.sync()) == {"uploaded": ["t"], "failed": {"s": SerializationError}}
    assert await a.state("s") is SyncState.LOCAL_ONLY
    assert a.texts() == ["x" * 20_000]
    a = await machines.reopen(a)
    assert told(await a.sync()) == {"uploaded": ["s"]}
    await idle(a)


@over_tcp
async def test_a_wrong_password(machines: Machines, user: Callable[..., str]) -> None:
    """With a wrong password nothing is synced, and all goes on here."""
    a, _ = await machines.synced()
    a = await machines.reopen(a, url=user().replace(":pw@", ":wrong@"))
    await a.append("s", turn("b"))
    with pytest.raises(PermissionDeniedError) as caught:
        await a.sync()
    assert "wrong" not in str(caught.value)
    assert a.sync_status().mode is SyncMode.ERROR
    assert contents(await a.load("s")) == ["a", "b"]
    a = await machines.reopen(a)
    assert told(await a.sync()) == {"uploaded": ["s"]}
    await idle(a)


@tabled
async def test_another_layout(machines: Machines) -> None:
    """With another number of partitions nothing is synced, and all goes on here."""
    a, _ = await machines.synced()
    a = await machines.reopen(a, partitions=3)
    await a.append("s", turn("b"))
    with pytest.raises(LayoutError):
        await a.sync()
    assert a.sync_status().mode is SyncMode.ERROR
    assert contents(await a.load("s")) == ["a", "b"]
    a = await machines.reopen(a)
    assert told(await a.sync()) == {"uploaded": ["s"]}
    await idle(a)


@tabled
async def test_an_evicted_index(machines: Machines) -> None:
    """An index that lost its entries while the sessions are there is not taken for deletions."""
    a, peer = await machines.synced(sessions=many(3))
    place = machines.place
    place.raw.delete(place.key("meta"))
    report = await a.sync()
    assert (report.deleted, report.kept, report.uploaded) == ([], [], [])
    assert [a.file(session.id).exists() for session in many(3)] == [True] * 3
    assert contents(await peer.load("s00")) == ["turn of 0"]


@tabled
async def test_partitions(machines: Machines) -> None:
    """Over several partitions everything is as with one."""
    peer = await machines.peer(partitions=5)
    sessions = many(12)
    await peer.save_many(sessions)
    a, b = await machines.open("a"), await machines.open("b")
    assert told(await a.sync()) == {"downloaded": [session.id for session in sessions]}
    await a.append("s03", turn("b"))
    await a.delete("s04")
    await a.save(asset("new", id="t"))
    assert told(await a.sync()) == {"uploaded": ["s03", "t"], "deleted": ["s04"]}
    await b.sync()
    await idle(a, b)


# Networks


@pytest.fixture
def proxy(shared_server: Server) -> Iterator[Proxy]:
    with Proxy(shared_server.port) as made:
        yield made


def through(proxy: Proxy) -> str:
    return f"redis://127.0.0.1:{proxy.port}/0"


@over_tcp
async def test_unreachable_for_a_while(machines: Machines, proxy: Proxy) -> None:
    """A machine whose server goes away and comes back goes on where it was."""
    a, peer = await machines.synced()
    a = await machines.reopen(a, url=through(proxy), deadline=1.0)
    await a.sync()
    assert a.sync_status().mode is SyncMode.ONLINE
    proxy.strike(REFUSE, new=True)
    await a.append("s", turn("b"))
    with pytest.raises(UnavailableError):
        await a.sync()
    assert a.sync_status().mode is SyncMode.OFFLINE
    assert await a.state() is SyncState.LOCAL_AHEAD
    proxy.heal()
    assert told(await a.sync()) == {"uploaded": ["s"]}
    assert contents(await peer.load("s")) == ["a", "b"]
    await idle(a)


@over_tcp
@pytest.mark.timeout(180)
async def test_41_two_processes_on_one_folder(machines: Machines) -> None:
    """Two live processes on one folder and a peer: every turn is there once, everywhere, and nothing is asked."""
    a, peer = await machines.synced()
    place = machines.place
    processes = [
        start(append_often, place.row.form, a.folder, place.url, place.namespace, name, 100) for name in ("one", "two")
    ]
    expected = {f"{name} {n}" for name in ("one", "two") for n in range(100)}

    def has_grown(size: int) -> bool:
        return len(a.texts()) > size or not any(process.is_alive() for process in processes)

    for n in range(20):
        await peer.append("s", turn(f"peer {n}"))
        expected.add(f"peer {n}")
        await until(partial(has_grown, n * 8))
    assert [await ended(process) for process in processes] == [0, 0]
    report = await a.sync()
    assert (report.conflicts, report.failed) == ([], [])
    texts = contents(await peer.load("s"))
    assert sorted(texts) == sorted(["a", *expected])
    for name in ("one", "two", "peer"):
        own = [int(text.split()[1]) for text in texts if text.startswith(name)]
        assert own == sorted(own)
    await idle(a)


@over_tcp
@pytest.mark.timeout(180)
async def test_42_disconnections(machines: Machines, proxy: Proxy) -> None:
    """Two live machines append to one session while their connections break: every turn is there once, in order."""
    *_, peer = await machines.synced("a", "b")
    a, b = [await machines.open(f"live-{name}", url=through(proxy), live=True) for name in "ab"]
    for machine in (a, b):
        await until(machine.file().exists)
    count, done = 200, asyncio.Event()

    def is_complete(machine: Machine) -> bool:
        return len(machine.texts()) == 2 * count + 1

    async def break_often() -> None:
        while not done.is_set():
            proxy.cut(0.5)
            proxy.heal()
            await asyncio.sleep(0.05)

    async def work(machine: Machine, name: str) -> None:
        for n in range(count):
            await machine.append("s", turn(f"{name} {n}"))

    breaking = asyncio.create_task(break_often())
    await asyncio.gather(work(a, "a"), work(b, "b"))
    done.set()
    await breaking
    for machine in (a, b):
        await until(partial(is_complete, machine), 60)
    texts = contents(await peer.load("s"))
    assert a.texts() == b.texts() == texts
    for name in ("a", "b"):
        assert [text for text in texts if text.startswith(f"{name} ")] == [f"{name} {n}" for n in range(count)]
    assert (a.sync_status().conflicts, b.sync_status().conflicts) == ([], [])
    await idle(a, b)

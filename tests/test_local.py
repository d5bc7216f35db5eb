"""The file store, in both forms."""

from __future__ import annotations

import asyncio
import errno
import inspect
import json
import logging
import multiprocessing
import os
import pwd
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from orcs_redis.errors import (
    CorruptSessionError,
    InvalidIdError,
    NotFoundError,
    OutcomeUnknownError,
    PermissionDeniedError,
    SerializationError,
    StorageError,
    StoreFullError,
    UnavailableError,
    VersionIncompatibleError,
)
from orcs_redis.model.asset import SessionAsset
from orcs_redis.model.meta import SyncStatus
from orcs_redis.model.sections import ConversationTurn
from orcs_redis.stores.files import LocalFileStore
from orcs_redis.sync import LocalFileStore as BlockingLocalFileStore


class Client:
    """Either store, called as if it were asyncio's."""

    def __init__(self, store: Any) -> None:
        self.store = store

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self.store, name)

        async def call(*args: Any) -> Any:
            result = method(*args)
            return await result if inspect.isawaitable(result) else result

        return call


@pytest.fixture(params=[LocalFileStore, BlockingLocalFileStore], ids=["async", "blocking"])
def form(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def store(form: Any, tmp_path: Path) -> Client:
    return Client(form(tmp_path))


def names_in(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir()]


def asset_named(id: str, updated_at_ms: int = 5) -> SessionAsset:
    return SessionAsset(id=id, updated_at_ms=updated_at_ms)


async def test_save_and_load(store: Client, tmp_path: Path) -> None:
    """A session comes back equal, from a file that is what orcs writes."""
    asset = SessionAsset.new()
    asset.add_turn(ConversationTurn.user("é\u2028"))
    revision = await store.save(asset)
    file = tmp_path / f"{asset.id}.json"
    assert file.read_text() == asset.to_json()
    assert file.stat().st_mtime_ns == revision
    assert await store.load(asset.id) == asset
    assert names_in(tmp_path) == [file.name]


async def test_overwrite(store: Client) -> None:
    """Saving again replaces the session."""
    asset = SessionAsset.new()
    first = await store.save(asset)
    asset.add_turn(ConversationTurn.user("x"))
    assert await store.save(asset) >= first
    assert await store.load(asset.id) == asset


async def test_absent(store: Client) -> None:
    """An absent session is not found, and doesn't exist."""
    with pytest.raises(NotFoundError):
        await store.load("a")
    with pytest.raises(NotFoundError):
        await store.delete("a")
    assert not await store.exists("a")


async def test_delete(store: Client, tmp_path: Path) -> None:
    """A deleted session is gone."""
    await store.save(asset_named("a"))
    assert await store.exists("a")
    await store.delete("a")
    assert not await store.exists("a")
    assert names_in(tmp_path) == []


async def test_list(store: Client) -> None:
    """The last updated comes first, of equal ones the greater id; the revision is the file's."""
    revisions = {
        id: await store.save(asset_named(id, ms)) for id, ms in [("b", 5), ("a", 5), ("c", 5), ("d", 9), ("e", 1)]
    }
    metas = await store.list()
    assert [meta.id for meta in metas] == ["d", "c", "b", "a", "e"]
    assert {meta.id: meta.revision for meta in metas} == revisions


async def test_list_skips_and_reports(store: Client, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An unreadable file hides no other, is reported and logged; hidden and other files are passed over."""
    await store.save(asset_named("good"))
    (tmp_path / "bad.json").write_text("{secret")
    (tmp_path / "renamed.json").write_text(asset_named("other").to_json())
    (tmp_path / "new.json").write_text(json.dumps({"version": 2}))
    (tmp_path / "folder.json").mkdir()
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "con\ntrol.json").write_text("x")
    (tmp_path / os.fsdecode(b"\xff.json")).write_text("x")
    for name in (".hidden.json", ".x.json.tmp", "x.txt", "x.json.tmp", ".json"):
        (tmp_path / name).write_text("x")
    with caplog.at_level(logging.WARNING, "orcs_redis"):
        assert [meta.id for meta in await store.list()] == ["good"]
    reported = {path.name: type(error) for path, error in await store.unreadable()}
    assert reported == {
        "bad.json": CorruptSessionError,
        "renamed.json": CorruptSessionError,
        "new.json": VersionIncompatibleError,
        "folder.json": CorruptSessionError,
        "pipe.json": CorruptSessionError,
        "con\ntrol.json": InvalidIdError,
        os.fsdecode(b"\xff.json"): InvalidIdError,
    }
    assert len(caplog.records) == len(reported)
    assert "secret" not in caplog.text
    for name in reported:
        file = tmp_path / name
        file.rmdir() if file.is_dir() else file.unlink()
    await store.list()
    assert await store.unreadable() == []


async def test_unreadable_session(store: Client, tmp_path: Path) -> None:
    """Loading a file that is no session, or another's, names the id that was asked for."""
    (tmp_path / "a.json").write_bytes(b"\xff")
    (tmp_path / "b.json").write_text(asset_named("a").to_json())
    for id, field in [("a", ""), ("b", "id")]:
        with pytest.raises(CorruptSessionError) as caught:
            await store.load(id)
        assert (caught.value.id, caught.value.field) == (id, field)


@pytest.mark.parametrize("id", ["", "..", "../x", "/etc/passwd", "a/b", "a\\b", ".x", "a\0", "\ud800", "x" * 201])
async def test_ids_stay_in_the_folder(store: Client, tmp_path: Path, id: str) -> None:
    """No id leads out of the folder, or to a hidden file."""
    for operation in (store.load, store.delete, store.exists):
        with pytest.raises(InvalidIdError):
            await operation(id)
    with pytest.raises(InvalidIdError):
        await store.save(asset_named(id))
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("id", ["x" * 200, "é" * 100, "😀" * 50, "{a}*?[b] :", "~", "a.json", "%2e"])
async def test_any_id(store: Client, id: str) -> None:
    """The longest ids and all scripts work."""
    await store.save(asset_named(id))
    assert (await store.load(id)).id == id
    assert [meta.id for meta in await store.list()] == [id]


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, StoreFullError),
        (errno.EDQUOT, StoreFullError),
        (errno.EROFS, PermissionDeniedError),
        (errno.EACCES, PermissionDeniedError),
        (errno.EIO, UnavailableError),
    ],
)
@pytest.mark.parametrize("step", ["fsync", "replace"])
async def test_failed_save(
    store: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, number: int, expected: type[StorageError]
) -> None:
    """A save that fails leaves the old file, and nothing else."""
    asset = asset_named("a")
    await store.save(asset)

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(os, step, fail)
        with pytest.raises(expected):
            await store.save(asset_named("a", 9))
    assert names_in(tmp_path) == ["a.json"]
    assert await store.load("a") == asset


async def test_unsynced_folder(store: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """If only the folder can't be synced, it is written, but not for certain."""
    sync, calls = os.fsync, []

    def fail_second(fd: int) -> None:
        calls.append(fd)
        if len(calls) == 2:
            raise OSError(errno.EIO, "I/O error")
        sync(fd)

    monkeypatch.setattr(os, "fsync", fail_second)
    with pytest.raises(OutcomeUnknownError):
        await store.save(asset_named("a"))


async def test_refused_save(store: Client, tmp_path: Path) -> None:
    """What can't be encoded is refused before any file is touched."""
    asset = asset_named("a")
    asset.metadata["x"] = {1, 2}
    with pytest.raises(SerializationError):
        await store.save(asset)
    assert names_in(tmp_path) == []


async def test_folder_gone(store: Client, tmp_path: Path) -> None:
    """Without its folder the store is unavailable; a session in it is not found."""
    tmp_path.rmdir()  # noqa: ASYNC240  # a test may block
    with pytest.raises(UnavailableError):
        await store.save(asset_named("a"))
    with pytest.raises(UnavailableError):
        await store.list()
    with pytest.raises(NotFoundError):
        await store.load("a")


async def test_permissions(form: Any, closed: Path) -> None:
    """A folder that is not ours is PermissionDeniedError."""
    with pytest.raises(PermissionDeniedError):
        await Client(form(closed)).save(asset_named("a"))


async def test_home(form: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tilde before a slash is the home folder; missing folders are made."""
    monkeypatch.setenv("HOME", str(tmp_path))
    await Client(form("~/a/b")).save(asset_named("x"))
    assert (tmp_path / "a/b/x.json").exists()
    assert form().path == tmp_path / ".orcs/sessions"
    with pytest.raises(StorageError):
        form(tmp_path / "a/b/x.json/c")


@pytest.mark.parametrize("path", ["~", "~nobody-of-this-name/q", "./~/q", "a/~/q"])
def test_other_tildes_are_names(form: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """As in orcs, a tilde anywhere else is a name like others."""
    monkeypatch.setenv("HOME", "/nowhere")
    monkeypatch.chdir(tmp_path)
    form(path)
    assert (tmp_path / path).is_dir()


def test_no_home(form: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without HOME the user's entry says where home is, and without that there is a clear error."""
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: SimpleNamespace(pw_dir=str(tmp_path)))
    monkeypatch.setenv("HOME", "")
    assert form("~/a").path == tmp_path / "a"
    monkeypatch.delenv("HOME")
    assert form("~/a").path == tmp_path / "a"

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for arguments in ((), ("~/a",)):
        with pytest.raises(ValueError, match="HOME"):
            form(*arguments)
    assert form(tmp_path / "b").path == tmp_path / "b"


async def test_a_folder_that_cannot_be_synced(store: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the folder itself can't be opened (its rights are -wx, say) nothing is begun."""
    await store.save(asset_named("a"))
    opened = os.open

    def refuse(path: Any, flags: int, *rest: Any) -> int:
        if Path(path) == tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, flags, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refuse)
        for change in (store.save(asset_named("b")), store.save(asset_named("a", 9)), store.delete("a")):
            with pytest.raises(PermissionDeniedError):
                await change
    assert names_in(tmp_path) == ["a.json"]
    assert (await store.load("a")).updated_at_ms == 5


def _killed_while_saving(path: Path) -> None:
    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with mock.patch.object(os, "replace", die):
        BlockingLocalFileStore(path).save(asset_named("a"))


async def test_what_killed_writers_left(form: Any, tmp_path: Path) -> None:
    """A temporary file that is an hour old is removed by the next one who saves; a younger one may be a writer's."""
    process = multiprocessing.get_context("spawn").Process(target=_killed_while_saving, args=(tmp_path,))
    process.start()
    process.join()
    (left,) = names_in(tmp_path)
    others = [".hidden", "." + "0" * 32 + ".tmp.json", "x.tmp", ".a.json.tmp"]
    for name in others:
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, 0))
    await Client(form(tmp_path)).save(asset_named("b"))
    assert left in names_in(tmp_path)
    old = (tmp_path / left).stat().st_mtime - 3601
    os.utime(tmp_path / left, (old, old))
    await Client(form(tmp_path)).save(asset_named("b"))
    assert sorted(names_in(tmp_path)) == sorted(["b.json", *others])


@pytest.mark.parametrize("kind", [TimeoutError, PermissionError, FileNotFoundError])
def test_what_a_handler_raises_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[OSError]) -> None:
    """An OSError of a signal handler's is not taken for the folder's, and leaves no temporary file behind."""
    store = BlockingLocalFileStore(tmp_path)
    store.save(asset_named("a"))

    def handler(number: int, frame: Any) -> None:
        raise kind("mine")

    def strike(*_: object) -> None:
        signal.raise_signal(signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        for step, call in (
            ("fsync", lambda: store.save(asset_named("b"))),
            ("replace", lambda: store.save(asset_named("b"))),
            ("unlink", lambda: store.delete("a")),
            ("fstat", lambda: store.load("a")),
            ("fstat", store.list),
        ):
            with monkeypatch.context() as patched:
                patched.setattr(os, step, strike)
                with pytest.raises(kind, match="mine"):
                    call()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert names_in(tmp_path) == ["a.json"]


async def test_status_and_closing(tmp_path: Path) -> None:
    """The status is offline; both are context managers, and closing closes nothing."""
    async with LocalFileStore(tmp_path) as store:
        await store.save(asset_named("a"))
        assert store.sync_status() == SyncStatus.offline()
    with BlockingLocalFileStore(tmp_path) as blocking:
        assert blocking.load("a").id == "a"
        assert blocking.sync_status() == SyncStatus.offline()


async def test_asset_type(form: Any, tmp_path: Path) -> None:
    """A subclass of SessionAsset is loaded as such."""

    class Noted(SessionAsset):
        notes: list[str] = []  # noqa: RUF012  # msgspec copies it

    store = Client(form(tmp_path, asset_type=Noted))
    await store.save(Noted(id="a", notes=["n"]))
    back = await store.load("a")
    assert isinstance(back, Noted)
    assert back.notes == ["n"]


async def test_save_takes_the_asset_as_it_is(tmp_path: Path) -> None:
    """A change made while a save is under way isn't half in it."""
    store, asset = LocalFileStore(tmp_path), asset_named("a")
    saving = asyncio.ensure_future(store.save(asset))
    await asyncio.sleep(0)
    asset.add_turn(ConversationTurn.user("later"))
    await saving
    assert len((await store.load("a")).history) == 0


def _save_often(path: Path, mark: str) -> None:
    store = BlockingLocalFileStore(path)
    asset = SessionAsset(id="shared", metadata={"mark": mark * 50_000})
    for _ in range(40):
        store.save(asset)


async def test_concurrent_saves_never_tear(tmp_path: Path) -> None:
    """With processes and threads writing one session, a reader always finds a whole one."""
    store = BlockingLocalFileStore(tmp_path)
    store.save(SessionAsset(id="shared", metadata={"mark": "x"}))
    context = multiprocessing.get_context("spawn")
    workers: list[Any] = [context.Process(target=_save_often, args=(tmp_path, mark)) for mark in "ab"]
    workers += [threading.Thread(target=_save_often, args=(tmp_path, mark)) for mark in "cd"]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        mark = store.load("shared").metadata["mark"]
        assert len(set(mark)) == 1
    for worker in workers:
        worker.join()
    assert names_in(tmp_path) == ["shared.json"]

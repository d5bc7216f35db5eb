"""The folder of a hybrid store: no version is lost, whoever writes and whatever dies."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from orcs_redis.errors import (
    CorruptSessionError,
    InvalidIdError,
    NotFoundError,
    OutcomeUnknownError,
    PermissionDeniedError,
    StoreFullError,
    UnavailableError,
    UnsupportedServerError,
)
from orcs_redis.stores.disk import write_new
from orcs_redis.stores.hybrid import exchange as calls
from orcs_redis.stores.hybrid import files as module
from orcs_redis.stores.hybrid import kept
from orcs_redis.stores.hybrid.exchange import exchange
from orcs_redis.stores.hybrid.files import Files, Moved, Replacement
from orcs_redis.stores.hybrid.locks import RoundLock
from orcs_redis.stores.hybrid.reading import Signature, file_digest

OURS = {"locks", "kept", "sync.lock"}


def try_lock(files: Files) -> RoundLock | None:
    """Take the lock on rounds; None if another has it."""
    lock = files.round_lock()
    return lock if lock.take() else None


def content(text: str, id: str = "a") -> bytes:
    return json.dumps({"id": id, "text": text}).encode()


def write(folder: Path, data: bytes, id: str = "a") -> None:
    """Write a session's file as orcs does."""
    temporary = folder / f".{threading.get_ident()}.tmp"
    temporary.write_bytes(data)
    temporary.replace(folder / f"{id}.json")


def text_in(files: Files, id: str = "a") -> str | None:
    found = files.read(id)
    return None if found is None else json.loads(found.data)["text"]


def left_in(files: Files) -> list[Path]:
    """Return the temporary files."""
    return [path for path in files.home.iterdir() if path.name not in OURS]


def kept_texts(files: Files) -> list[str]:
    return [json.loads(files.copies.read(copy.path))["text"] for copy in files.copies.list()]


def reopened(files: Files, monkeypatch: pytest.MonkeyPatch) -> Files:
    """Return the folder as it is opened an hour later."""
    with monkeypatch.context() as patched:
        patched.setattr(module, "LEFTOVER_NS", -1)
        return Files(files.path)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.fixture(params=["exchange", "rename", "no links"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How files are renamed: as well as this system can, as one without such calls, and without links as well."""
    if request.param != "exchange":
        monkeypatch.setattr(calls, "_renameat2", None)
        monkeypatch.setattr(calls, "_renamex_np", None)
    if request.param == "no links":

        def refuse(*_: object) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
    return str(request.param)


# Replacing.


def test_replacing(way: str, files: Files, tmp_path: Path) -> None:
    """A file is replaced if it is what was expected; what became of each is returned in order."""
    write(tmp_path, content("1"))
    write(tmp_path, content("x", "b"), "b")
    results = files.replace(
        [
            Replacement("a", content("2"), file_digest(content("1"))),
            Replacement("b", content("y", "b"), file_digest(content("1"))),
            Replacement("c", content("new", "c"), None),
            Replacement("b", content("y", "b"), None),
            Replacement("d", content("y", "d"), file_digest(b"")),
            Replacement("e/", b"", None),
        ]
    )
    assert [type(result) for result in results] == [Signature, Moved, Signature, Moved, Moved, InvalidIdError]
    assert [text_in(files, id) for id in "abcd"] == ["2", "x", "new", None]
    assert results[0] == files.signature("a") == files.scan()["a"]
    assert results[2] == files.signature("c") == files.scan()["c"]
    assert files.can_exchange == (way == "exchange")
    assert left_in(files) == []
    assert files.copies.list() == []


def test_replacing_under_a_lock_that_is_held(way: str, files: Files, tmp_path: Path) -> None:
    """Whoever holds the lock replaces, or learns that the file has moved on."""
    with files.lock("a"):
        first = files.replace_locked(Replacement("a", content("1"), None))
        assert first == files.signature("a")
        files.replace_locked(Replacement("a", content("2"), file_digest(content("1"))))
        for expected in (None, file_digest(content("1"))):
            with pytest.raises(Moved):
                files.replace_locked(Replacement("a", content("3"), expected))
    assert text_in(files) == "2"
    assert left_in(files) == []


def test_replacing_what_was_read(way: str, files: Files, tmp_path: Path) -> None:
    """A file that was read is replaced if it is still the same one; else it has moved on, also if it is gone."""
    write(tmp_path, content("1"))
    found = files.read("a")
    with files.lock("a"):
        files.replace_locked(Replacement("a", content("2"), found))
        with pytest.raises(Moved):
            files.replace_locked(Replacement("a", content("3"), found))
        found = files.read("a")
        write(tmp_path, content("4"))
        with pytest.raises(Moved):
            files.replace_locked(Replacement("a", content("3"), found))
        assert text_in(files) == "4"
        found = files.read("a")
        (tmp_path / "a.json").unlink()
        with pytest.raises(Moved):
            files.replace_locked(Replacement("a", content("3"), found))
    assert text_in(files) is None
    assert left_in(files) == []


def test_many(files: Files) -> None:
    """A batch of new files is written, and replaced, each in its own place."""
    ids = [f"s{number}" for number in range(50)]
    for before, after in ((None, "1"), ("1", "2")):
        results = files.replace(
            [Replacement(id, content(after, id), file_digest(content(before, id)) if before else None) for id in ids]
        )
        assert dict(zip(ids, results, strict=True)) == files.scan()
        assert {text_in(files, id) for id in ids} == {after}
    assert files.replace([]) == []


def test_mode(files: Files, tmp_path: Path) -> None:
    """A file keeps its mode; a new one, and all that is beside it, is for its owner alone."""
    write(tmp_path, content("1"))
    (tmp_path / "a.json").chmod(0o640)
    files.replace(
        [Replacement("a", content("2"), file_digest(content("1"))), Replacement("b", content("1", "b"), None)]
    )
    copies = [files.copies.keep("a", "here", content("1"), ""), files.remove("a", file_digest(content("2")), keep="")]
    assert (tmp_path / "b.json").stat().st_mode & 0o777 == 0o600
    assert [copy.stat().st_mode & 0o777 for copy in copies if copy is not None] == [0o600, 0o600]
    assert files.home.stat().st_mode & 0o777 == 0o700
    files.replace([Replacement("a", content("2"), None)])
    (tmp_path / "a.json").chmod(0o640)
    files.replace([Replacement("a", content("3"), file_digest(content("2")))])
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o640


def test_disk_full(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What there is no room for leaves the old file, and nothing else; the others are replaced."""
    for id in "ab":
        write(tmp_path, content("1", id), id)
    sync, too_large = os.fsync, content("x" * 1000)

    def fill(fd: int) -> None:
        if os.fstat(fd).st_size == len(too_large):
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(fd)

    monkeypatch.setattr(os, "fsync", fill)
    results = files.replace(
        [
            Replacement("a", too_large, file_digest(content("1"))),
            Replacement("b", content("2", "b"), file_digest(content("1", "b"))),
        ]
    )
    assert [type(result) for result in results] == [StoreFullError, Signature]
    with files.lock("a"), pytest.raises(StoreFullError):
        files.replace_locked(Replacement("a", too_large, file_digest(content("1"))))
    with pytest.raises(StoreFullError):
        files.copies.keep("a", "there", too_large, "")
    assert (text_in(files), text_in(files, "b")) == ("1", "2")
    assert left_in(files) == []
    assert files.copies.list() == []


def test_unsynced_folder(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If only the folder can't be synced, files are replaced, but not for certain."""
    write(tmp_path, content("1"))
    sync, folder = os.fsync, tmp_path.stat().st_ino

    def fail(fd: int) -> None:
        if os.fstat(fd).st_ino == folder:
            raise OSError(errno.EIO, "I/O error")
        sync(fd)

    monkeypatch.setattr(os, "fsync", fail)
    results = files.replace(
        [Replacement("a", content("2"), file_digest(content("1"))), Replacement("a", content("3"), None)]
    )
    assert [type(result) for result in results] == [OutcomeUnknownError, Moved]
    assert text_in(files) == "2"
    with pytest.raises(OutcomeUnknownError):
        files.remove("a", file_digest(content("2")), keep="")
    assert kept_texts(files) == ["2"]


def test_a_folder_that_cannot_be_synced(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the folder itself can't be opened nothing is begun."""
    write(tmp_path, content("1"))
    opened = os.open

    def refuse(path: Any, flags: int, *rest: Any) -> int:
        if Path(path) == tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, flags, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refuse)
        results = files.replace(
            [Replacement("a", content("2"), file_digest(content("1"))), Replacement("b", content("1", "b"), None)]
        )
        with pytest.raises(PermissionDeniedError):
            files.remove("a", file_digest(content("1")), keep="")
    assert [type(result) for result in results] == [PermissionDeniedError] * 2
    assert list(files.scan()) == ["a"]
    assert text_in(files) == "1"
    assert left_in(files) == []


def test_power_failure(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New files are synced before they are in place, the folder once after all; what is kept is synced too."""
    write(tmp_path, content("1"))
    write(tmp_path, content("1", "b"), "b")
    steps: list[object] = []
    sync = os.fsync

    def record(fd: int) -> None:
        steps.append(os.fstat(fd).st_ino)
        sync(fd)

    def record_exchange(one: Path, other: Path) -> None:
        steps.append(other.name)
        exchange(one, other)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(module, "exchange", record_exchange)
    files.replace([Replacement(id, content("2", id), file_digest(content("1", id))) for id in "ab"])
    new = {signature.inode for signature in files.scan().values()}
    assert {*steps[:2]} == new
    assert steps[2:] == ["a.json", "b.json", tmp_path.stat().st_ino]
    steps.clear()
    copy = files.remove("a", file_digest(content("2")), keep="")
    assert copy is not None
    assert {copy.stat().st_ino, copy.parent.stat().st_ino, tmp_path.stat().st_ino} < {*steps}
    steps.clear()
    copy = files.copies.keep("b", "there", content("3", "b"), "")
    assert {path.stat().st_ino for path in (copy, copy.parent, copy.parent.parent)} < {*steps}


# Reading.


@pytest.mark.parametrize("kind", ["folder", "pipe", "link", "broken link", "socket"])
def test_no_regular_file(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """What is no regular file is there, but can't be read, and is never replaced or removed."""
    path = tmp_path / "a.json"
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    (tmp_path / "other").write_bytes(content("1"))
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("a.json")
    else:
        path.symlink_to("other" if kind == "link" else "nowhere")
    before = path.lstat()
    assert files.scan() == {"a": files.signature("a")}
    with pytest.raises(CorruptSessionError):
        files.read("a")
    (result,) = files.replace([Replacement("a", content("2"), file_digest(content("1")))])
    assert type(result) is CorruptSessionError
    with pytest.raises(CorruptSessionError):
        files.remove("a", file_digest(content("1")), keep="")
    (result,) = files.replace([Replacement("a", content("2"), None)])
    assert isinstance(result, (CorruptSessionError, Moved))
    assert (path.lstat().st_ino, path.lstat().st_mode) == (before.st_ino, before.st_mode)
    assert left_in(files) == []


def test_scan(files: Files, tmp_path: Path) -> None:
    """All files are found whose names can be those of sessions, with the signature that reading one gives."""
    ids = ["a", "x" * 200, "é" * 100, "a.json", "{b}*?[c] :", "~"]
    for id in ids:
        (tmp_path / f"{id}.json").write_bytes(content("1", id))
    for name in (".hidden.json", ".json", "x.txt", "x.json.tmp", "con\ntrol.json", os.fsdecode(b"\xff.json")):
        (tmp_path / name).write_bytes(content("1"))
    found = files.scan()
    assert sorted(found) == sorted(ids)
    for id, signature in found.items():
        read = files.read(id)
        assert read is not None
        assert read.signature == signature == files.signature(id)
        assert read.data == content("1", id)
    assert (files.read("absent"), files.signature("absent")) == (None, None)


def test_signature(files: Files, tmp_path: Path) -> None:
    """A signature is another once the file is written in place, at the same size and the time set back."""
    path = tmp_path / "a.json"
    path.write_bytes(b"1")
    before, status = files.signature("a"), path.stat()
    path.write_bytes(b"2")
    while path.stat().st_ctime_ns == status.st_ctime_ns:  # the file system's clock has ticks
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = files.signature("a")
    assert before is not None
    assert after is not None
    assert after != before
    assert after[:3] == before[:3]


@pytest.mark.parametrize("times", [1, 100])
def test_written_in_place(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """A file that is written while it is read is read again; for ever, it can't be read."""
    path = tmp_path / "a.json"
    path.write_bytes(b"1")
    status, written = os.fstat, 0

    def growing(fd: int) -> os.stat_result:
        nonlocal written
        found = status(fd)
        if written < times and found.st_ino == path.stat().st_ino:
            written += 1
            path.write_bytes(b"1" * (written + 1))
        return found

    with monkeypatch.context() as patched:
        patched.setattr(os, "fstat", growing)
        if times == 100:
            with pytest.raises(UnavailableError):
                files.read("a")
            return
        found = files.read("a")
    assert found is not None
    assert found.data == b"11"
    assert found.signature == files.signature("a")


def test_ids_that_one_file_system_takes_for_one(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session is not written over one whose name differs in case alone, and their copies are told apart."""
    write(tmp_path, content("1"))
    monkeypatch.setattr(Files, "_file", lambda self, name: self.path / f"{name.casefold()}.json")
    (result,) = files.replace([Replacement("A", content("2", "A"), None)])
    assert isinstance(result, Moved)
    assert text_in(files) == "1"
    copy = files.copies.keep("a", "here", content("1"), "")
    (files.home / "kept" / "A").symlink_to("a")  # as one folder for both
    other = files.copies.keep("A", "here", content("1", "A"), "")
    assert [found.path.name for found in files.copies.list("a")] == [copy.name]
    assert [found.path.name for found in files.copies.list("A")] == [other.name]


# Removing.


def test_removing(way: str, files: Files, tmp_path: Path) -> None:
    """A file is removed if it is what was expected, and kept if that is asked for."""
    write(tmp_path, content("1"))
    for keep in (None, "why"):
        with pytest.raises(Moved):
            files.remove("a", file_digest(content("2")), keep=keep)
        with pytest.raises(NotFoundError):
            files.remove("absent", file_digest(content("2")), keep=keep)
    assert text_in(files) == "1"
    assert files.copies.list() == []
    path = files.remove("a", file_digest(content("1")), keep="deleted there")
    (copy,) = files.copies.list("a")
    assert (copy.id, copy.side, copy.why, copy.path) == ("a", "here", "deleted there", path)
    assert files.copies.read(copy.path) == content("1")
    assert files.scan() == {}
    write(tmp_path, content("2"))
    assert files.remove("a", file_digest(content("2")), keep=None) is None
    assert files.scan() == {}
    assert kept_texts(files) == ["1"]
    assert left_in(files) == []


@pytest.mark.parametrize("call", ["move", "digest_of"])
def test_a_removal_that_fails(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """A file that can't be moved, or not be read once it is, stays, and no note is left of a copy."""

    def fail(*_: object) -> None:
        if call == "move":
            raise OSError(errno.EIO, "I/O error")

    write(tmp_path, content("1"))
    for owner in (module, kept):
        monkeypatch.setattr(owner, call, fail)
    with pytest.raises(UnavailableError if call == "move" else Moved):
        files.remove("a", file_digest(content("1")), keep="")
    if call == "move":
        with pytest.raises(UnavailableError):
            files.copies.keep("a", "here", content("1"), "")
    assert text_in(files) == "1"
    assert [*(files.home / "kept" / "a").iterdir()] == []
    assert left_in(files) == []


def test_long_ids(way: str, files: Files) -> None:
    """The longest ids are replaced, removed and kept."""
    for id in ("x" * 200, "é" * 100):
        files.replace([Replacement(id, content("1", id), None)])
        (result,) = files.replace([Replacement(id, content("2", id), file_digest(content("1", id)))])
        assert isinstance(result, Signature)
        files.copies.keep(id, "there", content("3", id), "")
        files.remove(id, file_digest(content("2", id)), keep="")
        assert {copy.side for copy in files.copies.list(id)} == {"here", "there"}


# Others write at the same moment.


def before_call(monkeypatch: pytest.MonkeyPatch, name: str, actions: list[Callable[[], object]]) -> None:
    """Let others act right before each of the first calls of `exchange` or `move`."""
    function, rest = getattr(module, name), list(actions)

    def call(*args: Path) -> None:
        if rest:
            rest.pop(0)()
        function(*args)

    monkeypatch.setattr(module, name, call)


@pytest.mark.parametrize("writes", [1, 2, 3, 4])
def test_written_right_before_the_exchange(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    """What another writes after the file was looked at goes back to its place; of several, the last."""
    write(tmp_path, content("0"))
    versions = [content(str(number)) for number in range(1, writes + 1)]
    before_call(monkeypatch, "exchange", [partial(write, tmp_path, data) for data in versions])
    (result,) = files.replace([Replacement("a", content("ours"), file_digest(content("0")))])
    assert isinstance(result, Moved)
    assert text_in(files) == str(writes)
    assert left_in(files) == []


def test_a_pipe_right_before_the_exchange(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no file goes back to its place as well."""
    write(tmp_path, content("0"))

    def make() -> None:
        (tmp_path / "a.json").unlink()
        os.mkfifo(tmp_path / "a.json")

    before_call(monkeypatch, "exchange", [make])
    (result,) = files.replace([Replacement("a", content("ours"), file_digest(content("0")))])
    assert isinstance(result, Moved)
    assert (tmp_path / "a.json").is_fifo()
    assert left_in(files) == []


def test_deleted_right_before_the_exchange(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that another deletes at that moment stays deleted; what came out is kept."""
    write(tmp_path, content("0"))
    path = tmp_path / "a.json"
    replacement = Replacement("a", content("ours"), file_digest(content("0")))
    with monkeypatch.context() as patched:
        before_call(patched, "exchange", [path.unlink])
        (result,) = files.replace([replacement])
        assert isinstance(result, Moved)
    assert files.scan() == {}
    assert files.copies.list() == []
    write(tmp_path, content("0"))
    before_call(monkeypatch, "exchange", [lambda: write(tmp_path, content("1")), path.unlink])
    (result,) = files.replace([replacement])
    assert isinstance(result, Moved)
    assert files.scan() == {}
    assert kept_texts(files) == ["1"]
    assert left_in(files) == []


def test_made_right_before(way: str, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new file does not replace one that another makes at that moment."""
    before_call(monkeypatch, "move", [lambda: write(tmp_path, content("1"))])
    (result,) = files.replace([Replacement("a", content("ours"), None)])
    assert isinstance(result, Moved)
    assert text_in(files) == "1"
    assert left_in(files) == []


@pytest.mark.parametrize("keep", [None, "why"])
def test_written_right_before_it_is_removed(
    way: str, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: str | None
) -> None:
    """What another writes at that moment stays; what it overwrites so is kept."""
    write(tmp_path, content("0"))
    with monkeypatch.context() as patched:
        before_call(patched, "move", [lambda: write(tmp_path, content("1"))])
        with pytest.raises(Moved):
            files.remove("a", file_digest(content("0")), keep=keep)
    assert text_in(files) == "1"
    assert files.copies.list() == []
    before_call(monkeypatch, "move", [lambda: write(tmp_path, content("2")), lambda: write(tmp_path, content("3"))])
    with pytest.raises(Moved):
        files.remove("a", file_digest(content("1")), keep=keep)
    assert text_in(files) == "3"
    assert kept_texts(files) == ["2"]
    assert left_in(files) == []
    assert len([*(files.home / "kept" / "a").iterdir()]) == 2  # a copy and its note


def test_unreadable_after_the_exchange(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If nothing can be opened any more, the file goes back unseen, and nothing is deleted."""
    write(tmp_path, content("0"))
    opened, is_full = os.open, False

    def full() -> None:
        nonlocal is_full
        is_full = True

    def refuse(path: Any, *args: Any) -> int:
        if is_full:
            raise OSError(errno.EMFILE, "Too many open files")
        return opened(path, *args)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refuse)
        before_call(patched, "exchange", [full])
        (result,) = files.replace([Replacement("a", content("ours"), file_digest(content("0")))])
    assert isinstance(result, Moved)
    assert text_in(files) == "0"
    assert [path.read_bytes() for path in left_in(files)] == [content("ours")]


def test_what_a_handler_raises_passes(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An OSError of a signal handler's is not taken for the folder's, and what came out is not deleted for it."""
    write(tmp_path, content("0"))

    def handler(number: int, frame: Any) -> None:
        raise FileNotFoundError("mine")

    def strike(*_: object) -> None:
        signal.raise_signal(signal.SIGUSR1)

    def exchange_and_strike(one: Path, other: Path) -> None:
        exchange(one, other)
        strike()

    replacement = Replacement("a", content("1"), file_digest(content("0")))
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        for step, call in (
            ("fsync", lambda: files.replace([replacement])),
            ("fstat", lambda: files.read("a")),
            ("lstat", lambda: files.signature("a")),
            ("fsync", lambda: files.remove("a", file_digest(content("0")), keep="")),
            ("fsync", lambda: files.copies.keep("a", "here", content("0"), "")),
        ):
            with monkeypatch.context() as patched:
                patched.setattr(os, step, strike)
                with pytest.raises(FileNotFoundError, match="mine"):
                    call()
            assert left_in(files) == []
            assert files.copies.list() == []
        monkeypatch.setattr(module, "exchange", exchange_and_strike)
        with pytest.raises(FileNotFoundError, match="mine"):
            files.replace([replacement])
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert text_in(files) == "1"
    assert [path.read_bytes() for path in left_in(files)] == [content("0")]


def test_no_version_is_lost(files: Files, tmp_path: Path) -> None:
    """With a writer and three replacers at once, each version is replaced once, by one who knew it, or is the file.

    The writer sees by exchange what it overwrites. That may be a replacer's version which is about to be taken back:
    then the replacer has the writer's version before, which the writer has overwritten all the same.
    """
    write(tmp_path, content("0"))
    path, written, overwritten = tmp_path / "a.json", [content("0")], []
    done = threading.Event()

    def replace(name: int) -> list[tuple[bytes, bytes, bool]]:
        mine: list[tuple[bytes, bytes, bool]] = []
        while not done.is_set():
            found = files.read("a")
            assert found is not None
            json.loads(found.data)  # never in part
            data = content(f"r{name}-{len(mine)}")
            (result,) = files.replace([Replacement("a", data, file_digest(found.data))])
            assert isinstance(result, (Signature, Moved)), result
            mine.append((found.data, data, isinstance(result, Signature)))
        return mine

    attempts: list[tuple[bytes, bytes, bool]] = []
    threads = [threading.Thread(target=lambda n=n: attempts.extend(replace(n))) for n in range(3)]
    for thread in threads:
        thread.start()
    temporary = tmp_path / ".writer.tmp"
    try:
        for number in range(1, 400):
            written.append(content(str(number)))
            temporary.write_bytes(written[-1])
            exchange(temporary, path)
            overwritten.append(temporary.read_bytes())
            temporary.unlink()
    finally:
        done.set()
        for thread in threads:
            thread.join()
    replaced = [old for old, _, was_replaced in attempts if was_replaced]
    installed = [data for _, data, was_replaced in attempts if was_replaced]
    versions = {*written, *installed}
    gone = [data for data in (*replaced, *overwritten) if data in versions]
    assert len(gone) == len(set(gone))  # nothing is replaced twice
    unseen = versions - {*gone, path.read_bytes()}
    taken_back = {*overwritten} - versions
    assert len(unseen) == len(taken_back)
    assert written[-1] not in unseen
    assert left_in(files) == []


# Processes are killed.


def run_killed_at_each_line(folder: Path, setup: str, act: str, check: str) -> int:
    """Fork for each line that `act` runs in the package, killed there; return how many there were.

    `files` is the folder, opened anew for `check`, with `killed` False after the run that came to its end.
    """
    script = f"""
        import json, os, signal, sys
        from pathlib import Path
        from orcs_redis.stores.hybrid import files as module
        from orcs_redis.stores.hybrid.files import Files, Moved, Replacement
        from orcs_redis.stores.hybrid.reading import file_digest
        folder = Path(sys.argv[1])
        def content(text):
            return json.dumps(dict(id="a", text=text)).encode()
        def write(text):
            (folder / ".w.tmp").write_bytes(content(text))
            (folder / ".w.tmp").replace(folder / "a.json")
        def texts():
            data = [path.read_bytes() for path in folder.glob("*.json")]
            data += [files.copies.read(copy.path) for copy in files.copies.list()]
            return [json.loads(one)["text"] for one in data]
        def act(files):
{textwrap.indent(textwrap.dedent(act).strip(), " " * 12)}
        def count(frame, event, argument):
            if "orcs_redis" not in frame.f_code.co_filename:
                return None
            if event == "line":
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
            return count
        line, killed = 0, True
        while killed:
            line += 1
            for path in [*folder.rglob("*.json"), *folder.rglob("*.note")]:
                path.unlink()
{textwrap.indent(textwrap.dedent(setup).strip(), " " * 12)}
            files = Files(folder)
            pid = os.fork()
            if not pid:
                left = [line]
                sys.settrace(count)
                try:
                    act(files)
                finally:
                    sys.settrace(None)
                    os._exit(0)
            killed = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
            assert len([*folder.glob("*.json")]) <= 1
            found = files.read("a")
            there = None if found is None else json.loads(found.data)["text"]
            module.LEFTOVER_NS = -1
            files = Files(folder)
            module.LEFTOVER_NS = 3600 * 10**9
            assert {{path.name for path in files.home.iterdir()}} == {{"locks", "kept", "sync.lock"}}
{textwrap.indent(textwrap.dedent(check).strip(), " " * 12)}
        print(line)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(folder)], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize("call", ["files.replace([one])", "with files.lock('a'): files.replace_locked(one)"])
def test_killed_while_replacing(tmp_path: Path, call: str) -> None:
    """Killed anywhere, the file is the old or the new one whole; what else there was is kept, or never was in use."""
    lines = run_killed_at_each_line(
        tmp_path,
        "write('old')",
        f"one = Replacement('a', content('new'), file_digest(content('old')))\n{call}",
        """
        assert there in ("old", "new")
        assert not ({*texts()} - {"old", "new"})
        assert killed or texts() == ["new"]
        """,
    )
    assert lines > 50


def test_killed_while_putting_back(tmp_path: Path) -> None:
    """Killed while what another wrote goes back to its place, it is the file or is kept."""
    lines = run_killed_at_each_line(
        tmp_path,
        "write('old')",
        """
        function = module.exchange
        def exchange(*paths):
            module.exchange = function
            write('theirs')
            function(*paths)
        module.exchange = exchange
        files.replace([Replacement('a', content('ours'), file_digest(content('old')))])
        """,
        """
        assert there in ("old", "theirs", "ours")
        assert there == "old" or "theirs" in texts()
        assert killed or texts() == ["theirs"]
        """,
    )
    assert lines > 50


@pytest.mark.parametrize("keep", ["'why'", "None"])
def test_killed_while_removing(tmp_path: Path, keep: str) -> None:
    """Killed anywhere, the file is there, or is kept, if it was to be."""
    lines = run_killed_at_each_line(
        tmp_path,
        "write('old')",
        f"files.remove('a', file_digest(content('old')), keep={keep})",
        f"""
        assert texts() == ["old"] or ({keep} is None and texts() == [])
        assert killed or there is None
        assert killed or [copy.why for copy in files.copies.list()] == [why for why in [{keep}] if why]
        """,
    )
    assert lines > 50


REPLACING_FOR_EVER = """
    import itertools, json, sys
    from orcs_redis.stores.hybrid.files import Files, Replacement
    from orcs_redis.stores.hybrid.reading import file_digest
    files, ids = Files(sys.argv[1]), [f"s{number}" for number in range(8)]
    for number in itertools.count():
        new = [(id, files.read(id), json.dumps({"id": id, "text": str(number) * 20_000}).encode()) for id in ids]
        files.replace([Replacement(id, data, found and file_digest(found.data)) for id, found, data in new])
        print(number, flush=True)
"""


def test_killed_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that replaces many files at once, killed at a random moment, leaves each of them whole."""
    command = [sys.executable, "-c", textwrap.dedent(REPLACING_FOR_EVER), str(tmp_path)]
    for seed in range(20):
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            for _ in range(2 + seed % 3):
                assert process.stdout.readline()
            time.sleep(random.Random(seed).uniform(0, 0.02))  # the moment may be any
            process.kill()
        files = reopened(Files(tmp_path), monkeypatch)
        assert left_in(files) == []
        assert len(files.scan()) == 8
        for id in files.scan():
            text = text_in(files, id)
            assert text is not None
            assert text == text[: len(text) // 20_000] * 20_000


# Locks.


def test_lock_of_threads(tmp_path: Path) -> None:
    """One thread at a time has a session's lock, also through two openings of the folder."""
    opened, holders, most = [Files(tmp_path), Files(tmp_path)], 0, 0

    def work(files: Files) -> None:
        nonlocal holders, most
        for _ in range(100):
            with files.lock("a"):
                holders += 1
                time.sleep(0)  # another may run
                most = max(most, holders)
                holders -= 1

    threads = [threading.Thread(target=work, args=(files,)) for files in opened * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that has the lock of session a, and that of a round."""
    script = """
        import sys
        from orcs_redis.stores.hybrid.files import Files
        files = Files(sys.argv[1])
        with files.lock("a"):
            round = files.round_lock()
            assert round.take()
            print("held", flush=True)
            sys.stdin.read()
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_locks_of_processes(holder: subprocess.Popen[bytes], files: Files) -> None:
    """A lock that another process has is waited for, and ends with that process, also by kill -9."""
    assert try_lock(files) is None
    (path,) = (files.home / "locks").iterdir()
    with path.open("rb") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    results: list[Any] = []
    waiting = threading.Thread(target=lambda: results.extend(files.replace([Replacement("a", content("1"), None)])))
    waiting.start()
    waiting.join(0.05)
    assert results == []
    (other,) = files.replace([Replacement("b", content("1", "b"), None)])  # with another lock
    assert isinstance(other, Signature)
    holder.kill()
    waiting.join()
    assert isinstance(results[0], Signature)
    holder.wait()
    lock = try_lock(files)
    assert lock is not None
    lock.release()


def test_a_child_does_not_prolong_a_lock(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock ends when it is given back, even if a child that was forked meanwhile has the file open too."""
    opened, inherited = os.open, []

    def record(*args: Any) -> int:
        fd = opened(*args)
        inherited.append(os.dup(fd))
        return fd

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", record)
        first = try_lock(files)
        assert first is not None
        first.release()
        with files.lock("a"):
            pass
    second = try_lock(files)
    assert second is not None
    second.release()
    (path,) = (files.home / "locks").iterdir()
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    for fd in inherited:
        os.close(fd)


def test_lock_of_a_round(files: Files, tmp_path: Path) -> None:
    """A round's lock excludes others, in this process too, until it is given back; that may be done twice."""
    first = try_lock(files)
    assert first is not None
    assert try_lock(files) is None
    assert try_lock(Files(tmp_path)) is None
    first.release()
    second = try_lock(files)
    assert second is not None
    first.release()
    assert try_lock(files) is None
    second.release()


# Kept copies.


def test_keeping(files: Files) -> None:
    """A copy is listed with what is known of it, the newest first, and read."""
    before = datetime.now(UTC)
    paths = [
        files.copies.keep("a", "here", content("1"), "overwritten: é"),
        files.copies.keep("a", "there", content("2"), ""),
        files.copies.keep("b", "here", content("3", "b"), "x"),
    ]
    copies = files.copies.list()
    assert [copy.path for copy in copies] == paths[::-1]
    assert [(copy.id, copy.side, copy.why) for copy in copies] == [
        ("b", "here", "x"),
        ("a", "there", ""),
        ("a", "here", "overwritten: é"),
    ]
    assert all(before <= copy.at <= datetime.now(UTC) for copy in copies)
    assert kept_texts(files) == ["3", "2", "1"]
    assert files.copies.list("a") == copies[1:]
    assert files.copies.list("absent") == []
    assert files.scan() == {}
    assert left_in(files) == []


def test_the_same_is_kept_once(files: Files) -> None:
    """Of one content of one side there is one copy."""
    first = files.copies.keep("a", "here", content("1"), "x")
    other = files.copies.keep("a", "there", content("1"), "x")
    assert files.copies.keep("a", "here", content("1"), "y") == first
    assert files.copies.keep("a", "there", content("1"), "y") == other
    assert len(files.copies.list()) == 2


def test_many_copies_at_one_moment(files: Files) -> None:
    """Threads that keep copies at the same moment, while others are pruned, have one each, with its reason."""

    def work(name: int) -> None:
        for number in range(20):
            files.copies.keep(f"s{name % 2}-{number % 4}", "here", content(f"{name}-{number}"), f"{name}-{number}")
            files.copies.prune(1, per_session=1000)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(kept_texts(files)) == sorted(f"{name}-{number}" for name in range(4) for number in range(20))
    assert all(json.loads(files.copies.read(copy.path))["text"] == copy.why for copy in files.copies.list())


def test_two_copies_of_one_microsecond(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two removals of one content at the same microsecond have a copy each."""
    frozen = datetime.now(UTC)

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return frozen

    monkeypatch.setattr(kept, "datetime", Clock)
    for _ in range(2):
        write(tmp_path, content("1"))
        files.remove("a", file_digest(content("1")), keep="")
    assert [copy.at for copy in files.copies.list()] == [frozen + timedelta(microseconds=1), frozen]


def test_a_folder_of_copies_that_is_pruned(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of a session's copies is made anew if another deletes it right before one is put there."""
    deleted: list[Path] = []

    def write_and_delete(path: Path, *args: Any) -> os.stat_result:
        if path.suffix == ".note" and not deleted:
            path.parent.rmdir()
            deleted.append(path.parent)
        return write_new(path, *args)

    monkeypatch.setattr(kept, "write_new", write_and_delete)
    files.copies.keep("a", "here", content("1"), "why")
    assert [copy.why for copy in files.copies.list()] == ["why"]
    assert deleted


def test_a_copy_without_its_note(files: Files) -> None:
    """A copy whose note is gone, or damaged, is listed all the same; what is none is not."""
    path = files.copies.keep("a", "here", content("1"), "x")
    note = path.with_suffix(".note")
    damages: list[Callable[[], object]] = [lambda: note.write_bytes(b"{"), note.unlink]
    for damage in damages:
        damage()
        (copy,) = files.copies.list()
        assert (copy.id, copy.why, copy.path) == ("a", "", path)
    for name in ("x.json", "99999999T221500.123456Z-here-00000000.json", f".{path.name}"):
        (path.parent / name).touch()
    (files.home / "kept" / "file").touch()
    assert files.copies.list() == [copy]


def test_only_kept_copies_are_read(files: Files, tmp_path: Path) -> None:
    """`read` reads nothing outside of kept, and says what is no more."""
    path = files.copies.keep("a", "here", content("1"), "")
    write(tmp_path, content("1"))
    outside = files.home / path.name
    outside.write_bytes(b"secret")
    for other in (
        tmp_path / "a.json",
        outside,
        files.home / "kept" / ".." / path.name,
        files.home / "kept" / "a" / ".." / ".." / path.name,
        path.with_suffix(".note"),
        Path(path.name),
    ):
        with pytest.raises(ValueError, match="kept"):
            files.copies.read(other)
    path.unlink()
    path.symlink_to(outside)
    with pytest.raises(CorruptSessionError):
        files.copies.read(path)
    path.unlink()
    with pytest.raises(NotFoundError):
        files.copies.read(path)


def test_pruning(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies go that are too old, and the oldest ones beyond so many of a session and so many bytes of all."""
    paths = [files.copies.keep(id, "here", content(str(number), id), "") for number in range(6) for id in "ab"]
    files.copies.prune(1)
    assert [copy.path for copy in files.copies.list()] == paths[::-1]
    files.copies.prune(1, per_session=4)
    assert [copy.path for copy in files.copies.list()] == paths[:3:-1]
    size = len(content("0"))
    files.copies.prune(1, total_bytes=6 * size)
    assert [copy.path for copy in files.copies.list()] == paths[:5:-1]
    files.copies.prune(1, total_bytes=6 * size - 1)
    assert [copy.path for copy in files.copies.list()] == paths[:6:-1]
    later = time.time() + 2 * 86400
    monkeypatch.setattr(time, "time", lambda: later)
    os.utime(paths[-2], (later - 60, later - 60))
    files.copies.prune(1)
    assert [copy.path for copy in files.copies.list()] == [paths[-2]]
    files.copies.prune(0)
    assert [*(files.home / "kept").iterdir()] == []


def test_what_is_kept_again_is_not_old(files: Files) -> None:
    """The age of a copy is that of its last keeping."""
    path = files.copies.keep("a", "here", content("1"), "")
    old = path.with_name(f"20200101T000000.000000Z-here-{path.stem[-8:]}.json")
    path.rename(old)
    os.utime(old, (0, 0))
    assert files.copies.keep("a", "here", content("1"), "") == old
    files.copies.prune(1)
    assert [copy.path for copy in files.copies.list()] == [old]
    os.utime(old, (0, 0))
    files.copies.prune(1)
    assert files.copies.list() == []


def test_a_note_whose_copy_is_yet_to_come(files: Files) -> None:
    """A note without its copy may be a living writer's; once it is old it goes."""
    path = files.copies.keep("a", "here", content("1"), "")
    path.unlink()
    files.copies.prune(1)
    assert path.with_suffix(".note").exists()
    os.utime(path.with_suffix(".note"), (0, 0))
    files.copies.prune(1)
    assert not path.parent.exists()


# Opening.


def test_what_killed_processes_left(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Temporary files that are an hour old go to kept if they are sessions that are nowhere else; others go."""
    write(tmp_path, content("the file"))
    files.copies.keep("a", "here", content("kept"), "x")
    orphans = [content("orphan"), content("the file"), content("kept")]
    others = [b"{half", b'{"id": "../x"}', b'{"id": 1}', b"\xff", b'{"x":' + b"[" * 100_000]
    for number, data in enumerate([*orphans, *others]):
        (files.home / f".{number:032x}.tmp").write_bytes(data)
    (files.home / "other").touch()
    os.utime(
        files.home / f".{0:032x}.tmp", (0, 0)
    )  # when it was modified says nothing: it may be an old session's file
    Files(tmp_path)
    assert len(left_in(files)) == len(orphans) + len(others) + 1
    files = reopened(files, monkeypatch)
    assert [path.name for path in left_in(files)] == ["other"]
    assert sorted(kept_texts(files)) == ["kept", "orphan"]
    (copy,) = (copy for copy in files.copies.list() if copy.why != "x")
    assert (copy.id, copy.side, copy.why) == ("a", "here", "left by a process that was killed")
    assert copy.path.stat().st_mode & 0o777 == 0o600


def test_a_folder_that_is_not_ours(closed: Path) -> None:
    """A folder that can't be written to is PermissionDeniedError."""
    with pytest.raises(PermissionDeniedError):
        Files(closed)


def test_a_folder_that_is_ours_no_more(closed: Path) -> None:
    """So is one whose ``.orcs-redis`` can still be written to."""
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as name:  # other users can't get at pytest's
        folder = Path(name)
        home = Files(folder).home
        os.seteuid(os.getuid())
        for path in (home, *home.iterdir()):
            os.chown(path, user, -1)
        os.chown(folder, os.getuid(), -1)
        folder.chmod(0o555)
        os.seteuid(user)
        try:
            with pytest.raises(PermissionDeniedError):
                Files(folder)
        finally:
            os.seteuid(os.getuid())
            folder.chmod(0o700)


@pytest.mark.parametrize(
    ("kind", "is_refused"),
    [
        *((kind, True) for kind in ("nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "fuse.sshfs", "fuse.s3fs")),
        *((kind, False) for kind in ("ext4", "nfsd", "overlay", "fuse.bindfs")),
    ],
)
def test_network_file_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, is_refused: bool) -> None:
    """A folder on a network file system is refused before anything is made in it."""
    device = tmp_path.stat().st_dev
    mounts = tmp_path / "mountinfo"
    other = "36 35 0:0 / /other rw,noatime shared:1 - nfs4 server:/ rw\n\n"
    here = f"37 35 {os.major(device)}:{os.minor(device)} /a\\040b /here rw - {kind} server:/ rw\n"
    mounts.write_text(other + here)
    monkeypatch.setattr(module, "_MOUNTS", mounts)
    if is_refused:
        with pytest.raises(UnsupportedServerError, match=kind):
            Files(tmp_path)
        assert [*tmp_path.iterdir()] == [mounts]
    else:
        assert Files(tmp_path).scan() == {}


def test_without_a_list_of_mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where mounts can't be found out, the folder is taken."""
    monkeypatch.setattr(module, "_MOUNTS", tmp_path / "nowhere")
    assert Files(tmp_path / "made" / "here").scan() == {}


def test_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path may begin with ~/, and stays what it was if the working folder changes."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Files("~/x").path == tmp_path / "x"
    monkeypatch.chdir(tmp_path)
    files = Files("y")
    monkeypatch.chdir("/")
    files.replace([Replacement("a", content("1"), None)])
    assert (tmp_path / "y" / "a.json").exists()
    (tmp_path / "z").touch()
    with pytest.raises(UnavailableError):
        Files(tmp_path / "z")


def test_macos(monkeypatch: pytest.MonkeyPatch, files: Files, tmp_path: Path) -> None:
    """Where renamex_np is there in renameat2's place, it gets its own flags, and its errors are read."""
    asked = []

    def renamex_np(one: bytes, other: bytes, flag: int) -> int:
        asked.append((one, other, flag))
        ctypes.set_errno(errno.EEXIST if flag == 4 else 0)
        return -1 if flag == 4 else 0

    monkeypatch.setattr(calls, "_renameat2", None)
    monkeypatch.setattr(calls, "_renamex_np", renamex_np)
    exchange(Path("a"), Path("é"))
    with pytest.raises(FileExistsError):
        calls.move(Path("a"), Path("b"))
    assert asked == [(b"a", "é".encode(), 2), (b"a", b"b", 4)]

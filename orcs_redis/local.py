"""orcs' own files: one ``<id>.json`` for each session in a folder.

`BlockingLocalFileStore` does the work; `LocalFileStore` gives its calls to threads.
"""

from __future__ import annotations

import asyncio
import builtins
import errno
import logging
import os
import pwd
import re
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISREG
from typing import Any, Generic, NamedTuple, Self, TypeVar, cast, overload

from .asset import SessionAsset
from .errors import (
    CorruptSessionError,
    NotFoundError,
    OutcomeUnknownError,
    PermissionDeniedError,
    StorageError,
    StoreFullError,
    UnavailableError,
)
from .ids import check_id
from .interrupts import raise_interruption
from .meta import SessionMeta, SyncStatus

__all__ = ["BlockingLocalFileStore", "LocalFileStore", "Unreadable"]

T = TypeVar("T")
A = TypeVar("A", bound=SessionAsset)
AnyPath = str | os.PathLike[str]

_log = logging.getLogger("orcs_redis")

_SUFFIX = ".json"
_THREADS = 16
_DEFAULT_FOLDER = "~/.orcs/sessions"
_LEFTOVER = re.compile(r"\.[0-9a-f]{32}\.tmp")
_LEFTOVER_NS = 3600 * 10**9  # so old is a temporary file of a writer that is no more
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Unreadable(NamedTuple):
    """A file that `list` could not read, and why."""

    path: Path
    error: StorageError


class BlockingLocalFileStore(Generic[A]):
    """Sessions as orcs' files in a folder, for threads and processes at once.

    A file is written beside the old one, synced and renamed over it: a reader sees one or the other whole.
    """

    @overload
    def __init__(
        self: BlockingLocalFileStore[SessionAsset], path: AnyPath = ..., *, asset_type: None = None
    ) -> None: ...
    @overload
    def __init__(self, path: AnyPath = ..., *, asset_type: type[A]) -> None: ...
    def __init__(self, path: AnyPath = _DEFAULT_FOLDER, *, asset_type: type[Any] | None = None) -> None:
        self.path = _expanded(path)
        self._type = cast(type[A], asset_type or SessionAsset)
        self._unreadable: builtins.list[Unreadable] = []
        self._has_tidied = False
        with _translated():
            self.path.mkdir(parents=True, exist_ok=True)

    def save(self, asset: A) -> int:
        """Store the whole asset, overwriting one of the same id; return the file's modification time in ns.

        Raises:
            OutcomeUnknownError: it is written, but may not survive a power failure.

        """
        return self._write(*self._encode(asset))

    def load(self, id: str) -> A:
        """Read a session; NotFoundError if it is absent."""
        return self._read(check_id(id))[0]

    def list(self) -> builtins.list[SessionMeta]:
        """List all sessions that can be read, the last updated first; `unreadable` has the others."""
        metas, unreadable = [], []
        with _translated():
            names = [file.name for file in self.path.iterdir()]
        for name in sorted(names, reverse=True):
            if name.startswith(".") or not name.endswith(_SUFFIX):
                continue
            try:
                metas.append(SessionMeta.from_asset(*self._read(check_id(name.removesuffix(_SUFFIX)))))
            except NotFoundError:
                continue  # deleted since
            except StorageError as error:
                unreadable.append(Unreadable(self.path / name, error))
                _log.warning("session file %r left out of the list: %s", str(self.path / name), error)
        self._unreadable = unreadable
        metas.sort(key=lambda meta: (meta.updated_at, meta.id), reverse=True)
        return metas

    def delete(self, id: str) -> None:
        """Delete a session; NotFoundError if it is absent."""
        with self._changing(check_id(id)):
            self._file(id).unlink()

    def exists(self, id: str) -> bool:
        """Return whether there is such a session."""
        with suppress(NotFoundError), _translated(check_id(id)):
            self._file(id).stat()
            return True
        return False

    def sync_status(self) -> SyncStatus:
        """Return that there is no server."""
        return SyncStatus.offline()

    def unreadable(self) -> builtins.list[Unreadable]:
        """Return the files that the last `list` could not read."""
        return builtins.list(self._unreadable)

    def close(self) -> None:
        """Do nothing: no file stays open."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _file(self, id: str) -> Path:
        return self.path / (id + _SUFFIX)

    def _encode(self, asset: A) -> tuple[str, bytes]:
        return check_id(asset.id), asset.to_json().encode()

    def _write(self, id: str, data: bytes) -> int:
        # Not named after the session: the longest ids leave no room. orcs skips names with a leading dot.
        temporary = self.path / f".{uuid.uuid4().hex}.tmp"
        with self._changing():
            try:
                with open(temporary, "xb") as file:  # noqa: PTH123  # a name is enough
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                    modified = os.fstat(file.fileno()).st_mtime_ns
                self._tidy(modified)
                os.replace(temporary, self._file(id))  # noqa: PTH105
            except BaseException:
                with suppress(OSError):
                    temporary.unlink()
                raise
        return modified

    def _tidy(self, now: int) -> None:
        """Remove, once, what writers that were killed have left; `now` is by the file system's clock, in ns."""
        if self._has_tidied:
            return
        self._has_tidied = True
        for name in filter(_LEFTOVER.fullmatch, os.listdir(self.path)):  # noqa: PTH208  # names are enough
            try:
                # A writer that is alive but was stopped for so long fails, and says so.
                if os.stat(self.path / name).st_mtime_ns < now - _LEFTOVER_NS:  # noqa: PTH116
                    os.unlink(self.path / name)  # noqa: PTH108
            except OSError as error:  # another is faster, or it is not ours
                raise_interruption(error)

    @contextmanager
    def _changing(self, id: str | None = None) -> Iterator[None]:
        """Sync the folder after a change in it. It is opened first: what can't be synced is not begun."""
        with _translated(id):
            folder = os.open(self.path, os.O_RDONLY)
        try:
            with _translated(id):
                yield
            try:
                os.fsync(folder)
            except OSError as error:
                raise_interruption(error)
                if error.errno != errno.EINVAL:  # a file system that has no such thing
                    raise OutcomeUnknownError(f"the folder could not be synced: {error.strerror}") from error
        finally:
            os.close(folder)

    def _read(self, id: str) -> tuple[A, int]:
        with _translated(id), open(self._file(id), "rb", opener=_open_at_once) as file:
            status = os.fstat(file.fileno())
            if not S_ISREG(status.st_mode):
                raise CorruptSessionError(id)
            data = file.read()
        try:
            asset = self._type.from_json(data)
        except CorruptSessionError as error:
            field = error.field
        else:
            if asset.id == id:
                return asset, status.st_mtime_ns
            field = "id"
        raise CorruptSessionError(id, field)


class LocalFileStore(Generic[A]):
    """`BlockingLocalFileStore` for asyncio: its calls run in threads."""

    @overload
    def __init__(self: LocalFileStore[SessionAsset], path: AnyPath = ..., *, asset_type: None = None) -> None: ...
    @overload
    def __init__(self, path: AnyPath = ..., *, asset_type: type[A]) -> None: ...
    def __init__(self, path: AnyPath = _DEFAULT_FOLDER, *, asset_type: type[Any] | None = None) -> None:
        self._store = BlockingLocalFileStore[A](path, asset_type=cast(type[A], asset_type or SessionAsset))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._threads: ThreadPoolExecutor  # dedicated: those of the loop may all be busy

    @property
    def path(self) -> Path:
        """The folder."""
        return self._store.path

    async def save(self, asset: A) -> int:
        """Store the whole asset, overwriting one of the same id; return the file's modification time in ns.

        Raises:
            OutcomeUnknownError: it is written, but may not survive a power failure.

        """
        encoded = self._store._encode(asset)  # here, lest another task changes the asset meanwhile
        return await self._in_thread(self._store._write, *encoded)

    async def load(self, id: str) -> A:
        """Read a session; NotFoundError if it is absent."""
        return await self._in_thread(self._store.load, id)

    async def list(self) -> builtins.list[SessionMeta]:
        """List all sessions that can be read, the last updated first; `unreadable` has the others."""
        return await self._in_thread(self._store.list)

    async def delete(self, id: str) -> None:
        """Delete a session; NotFoundError if it is absent."""
        await self._in_thread(self._store.delete, id)

    async def exists(self, id: str) -> bool:
        """Return whether there is such a session."""
        return await self._in_thread(self._store.exists, id)

    def sync_status(self) -> SyncStatus:
        """Return that there is no server."""
        return self._store.sync_status()

    def unreadable(self) -> builtins.list[Unreadable]:
        """Return the files that the last `list` could not read."""
        return self._store.unreadable()

    async def aclose(self) -> None:
        """Do nothing: no file stays open."""

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop, self._threads = loop, ThreadPoolExecutor(_THREADS, "orcs-redis-files")
        return await loop.run_in_executor(self._threads, function, *arguments)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


def _expanded(path: AnyPath) -> Path:
    """Return the path, in which ~/ at the start is the home folder; as in orcs, any other ~ is a name like others."""
    text = os.fspath(path)
    if not text.startswith("~/"):
        return Path(text)
    home = os.environ.get("HOME")
    if not home:
        try:
            home = pwd.getpwuid(os.getuid()).pw_dir
        except KeyError:
            raise ValueError("~/ is no folder: HOME is not set, and the user has no entry in passwd") from None
    return Path(home, text.removeprefix("~/"))


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe would wait for its writer


@contextmanager
def _translated(id: str | None = None) -> Iterator[None]:
    """Turn OSError into StorageError; with an id, a missing file means that this session is absent."""
    try:
        yield
    except OSError as error:
        raise_interruption(error)
        if isinstance(error, FileNotFoundError) and id is not None:
            raise NotFoundError(id) from None
        if isinstance(error, IsADirectoryError) and id is not None:
            raise CorruptSessionError(id) from error
        message = f"{error.strerror or type(error).__name__}: {error.filename or 'the session folder'}"
        if error.errno in _DENIED:
            raise PermissionDeniedError(message) from error
        if error.errno in _FULL:
            raise StoreFullError(message) from error
        raise UnavailableError(message) from error

"""The folder of a hybrid store on disk: orcs' files, replaced so that no version is lost; locks; kept copies.

Bytes only, and blocking. Nobody else's version is overwritten: a new file changes places with the old one, and what
comes out has to be what was expected. If it is not, it goes back.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from errno import ELOOP, ENXIO
from hashlib import blake2b
from pathlib import Path
from stat import S_IMODE, S_ISREG
from typing import Final, Literal, NamedTuple, cast

import msgspec

from ...errors import (
    CorruptSessionError,
    InvalidIdError,
    NotFoundError,
    PermissionDeniedError,
    StorageError,
    UnavailableError,
    UnsupportedServerError,
)
from ...interrupts import raise_interruption, suppress
from ...model.ids import check_id
from ..disk import (
    LEFTOVER_NS,
    SUFFIX,
    AnyPath,
    expanded,
    open_at_once,
    synced,
    temporaries,
    temporary_in,
    translated,
    write_new,
)
from .exchange import UNSUPPORTED, exchange, move
from .results import Kept

__all__ = ["Files", "Found", "Moved", "Replacement", "RoundLock", "Signature", "file_digest"]

Side = Literal["here", "there"]

_HOME: Final = ".orcs-redis"
_PRIVATE: Final = 0o600
_TRIES: Final = 5
_WRITERS: Final = 4  # file systems sync several files at once in less time than one after the other
_DAY: Final = 86400
_COPIES: Final = 20  # so many are kept of a session
_MAX_BYTES: Final = 2**30  # of a file; a system call reads a little less than twice as many
_MOUNTS: Final = Path("/proc/self/mountinfo")
_NETWORK: Final = re.compile(
    r"nfs4?|cifs|smb\w*|9p|afs|ncpfs|coda|ceph|lustre|glusterfs|beegfs|gpfs|orangefs|pvfs2|gfs2|ocfs2|davfs2?"
    r"|fuse\.(sshfs|s3fs|glusterfs|ceph|ceph-fuse|rclone|gcsfuse|goofys|blobfuse2?|juicefs|mount-s3|davfs2?|curlftpfs|smbnetfs)"
)
_COPY: Final = re.compile(r"(\d{8}T\d{6}\.\d{6}Z)-(here|there)-[0-9a-f]{8}\.json")
_STAMP: Final = "%Y%m%dT%H%M%S.%fZ"
_NOTE: Final = ".note"
_ORPHAN: Final = "left by a process that was killed"


class Moved(Exception):
    """The session's file is not what was expected."""


class Signature(NamedTuple):
    """What tells that a file may have changed; times in ns."""

    inode: int
    size: int
    modified_ns: int
    changed_ns: int


class Found(NamedTuple):
    """A file as it was read."""

    signature: Signature
    data: bytes


class Replacement(NamedTuple):
    """New content of a session's file.

    ``expected`` is what is to be replaced: the file as it was read, or its `file_digest`; None: there must be no file.
    """

    id: str
    data: bytes
    expected: Found | bytes | None


class _Note(msgspec.Struct):
    """What a copy's name has no room for: the id as it is, which a file system may spell otherwise, and the reason."""

    id: str
    why: str


class _Named(msgspec.Struct):
    id: str


def file_digest(data: bytes) -> bytes:
    """Return the digest of a file's bytes: BLAKE2b, 16 bytes."""
    return blake2b(data, digest_size=16).digest()


class RoundLock:
    """The lock on a folder's rounds; it ends with its process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = None

    def take(self) -> bool:
        """Exclude others from the folder's rounds; return whether that could be done at once."""
        fd = _open_lock(self._path)
        try:
            with translated():
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._fd = fd
        except UnavailableError as error:
            os.close(fd)
            if isinstance(error.__cause__, BlockingIOError):
                return False
            raise
        except BaseException:
            os.close(fd)
            raise
        return True

    def release(self) -> None:
        """Let others have it."""
        fd, self._fd = self._fd, None
        if fd is not None:
            _unlock(fd)


class Files:
    """Orcs' files in a folder, for threads and processes at once, and what is kept beside them in ``.orcs-redis``.

    Raises:
        PermissionDeniedError: the folder can't be written to.
        UnsupportedServerError: it is on a network file system, where neither locks nor SQLite can be relied on.

    """

    def __init__(self, path: AnyPath) -> None:
        self.path = expanded(path).absolute()
        self.home = self.path / _HOME
        self._locks = self.home / "locks"
        self._kept = self.home / "kept"
        self._can_exchange = True
        with translated():
            self.path.mkdir(parents=True, exist_ok=True)
            if kind := _network_file_system(self.path):
                raise UnsupportedServerError(f"the folder is on a network file system, {kind}: {self.path}")
            if not os.access(self.path, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
                raise PermissionDeniedError(f"the folder can't be written to: {self.path}")
            for folder in (self.home, self._locks, self._kept):
                folder.mkdir(mode=0o700, exist_ok=True)
            self._tidy()

    @property
    def can_exchange(self) -> bool:
        """Whether files change places in one step here, as far as known; else there is a window of microseconds."""
        return self._can_exchange

    # Reading.

    def scan(self) -> dict[str, Signature]:
        """Return the signatures of all files whose names can be those of sessions, by id; also of what `read` refuses.

        A file that is replaced meanwhile may be missed, on some file systems: `read` says whether one is really absent.
        """
        found = {}
        with translated(), os.scandir(self.path) as entries:
            for entry in entries:
                name = entry.name
                if not name.endswith(SUFFIX):
                    continue
                try:
                    id = check_id(name[: -len(SUFFIX)])
                    found[id] = _signature(entry.stat(follow_symlinks=False))
                except (InvalidIdError, FileNotFoundError) as error:
                    raise_interruption(error)
        return found

    def signature(self, id: str) -> Signature | None:
        """Return the signature of a session's file; None if it is absent."""
        with suppress(NotFoundError), translated(check_id(id)):
            return _signature(os.lstat(self._file(id)))
        return None

    def read(self, id: str) -> Found | None:
        """Read a session's file; None if it is absent.

        Raises:
            CorruptSessionError: it is no regular file, or larger than 1 GiB. A link is none, whatever it points to.
            UnavailableError: it is being written in place.

        """
        with suppress(NotFoundError), translated(check_id(id)):
            return _read(self._file(id), id)
        return None

    def id_inside(self, id: str) -> str | None:
        """Return the id that is in a session's file; None: there is no such file, or no id in it."""
        with suppress(StorageError, msgspec.DecodeError, RecursionError):
            if (found := self.read(id)) is not None:
                return msgspec.json.decode(found.data, type=_Named).id
        return None

    # Locks.

    @contextmanager
    def lock(self, id: str) -> Iterator[None]:
        """Exclude others, threads and processes, from writing the session; waits.

        Whoever has one lock must not ask for another: two ids may have the same.
        """
        fd = _open_lock(self._locks / blake2b(check_id(id).encode(), digest_size=1).hexdigest())
        try:
            with translated():
                fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            _unlock(fd)

    def round_lock(self) -> RoundLock:
        """Return the lock on rounds; it is not taken yet."""
        return RoundLock(self.home / "sync.lock")

    def try_lock_round(self) -> RoundLock | None:
        """Exclude others from the folder's rounds; None if they do so."""
        lock = self.round_lock()
        return lock if lock.take() else None

    # Writing.

    def replace(self, replacements: Sequence[Replacement]) -> list[Signature | Moved | StorageError]:
        """Replace files, each under its lock; return what became of each, in order.

        That is the new file's signature; `Moved` if the file was not what was expected, and is as it was; or why it was
        not replaced. OutcomeUnknownError: it is, but that may not survive a power failure.
        """
        results: list[Signature | Moved | StorageError] = []
        unused = [temporary_in(self.home) for _ in replacements]
        try:
            with synced(self.path):
                written = self._write_all(replacements, unused)
                for number, (replacement, error) in enumerate(zip(replacements, written, strict=True)):
                    try:
                        if error is not None:
                            raise error
                        with self.lock(replacement.id):
                            results.append(self._install(replacement, unused, number))
                    except (Moved, StorageError) as problem:
                        results.append(problem)
        except StorageError as error:  # of the folder: it was not begun, or is not synced
            results = [error if isinstance(result, Signature) else result for result in results]
            results += [error] * (len(replacements) - len(results))
        finally:
            _discard(unused)
        return results

    def replace_locked(self, replacement: Replacement) -> Signature:
        """Replace a file whose lock the caller holds; return the new one's signature.

        Raises:
            Moved: the file is not what was expected, and is as it was.
            OutcomeUnknownError: it is replaced, but that may not survive a power failure.

        """
        unused = [temporary_in(self.home)]
        try:
            with synced(self.path):
                self._write(replacement, unused[0])
                return self._install(replacement, unused, 0)
        finally:
            _discard(unused)

    def remove(self, id: str, expected: bytes, *, keep: str | None) -> Path | None:
        """Delete a session's file, under its lock; return where it is kept.

        Args:
            id: the session.
            expected: the `file_digest` of its file.
            keep: why it is kept; None: it is not.

        Raises:
            Moved: the file is not what was expected, and is as it was.
            NotFoundError: it is absent.
            OutcomeUnknownError: it is deleted, but that may not survive a power failure.

        """
        with self.lock(id):
            file = self._file(id)
            with translated(id):
                if file_digest(_read(file, id).data) != expected:
                    raise Moved(id)
            target = temporary_in(self.home) if keep is None else self._new_copy(id, "here", expected, keep)
            with synced(target.parent), synced(self.path, id):
                self._take_out(file, target, expected)
                if keep is None:
                    _discard([target])
        return None if keep is None else target

    def _file(self, id: str) -> Path:
        return self.path / (id + SUFFIX)

    def _write_all(self, replacements: Sequence[Replacement], paths: Sequence[Path]) -> list[StorageError | None]:
        if len(replacements) < 2:
            return [*map(self._try_write, replacements, paths)]
        with ThreadPoolExecutor(min(_WRITERS, len(replacements)), "orcs-redis-sync") as pool:
            return [*pool.map(self._try_write, replacements, paths)]

    def _try_write(self, replacement: Replacement, path: Path) -> StorageError | None:
        try:
            self._write(replacement, path)
        except StorageError as error:
            return error
        return None

    def _write(self, replacement: Replacement, path: Path) -> None:
        """Write what is to replace a file, with its mode."""
        file = self._file(check_id(replacement.id))
        with translated():
            write_new(path, replacement.data, _PRIVATE)
            if replacement.expected is not None:
                with suppress(FileNotFoundError):
                    path.chmod(S_IMODE(os.lstat(file).st_mode) & 0o777)

    def _install(self, replacement: Replacement, unused: list[Path], number: int) -> Signature:
        """Put a temporary file, ``unused[number]``, in the place of the session's, under its lock.

        It is taken off the list, by an empty path, once it may hold what came out instead: that is never discarded
        before it was looked at.
        """
        id, data, _ = replacement
        new, file, old = unused[number], self._file(id), self._replaced(replacement)
        with translated(), _opened(new) as own:  # it says that this is the file, whatever its name
            unused[number] = Path()
            try:
                exchanged = self._put(new, file, old is None)
            except OSError as error:
                raise_interruption(error)
                unused[number] = new  # no rename was done
                if isinstance(error, FileExistsError) or (isinstance(error, FileNotFoundError) and new.exists()):
                    raise Moved(id) from None
                raise
            if exchanged:
                if _content(new) != old:
                    self._put_back(new, file, file_digest(data))
                    raise Moved(id)
                _discard([new])
            return _signature(os.fstat(own))

    def _replaced(self, replacement: Replacement) -> bytes | None:
        """Return the content that is to be replaced; raise Moved if the file is not what was expected."""
        id, _, expected = replacement
        if isinstance(expected, Found):
            if self.signature(id) != expected.signature:
                raise Moved(id)
            return expected.data
        found = self.read(id)
        if (None if found is None else file_digest(found.data)) != expected:
            raise Moved(id)
        return None if found is None else found.data

    def _put(self, new: Path, file: Path, is_first: bool) -> bool:
        """Rename; return whether the names were exchanged, so that the old file has the new one's name."""
        if is_first:
            move(new, file)
            return False
        if self._can_exchange:
            try:
                exchange(new, file)
            except OSError as error:
                raise_interruption(error)
                if error.errno not in UNSUPPORTED:
                    raise
                self._can_exchange = False
            else:
                return True
        # What is written since the file was read is lost here: a window of microseconds.
        os.rename(new, file)  # noqa: PTH104  # as `exchange`
        return False

    def _put_back(self, out: Path, file: Path, placed: bytes | None) -> None:
        """Put back what came out in exchange for what has the digest ``placed``, and is now to come out again.

        If something else does, another has written it meanwhile: it is newer, so it goes back in turn. What can't be
        read now stays where it is, for `_tidy`.
        """
        while True:
            returned = _digest(out)
            try:
                exchange(out, file)
            except FileNotFoundError as error:
                raise_interruption(error)
                self._salvage(out, "deleted while it was replaced")
                return
            came = _digest(out)
            if came is None or placed is None:
                return
            if came == placed:
                _discard([out])
                return
            placed = returned

    def _take_out(self, file: Path, target: Path, expected: bytes) -> None:
        """Move the session's file away; raise Moved, and put it back, if it is not what was expected."""
        try:
            with _opened(file) as old:
                os.fsync(old)  # orcs may not have done so
            move(file, target)
        except BaseException:
            _discard([target.with_suffix(_NOTE)])
            raise
        if _digest(target) == expected:
            with suppress(OSError):
                target.chmod(_PRIVATE)
            return
        try:
            move(target, file)
        except FileExistsError as error:
            raise_interruption(error)
            self._salvage(target, "overwritten while it was deleted")
        _discard([target.with_suffix(_NOTE)])
        raise Moved(file.name)

    # Kept copies.

    def keep(self, id: str, side: Side, data: bytes, why: str) -> Path:
        """Keep a copy of what is about to be lost; return where. What is kept already gets no second copy.

        Beyond 20 copies of a session the oldest are deleted.
        """
        digest = file_digest(data)
        with translated():
            if (known := self._known_copy(check_id(id), side, digest)) is not None:
                os.utime(known)  # it is as good as new to `prune_kept`
                return known
            temporary = temporary_in(self.home)
            try:
                write_new(temporary, data, _PRIVATE)
                copy = self._new_copy(id, side, digest, why)
                self._file_copy(temporary, copy)
            except BaseException:
                _discard([temporary])
                raise
            for _, _, surplus in self._aged_copies(copy.parent)[_COPIES:]:
                _discard([surplus, surplus.with_suffix(_NOTE)])
        return copy

    def kept(self, id: str | None = None) -> list[Kept]:
        """List the kept copies, of one session or of all, the newest first."""
        with translated():
            folders = self._kept_folders() if id is None else [self._kept / check_id(id)]
            found = [_kept(copy) for folder in folders for copy in self._copies_in(folder)]
        found = [copy for copy in found if id is None or copy.id == id]
        return sorted(found, key=lambda copy: (copy.at, copy.path), reverse=True)

    def read_kept(self, path: Path) -> bytes:
        """Read a kept copy.

        Raises:
            ValueError: the path is none of a kept copy.
            NotFoundError: there is none any more.

        """
        path = path.absolute()
        folder = path.parent
        if folder.parent != self._kept or folder.name.startswith(".") or not _is_copy(path.name):
            raise ValueError("the path is none of a kept copy")
        with translated(folder.name):
            return _read(path, folder.name).data

    def prune_kept(self, days: float, per_session: int = _COPIES, total_bytes: int = 2**30) -> None:
        """Delete kept copies that are older than so many days, and the oldest ones beyond these limits."""
        now = time.time()
        rest = []
        with translated():
            folders = self._kept_folders()
            for folder in folders:
                for place, (kept_at, size, copy) in enumerate(self._aged_copies(folder)):
                    if place >= per_session or kept_at < now - days * _DAY:
                        _discard([copy, copy.with_suffix(_NOTE)])
                    else:
                        rest.append((kept_at, size, copy))
            total = 0
            for _, size, copy in sorted(rest, reverse=True):
                total += size
                if total > total_bytes:
                    _discard([copy, copy.with_suffix(_NOTE)])
            for folder in folders:
                self._clear(folder)

    def _aged_copies(self, folder: Path) -> list[tuple[float, int, Path]]:
        """Return when each copy in a folder was kept last, and its size; the newest first."""
        return sorted(filter(None, map(_aged, self._copies_in(folder))), reverse=True)

    def _kept_folders(self) -> list[Path]:
        return [folder for folder in self._kept.iterdir() if not folder.name.startswith(".")]

    def _copies_in(self, folder: Path) -> list[Path]:
        with suppress(FileNotFoundError, NotADirectoryError):
            return [folder / name for name in os.listdir(folder) if _is_copy(name)]  # noqa: PTH208  # names are enough
        return []

    def _known_copy(self, id: str, side: Side, digest: bytes) -> Path | None:
        for copy in self._copies_in(self._kept / id):
            if copy.name.endswith(f"-{side}-{digest.hex()[:8]}{SUFFIX}") and _digest(copy) == digest:
                return copy
        return None

    def _clear(self, folder: Path) -> None:
        """Delete old notes without a copy, and the folder if nothing is left. A new note's copy is yet to come."""
        with suppress(OSError):
            for note in folder.glob(f"*{_NOTE}"):
                is_old = time.time_ns() - note.stat().st_mtime_ns > LEFTOVER_NS
                if is_old and not note.with_suffix(SUFFIX).exists():
                    _discard([note])
            folder.rmdir()

    def _new_copy(self, id: str, side: Side, digest: bytes, why: str) -> Path:
        """Return where a copy is to be put; its note is there already, and reserves the name."""
        note = msgspec.json.encode(_Note(id, why))
        at = datetime.now(UTC)
        folder = self._kept / check_id(id)
        with translated():
            for _ in range(_TRIES):
                copy = folder / f"{at.strftime(_STAMP)}-{side}-{digest.hex()[:8]}{SUFFIX}"
                try:
                    folder.mkdir(mode=0o700, exist_ok=True)
                    write_new(copy.with_suffix(_NOTE), note, _PRIVATE)
                except FileExistsError as error:  # another thread's, of the same microsecond
                    raise_interruption(error)
                    at += timedelta(microseconds=1)
                except FileNotFoundError as error:  # the folder was empty, and is deleted
                    raise_interruption(error)
                else:
                    with synced(self._kept):  # the folder may be new
                        return copy
        raise UnavailableError(f"no name for a copy: {folder}")

    def _file_copy(self, source: Path, copy: Path) -> None:
        try:
            with synced(copy.parent):
                move(source, copy)
        except BaseException:
            if not copy.exists():
                _discard([copy.with_suffix(_NOTE)])
            raise

    # What killed processes have left.

    def _tidy(self) -> None:
        """Keep, or remove, the temporary files of processes that are no more."""
        fd = _open_lock(self.home / "sync.lock")
        try:
            os.utime(fd)
            now = os.fstat(fd).st_mtime_ns  # by the file system's clock
        finally:
            os.close(fd)
        for path, status in temporaries(self.home):
            # Not only when it was modified: what came out of an exchange is as old as it is.
            if max(status.st_mtime_ns, status.st_ctime_ns) < now - LEFTOVER_NS:
                with suppress(OSError, StorageError):  # the next one tries again
                    self._salvage(path, _ORPHAN)

    def _salvage(self, path: Path, why: str) -> None:
        """Move a file that may be the only one of a session's version into kept; delete it if it is no session."""
        try:
            data = _read(path, "").data
            id = check_id(msgspec.json.decode(data, type=_Named).id)
        except (msgspec.DecodeError, RecursionError, CorruptSessionError, InvalidIdError):
            _discard([path])
            return
        digest = file_digest(data)
        if digest == _digest(self._file(id)) or self._known_copy(id, "here", digest) not in (None, path):
            _discard([path])
            return
        path.chmod(_PRIVATE)
        self._file_copy(path, self._new_copy(id, "here", digest, why))


def _signature(status: os.stat_result) -> Signature:
    return Signature(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """Open a file to read, but no link."""
    fd = open_at_once(os.fspath(path), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        yield fd
    finally:
        os.close(fd)


def _read(path: Path, id: str) -> Found:
    """Read a file whole, as it was at one moment."""
    try:
        with _opened(path) as fd:
            for _ in range(_TRIES):
                status = os.fstat(fd)
                if not S_ISREG(status.st_mode) or status.st_size > _MAX_BYTES:
                    raise CorruptSessionError(id)
                signature = _signature(status)
                data = os.pread(fd, signature.size + 1, 0)
                if signature == _signature(os.fstat(fd)) and len(data) == signature.size:
                    return Found(signature, data)
    except OSError as error:
        raise_interruption(error)
        if isinstance(error, IsADirectoryError) or error.errno in (ELOOP, ENXIO):  # a link, a socket
            raise CorruptSessionError(id) from error
        raise
    raise UnavailableError(f"the file is being written: {path}")


def _content(path: Path) -> bytes | None:
    """Return what is in a file; None if it can't be read."""
    with suppress(OSError, StorageError):
        return _read(path, "").data
    return None


def _digest(path: Path) -> bytes | None:
    """Return the digest of a file; None if it can't be read."""
    data = _content(path)
    return None if data is None else file_digest(data)


def _discard(paths: Sequence[Path]) -> None:
    for path in paths:
        if path.name:
            with suppress(OSError):
                path.unlink()


def _open_lock(path: Path) -> int:
    with translated():
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, _PRIVATE)


def _unlock(fd: int) -> None:
    try:
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_UN)  # a child of this process may have the file open too
    finally:
        os.close(fd)


def _parsed(name: str) -> tuple[datetime, Side]:
    """Return when a copy was made, and of which side; ValueError if it is no copy's name."""
    match = _COPY.fullmatch(name)
    if match is None:
        raise ValueError("not the name of a kept copy")
    return datetime.strptime(match[1], _STAMP).replace(tzinfo=UTC), cast(Side, match[2])


def _is_copy(name: str) -> bool:
    with suppress(ValueError):
        _parsed(name)
        return True
    return False


def _kept(copy: Path) -> Kept:
    at, side = _parsed(copy.name)
    note = _Note(copy.parent.name, "")
    with suppress(OSError, StorageError, msgspec.DecodeError):
        note = msgspec.json.decode(_read(copy.with_suffix(_NOTE), "").data, type=_Note)
    return Kept(note.id, side, at, note.why, copy)


def _aged(copy: Path) -> tuple[float, int, Path] | None:
    """Return when a copy was kept last, and its size; None if it is gone."""
    with suppress(OSError):
        status = copy.lstat()
        return max(_parsed(copy.name)[0].timestamp(), status.st_mtime), status.st_size, copy
    return None


def _network_file_system(path: Path) -> str | None:
    """Return what network file system a folder is on; None if it is on none, or that can't be found out."""
    device = path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    with suppress(OSError):
        for line in _MOUNTS.read_text(errors="replace").splitlines():
            mount, _, source = line.partition(" - ")
            if mount.split()[2:3] == [number] and _NETWORK.fullmatch(kind := source.partition(" ")[0]):
                return kind
    return None

"""The folder of a hybrid store on disk: orcs' files, replaced so that no version is lost.

Bytes only, and blocking. Nobody else's version is overwritten: a new file changes places with the old one, and what
comes out has to be what was expected. If it is not, it goes back.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from stat import S_IMODE
from typing import Final, NamedTuple

import msgspec

from ...errors import InvalidIdError, NotFoundError, PermissionDeniedError, StorageError, UnsupportedServerError
from ...interrupts import raise_interruption, suppress
from ...model.ids import check_id
from ..disk import (
    LEFTOVER_NS,
    PRIVATE,
    SUFFIX,
    AnyPath,
    discard,
    expanded,
    synced,
    temporaries,
    temporary_in,
    translated,
    write_new,
)
from .exchange import UNSUPPORTED, exchange, move
from .kept import KeptCopies, drop_note
from .locks import RoundLock, open_lock, session_lock
from .reading import Found, Signature, content_of, digest_of, file_digest, id_in, opened, read_whole, signature_of

__all__ = ["Files", "Moved", "Replacement"]

_HOME: Final = ".orcs-redis"
_WRITERS: Final = 4  # file systems sync several files at once in less time than one after the other
_MOUNTS: Final = Path("/proc/self/mountinfo")
_NETWORK: Final = re.compile(
    r"nfs4?|cifs|smb\w*|9p|afs|ncpfs|coda|ceph|lustre|glusterfs|beegfs|gpfs|orangefs|pvfs2|gfs2|ocfs2|davfs2?"
    r"|fuse\.(sshfs|s3fs|glusterfs|ceph|ceph-fuse|rclone|gcsfuse|goofys|blobfuse2?|juicefs|mount-s3|davfs2?|curlftpfs|smbnetfs)"
)
_ORPHAN: Final = "left by a process that was killed"


class Moved(Exception):
    """The session's file is not what was expected."""


class Replacement(NamedTuple):
    """New content of a session's file.

    ``expected`` is what is to be replaced: the file as it was read, or its `file_digest`; None: there must be no file.
    """

    id: str
    data: bytes
    expected: Found | bytes | None


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
        self._can_exchange = True
        with translated():
            self.path.mkdir(parents=True, exist_ok=True)
            if kind := _network_file_system(self.path):
                raise UnsupportedServerError(f"the folder is on a network file system, {kind}: {self.path}")
            if not os.access(self.path, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
                raise PermissionDeniedError(f"the folder can't be written to: {self.path}")
            for folder in (self.home, self._locks):
                folder.mkdir(mode=0o700, exist_ok=True)
            self.copies = KeptCopies(self.home, self._file)
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
                    found[id] = signature_of(entry.stat(follow_symlinks=False))
                except (InvalidIdError, FileNotFoundError) as error:
                    raise_interruption(error)
        return found

    def signature(self, id: str) -> Signature | None:
        """Return the signature of a session's file; None if it is absent."""
        with suppress(NotFoundError), translated(check_id(id)):
            return signature_of(os.lstat(self._file(id)))
        return None

    def read(self, id: str) -> Found | None:
        """Read a session's file; None if it is absent.

        Raises:
            CorruptSessionError: it is no regular file, or larger than 1 GiB. A link is none, whatever it points to.
            UnavailableError: it is being written in place.

        """
        with suppress(NotFoundError), translated(check_id(id)):
            return read_whole(self._file(id), id)
        return None

    def id_inside(self, id: str) -> str | None:
        """Return the id that is in a session's file; None: there is no such file, or no id in it."""
        with suppress(StorageError, msgspec.DecodeError, RecursionError):
            if (found := self.read(id)) is not None:
                return id_in(found.data)
        return None

    # Locks.

    def lock(self, id: str) -> AbstractContextManager[None]:
        """Exclude others, threads and processes, from writing the session; waits.

        Whoever has one lock must not ask for another: two ids may have the same.
        """
        return session_lock(self._locks, id)

    def round_lock(self) -> RoundLock:
        """Return the lock on rounds; it is not taken yet."""
        return RoundLock(self.home / "sync.lock")

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
            discard(unused)
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
            discard(unused)

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
                if file_digest(read_whole(file, id).data) != expected:
                    raise Moved(id)
            target = temporary_in(self.home) if keep is None else self.copies.new_copy(id, "here", expected, keep)
            with synced(target.parent), synced(self.path, id):
                self._take_out(file, target, expected)
                if keep is None:
                    discard([target])
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
            write_new(path, replacement.data, PRIVATE)
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
        with translated(), opened(new) as own:  # it says that this is the file, whatever its name
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
                if content_of(new) != old:
                    self._put_back(new, file, file_digest(data))
                    raise Moved(id)
                discard([new])
            return signature_of(os.fstat(own))

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
            returned = digest_of(out)
            try:
                exchange(out, file)
            except FileNotFoundError as error:
                raise_interruption(error)
                self.copies.salvage(out, "deleted while it was replaced")
                return
            came = digest_of(out)
            if came is None or placed is None:
                return
            if came == placed:
                discard([out])
                return
            placed = returned

    def _take_out(self, file: Path, target: Path, expected: bytes) -> None:
        """Move the session's file away; raise Moved, and put it back, if it is not what was expected."""
        try:
            with opened(file) as old:
                os.fsync(old)  # orcs may not have done so
            move(file, target)
        except BaseException:
            drop_note(target)
            raise
        if digest_of(target) == expected:
            with suppress(OSError):
                target.chmod(PRIVATE)
            return
        try:
            move(target, file)
        except FileExistsError as error:
            raise_interruption(error)
            self.copies.salvage(target, "overwritten while it was deleted")
        drop_note(target)
        raise Moved(file.name)

    # What killed processes have left.

    def _tidy(self) -> None:
        """Keep, or remove, the temporary files of processes that are no more."""
        fd = open_lock(self.home / "sync.lock")
        try:
            os.utime(fd)
            now = os.fstat(fd).st_mtime_ns  # by the file system's clock
        finally:
            os.close(fd)
        for path, status in temporaries(self.home):
            # Not only when it was modified: what came out of an exchange is as old as it is.
            if max(status.st_mtime_ns, status.st_ctime_ns) < now - LEFTOVER_NS:
                with suppress(OSError, StorageError):  # the next one tries again
                    self.copies.salvage(path, _ORPHAN)


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

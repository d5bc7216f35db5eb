"""The locks of a folder, between processes and threads: on its rounds, and on each session."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Self

from ...errors import UnavailableError
from ...interrupts import suppress
from ...model.ids import check_id
from ..disk import PRIVATE, translated

__all__ = ["RoundLock", "open_lock", "session_lock"]


class RoundLock:
    """The lock on a folder's rounds; it ends with its process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def take(self) -> bool:
        """Exclude others from the folder's rounds; return whether that could be done at once."""
        fd = open_lock(self._path)
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


@contextmanager
def session_lock(folder: Path, id: str) -> Iterator[None]:
    """Exclude others, threads and processes, from writing a session, by a file in this folder; waits.

    Whoever has one lock must not ask for another: two ids may have the same.
    """
    fd = open_lock(folder / blake2b(check_id(id).encode(), digest_size=1).hexdigest())
    try:
        with translated():
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        _unlock(fd)


def open_lock(path: Path) -> int:
    """Open a lock's file, which is made if it is absent; no link is followed."""
    with translated():
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, PRIVATE)


def _unlock(fd: int) -> None:
    try:
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_UN)  # a child of this process may have the file open too
    finally:
        os.close(fd)

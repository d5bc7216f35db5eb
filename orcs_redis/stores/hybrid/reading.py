"""A session's file read whole, as it was at one moment, and what tells that it has changed since."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from errno import ELOOP, ENXIO
from hashlib import blake2b
from pathlib import Path
from stat import S_ISREG
from typing import Final, NamedTuple

import msgspec

from ...errors import CorruptSessionError, StorageError, UnavailableError
from ...interrupts import raise_interruption, suppress
from ..disk import open_at_once

__all__ = [
    "Found",
    "Signature",
    "content_of",
    "digest_of",
    "file_digest",
    "id_in",
    "opened",
    "read_whole",
    "signature_of",
]

_TRIES: Final = 5
_MAX_BYTES: Final = 2**30  # of a file; a system call reads a little less than twice as many


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


class _Named(msgspec.Struct):
    id: str


def file_digest(data: bytes) -> bytes:
    """Return the digest of a file's bytes: BLAKE2b, 16 bytes."""
    return blake2b(data, digest_size=16).digest()


def id_in(data: bytes) -> str:
    """Return the id in a file's bytes; msgspec.DecodeError or RecursionError if there is none."""
    return msgspec.json.decode(data, type=_Named).id


def signature_of(status: os.stat_result) -> Signature:
    """Return the signature of a file of this status."""
    return Signature(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """Open a file to read, but no link."""
    fd = open_at_once(os.fspath(path), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        yield fd
    finally:
        os.close(fd)


def read_whole(path: Path, id: str) -> Found:
    """Read a file whole, as it was at one moment.

    Raises:
        CorruptSessionError: it is no regular file, or larger than 1 GiB. A link is none, whatever it points to.
        UnavailableError: it is being written in place.
        OSError: it is absent, or can't be read.

    """
    try:
        with opened(path) as fd:
            for _ in range(_TRIES):
                status = os.fstat(fd)
                if not S_ISREG(status.st_mode) or status.st_size > _MAX_BYTES:
                    raise CorruptSessionError(id)
                signature = signature_of(status)
                data = os.pread(fd, signature.size + 1, 0)
                if signature == signature_of(os.fstat(fd)) and len(data) == signature.size:
                    return Found(signature, data)
    except OSError as error:
        raise_interruption(error)
        if isinstance(error, IsADirectoryError) or error.errno in (ELOOP, ENXIO):  # a link, a socket
            raise CorruptSessionError(id) from error
        raise
    raise UnavailableError(f"the file is being written: {path}")


def content_of(path: Path) -> bytes | None:
    """Return what is in a file; None if it can't be read."""
    with suppress(OSError, StorageError):
        return read_whole(path, "").data
    return None


def digest_of(path: Path) -> bytes | None:
    """Return the digest of a file; None if it can't be read."""
    data = content_of(path)
    return None if data is None else file_digest(data)

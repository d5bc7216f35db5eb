"""Two renames that lose nothing: one that exchanges two files, and one that replaces none."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path
from typing import Final

from ...interrupts import raise_interruption

__all__ = ["UNSUPPORTED", "exchange", "move"]

UNSUPPORTED: Final = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""What a system or a file system says that has no such call."""

_libc = ctypes.CDLL(None, use_errno=True)
_renameat2 = getattr(_libc, "renameat2", None)  # Linux
_renamex_np = getattr(_libc, "renamex_np", None)  # macOS
_AT_FDCWD = -100
_NO_REPLACE, _EXCHANGE = 1, 2  # of Linux
_FLAGS_OF_MACOS = {_NO_REPLACE: 4, _EXCHANGE: 2}


def exchange(one: Path, other: Path) -> None:
    """Let two files change places, in one step; OSError with one of `UNSUPPORTED` where there is no such thing."""
    _rename(one, other, _EXCHANGE)


def move(source: Path, target: Path) -> None:
    """Rename a file; FileExistsError if there is one of the new name."""
    try:
        _rename(source, target, _NO_REPLACE)
    except OSError as error:
        raise_interruption(error)
        if error.errno not in UNSUPPORTED:
            raise
    else:
        return
    try:
        os.link(source, target)  # as the calls beside it
    except OSError as error:
        raise_interruption(error)
        if error.errno not in UNSUPPORTED | {errno.EPERM}:
            raise
        if os.path.lexists(target):  # there are no links here either: a window of microseconds
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(target)) from None
        os.rename(source, target)  # noqa: PTH104  # the same
    else:
        os.unlink(source)  # noqa: PTH108  # the same


def _rename(source: Path, target: Path, flag: int) -> None:
    names = os.fsencode(source), os.fsencode(target)
    if _renameat2 is not None:
        failed = _renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], flag)
    elif _renamex_np is not None:
        failed = _renamex_np(*names, _FLAGS_OF_MACOS[flag])
    else:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), os.fspath(source))
    if failed:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), os.fspath(source))

"""Which strings can be session ids."""

from __future__ import annotations

import re
from typing import Final

from ..errors import InvalidIdError

__all__ = ["MAX_ID_BYTES", "check_id"]

MAX_ID_BYTES: Final = 200
"""An id is a file name too, and a name has 255 bytes at most, of which suffixes need some."""

_control = re.compile("[\x00-\x1f\x7f-\x9f]").search  # exactly Cc, of which nothing is printable


def check_id(id: str) -> str:
    """Return ``id`` if it can be a session's.

    That is 1 to 200 bytes of UTF-8, no control characters (Unicode Cc), no / or backslash, no leading dot.

    Raises:
        InvalidIdError: for everything else.

    """
    if not isinstance(id, str):
        raise InvalidIdError(f"a session id is a str, not {type(id).__name__}")
    try:
        size = len(id) if id.isascii() else len(id.encode())
    except UnicodeEncodeError:
        size = -1  # raised below, outside of this block, lest the error drags the id along
    if size < 0:
        raise InvalidIdError("a session id has no lone surrogates")
    if not 0 < size <= MAX_ID_BYTES:
        raise InvalidIdError(f"a session id has 1 to {MAX_ID_BYTES} bytes of UTF-8, not {size}")
    if id[0] == "." or "/" in id or "\\" in id or not (id.isprintable() or not _control(id)):
        raise InvalidIdError("a session id has no control characters, no / or \\ and no leading dot")
    return id

"""Which strings can be session ids; ids made from strings of any kind."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import Final, TypeVar

from ..errors import InvalidIdError

__all__ = ["MAX_ID_BYTES", "check_id", "foreign_id", "several"]

T = TypeVar("T")

MAX_ID_BYTES: Final = 200
"""An id is a file name too, and a name has 255 bytes at most, of which suffixes need some."""

# A file system may take upper and lower case for the same, and two ways to compose an é. Which characters have these
# differs between versions of Unicode, and so of Python: of ASCII alone it is certain.
_to_escape = re.compile("[^a-z0-9@=+_.-]").sub
_HEAD_BYTES: Final = 135  # of the readable beginning of a hashed id

_control = re.compile("[\x00-\x1f\x7f-\x9f]").search  # exactly Cc, of which nothing is printable


def several(ids: Iterable[T]) -> Iterable[T]:
    """Return what is to be ids, or raise TypeError: a text would be taken for ids of one character."""
    if isinstance(ids, (str, bytes)):
        raise TypeError("ids is a collection of ids")
    return ids


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


def foreign_id(*parts: str) -> str:
    """Return a session id made from strings of any kind, such as another system's ids of application, user and thread.

    The same parts give the same id, in every version; other parts give another one, also for a file system that ignores
    case. Lower-case letters, digits and ``@=+_.-`` stay as they are; an upper-case letter becomes ``^`` and the
    lower-case one; all else is percent-encoded in lower case; commas join the parts. What is longer than 200 bytes so
    is cut, and ends in ``~`` and the SHA-256 of the whole in hexadecimal digits.

    Raises:
        ValueError: there are no parts. Any of them may be empty.
        TypeError: a part is not a str.

    """
    if not parts:
        raise ValueError("a foreign id has at least one part")
    for part in parts:
        if not isinstance(part, str):
            raise TypeError(f"a part of a foreign id is a str, not {type(part).__name__}")
    id = ",".join(_to_escape(_escape, part) for part in parts) or "%"  # a single empty part
    if id[0] == ".":
        id = f"%2e{id[1:]}"
    if len(id) > MAX_ID_BYTES:
        head = re.sub(r"(%.?|\^)$", "", id[:_HEAD_BYTES])  # without half an escape
        id = f"{head}~{hashlib.sha256(id.encode()).hexdigest()}"
    return id


def _escape(match: re.Match[str]) -> str:
    char = match[0]
    if "A" <= char <= "Z":
        return f"^{char.lower()}"
    return "".join(f"%{byte:02x}" for byte in char.encode(errors="surrogatepass"))

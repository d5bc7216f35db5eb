"""What projections are made of: readable text of parts of JSON, whatever they turn out to be."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, NamedTuple

import msgspec

from ..encoding import attempt

__all__ = [
    "Fields",
    "Projection",
    "called",
    "joined",
    "list_of",
    "map_of",
    "media",
    "ms_of",
    "returned",
    "tagged",
    "text_of",
    "texts_of",
]

Fields = dict[str, Any]

_MAX_URL = 200  # characters of an address that are shown
_MAX_TIME = 253_402_300_800  # seconds


class Projection(NamedTuple):
    """What an item says: text, and what else its format knows. None: it does not."""

    content: str
    role: str | None = None
    id: str | None = None
    timestamp_ms: int | None = None


def map_of(value: object) -> Fields:
    """Return an object's fields; of anything else, none."""
    return value if isinstance(value, dict) else {}


def list_of(value: object) -> list[Fields]:
    """Return the objects in a list."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def text_of(value: object) -> str:
    """Return text as it is, nothing for null, anything else as compact JSON."""
    if isinstance(value, str):
        return value
    return "" if value is None else msgspec.json.encode(value).decode()


def texts_of(value: object) -> str:
    """Return a list's elements, separated by commas; anything else as `text_of`."""
    return ", ".join(map(text_of, value)) if isinstance(value, list) else text_of(value)


def joined(parts: Iterable[str]) -> str:
    """Return the parts that are not empty, one a line."""
    return "\n".join(filter(None, parts))


def tagged(tag: str, value: object = None) -> str:
    """Return what is no message: what it is, in brackets, and its text."""
    return f"[{tag}] {text_of(value)}".rstrip(" ")


def called(name: object, arguments: object) -> str:
    """Return the call of a tool."""
    return tagged(f"call {text_of(name)}".rstrip(), arguments)


def returned(name: object, result: object, failed: bool = False) -> str:
    """Return what a tool gave; the name may be unknown."""
    kind = "error" if failed else "result"
    return tagged(f"{kind} of {text_of(name)}" if name else kind, result)


def media(kind: str, *sources: object, name: object = None) -> str:
    """Return what stands for a file: the first name, address or id that there is; never its bytes."""
    for source in (name, *sources):
        if isinstance(source, str) and source:
            if source.startswith("data:"):
                return f"[{kind}: {source[5:].partition(';')[0][:_MAX_URL]}]"
            return f"[{kind}: {source[:_MAX_URL]}]"
    return f"[{kind}]"


def ms_of(value: object) -> int | None:
    """Return a time, seconds since 1970 or ISO 8601, in milliseconds; None if it is none, or before 1970."""
    seconds = value
    if isinstance(value, str):
        time: datetime | None = attempt(datetime.fromisoformat, value)[0]
        if time is None:
            return None
        seconds = (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
    if type(seconds) not in (int, float) or not 0 <= seconds < _MAX_TIME:  # type: ignore[operator]
        return None
    return round(seconds * 1000)  # type: ignore[operator]

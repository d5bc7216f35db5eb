"""Records, the ordered keyed bytes inside a session: requests and plans that read them.

Keys are read in order from a sorted set, then their records by plain commands, some at a time. One command is atomic; a
range of several is not: what is dropped in between is left out, what is put in between may be in it.
"""

from __future__ import annotations

import builtins
from collections.abc import Iterable, Sequence
from typing import TypeAlias, cast

from ..errors import CorruptSessionError
from ..model.encoding import attempt, named, utf8_of
from ..model.filters import check_limit
from ..model.ids import check_id
from .commands import Command, Reply, as_error
from .request import Pause, Plan, Request
from .writer import Namespace

__all__ = ["MAX_RECORD_KEY_BYTES", "Record", "RecordKeys", "RecordValues", "Records", "check_record_key"]

Record: TypeAlias = tuple[str, bytes]
MAX_RECORD_KEY_BYTES = 1024
_FEW, _MANY = 100, 1000  # records in one command, at first and at most
_MUCH = 4 << 20  # bytes of records in one reply


class Records:
    """What there is to ask about a session's records, as plans. Bad input is refused before anything is sent."""

    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace

    def range(
        self, id: str, prefix: str, after: str | None, before: str | None, limit: int | None, reverse: bool
    ) -> Plan[builtins.list[Record]]:
        """Records in the order of their keys' bytes, or reversed; none of an absent session."""
        check_id(id)
        first, stop = _bounds(prefix, after, before)
        limit = None if limit is None else check_limit(limit)
        return self._range(id, first, stop, limit, reverse)

    def _range(
        self, id: str, first: bytes, stop: bytes, limit: int | None, reverse: bool
    ) -> Plan[builtins.list[Record]]:
        found: builtins.list[Record] = []
        chunk = _Chunk()
        while limit is None or len(found) < limit:
            count = chunk.count if limit is None else min(chunk.count, limit - len(found))
            keys = yield RecordKeys(self._namespace, id, first, stop, count, reverse)
            if keys:
                values = yield RecordValues(self._namespace, id, keys)
                chunk.note(values)
                found += _present(keys, values)
            if len(keys) < count or len(found) == limit:
                break
            passed = b"(" + keys[-1].encode()
            first, stop = (first, passed) if reverse else (passed, stop)
            yield Pause(0)  # the deadline is for each chunk
        return found

    def get(self, id: str, keys: Iterable[str]) -> Plan[dict[str, bytes]]:
        """Records by key, without those that are absent."""
        check_id(id)
        if isinstance(keys, str):
            raise ValueError("keys are several: a str is one")
        unique = builtins.list(dict.fromkeys(keys))
        for key in unique:
            check_record_key(key)
        return self._get(id, unique)

    def _get(self, id: str, keys: builtins.list[str]) -> Plan[dict[str, bytes]]:
        found: dict[str, bytes] = {}
        chunk = _Chunk()
        at = 0
        while at < len(keys):
            if at:
                yield Pause(0)  # the deadline is for each chunk
            some = keys[at : at + chunk.count]
            values = yield RecordValues(self._namespace, id, some)
            found |= _present(some, values)
            at += len(some)
            chunk.note(values)
        return found


class RecordKeys(Request[list[str]]):
    """Keys of a range of records, in their order or reversed; bounds are as in ZRANGE BYLEX."""

    __slots__ = ("_command", "_id")

    def __init__(self, namespace: Namespace, id: str, first: bytes, stop: bytes, count: int, reverse: bool) -> None:
        super().__init__()
        self._id = id
        bounds: tuple[bytes | str, ...] = (stop, first, "BYLEX", "REV") if reverse else (first, stop, "BYLEX")
        self._command = ("ZRANGE", namespace.keyspace.of(id).names(id), *bounds, "LIMIT", 0, count)

    def commands(self) -> Sequence[Command]:
        """Ask for the keys alone."""
        return [self._command]

    def decode(self, replies: Sequence[Reply]) -> list[str]:
        """Return them."""
        _check_type(self._id, replies[0], "names")
        self._check(replies)
        keys, refusal = attempt(_texts, replies[0])
        if refusal is not None:
            raise CorruptSessionError(self._id, "names")
        return cast(list[str], keys)


class RecordValues(Request["list[bytes | None]"]):
    """Records by their keys, None for those that are absent."""

    __slots__ = ("_command", "_id")

    def __init__(self, namespace: Namespace, id: str, keys: Sequence[str]) -> None:
        super().__init__()
        self._id = id
        self._command = ("HMGET", namespace.keyspace.of(id).records(id), *keys)

    def commands(self) -> Sequence[Command]:
        """One plain command: large bodies are dear in a script."""
        return [self._command]

    def decode(self, replies: Sequence[Reply]) -> list[bytes | None]:
        """Return them, one for each key."""
        _check_type(self._id, replies[0], "records")
        self._check(replies)
        return [None if value is None else bytes(value) for value in replies[0]]


class _Chunk:
    """How many records to read at a time: a reply is neither small nor large, whatever their size."""

    def __init__(self) -> None:
        self.count = _FEW

    def note(self, values: Iterable[bytes | None]) -> None:
        size = sum(len(value) for value in values if value is not None)
        self.count = max(1, self.count // 2) if size > _MUCH else min(2 * self.count, _MANY)


def check_record_key(key: str) -> bytes:
    """Return a record's key as UTF-8, or raise ValueError: it has 1 to 1,024 bytes."""
    data = utf8_of(key, "a record's key")
    if not 1 <= len(data) <= MAX_RECORD_KEY_BYTES:
        raise ValueError(f"a record's key has {len(data)} bytes, not 1 to {MAX_RECORD_KEY_BYTES}: {named(key)}")
    return data


def _bounds(prefix: str, after: str | None, before: str | None) -> tuple[bytes, bytes]:
    """Return the bounds of a range for ZRANGE BYLEX. No key has the byte 255."""
    start = utf8_of(prefix, "a prefix")
    first, stop = b"[" + start, start + b"\xff"
    if after is not None and (key := check_record_key(after)) >= start:
        first = b"(" + key
    if before is not None:
        stop = min(stop, check_record_key(before))
    return first, b"(" + stop


def _present(keys: Sequence[str], values: Sequence[bytes | None]) -> builtins.list[Record]:
    return [(key, value) for key, value in zip(keys, values, strict=True) if value is not None]


def _texts(values: Iterable[bytes]) -> builtins.list[str]:
    return [value.decode() for value in values]


def _check_type(id: str, reply: Reply, part: str) -> None:
    if (as_error(reply) or "").startswith("WRONGTYPE"):
        raise CorruptSessionError(id, part)

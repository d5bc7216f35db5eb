"""Requests that read: a session, its turns, the index."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from ..errors import CorruptSessionError, NotFoundError
from ..model.asset import SessionAsset
from ..model.meta import Versioned
from ..model.sections import ConversationTurn
from .attempts import TornRead
from .baseline import Baseline, set_baseline
from .codec import Codec
from .commands import Argument, Command, Reply, as_error, as_map, has_errors
from .request import Request
from .turns import decode_turns
from .writer import Namespace

__all__ = [
    "Exists",
    "Load",
    "Mark",
    "News",
    "Ping",
    "ReadMark",
    "ReadNews",
    "ReadStored",
    "ReadTail",
    "ReadWithRecords",
    "Stored",
    "Tail",
    "Turns",
]

A = TypeVar("A", bound=SessionAsset)
T = TypeVar("T")
_TORN_READS = 100


class Stored(NamedTuple):
    """A session as it is stored, or the part of it that was asked for."""

    revision: int
    operation_id: bytes  # of the write that made the revision
    fields: dict[str, bytes]
    start: int  # index of the first of `turns`
    turns: Sequence[bytes]
    born: int  # revision of the write that made the session
    reshaped: int  # revision of the last write that changed turns other than by pushing

    @property
    def turn_count(self) -> int:
        """The number of the session's turns."""
        return self.start + len(self.turns)


class Read(Request[T], Generic[T]):
    """A session, with the turns from an index on. The revision is read again at the end.

    If no write came between, nothing is torn.
    """

    __slots__ = ("_absent", "_id", "_listed", "_namespace", "_partition", "_start")

    def __init__(self, namespace: Namespace, id: str, start: int = 0) -> None:
        super().__init__()
        self._namespace = namespace
        self._id = id
        self._partition = namespace.keyspace.of(id)
        self._start = start
        self._absent = False  # it was, at the last attempt
        self._listed: Reply = None  # the metadata that it had all the same

    def commands(self) -> Sequence[Command]:
        """Plain commands: they cost the server a fifth of what a script does, and work when its memory is full."""
        session = self._partition.session(self._id)
        none = ("EXISTS", session)  # in place of no turns at all
        return [
            ("HGETALL", session),
            none if self._start == NO_TURNS else ("LRANGE", self._partition.turns(self._id), self._start, b"-1"),
            ("HGET", session, ".revision"),
            *([("HGET", self._partition.meta, self._id)] if self._absent else []),
        ]

    def decode(self, replies: Sequence[Reply]) -> T:
        """Return what was read as the caller wants it."""
        id = self._id
        if has_errors(replies):
            _check_types(id, replies[:3], ("session", "history.turns", "session"))
            self._check(replies)
        hash, turns = as_map(replies[0]), replies[1] if self._start != NO_TURNS else []
        revision = hash.get(b".revision")
        if revision != replies[2]:
            raise TornRead("a write came between")
        if not hash:
            if not self._absent:
                self._absent = True
                raise TornRead("it is absent, or was evicted")
            if replies[3] is None:
                raise NotFoundError(id)
            if replies[3] != self._listed:
                self._listed = replies[3]
                raise TornRead("it was created meanwhile, or evicted")
            raise CorruptSessionError(id, "session")
        number = _number(id, hash, ".revision")
        start = self._first(_number(id, hash, ".turns"), len(turns))
        self._namespace.observe(self._partition, number)
        return self._result(number, hash, start, turns)

    def _first(self, count: int, found: int) -> int:
        """Return the index of the first turn that was read."""
        start = count if self._start == NO_TURNS else self._start
        first = max(count + start, 0) if start < 0 else start
        if found != max(count - first, 0):
            raise CorruptSessionError(self._id, "history.turns")
        return min(first, count)

    def _result(self, revision: int, hash: Mapping[bytes, bytes], start: int, turns: Sequence[bytes]) -> T:
        raise NotImplementedError


NO_TURNS = -(2**63)  # as a start


class ReadStored(Read[Stored]):
    """A session's parts, and the turns from an index on."""

    __slots__ = ("_codec",)

    def __init__(self, namespace: Namespace, codec: Codec[Any], id: str, start: int = 0) -> None:
        super().__init__(namespace, id, start)
        self._codec = codec

    def _result(self, revision: int, hash: Mapping[bytes, bytes], start: int, turns: Sequence[bytes]) -> Stored:
        born, reshaped = (_number(self._id, hash, name) for name in (".born", ".reshaped"))
        return Stored(revision, hash.get(b".op", b""), self._codec.parts(hash), start, turns, born, reshaped)


class Load(Read[Versioned[A]]):
    """A session, or its last turns: an asset, which remembers what it was."""

    __slots__ = ("_codec",)

    def __init__(self, namespace: Namespace, codec: Codec[A], id: str, last: int | None = None) -> None:
        super().__init__(namespace, id, 0 if last is None else -last if last else NO_TURNS)
        self._codec = codec

    def _result(self, revision: int, hash: Mapping[bytes, bytes], start: int, turns: Sequence[bytes]) -> Versioned[A]:
        fields = self._codec.parts(hash)
        asset = self._codec.decode(self._id, fields, turns)
        operation_id = hash.get(b".op", b"")
        baseline = Baseline(self._namespace.incarnation, self._id, revision, operation_id, fields, turns, start)
        set_baseline(asset, baseline, tuple(asset.history.turns))
        return Versioned(asset, revision)


class News(NamedTuple):
    """What is new of a session since a revision: turns that were pushed; or more."""

    revision: int
    operation_id: bytes
    updated_at: bytes
    pushed: Sequence[bytes]
    parts_changed: bool
    reshaped: bool  # turns were changed other than by pushing, or nothing is as it was
    born: int


class ReadNews(Request[News]):
    """What came to a session after a baseline, as far as two commands say."""

    __slots__ = ("_base", "_namespace", "_partition")

    def __init__(self, namespace: Namespace, base: Baseline) -> None:
        super().__init__()
        self._namespace = namespace
        self._base = base
        self._partition = namespace.keyspace.of(base.id)

    def commands(self) -> Sequence[Command]:
        """Ask for the turns first: what is pushed in between shows in their number."""
        id, fields = self._base.id, (".revision", ".op", ".turns", "updated_at_ms", ".parts", ".reshaped", ".born")
        return [
            ("LRANGE", self._partition.turns(id), self._base.turn_count, b"-1"),
            ("HMGET", self._partition.session(id), *fields),
        ]

    def decode(self, replies: Sequence[Reply]) -> News:
        """Return them; NotFoundError if the session is gone."""
        base = self._base
        if has_errors(replies):
            _check_types(base.id, replies, ("history.turns", "session"))
            self._check(replies)
        pushed, (revision, operation_id, count, updated_at, parts, reshaped, born) = replies
        if revision is None:
            raise NotFoundError(base.id)
        marks = {b".revision": revision, b".turns": count, b".parts": parts, b".reshaped": reshaped, b".born": born}
        now, turns, parts_at, reshaped_at, born_at = (_number(base.id, marks, name.decode()) for name in marks)
        self._namespace.observe(self._partition, now)
        went_back = now < base.revision or (now == base.revision and operation_id != base.operation_id)
        reshapes = went_back or reshaped_at > base.revision
        # With a conflict that was left, the turns are those of before.
        if not (reshapes or base.conflicting) and turns != base.turn_count + len(pushed):
            if turns < base.turn_count + len(pushed):  # and none was removed: the data went back
                return News(now, operation_id, updated_at, pushed, True, True, born_at)
            raise TornRead("a write came between")
        return News(now, operation_id, updated_at, pushed, went_back or parts_at > base.revision, reshapes, born_at)


class ReadTail(Request["Tail"]):
    """The end of a history, at one revision."""

    __slots__ = ("_id", "_most", "_partition")

    def __init__(self, namespace: Namespace, id: str, most: int) -> None:
        super().__init__()
        self._id = id
        self._most = most
        self._partition = namespace.keyspace.of(id)

    def commands(self) -> Sequence[Command]:
        """The revision is read before and after."""
        session = self._partition.session(self._id)
        return [
            ("HGET", session, ".revision"),
            ("LRANGE", self._partition.turns(self._id), -self._most, b"-1"),
            ("HMGET", session, ".revision", ".op", ".turns"),
        ]

    def decode(self, replies: Sequence[Reply]) -> Tail:
        """Return it; NotFoundError if there is no session."""
        _check_types(self._id, replies, ("session", "history.turns", "session"))
        self._check(replies)
        before, turns, (revision, operation_id, count) = replies
        if revision is None and before is None:
            raise NotFoundError(self._id)
        if before != revision:
            raise TornRead("a write came between")
        marks = {b".revision": revision, b".turns": count}
        number = _number(self._id, marks, ".turns")
        if len(turns) != min(number, self._most):
            raise CorruptSessionError(self._id, "history.turns")
        return Tail(_number(self._id, marks, ".revision"), operation_id or b"", number, turns)


class Tail(NamedTuple):
    """The last turns of a history that has `turn_count`."""

    revision: int
    operation_id: bytes
    turn_count: int
    turns: Sequence[bytes]


class ReadWithRecords(Request[tuple[Stored, list[Argument]]]):
    """A session and all its records, keys and values in turn, at one revision."""

    __slots__ = ("_id", "_partition", "_stored")

    def __init__(self, namespace: Namespace, codec: Codec[Any], id: str) -> None:
        super().__init__()
        self._id = id
        self._partition = namespace.keyspace.of(id)
        self._stored = ReadStored(namespace, codec, id)

    def commands(self) -> Sequence[Command]:
        """The revision is read once more after the records."""
        partition, id = self._partition, self._id
        return [
            *self._stored.commands(),
            ("HGETALL", partition.records(id)),
            ("HGET", partition.session(id), ".revision"),
        ]

    def decode(self, replies: Sequence[Reply]) -> tuple[Stored, list[Argument]]:
        """Return both; NotFoundError if there is no session."""
        stored = self._stored.decode(replies[:-2])
        _check_types(self._id, replies[-2:], ("records", "session"))
        self._check(replies)
        records, revision = replies[-2:]
        if revision != b"%d" % stored.revision:
            raise TornRead("a write came between")
        return stored, [item for pair in as_map(records).items() for item in pair]


class Turns(Request[list[ConversationTurn]]):
    """A part of a session's history."""

    __slots__ = ("_id", "_partition", "_start", "_stop", "_torn")

    def __init__(self, namespace: Namespace, id: str, start: int, stop: int) -> None:
        super().__init__()
        self._id = id
        self._partition = namespace.keyspace.of(id)
        self._start = start
        self._stop = stop
        self._torn = 0

    def commands(self) -> Sequence[Command]:
        """The number of turns is read with them, since a list that was evicted looks like an empty one."""
        return [
            ("LRANGE", self._partition.turns(self._id), self._start, self._stop),
            ("HGET", self._partition.session(self._id), ".turns"),
        ]

    def decode(self, replies: Sequence[Reply]) -> list[ConversationTurn]:
        """Return the turns."""
        _check_types(self._id, replies, ("history.turns", "session"))
        self._check(replies)
        turns, count = replies
        if count is None:
            raise NotFoundError(self._id)
        if not count.isdigit():
            raise CorruptSessionError(self._id, ".turns")
        if not turns and range(int(count))[_slice(self._start, self._stop)]:
            self._torn += 1  # the first turns may have come between
            if self._torn < _TORN_READS:
                raise TornRead("a write came between")
            raise CorruptSessionError(self._id, "history.turns")
        return decode_turns(self._id, turns)


class Exists(Request[bool]):
    """Whether there is a session."""

    __slots__ = ("_key",)

    def __init__(self, namespace: Namespace, id: str) -> None:
        super().__init__()
        self._key = namespace.keyspace.of(id).session(id)

    def commands(self) -> Sequence[Command]:
        """Ask for the key."""
        return [("EXISTS", self._key)]

    def decode(self, replies: Sequence[Reply]) -> bool:
        """Read the number of keys found."""
        self._check(replies)
        return bool(replies[0])


class Mark(NamedTuple):
    """Which write a session is of; revision 0: what is stored does not say so."""

    revision: int
    operation_id: bytes


class ReadMark(Request["Mark | None"]):
    """Which write a session is of; None: it is absent."""

    __slots__ = ("_key",)

    def __init__(self, namespace: Namespace, id: str) -> None:
        super().__init__()
        self._key = namespace.keyspace.of(id).session(id)

    def commands(self) -> Sequence[Command]:
        """A key that is no session is there, too."""
        return [("EXISTS", self._key), ("HMGET", self._key, ".revision", ".op")]

    def decode(self, replies: Sequence[Reply]) -> Mark | None:
        """Return it."""
        exists, found = replies
        if (as_error(found) or "").startswith("WRONGTYPE"):
            return Mark(0, b"")
        self._check(replies)
        revision, operation_id = found
        if revision is not None and revision.isdigit():
            return Mark(int(revision), operation_id or b"")
        return Mark(0, b"") if exists else None


class Ping(Request[float]):
    """A round trip, in seconds."""

    __slots__ = ("_sent",)

    def commands(self) -> Sequence[Command]:
        """Ask for nothing."""
        self._sent = time.perf_counter()
        return [("PING",)]

    def decode(self, replies: Sequence[Reply]) -> float:
        """Return the time it took."""
        self._check(replies)
        return time.perf_counter() - self._sent


def _check_types(id: str, replies: Sequence[Reply], parts: Sequence[str]) -> None:
    for reply, part in zip(replies, parts, strict=True):
        if (as_error(reply) or "").startswith("WRONGTYPE"):
            raise CorruptSessionError(id, part)


def _number(id: str, hash: Mapping[bytes, Any], name: str) -> int:
    value = hash.get(name.encode())
    if value is None or not value.isdigit() or len(value) > 16:
        raise CorruptSessionError(id, name)
    return int(value)


def _slice(start: int, stop: int) -> slice:
    """Return Redis' range, whose end is included, as Python's."""
    return slice(start, None if stop == -1 else stop + 1)

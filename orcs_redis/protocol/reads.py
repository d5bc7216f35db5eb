"""Requests that read: a session, its turns, the index."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TypeVar

from ..errors import CorruptSessionError, NotFoundError
from ..model.asset import SessionAsset
from ..model.meta import Versioned
from ..model.sections import ConversationTurn
from .attempts import TornRead
from .codec import Baseline, Codec, set_baseline
from .commands import Command, Reply, as_error, as_map, has_errors
from .request import Request
from .turns import decode_turns
from .writer import Namespace

__all__ = ["Exists", "Load", "Ping", "Turns"]

A = TypeVar("A", bound=SessionAsset)
_TORN_READS = 100


class Load(Request[Versioned[A]]):
    """A whole session. The revision is read again at the end: if no write came between, nothing is torn."""

    __slots__ = ("_absent", "_codec", "_id", "_listed", "_namespace", "_partition")

    def __init__(self, namespace: Namespace, codec: Codec[A], id: str) -> None:
        super().__init__()
        self._namespace = namespace
        self._codec = codec
        self._id = id
        self._partition = namespace.keyspace.of(id)
        self._absent = False  # it was, at the last attempt
        self._listed: Reply = None  # the metadata that it had all the same

    def commands(self) -> Sequence[Command]:
        """Plain commands: they cost the server a fifth of what a script does, and work when its memory is full."""
        session = self._partition.session(self._id)
        return [
            ("HGETALL", session),
            ("LRANGE", self._partition.turns(self._id), b"0", b"-1"),
            ("HGET", session, ".revision"),
            *([("HGET", self._partition.meta, self._id)] if self._absent else []),
        ]

    def decode(self, replies: Sequence[Reply]) -> Versioned[A]:
        """Return the asset, which remembers what it was."""
        id = self._id
        if has_errors(replies):
            _check_types(id, replies[:3], ("session", "history.turns", "session"))
            self._check(replies)
        fields, turns = as_map(replies[0]), replies[1]
        revision = fields.get(b".revision")
        if revision != replies[2]:
            raise TornRead("a write came between")
        if not fields:
            if not self._absent:
                self._absent = True
                raise TornRead("it is absent, or was evicted")
            if replies[3] is None:
                raise NotFoundError(id)
            if replies[3] != self._listed:
                self._listed = replies[3]
                raise TornRead("it was created meanwhile, or evicted")
            raise CorruptSessionError(id, "session")
        if revision is None or not revision.isdigit() or len(revision) > 16:
            raise CorruptSessionError(id, ".revision")
        sections = self._codec.sections(fields)
        asset = self._codec.decode(id, sections, turns)
        if fields.get(b".turns") != b"%d" % len(turns):
            raise CorruptSessionError(id, "history.turns")
        number = int(revision)
        self._namespace.observe(self._partition, number)
        operation_id = fields.get(b".op", b"")
        set_baseline(asset, Baseline(self._namespace.incarnation, id, number, operation_id, sections, turns))
        return Versioned(asset, number)


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


def _slice(start: int, stop: int) -> slice:
    """Return Redis' range, whose end is included, as Python's."""
    return slice(start, None if stop == -1 else stop + 1)

"""Requests that read: a session, its turns, the index."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any, TypeAlias, TypeVar

from .. import scripts
from ..errors import CorruptSessionError, LayoutError, NotFoundError
from ..model.asset import SessionAsset
from ..model.meta import SessionMeta, Versioned
from ..model.sections import ConversationTurn
from .attempts import TornRead
from .codec import Baseline, Codec, decode_meta, decode_turns, set_baseline
from .commands import Argument, Command, Reply, as_error, as_map, has_errors
from .keys import Partition
from .request import Request
from .writer import Namespace

__all__ = ["AllMeta", "Exists", "Load", "MetaRun", "Ping", "Position", "Turns"]

_log = logging.getLogger("orcs_redis")
A = TypeVar("A", bound=SessionAsset)
Position: TypeAlias = tuple[Argument, Argument]  # a place in the index: updated_at_ms and id
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


class AllMeta(Request[list[SessionMeta]]):
    """The metadata of every session of a partition, in no order."""

    __slots__ = ("_partition",)

    def __init__(self, partition: Partition) -> None:
        super().__init__()
        self._partition = partition

    def commands(self) -> Sequence[Command]:
        """One plain command; the metadata holds what they are to be ordered by."""
        return [("HGETALL", self._partition.meta)]

    def decode(self, replies: Sequence[Reply]) -> list[SessionMeta]:
        """Decode them, without those that can't be: they show themselves when loaded."""
        _check_index(self._partition, replies)
        self._check(replies)
        return _metas(as_map(replies[0]).items())


class MetaRun(Request["tuple[Position | None, list[SessionMeta]]"]):
    """A run of a partition's index (scripts/page.lua): where it ended (None: at the end) and its metadata."""

    __slots__ = ("_arguments", "_limit", "_partition")

    def __init__(self, partition: Partition, limit: int, span: tuple[Argument, Argument], after: Position) -> None:
        super().__init__()
        self._partition = partition
        self._limit = limit
        self._arguments = (limit, *span, *after)

    def commands(self) -> Sequence[Command]:
        """Call the script."""
        keys = (self._partition.updated, self._partition.meta)
        return [self._script(scripts.PAGE, keys, self._arguments)]

    def decode(self, replies: Sequence[Reply]) -> tuple[Position | None, list[SessionMeta]]:
        """Return the end, and the metadata of those where it can be decoded."""
        _check_index(self._partition, replies)
        self._check(replies)
        time_of_last, *flat = replies[0]
        ids = flat[::2]
        last = (int(float(time_of_last)), ids[-1]) if len(ids) == self._limit else None
        return last, _metas(zip(ids, flat[1::2], strict=True))


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


def _metas(pairs: Any) -> list[SessionMeta]:
    metas = []
    for id, packed in pairs:
        try:
            metas.append(decode_meta(id.decode(), packed))
        except (CorruptSessionError, UnicodeDecodeError):
            _log.warning("a list leaves out session %r: its metadata can't be decoded", id)
    return metas


def _check_types(id: str, replies: Sequence[Reply], parts: Sequence[str]) -> None:
    for reply, part in zip(replies, parts, strict=True):
        if (as_error(reply) or "").startswith("WRONGTYPE"):
            raise CorruptSessionError(id, part)


def _check_index(partition: Partition, replies: Sequence[Reply]) -> None:
    if "WRONGTYPE" in (as_error(replies[0]) or ""):
        raise LayoutError(f"the index of {partition.prefix} is not of this store's layout")


def _slice(start: int, stop: int) -> slice:
    """Return Redis' range, whose end is included, as Python's."""
    return slice(start, None if stop == -1 else stop + 1)

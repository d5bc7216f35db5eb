"""What to ask of a server: each operation is a value that knows its commands and how to read their replies.

Nothing here waits: the drivers (driver.py, threads.py) do.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import struct
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, TypeAlias, TypeVar, cast

import msgspec

from .. import scripts
from ..errors import (
    ConflictError,
    CorruptSessionError,
    LayoutError,
    LeaseLostError,
    NotFoundError,
    OutcomeUnknownError,
    PermissionDeniedError,
    SerializationError,
    StorageError,
    StoreResetError,
    UnsupportedServerError,
    VersionIncompatibleError,
)
from ..model.asset import SESSION_VERSION, ConversationTurn, SessionAsset
from ..model.meta import SessionMeta, Versioned
from ..scripts import Script
from .codec import VERSION, Codec, Stored, decode_meta, decode_turns, decode_version, remember
from .keys import LAYOUT_VERSION, Keyspace, Partition
from .resp import (
    Again,
    Argument,
    Command,
    Forgotten,
    Head,
    Joinable,
    NoScript,
    Reply,
    Torn,
    Trouble,
    as_error,
    as_map,
    check,
    check_server,
    has_errors,
    translate,
)

__all__ = [
    "APPEND",
    "DELETE",
    "SAVE",
    "AllMeta",
    "Create",
    "Exists",
    "Load",
    "MetaRun",
    "Namespace",
    "Operation",
    "Ping",
    "Probe",
    "ReadLayout",
    "Ticket",
    "Turns",
    "Write",
    "Written",
    "check_script",
    "refusal",
]

_log = logging.getLogger("orcs_redis")

APPEND, SAVE, DELETE = b"a", b"s", b"d"  # kinds of writes

Position: TypeAlias = tuple[Argument, Argument]  # a place in the index: updated_at_ms and id

T = TypeVar("T")
A = TypeVar("A", bound=SessionAsset)

_STOPPED = re.compile(r"script: [0-9a-f]{40}, on|user_script")  # where in a script an error was raised
_POLICY = re.compile(rb"maxmemory_policy:(?!noeviction)([a-z-]+)")
_STAGING_CHUNK = 256 * 1024  # bytes of turns in one command
_STAGING_TTL_MS = 60_000  # what a writer that died has staged is gone after this
_TORN_READS = 100
_CLOSED = 2**32 - 1  # in place of a counter: nothing more is to come of an epoch
_BARRED = 100  # of what is not to be applied any more, so many are named by one write at most
_WINDOW = 1024  # operations that a dedup window may come to hold: what one that hangs keeps the server from forgetting
_pack_barred = struct.Struct(">4sII").pack
_pack_head = struct.Struct(">IB12sIIQI").pack  # of a write, in scripts/write.lua

# What the scripts call besides TIME and PUBLISH, and what goes ahead of them; tests/test_rights.py reads the scripts.
_WRITE_COMMANDS = (
    "EVALSHA", "EXEC", "EXISTS", "HDEL", "HGET", "HINCRBY", "HLEN", "HMGET", "HRANDFIELD", "HSET", "LLEN", "LSET",
    "LTRIM", "MULTI", "PERSIST", "PEXPIRE", "PUBLISH", "RENAME", "RPUSH", "TIME", "UNLINK", "ZADD", "ZCARD", "ZRANGE",
    "ZREM", "ZSCORE",
)  # fmt: skip
_OTHER_COMMANDS = (
    "EVAL",
    "HGETALL",
    "INCR",
    "LRANGE",
    "PTTL",
    "SUBSCRIBE",
    "UNSUBSCRIBE",
    "ZCOUNT",
    "ZREMRANGEBYSCORE",
)


class Operation(Generic[T]):
    """Commands, and what their replies mean. A driver may send it several times until there is an answer."""

    __slots__ = ("_evaluate", "deadline")
    writes = False

    def __init__(self) -> None:
        self.deadline: float | None = None  # seconds for all attempts, where it is not the store's
        self._evaluate = False  # send the script's text, since the server doesn't know its digest

    def commands(self) -> Sequence[Command]:
        """Return the commands of the next attempt."""
        raise NotImplementedError

    def decode(self, replies: Sequence[Reply]) -> T:
        """Return what the replies mean, or raise: a StorageError, or a Trouble if another attempt may succeed."""
        raise NotImplementedError

    def settles(self, error: StorageError) -> bool:
        """Whether a refusal also means that no earlier sending, still on its way perhaps, will be applied."""
        return True

    def end(self) -> None:
        """Note that it is finished, however it ended, and will not be sent again."""

    def _script(self, script: Script, keys: Sequence[str], arguments: Sequence[Argument]) -> Command:
        if self._evaluate:
            return ("EVAL", script.source, len(keys), *keys, *arguments)
        return ("EVALSHA", script.sha, len(keys), *keys, *arguments)

    def _check(self, replies: Sequence[Reply]) -> None:
        try:
            check(replies)
        except NoScript:
            self._evaluate = True
            raise


class Ticket:
    """What a write is known by, from its first sending until it is finished."""

    __slots__ = ("barred", "counter", "floor", "nonce", "seen", "window")

    def __init__(self, window: _Window, counter: int, seen: int) -> None:
        self.window = window
        self.counter = counter
        self.nonce = time.time_ns() & 0xFFFFFFFF  # two clones of a process count alike, but not at the same moment
        self.seen = seen  # a revision of the partition, known before: whatever it makes is later
        self.floor = counter  # the lowest counter of the window's writes that were not finished when it began
        self.barred: Sequence[_Barred] = ()  # what the server must not apply any more, should it arrive late

    def head(self) -> tuple[bytes, int, int, int, int]:
        """Return what the scripts need to recognise it: writer, counter, nonce, seen, floor."""
        return self.window.writer, self.counter, self.nonce, self.seen, self.floor

    @property
    def operation_id(self) -> bytes:
        """What no other write has, of this writer or any other."""
        return self.window.writer + self.counter.to_bytes(4) + self.nonce.to_bytes(4)

    def __del__(self) -> None:
        # An exception of a signal handler may have come before its owner could keep it.
        self.window.unfinished.pop(self.counter, None)


class _Window:
    """The writes of one epoch to a partition, as scripts/write.lua remembers them."""

    __slots__ = ("counters", "generation", "given_up", "unfinished", "writer")

    def __init__(self, origin: bytes, generation: int) -> None:
        self.writer = origin + os.urandom(4)
        self.generation = generation
        self.counters = itertools.count(1)
        self.unfinished: dict[int, None] = {}  # counters, lowest first
        self.given_up: dict[int, int] = {}  # counter and nonce of what ended unanswered while older ones went on

    def barred(self, floor: int) -> Iterator[_Barred]:
        """Yield what the low-water mark does not bar."""
        for counter, nonce in tuple(self.given_up.items()):
            if counter >= floor:
                yield self, counter, nonce
            else:
                self.given_up.pop(counter, None)


_Barred: TypeAlias = tuple[_Window, int, int]  # counter, nonce


class Namespace:
    """What a store knows of its namespace once it is open: its keys, who writes, and the revisions seen."""

    def __init__(self, name: str, partitions: int, incarnation: bytes) -> None:
        self.keyspace = Keyspace(name, partitions)
        self.incarnation = incarnation
        self.origin = os.urandom(8)
        self.seen = [0] * partitions  # the highest revision that this store has received
        self.heads = [_heads(partition, incarnation) for partition in self.keyspace.partitions]
        self._generation = 0
        self._windows = [_Window(self.origin, 0) for _ in range(partitions)]
        self._retired: list[list[_Window]] = [[] for _ in range(partitions)]
        self._lock = threading.RLock()  # a signal handler or finalizer may write while its thread is in `begin`

    def begin(self, partition: Partition) -> Ticket:
        """Return a new write's ticket."""
        number = partition.number
        with self._lock:
            window = self._windows[number]
            if window.generation != self._generation:
                window = self._retire(number, window)
            ticket = Ticket(window, next(window.counters), self.seen[number])
            ticket.floor = next(iter(window.unfinished), ticket.counter)
            if ticket.counter - ticket.floor >= _WINDOW or ticket.counter > 0xFFFFFFF0:
                window = self._retire(number, window)
                ticket = Ticket(window, next(window.counters), self.seen[number])
            window.unfinished[ticket.counter] = None
            if self._retired[number] or window.given_up:
                barred = itertools.chain(window.barred(ticket.floor), *map(_barred, self._retired[number]))
                ticket.barred = list(itertools.islice(barred, _BARRED))
            return ticket

    def end(self, ticket: Ticket, *, answered: bool = True) -> None:
        """Note that a write is finished, and will not be sent again; unanswered, a sending may be on its way still."""
        unfinished = ticket.window.unfinished
        unfinished.pop(ticket.counter, None)
        if not answered and unfinished:
            ticket.window.given_up[ticket.counter] = ticket.nonce

    def barred(self, partition: Partition, barred: Sequence[_Barred]) -> None:
        """Note that the server knows what it must not apply any more."""
        with self._lock:
            for window, counter, _ in barred:
                if counter != _CLOSED:
                    window.given_up.pop(counter, None)
                elif window in self._retired[partition.number]:
                    self._retired[partition.number].remove(window)

    def renew(self) -> None:
        """Begin a new epoch with the next write: a process that was cloned must not go on as its twin does."""
        self._generation += 1

    def forgotten(self, partition: Partition, revision: int) -> None:
        """Note that the server has forgotten what there was before this revision: all goes on in a new epoch."""
        self.saw(partition, revision)
        self.renew()

    def saw(self, partition: Partition, revision: int) -> None:
        """Remember that the partition has reached a revision."""
        if revision > self.seen[partition.number]:
            self.seen[partition.number] = revision

    def channel(self, key: str) -> str:
        """Return the channel that goes with a key: pub/sub knows no databases, and this name no other has."""
        return f"{key}:{self.incarnation.decode()}"

    def _retire(self, number: int, window: _Window) -> _Window:
        new = _Window(self.origin, self._generation)
        if next(window.counters) > 1:
            self._retired[number].append(window)
        self._windows[number] = new
        return new


def _barred(window: _Window) -> Iterable[_Barred]:
    """Return what is barred of a window that was left."""
    return window.barred(0) if window.unfinished else [(window, _CLOSED, 0)]


def _heads(partition: Partition, incarnation: bytes) -> tuple[Head, Head]:
    """Return what all calls of the writing script for a partition have in common: by digest, by text."""
    keys = (
        partition.state, partition.updated, partition.meta, partition.changes, partition.deleted,
        partition.deleted_meta,
    )  # fmt: skip
    script, arguments = scripts.WRITE, (incarnation, VERSION)
    return Head("EVALSHA", script.sha, keys, arguments), Head("EVAL", script.source, keys, arguments)


class Identified(Operation[T]):
    """An operation that the server recognises when it is sent again, until it is finished."""

    __slots__ = ("_namespace", "_partition", "_ticket", "_unanswered")
    writes = True

    def __init__(self, namespace: Namespace, id: str) -> None:
        super().__init__()
        self._namespace = namespace
        self._partition = namespace.keyspace.of(id)
        self._ticket: Ticket | None = None
        self._unanswered = 0  # sendings that no reply came to, and that the server would not recognise

    def end(self) -> None:
        """Let the server forget it, and refuse what may be on its way still. Sent again, it is another operation."""
        if self._ticket is not None:
            self._namespace.end(self._ticket, answered=not self._unanswered)
            self._ticket, self._unanswered = None, 0

    def _identify(self) -> Ticket:
        """Return the ticket for another sending."""
        self._unanswered += 1
        if self._ticket is None:
            self._ticket = self._namespace.begin(self._partition)
        return self._ticket

    def _forgotten(self, revision: int) -> Forgotten:
        """Begin anew, as one that no earlier sending can be taken for."""
        self._namespace.forgotten(self._partition, revision)
        self.end()
        return Forgotten("the server has forgotten operations")


class Written(msgspec.Struct, frozen=True):
    """What a write came to."""

    revision: int
    updated_at_ms: int  # 0: by an earlier sending
    operation: bytes


class Write(Identified[Written]):
    """One run of the writing script (scripts/write.lua)."""

    __slots__ = (
        "_conditions", "_expected", "_id", "_keys", "_rest", "_sendings", "_staged", "_staging", "_what", "_wiped",
    )  # fmt: skip

    def __init__(
        self,
        namespace: Namespace,
        kind: bytes,
        id: str,
        expected: int | None,
        rest: Sequence[Argument] = (),
        staged: Sequence[bytes] = (),
        token: int | None = None,
        maker: bytes | None = None,
        keeps_time: bool = False,
    ) -> None:
        super().__init__(namespace, id)
        self._id = id
        partition = self._partition
        self._keys = [partition.session(id), partition.turns(id)]
        self._expected = expected
        self._what = kind + b"k" if keeps_time else kind
        self._conditions: list[Argument] = []
        if expected is not None:
            self._what += b"r"
            self._conditions.append(expected if maker is None else b"%d:%b" % (expected, maker))
        if token is not None:
            self._what += b"l"
            self._conditions.append(token)
            self._keys.append(partition.lease(id))
        if b"" in rest or b"" in staged:
            raise SerializationError("", "no bytes at all")
        self._rest = rest
        self._staged = staged
        self._staging = ""  # the key, while it holds the turns of a sending that the script did not see
        self._sendings = 0
        self._wiped = False

    def commands(self) -> Sequence[Command]:
        """Return the script's call, after the turns that it finds staged."""
        ticket = self._identify()
        if not self._staged:
            return [self._call(ticket, self._keys)]
        if self._staging:
            key, self._staging = self._staging, ""
            return [self._call(ticket, [*self._keys, key])]
        # A key of its own for each sending: an earlier one may still be on its way.
        self._sendings += 1
        key = self._staging_key(ticket)
        staging: list[Command] = [("RPUSH", key, *chunk) for chunk in _chunks(self._staged)]
        return [
            ("MULTI",),  # else a connection that breaks in between leaves a key for ever
            *staging,
            ("PEXPIRE", key, _STAGING_TTL_MS),
            ("EXEC",),
            self._call(ticket, [*self._keys, key]),
        ]

    def _staging_key(self, ticket: Ticket) -> str:
        return self._partition.staging(f"{ticket.operation_id.hex()}:{self._sendings}")

    def _call(self, ticket: Ticket, keys: Sequence[str]) -> Joinable:
        head, letters = self._namespace.heads[self._partition.number][self._evaluate], self._what
        arguments = [b"", *self._conditions]
        if ticket.barred:
            letters += b"b"
            arguments.append(b"".join([_pack_barred(window.writer[8:], *rest) for window, *rest in ticket.barred]))
        arguments += self._rest
        writer, counter, nonce, seen, floor = ticket.head()
        arguments[0] = _pack_head(len(arguments) - 1, len(keys), writer, counter, nonce, seen, floor) + letters
        return Joinable(head, keys, arguments)

    def settles(self, error: StorageError) -> bool:
        """Only revisions and tokens never return; a session may be made, deleted or mended before a late sending."""
        if isinstance(error, ConflictError):
            return error.expected > 0
        if isinstance(error, StoreResetError):  # a counter that went back comes to `seen` again
            return self._wiped
        return isinstance(error, (LeaseLostError, OutcomeUnknownError))

    def decode(self, replies: Sequence[Reply]) -> Written:
        """Return the revision that the write made, or raise what the script says."""
        id, ticket = self._id, cast(Ticket, self._ticket)
        self._unanswered -= 1
        reply = replies[-1]
        if type(reply) is not list:
            try:
                check_script(reply)
                self._check((reply,))
            except NoScript:
                if len(replies) > 1:
                    self._staging = self._staging_key(ticket)
                raise
        if type(reply[0]) is not list:
            check_script(reply[0])
            self._check(reply)
        answer, value, updated_at_ms = (*reply[0], None, None)[:3]
        match answer:
            case b"OK":
                self._unanswered = 0
                self._namespace.saw(self._partition, value)
                if ticket.barred:
                    self._namespace.barred(self._partition, ticket.barred)
                return Written(value, updated_at_ms, ticket.operation_id)
            case b"CONFLICT":
                raise ConflictError(id, self._expected or 0, value)
            case b"NOTFOUND":
                raise NotFoundError(id)
            case b"LEASELOST":
                raise LeaseLostError(id)
            case b"CORRUPT":
                raise CorruptSessionError(id, value.decode())
            case b"VERSION":
                raise VersionIncompatibleError(decode_version(id, value), SESSION_VERSION)
            case b"STAGING":
                self._check(replies)
                raise Again("the staged turns are gone")
            case b"FORGOTTEN":
                # No earlier sending can have been applied, or Retry ends it: so it may start afresh.
                raise self._forgotten(value)
            case b"EMPTY":
                raise SerializationError(value.decode(errors="replace"), "no bytes at all")
            case b"RESET":
                self._wiped = value < 0
        raise refusal(self._partition, answer, value)


def refusal(partition: Partition, answer: bytes, value: Any) -> StorageError:
    """Return the error for what both writing scripts may answer."""
    match answer:
        case b"RESET" if value < 0:
            return StoreResetError("the namespace was wiped")
        case b"RESET":
            return StoreResetError(f"the data went back in time: to revision {value}, below one that this store knows")
        case b"LAYOUT":
            return LayoutError(f"{partition.prefix}{value.decode()} is not of this store's layout")
        case b"DENIED" | b"MISSING":
            return _unable(answer, value.decode())
    return StorageError("a script gave an unknown answer")


def _unable(answer: bytes, commands: str) -> StorageError:
    if answer == b"DENIED":
        return PermissionDeniedError(f"the user may not call {commands}: nothing was written")
    return UnsupportedServerError(f"the server has no command {commands}, or it was renamed")


def check_script(reply: Reply) -> None:
    """Raise OutcomeUnknownError for an error that stopped a script on its way, which checks before its first write."""
    if _STOPPED.search(as_error(reply) or ""):
        raise OutcomeUnknownError("the script was stopped on its way, and the write may have been applied in part")


class Load(Operation[Versioned[A]]):
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
            raise Torn("a write came between")
        if not fields:
            if not self._absent:
                self._absent = True
                raise Torn("it is absent, or was evicted")
            if replies[3] is None:
                raise NotFoundError(id)
            if replies[3] != self._listed:
                self._listed = replies[3]
                raise Torn("it was created meanwhile, or evicted")
            raise CorruptSessionError(id, "session")
        if revision is None or not revision.isdigit() or len(revision) > 16:
            raise CorruptSessionError(id, ".revision")
        sections = self._codec.sections(fields)
        asset = self._codec.decode(id, sections, turns)
        if fields.get(b".turns") != b"%d" % len(turns):
            raise CorruptSessionError(id, "history.turns")
        number = int(revision)
        self._namespace.saw(self._partition, number)
        maker = fields.get(b".op", b"")
        remember(asset, Stored(self._namespace.incarnation, id, number, maker, sections, turns))
        return Versioned(asset, number)


class Turns(Operation[list[ConversationTurn]]):
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
                raise Torn("a write came between")
            raise CorruptSessionError(self._id, "history.turns")
        return decode_turns(self._id, turns)


class Exists(Operation[bool]):
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


class AllMeta(Operation[list[SessionMeta]]):
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


class MetaRun(Operation["tuple[Position | None, list[SessionMeta]]"]):
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


class Ping(Operation[float]):
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


class ReadLayout(Operation["dict[bytes, bytes]"]):
    """The namespace's descriptor; empty if there is none."""

    __slots__ = ("_key",)

    def __init__(self, name: str) -> None:
        super().__init__()
        self._key = Keyspace.layout(name)

    def commands(self) -> Sequence[Command]:
        """HELLO tells the server's version, also over a client that was injected; INFO may be denied."""
        return [("HELLO",), ("HGETALL", self._key), ("INFO", "memory")]

    def decode(self, replies: Sequence[Reply]) -> dict[bytes, bytes]:
        """Return the descriptor's fields."""
        text = as_error(replies[0])
        if text is None:
            check_server(replies[0])
        elif not isinstance(translate(text), PermissionDeniedError):
            check_server({b"version": b"0"})
        if (as_error(replies[1]) or "").startswith("WRONGTYPE"):
            raise LayoutError(f"{self._key} is not a descriptor of this store's layout")
        self._check(replies[1:2])
        if as_error(replies[2]) is None and (policy := _POLICY.search(bytes(replies[2]))):
            name = policy[1].decode(errors="replace")
            _log.warning("the server's maxmemory-policy is %s: it may evict sessions; noeviction is needed", name)
        return dict(as_map(replies[1]))


class Create(Operation[str]):
    """The creation of a namespace (scripts/create.lua)."""

    __slots__ = ("_arguments", "_keys")

    def __init__(self, name: str, partitions: int) -> None:
        super().__init__()
        keyspace = Keyspace(name, partitions)
        self._keys = [Keyspace.layout(name), *(partition.state for partition in keyspace.partitions)]
        self._arguments = (LAYOUT_VERSION, os.urandom(8).hex())

    def commands(self) -> Sequence[Command]:
        """Call the script, which does nothing if it was called before."""
        return [self._script(scripts.CREATE, self._keys, self._arguments)]

    def decode(self, replies: Sequence[Reply]) -> str:
        """Return its answer.

        Raises:
            PermissionDeniedError, UnsupportedServerError: a command can't be called.

        """
        self._check(replies)
        answer, command = replies[0]
        if answer in (b"DENIED", b"MISSING"):
            raise _unable(answer, command.decode())
        return bytes(answer).decode()


class Probe(Operation["StorageError | None"]):
    """Whether the user may do what the writing script does: the error if not (scripts/probe.lua)."""

    __slots__ = ("_namespace",)

    def __init__(self, namespace: Namespace) -> None:
        super().__init__()
        self._namespace = namespace

    def commands(self) -> Sequence[Command]:
        """Call the script, and ask for the partitions' revisions: the first write will name one."""
        partitions = self._namespace.keyspace.partitions
        keys = (partitions[0].state, partitions[0].changes)
        channel = self._namespace.channel(partitions[0].changes)
        probe = self._script(scripts.PROBE, keys, (channel, *_WRITE_COMMANDS, *_OTHER_COMMANDS))
        return [probe, *(("HGET", partition.state, "revision") for partition in partitions)]

    def decode(self, replies: Sequence[Reply]) -> StorageError | None:
        """Return what is denied. Another obstacle (a full disk, say) may pass, and is no reason not to read.

        Raises:
            UnsupportedServerError: a command is missing or was renamed.

        """
        for partition, revision in zip(self._namespace.keyspace.partitions, replies[1:], strict=True):
            if type(revision) is bytes and revision.isdigit():
                self._namespace.saw(partition, int(revision))
        text = as_error(replies[0])
        if text is not None:
            problem = translate(text)
            if isinstance(problem, (NoScript, UnsupportedServerError)):
                self._check(replies)
            return PermissionDeniedError(f"the user may not write: {problem}") if _denies(problem) else None
        found = list(zip(replies[0][::2], map(bytes.decode, replies[0][1::2]), strict=True))
        if missing := [command for answer, command in found if answer == b"MISSING"]:
            raise _unable(b"MISSING", ", ".join(missing))
        denied = [command for answer, command in found if answer == b"DENIED" and command in _WRITE_COMMANDS]
        if denied:
            return _unable(b"DENIED", ", ".join(denied))
        return None


def _denies(problem: StorageError | Trouble) -> bool:
    return isinstance(problem, PermissionDeniedError)


def _chunks(turns: Sequence[bytes]) -> list[list[bytes]]:
    chunks: list[list[bytes]] = [[]]
    size = 0
    for turn in turns:
        if size + len(turn) > _STAGING_CHUNK and chunks[-1]:
            chunks.append([])
            size = 0
        chunks[-1].append(turn)
        size += len(turn)
    return chunks


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

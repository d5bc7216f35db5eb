"""Requests that the writing script answers (scripts/write.lua)."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import msgspec

from ..errors import (
    ConflictError,
    CorruptSessionError,
    LayoutError,
    LeaseLostError,
    NotFoundError,
    OutcomeUnknownError,
    SerializationError,
    StorageError,
    StoreResetError,
    VersionIncompatibleError,
)
from ..model.asset import SESSION_VERSION
from ..model.encoding import named
from ..model.labels import MAX_LABELS
from .attempts import OperationEvicted, ScriptNotLoaded, ServerBusy, not_callable_error
from .codec import decode_version
from .commands import Argument, Command, Reply, ScriptCall, as_error
from .keys import Partition
from .request import Request
from .writer import Namespace, OperationToken

__all__ = [
    "DELETE",
    "FORK",
    "Group",
    "Identified",
    "LeaseToken",
    "Outdated",
    "PopUnseen",
    "Write",
    "Written",
    "check_lease",
    "check_not_stopped",
    "expectation",
    "script_error",
]

T = TypeVar("T")
WRITE, DELETE, FORK = b"w", b"d", b"f"  # kinds of writes
_STOPPED = re.compile(r"script: [0-9a-f]{40}, on|user_script")  # where in a script an error was raised
_STAGING_CHUNK = 256 * 1024  # bytes of turns in one command
_STAGING_TTL_MS = 60_000  # what a store that died has staged is gone after this
_pack_barred = struct.Struct(">4sII").pack
_pack_header = struct.Struct(">IB12sIIQI").pack  # of a write, in scripts/write.lua


class LeaseToken(Protocol):
    """A lease of either form."""

    id: str
    token: int


class Identified(Request[T]):
    """A request that the server recognises in each attempt, until it is finished: it has an operation id."""

    __slots__ = ("_namespace", "_partition", "_token", "_unanswered")
    writes = True

    def __init__(self, namespace: Namespace, id: str) -> None:
        super().__init__()
        self._namespace = namespace
        self._partition = namespace.keyspace.of(id)
        self._token: OperationToken | None = None
        self._unanswered = 0  # attempts without a reply, which the server would not recognise

    def end(self) -> None:
        """Let the server forget it, and refuse a late attempt. Sent again, it gets another operation id."""
        if self._token is not None:
            self._namespace.end(self._token, answered=not self._unanswered)
            self._token, self._unanswered = None, 0

    def _identify(self) -> OperationToken:
        """Return the token for another attempt."""
        self._unanswered += 1
        if self._token is None:
            self._token = self._namespace.begin(self._partition)
        return self._token

    def _evicted(self, revision: int) -> OperationEvicted:
        """Begin anew, under an operation id that no earlier attempt has."""
        self._namespace.note_eviction(self._partition, revision)
        self.end()
        return OperationEvicted("the server has evicted operations")


class Written(msgspec.Struct, frozen=True):
    """What a write came to."""

    revision: int
    updated_at_ms: int  # 0: by an earlier attempt
    operation_id: bytes
    bits: bytes = b""
    before: int | None = None  # the session's revision before, 0 if it was absent; None: not known
    popped: Sequence[bytes] = ()  # turns


class Outdated(ConflictError):
    """What a write was made from was changed by others. A plan reads what is new, and tries again."""

    conclusive = True


class Group(NamedTuple):
    """Arguments of one kind (scripts/write.lua)."""

    letter: bytes
    arguments: Sequence[Argument] = ()


class Write(Identified[Written]):
    """One run of the writing script (scripts/write.lua)."""

    __slots__ = (
        "_arguments", "_empties", "_expected", "_id", "_keys", "_kind_and_groups", "_may_create", "_more_keys",
        "_source", "_staged", "_staging", "_stagings", "_wiped",
    )  # fmt: skip

    def __init__(
        self,
        namespace: Namespace,
        id: str,
        groups: Iterable[Group],
        *,
        kind: bytes = WRITE,
        lease: LeaseToken | None = None,
        staged: Sequence[bytes] = (),
        source: str | None = None,
    ) -> None:
        """Prepare it.

        Args:
            namespace: where to write.
            id: the session's.
            groups: what to do; conditions first.
            kind: of write.
            lease: only as long as it is held.
            staged: turns that replace the history.
            source: of a fork.

        """
        super().__init__(namespace, id)
        self._id = id
        self._source = source
        self._expected = 0
        self._may_create = False  # whether the session may be absent
        self._empties = False  # whether its list of turns or its records may vanish
        partition = self._partition
        self._keys = [partition.session(id), partition.turns(id)]
        self._more_keys: list[str] = []
        letters = kind
        arguments: list[Argument] = []
        if lease is not None:
            check_lease(id, lease)
            groups = (Group(b"l", (lease.token,)), *groups)
            self._keys.append(partition.lease(id))
        records = kind != WRITE
        for letter, values in groups:
            letters += letter + len(values).to_bytes(4)
            arguments += values
            if letter in b"rg":
                self._expected = _revision_of(values[0])
            records |= letter in b"PNDR"
            self._may_create |= letter in b"Wc"
            self._empties |= letter in b"xzqDR" or (letter == b"h" and not values)
            if letter in b"cshpyvPN" and b"" in values:
                raise SerializationError("", "no bytes at all")
        if staged:
            letters += b"S" + (1).to_bytes(4)
            arguments.append(len(staged))
        if b"" in staged:
            raise SerializationError("", "no bytes at all")
        if records:
            self._more_keys += [partition.records(id), partition.names(id)]
        if source is not None:
            self._more_keys += [
                partition.session(source), partition.turns(source), partition.records(source), partition.names(source)
            ]  # fmt: skip
        self._kind_and_groups = letters
        self._arguments = arguments
        self._staged = staged
        self._staging = ""  # the key, while it holds the turns of an attempt that the script did not see
        self._stagings = 0
        self._wiped = False

    def commands(self) -> Sequence[Command]:
        """Return the script's call, after the turns that it finds staged."""
        token = self._identify()
        if not self._staged:
            return [self._call(token)]
        if self._staging:
            key, self._staging = self._staging, ""
            return [self._call(token, key)]
        # A key of its own for each attempt that stages: an earlier one may still be on its way.
        self._stagings += 1
        key = self._staging_key(token)
        staging: list[Command] = [("RPUSH", key, *chunk) for chunk in _chunks(self._staged)]
        return [
            ("MULTI",),  # else a connection that breaks in between leaves a key for ever
            *staging,
            ("PEXPIRE", key, _STAGING_TTL_MS),
            ("EXEC",),
            self._call(token, key),
        ]

    def _staging_key(self, token: OperationToken) -> str:
        return self._partition.staging(f"{token.operation_id.hex()}:{self._stagings}")

    def _call(self, token: OperationToken, *staging: str) -> ScriptCall:
        prefix = self._namespace.prefixes[self._partition.number][self._evaluate]
        keys, letters = [*self._keys, *staging, *self._more_keys], self._kind_and_groups
        arguments = [b"", *self._arguments]
        if token.barred:
            letters += b"b\0\0\0\1"
            arguments.append(b"".join([_pack_barred(window.writer[8:], *rest) for window, *rest in token.barred]))
        arguments[0] = _pack_header(len(arguments) - 1, len(keys), *token.fields()) + letters
        return ScriptCall(prefix, keys, arguments, self._empties, alone=letters.startswith(DELETE))

    def in_absence(self) -> StorageError | None:
        """No namespace is made for what needs a session."""
        if self._source is not None:
            return NotFoundError(self._source)
        if self._expected:
            return ConflictError(self._id, self._expected, 0)
        return None if self._may_create else NotFoundError(self._id)

    def is_conclusive(self, error: StorageError) -> bool:
        """A late attempt is refused for the same reason only if that can't pass, as revisions and fencing tokens grow.

        A session may be made, deleted or mended before the attempt arrives. See `Retry`, which asks for this.
        """
        if isinstance(error, Outdated):
            return error.conclusive
        if isinstance(error, ConflictError):
            return error.expected > 0
        if isinstance(error, StoreResetError):  # a counter that went back comes to the high-water mark again
            return self._wiped
        return isinstance(error, (LeaseLostError, OutcomeUnknownError))

    def decode(self, replies: Sequence[Reply]) -> Written:
        """Return the revision that the write made, or raise what the script says."""
        id, token = self._id, cast(OperationToken, self._token)
        self._unanswered -= 1
        reply = replies[-1]
        if type(reply) is not list:
            try:
                check_not_stopped(reply)
                self._check((reply,))
            except ScriptNotLoaded:
                if len(replies) > 1:
                    self._staging = self._staging_key(token)
                raise
        if type(reply[0]) is not list:
            check_not_stopped(reply[0])
            self._check(reply)
        item: list[Any] = [*reply[0], None, None]
        answer, value, more, *rest = item
        expected = self._expected
        if self._source is not None and more == b"source":
            id = self._source
        elif self._source is not None:
            expected = 0
        match answer:
            case b"OK":
                idle = rest[1] == value  # there was nothing to do: nothing was noted, nor barred
                if idle and self._unanswered:
                    raise OutcomeUnknownError("an answer was lost, and that attempt may find more to do")
                self._unanswered = 0
                self._namespace.observe(self._partition, value)
                if (token.barred or token.window.given_up) and not idle:
                    self._namespace.acknowledge(self._partition, token)
                return Written(value, more, token.operation_id, rest[0] or b"", rest[1])
            case b"CONFLICT":
                reason = "the last turn is another one" if more == b"last" else ""
                raise ConflictError(id, expected, value, reason=reason)
            case b"CHANGED":
                outdated = Outdated(id, self._expected, value)
                # A part may come back to what it was, and what was absent may be gone again.
                outdated.conclusive = more == b"turns" and self._expected > 0
                raise outdated
            case b"NOTFOUND":
                raise NotFoundError(id)
            case b"LEASELOST":
                raise LeaseLostError(id)
            case b"CORRUPT":
                raise CorruptSessionError(id, named(value.decode(errors="replace")))
            case b"VERSION":
                raise VersionIncompatibleError(decode_version(id, value), SESSION_VERSION)
            case b"STAGING":
                self._check(replies)
                raise ServerBusy("the staged turns are gone")
            case b"FORGOTTEN":
                # No earlier attempt can have been applied, or Retry ends it: so it may start afresh.
                raise self._evicted(value)
            case b"EMPTY":
                raise SerializationError(named(value.decode(errors="replace")), "no bytes at all")
            case b"LABELS":
                raise SerializationError("metadata.labels", f"there would be more than {MAX_LABELS}")
            case b"RESET":
                self._wiped = value < 0
        raise script_error(self._partition, answer, value)


class PopUnseen(Write):
    """Removes the last turns, whatever they are: they are moved to a key from which they are read.

    This key is the operation's, so they are there for each attempt.
    """

    __slots__ = ()

    def __init__(self, namespace: Namespace, id: str, count: int, lease: LeaseToken | None) -> None:
        super().__init__(namespace, id, [Group(b"z", (count,)), Group(b"T", (_STAGING_TTL_MS,))], lease=lease)

    def commands(self) -> Sequence[Command]:
        """Return the script's call, and what reads the key."""
        token = self._identify()
        key = self._staging_key(token)
        return [self._call(token, key), ("LRANGE", key, b"0", b"-1")]

    def decode(self, replies: Sequence[Reply]) -> Written:
        """Return what was written, with the turns."""
        written = super().decode(replies[:1])
        self._check(replies[1:])
        if not written.updated_at_ms and not replies[1]:
            raise OutcomeUnknownError("turns were popped, but the answer came too late to read them")
        return msgspec.structs.replace(written, popped=replies[1])


def script_error(partition: Partition, answer: bytes, value: Any) -> StorageError:
    """Return the error for what both writing scripts may answer."""
    match answer:
        case b"RESET" if value < 0:
            return StoreResetError("the namespace was wiped")
        case b"RESET":
            return StoreResetError(f"the data went back in time: to revision {value}, below one that this store knows")
        case b"LAYOUT":
            return LayoutError(f"{partition.prefix}{value.decode()} is not of this store's layout")
        case b"DENIED" | b"MISSING":
            return not_callable_error(answer, value.decode())
    return OutcomeUnknownError("a script gave an unknown answer, and the write may have been applied")


def check_not_stopped(reply: Reply) -> None:
    """Raise OutcomeUnknownError if an error stopped a script half-way: it may have begun to write."""
    if _STOPPED.search(as_error(reply) or ""):
        raise OutcomeUnknownError("the script was stopped on its way, and the write may have been applied in part")


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


def check_lease(id: str, lease: LeaseToken | None) -> None:
    """Raise ValueError if a lease is of another session, TypeError if it is none."""
    if lease is not None and not (isinstance(getattr(lease, "id", None), str) and hasattr(lease, "token")):
        raise TypeError(f"expected a Lease, got {type(lease).__name__}")
    if lease is not None and lease.id != id:
        raise ValueError("the lease is of another session")


def expectation(if_revision: int | None) -> int | None:
    """Return `if_revision`, or raise ValueError if it can be no revision."""
    if if_revision is not None and (type(if_revision) is not int or not 0 <= if_revision < 2**63):
        raise ValueError("if_revision is a revision, or 0 for an absent session")
    return if_revision


def _revision_of(expected: Argument) -> int:
    return int(expected.partition(b":")[0]) if isinstance(expected, bytes) else int(expected)

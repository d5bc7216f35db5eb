"""What to ask of a server: each operation is a value that knows its commands and how to read their replies.

Nothing here waits. A driver (store.py, sync.py) performs an `Operation`, or runs a `Plan`: a generator that yields
operations and is sent their results, where one depends on another.
"""

from __future__ import annotations

import base64
import builtins
import inspect
import itertools
import os
import random
import time
from collections.abc import Callable, Generator, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar

import msgspec

from . import scripts
from .address import check_server
from .asset import SessionAsset
from .codec import VERSION, Codec, Encoded, Patch, Stored, decode_meta, decode_turns
from .errors import (
    ConflictError,
    CorruptSessionError,
    LayoutError,
    NotFoundError,
    PermissionDeniedError,
    SerializationError,
    StorageError,
    StoreResetError,
    VersionIncompatibleError,
)
from .ids import check_id
from .keys import LAYOUT_VERSION, MAX_PARTITIONS, Keyspace, Partition
from .meta import Page, SessionMeta, Versioned
from .resp import (
    Again,
    Argument,
    Command,
    Forgotten,
    NoScript,
    Reply,
    Torn,
    as_error,
    as_map,
    check,
    translate,
)
from .scripts import Script

if TYPE_CHECKING:
    from .asset import ConversationTurn

__all__ = ["Change", "Namespace", "Operation", "Operations", "Pause", "Plan", "Written", "alone", "open_namespace"]

T = TypeVar("T")
A = TypeVar("A", bound=SessionAsset)
Plan = Generator["Operation[Any] | Pause", Any, T]

_STAGED_TURNS = 16  # from so many turns on, a history is staged by plain commands, not passed through Lua
_STAGING_CHUNK = 256 * 1024  # bytes of turns in one command
_STAGING_TTL_MS = 60_000  # what a writer that died has staged is gone after this
_LIST_CHUNK = 1000  # sessions looked at in one go where a filter may drop most of them
_TORN_READS = 100


class Operation(Generic[T]):
    """Commands, and what their replies mean. A driver may send it several times until there is an answer."""

    __slots__ = ("_evaluate",)
    writes: ClassVar[bool] = False

    def __init__(self) -> None:
        self._evaluate = False  # send the script's text, since the server doesn't know its digest

    def commands(self) -> Sequence[Command]:
        """Return the commands of the next attempt."""
        raise NotImplementedError

    def decode(self, replies: Sequence[Reply]) -> T:
        """Return what the replies mean, or raise: a StorageError, or a Trouble if another attempt may succeed."""
        raise NotImplementedError

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


class Pause(NamedTuple):
    """What a plan yields to wait for some seconds."""

    seconds: float


class Namespace:
    """What a store knows of its namespace once it is open: its keys, who writes, and the revisions seen."""

    def __init__(self, name: str, partitions: int, incarnation: bytes) -> None:
        self.keyspace = Keyspace(name, partitions)
        self.incarnation = incarnation
        self.origin = os.urandom(8)
        self.seen = [0] * partitions  # the highest revision that this store has been told of
        self._numbers = itertools.count(1)

    def operation_id(self) -> bytes:
        """Return an id that no other write has, of this writer or any other."""
        return self.origin + (next(self._numbers) & 0xFFFFFFFF).to_bytes(4)

    def saw(self, partition: Partition, revision: int) -> None:
        """Remember that the partition has reached a revision."""
        if revision > self.seen[partition.number]:
            self.seen[partition.number] = revision


class Written:
    """What a write came to."""

    __slots__ = ("revision", "updated_at_ms")

    def __init__(self, revision: int, updated_at_ms: int) -> None:
        self.revision = revision
        self.updated_at_ms = updated_at_ms


class Change(Operation[Written]):
    """One run of the writing script (scripts/write.lua)."""

    __slots__ = (
        "_expected", "_id", "_kind", "_namespace", "_operation_id", "_partition", "_rest", "_seen", "_sendings",
        "_staged",
    )  # fmt: skip
    writes = True

    def __init__(
        self,
        namespace: Namespace,
        kind: str,
        id: str,
        expected: int | None,
        rest: Sequence[Argument] = (),
        staged: Sequence[bytes] = (),
    ) -> None:
        super().__init__()
        self._namespace = namespace
        self._kind = kind
        self._id = id
        self._partition = namespace.keyspace.of(id)
        self._expected: Argument = "" if expected is None else expected
        self._rest = rest
        self._staged = staged
        self._sendings = 0
        self._renew()

    def _renew(self) -> None:
        self._operation_id = self._namespace.operation_id()
        self._seen = self._namespace.seen[self._partition.number]

    def commands(self) -> Sequence[Command]:
        """Return the script's call, after the turns that it finds staged."""
        partition, id = self._partition, self._id
        keys = [
            partition.state, partition.session(id), partition.turns(id), partition.updated, partition.meta,
            partition.changes, partition.deleted, partition.deleted_ops,
        ]  # fmt: skip
        arguments = (
            self._operation_id, self._seen, self._namespace.incarnation, self._kind, id, self._expected, *self._rest,
        )  # fmt: skip
        if not self._staged:
            return [self._script(scripts.WRITE, keys, arguments)]
        # A key of its own for each sending: an earlier one may still be on its way.
        self._sendings += 1
        keys.append(partition.staging(f"{self._operation_id.hex()}:{self._sendings}"))
        staging = [
            ("RPUSH", keys[-1], *chunk) for chunk in _chunks(self._staged)
        ]
        return [
            *staging,
            ("PEXPIRE", keys[-1], _STAGING_TTL_MS),
            self._script(scripts.WRITE, keys, arguments),
        ]

    def decode(self, replies: Sequence[Reply]) -> Written:
        """Return the revision that the write made, or raise what the script says."""
        id = self._id
        self._check(replies[-1:])
        answer, *values = replies[-1]
        value = values[0] if values else None
        match answer:
            case b"OK":
                self._namespace.saw(self._partition, values[0])
                return Written(values[0], values[1])
            case b"CONFLICT":
                raise ConflictError(id, int(self._expected), value)
            case b"NOTFOUND":
                raise NotFoundError(id)
            case b"CORRUPT":
                raise CorruptSessionError(id, value.decode())
            case b"VERSION":
                try:
                    found = msgspec.msgpack.decode(value, type=int)
                except msgspec.DecodeError:
                    raise CorruptSessionError(id, "version") from None
                raise VersionIncompatibleError(found, msgspec.msgpack.decode(VERSION, type=int))
            case b"STAGING":
                self._check(replies)
                raise Again("the staged turns are gone")
            case b"FORGOTTEN":
                # No earlier sending can have been applied, or Retry ends it: so it may start afresh.
                self._namespace.saw(self._partition, value)
                self._renew()
                raise Forgotten("operations were forgotten")
            case b"RESET":
                raise StoreResetError(
                    "the namespace was wiped" if value < 0
                    else f"the data went back in time: to revision {value} from {self._seen} or later"
                )  # fmt: skip
            case b"LAYOUT":
                raise LayoutError(f"{self._partition.prefix}{value.decode()} is not of this store's layout")
        raise StorageError("the writing script gave an unknown answer")


class Load(Operation[Versioned[A]]):
    """A whole session. The revision is read again at the end: if no write came between, nothing is torn."""

    __slots__ = ("_codec", "_id", "_namespace", "_partition", "_torn")

    def __init__(self, namespace: Namespace, codec: Codec[A], id: str) -> None:
        super().__init__()
        self._namespace = namespace
        self._codec = codec
        self._id = id
        self._partition = namespace.keyspace.of(id)
        self._torn = 0

    def commands(self) -> Sequence[Command]:
        """Plain commands: they cost the server a fifth of what a script does, and work when its memory is full."""
        session = self._partition.session(self._id)
        return [
            ("HGETALL", session),
            ("LRANGE", self._partition.turns(self._id), 0, -1),
            ("HGET", session, ".revision"),
        ]

    def decode(self, replies: Sequence[Reply]) -> Versioned[A]:
        """Return the asset, which remembers what it was."""
        id = self._id
        _check_types(id, replies, ("session", "history.turns", "session"))
        self._check(replies)
        fields, turns = as_map(replies[0]), replies[1]
        revision = fields.get(b".revision")
        if revision != replies[2]:
            self._torn += 1
            if self._torn < _TORN_READS:
                raise Torn("a write came between")
        if not fields:
            raise NotFoundError(id)
        if revision is None or not revision.isdigit():
            raise CorruptSessionError(id, ".revision")
        sections = self._codec.sections(fields)
        asset = self._codec.decode(id, sections, turns)
        if fields.get(b".turns") != b"%d" % len(turns):
            raise CorruptSessionError(id, "history.turns")
        number = int(revision)
        self._namespace.saw(self._partition, number)
        _remember(asset, Stored(self._namespace.incarnation, id, number, sections, turns))
        return Versioned(asset, number)


class Turns(Operation["list[ConversationTurn]"]):
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


class MetaRun(Operation["tuple[tuple[int, str] | None, list[SessionMeta]]"]):
    """A run of a partition's index (scripts/page.lua): where it ended (None: at the end) and its metadata."""

    __slots__ = ("_arguments", "_limit", "_partition")

    def __init__(
        self, partition: Partition, limit: int, span: tuple[Argument, Argument], after: tuple[Argument, str]
    ) -> None:
        super().__init__()
        self._partition = partition
        self._limit = limit
        self._arguments = (limit, *span, *after)

    def commands(self) -> Sequence[Command]:
        """Call the script."""
        keys = (self._partition.updated, self._partition.meta)
        return [self._script(scripts.PAGE, keys, self._arguments)]

    def decode(self, replies: Sequence[Reply]) -> tuple[tuple[int, str] | None, list[SessionMeta]]:
        """Return the end, and the metadata of those where it can be decoded."""
        _check_index(self._partition, replies)
        self._check(replies)
        time_of_last, *flat = replies[0]
        ids = flat[::2]
        last = (int(float(time_of_last)), ids[-1].decode()) if len(ids) == self._limit else None
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
        """HELLO tells the server's version, also over a client that was injected."""
        return [("HELLO",), ("HGETALL", self._key)]

    def decode(self, replies: Sequence[Reply]) -> dict[bytes, bytes]:
        """Return the descriptor's fields."""
        text = as_error(replies[0])
        if text is None:
            check_server(replies[0])
        elif not isinstance(translate(text), PermissionDeniedError):
            check_server({b"version": b"0"})
        if (as_error(replies[1]) or "").startswith("WRONGTYPE"):
            raise LayoutError(f"{self._key} is not a descriptor of this store's layout")
        self._check(replies[1:])
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
        """Return its answer."""
        self._check(replies)
        return bytes(replies[0]).decode()


class Probe(Operation["StorageError | None"]):
    """Whether the user may do what the writing script does: the error if not (scripts/probe.lua)."""

    __slots__ = ("_partition",)

    def __init__(self, partition: Partition) -> None:
        super().__init__()
        self._partition = partition

    def commands(self) -> Sequence[Command]:
        """Call the script."""
        keys = [self._partition.probe(kind) for kind in ("hash", "list", "zset", "renamed")]
        return [self._script(scripts.PROBE, [*keys, self._partition.changes], ())]

    def decode(self, replies: Sequence[Reply]) -> StorageError | None:
        """Return what is denied. Another obstacle (a full disk, say) may pass, and is no reason not to read."""
        text = as_error(replies[0])
        if text is not None and text.startswith("NOSCRIPT"):
            self._check(replies)
        problem = text if text is not None else bytes(replies[0]).decode(errors="replace")
        command, _, reason = problem.rpartition(": ") if text is None else ("", "", problem)
        error = translate(reason) if reason else None
        if isinstance(error, PermissionDeniedError):
            return PermissionDeniedError(f"the user may not write ({command or 'EVALSHA'}): nothing was written")
        return None


def open_namespace(name: str, partitions: int | None) -> Plan[Namespace]:
    """Read the namespace's descriptor, or create it.

    Raises:
        LayoutError: another version, another number of partitions, or something else's keys.

    """
    fields = yield ReadLayout(name)
    if not fields:
        answer = yield Create(name, partitions or 1)
        if answer == "STRAY":
            raise LayoutError(f"namespace {name!r} has data but no descriptor: it was lost or is foreign")
        fields = yield ReadLayout(name)
    try:
        version, count = int(fields[b"version"]), int(fields[b"partitions"])
        incarnation = fields[b"incarnation"]
    except (KeyError, ValueError):
        raise LayoutError(f"{Keyspace.layout(name)} is not a descriptor of this store's layout") from None
    if version != LAYOUT_VERSION:
        raise LayoutError(f"namespace {name!r} has layout {version}, this store is of layout {LAYOUT_VERSION}")
    if not 1 <= count <= MAX_PARTITIONS:
        raise LayoutError(f"namespace {name!r} says it has {count} partitions")
    if partitions is not None and partitions != count:
        raise LayoutError(f"namespace {name!r} has {count} partitions, not {partitions}")
    return Namespace(name, count, incarnation)


class Operations(Generic[A]):
    """What a store can do, as operations and plans. Bad input is refused here, before anything is sent."""

    def __init__(self, namespace: Namespace, codec: Codec[A]) -> None:
        self._namespace = namespace
        self._codec = codec

    def probe(self) -> Probe:
        """Whether writing is allowed."""
        return Probe(self._namespace.keyspace.partitions[0])

    def ping(self) -> Ping:
        """A round trip."""
        return Ping()

    def load(self, id: str) -> Load[A]:
        """A session and its revision."""
        return Load(self._namespace, self._codec, check_id(id))

    def turns(self, id: str, start: int, stop: int) -> Turns:
        """Part of a history."""
        return Turns(self._namespace, check_id(id), _index(start), _index(stop))

    def exists(self, id: str) -> Exists:
        """Whether there is a session."""
        return Exists(self._namespace, check_id(id))

    def append(self, id: str, turns: Sequence[ConversationTurn], if_revision: int | None) -> Change:
        """Add turns to a history."""
        check_id(id)
        if not turns:
            raise ValueError("append needs a turn")
        where = "turn" if len(turns) == 1 else "turns[{}]"
        data = [self._codec.turn(turn, where.format(n)) for n, turn in enumerate(turns)]
        if sum(map(len, data)) > self._codec.max_asset_bytes:
            raise SerializationError("turns", f"more than {self._codec.max_asset_bytes} bytes")
        rest = (VERSION, "", "", "push", 0, 0, *data)
        return Change(self._namespace, "append", id, _revision(if_revision), rest)

    def delete(self, id: str, if_revision: int | None) -> Change:
        """Remove a session."""
        return Change(self._namespace, "delete", check_id(id), _revision(if_revision))

    def save(self, asset: A, if_revision: int | None) -> Plan[int]:
        """Store an asset: what has changed if it is what it was loaded from, else the whole."""
        id = check_id(asset.id) if isinstance(asset, SessionAsset) else ""
        expected = _revision(if_revision)
        known = self._known(asset)
        new = self._codec.encode(asset, known)
        patch = None
        if known is not None and expected in (None, known.revision):
            patch = self._codec.compare(known, new)
        if known is not None and patch is not None:
            try:
                written = yield self._save(asset, new, patch, known.revision)
                return self._saved(asset, new, written)
            except (ConflictError, CorruptSessionError):
                if expected is not None:
                    raise
        written = yield self._save(asset, new, None, expected)
        return self._saved(asset, new, written)

    def _known(self, asset: A) -> Stored | None:
        stored: Stored | None = vars(asset).get(_STORED) if isinstance(asset, SessionAsset) else None
        if stored is None or stored.id != asset.id or stored.home != self._namespace.incarnation:
            return None
        return stored

    def _save(self, asset: A, new: Encoded, patch: Patch | None, expected: int | None) -> Change:
        sections = new.sections if patch is None else patch.sections
        removed = [] if patch is None else patch.removed
        rest: builtins.list[Argument] = [VERSION, asset.updated_at_ms, new.tail]
        changes: builtins.list[Argument] = [len(sections), *itertools.chain.from_iterable(sections.items())]
        changes += [len(removed), *removed]
        staged: Sequence[bytes] = ()
        if patch is None and len(new.turns) < _STAGED_TURNS:
            rest += ["replace", *changes, *new.turns]
        elif patch is None:
            staged = new.turns
            rest += ["staged", *changes, len(new.turns)]
        elif patch.reshapes:
            edits = itertools.chain.from_iterable(patch.edits)
            rest += ["edit", *changes, *patch.keep, len(patch.edits), *edits, *patch.pushed]
        else:
            rest += ["push", *changes, *patch.pushed]
        return Change(self._namespace, "save", asset.id, expected, rest, staged)

    def _saved(self, asset: A, new: Encoded, written: Written) -> int:
        before = self._known(asset)
        if before is None or before.revision < written.revision:
            home = self._namespace.incarnation
            _remember(asset, Stored(home, asset.id, written.revision, new.sections, new.turns))
        return written.revision

    def list(
        self,
        limit: int | None,
        project_path: str | None,
        updated_after: datetime | None,
        updated_before: datetime | None,
    ) -> Plan[builtins.list[SessionMeta]]:
        """Metadata, newest first."""
        span = _span(updated_after, updated_before)
        if limit is None and span == _ALL:
            found: builtins.list[SessionMeta] = []
            for partition in self._namespace.keyspace.partitions:
                found += yield AllMeta(partition)
            found = [meta for meta in found if project_path is None or meta.project_path == project_path]
            found.sort(key=_position, reverse=True)
            return found
        if limit is not None:
            _limit(limit, least=0)
        return (yield from self._run(limit, project_path, span, None))

    def page(
        self,
        limit: int,
        cursor: str | None,
        project_path: str | None,
        updated_after: datetime | None,
        updated_before: datetime | None,
    ) -> Plan[Page[SessionMeta]]:
        """One page of metadata, newest first, and where the next begins."""
        after = None if cursor is None else _decode_cursor(cursor)
        span = _span(updated_after, updated_before)
        found = yield from self._run(_limit(limit, least=1) + 1, project_path, span, after)
        if len(found) <= limit:
            return Page(found, None)
        items = found[:limit]
        return Page(items, _encode_cursor(_position(items[-1])))

    def _run(
        self,
        limit: int | None,
        project_path: str | None,
        span: tuple[Argument, Argument],
        after: tuple[int, str] | None,
    ) -> Plan[builtins.list[SessionMeta]]:
        """Collect from each partition as many as can be among the first `limit`, then merge."""
        found: builtins.list[SessionMeta] = []
        for partition in self._namespace.keyspace.partitions:
            position: tuple[Argument, str] = after or ("", "")
            missing = limit
            while missing is None or missing > 0:
                chunk = _LIST_CHUNK * 10 if missing is None else missing
                if project_path is not None:
                    chunk = max(chunk, _LIST_CHUNK)
                last, metas = yield MetaRun(partition, chunk, span, position)
                wanted = [meta for meta in metas if project_path is None or meta.project_path == project_path]
                found += wanted[:missing]
                missing = None if missing is None else missing - len(wanted)
                if last is None:
                    break
                position = last
        found.sort(key=_position, reverse=True)
        return found[:limit]

    def update(self, id: str, change: Callable[[A], object]) -> Plan[Versioned[A]]:
        """Load, change and save, again and again until no other write came between."""
        delay = 0.001
        while True:
            asset, revision = yield self.load(id)
            if inspect.isawaitable(answer := change(asset)):
                if inspect.iscoroutine(answer):
                    answer.close()
                raise TypeError("update takes a plain function: what it does must not wait")
            if asset.id != id:
                raise ValueError("change must leave the id as it is")
            try:
                return Versioned(asset, (yield from self.save(asset, revision)))
            except ConflictError:
                yield Pause(random.uniform(0, delay))
                delay = min(2 * delay, 0.1)


_STORED = "_stored"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)
_ALL: tuple[Argument, Argument] = ("-inf", "+inf")


def _remember(asset: SessionAsset, stored: Stored) -> None:
    vars(asset)[_STORED] = stored


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
            continue
    return metas


def _position(meta: SessionMeta) -> tuple[int, str]:
    """Return a session's place in the order of lists, in which equal times are ordered by id."""
    return (meta.updated_at - _EPOCH) // _MILLISECOND, meta.id


def _span(after: datetime | None, before: datetime | None) -> tuple[Argument, Argument]:
    """Return the bounds in ms: the first included, the second not."""
    return "-inf" if after is None else _ms(after), "+inf" if before is None else _ms(before)


def _ms(moment: datetime) -> int:
    if not isinstance(moment, datetime) or moment.utcoffset() is None:
        raise ValueError("a datetime with a time zone is needed")
    return -((_EPOCH - moment) // _MILLISECOND)  # rounded up


def _limit(limit: int, least: int) -> int:
    if not isinstance(limit, int) or limit < least:
        raise ValueError(f"limit is {least} or more")
    return min(limit, 2**53)


def _index(index: int) -> int:
    if not isinstance(index, int):
        raise ValueError("the index of a turn is an integer")  # noqa: TRY004  # as for every other bad argument
    return max(-(2**62), min(index, 2**62))


def _slice(start: int, stop: int) -> slice:
    """Return Redis' range, whose end is included, as Python's."""
    return slice(start, None if stop == -1 else stop + 1)


def _revision(if_revision: int | None) -> int | None:
    if if_revision is not None and (not isinstance(if_revision, int) or if_revision < 0):
        raise ValueError("if_revision is a revision, or 0 for an absent session")
    return if_revision


def _encode_cursor(position: tuple[int, str]) -> str:
    return base64.urlsafe_b64encode(msgspec.msgpack.encode(position)).decode()


def _decode_cursor(cursor: str) -> tuple[int, str]:
    try:
        return msgspec.msgpack.decode(base64.urlsafe_b64decode(cursor), type=tuple[int, str])
    except (TypeError, ValueError, msgspec.MsgspecError):
        raise ValueError("that is not a cursor of a page") from None


def _check_types(id: str, replies: Sequence[Reply], parts: Sequence[str]) -> None:
    for reply, part in zip(replies, parts, strict=True):
        if (as_error(reply) or "").startswith("WRONGTYPE"):
            raise CorruptSessionError(id, part)


def _check_index(partition: Partition, replies: Sequence[Reply]) -> None:
    if "WRONGTYPE" in (as_error(replies[0]) or ""):
        raise LayoutError(f"the index of {partition.prefix} is not of this store's layout")


def alone(make: Callable[..., Operation[T]], *arguments: Any) -> Plan[T]:
    """Return the plan of one operation, made when the plan begins."""
    result: T = yield make(*arguments)
    return result

"""Requests and plans: what has changed after a revision, and cursors, which are a revision for each partition."""

from __future__ import annotations

import base64
import sys
import time
from array import array
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, NamedTuple

import msgspec

from .. import scripts
from ..errors import LayoutError, NotFoundError, StoreResetError
from ..interrupts import raise_interruption
from ..model.ids import check_id
from .commands import Command, Reply
from .keys import Partition
from .request import Pause, Plan, Request, Together
from .writer import Namespace

__all__ = ["Change", "Changes", "Entry", "Since", "decode_message"]

_UNIX_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MAX_READ = 1000  # changes read at once

_decode_message = msgspec.msgpack.Decoder(tuple[int, int, int, bytes, str]).decode
_decode_cursor = msgspec.msgpack.Decoder(tuple[bytes, int, int, bytes]).decode


class Change(NamedTuple):
    """A session was saved (or appended to), or deleted; several changes of one session may come as the last of them.

    Attributes:
        kind: "saved" or "deleted".
        id: the session's.
        revision: of the change.
        updated_at: of the session; of a deletion, when it was deleted.
        cursor: where a later `watch(since=...)` goes on.
        origin: the store that wrote it: its `store.origin`.

    """

    kind: Literal["saved", "deleted"]
    id: str
    revision: int
    updated_at: datetime
    cursor: str
    origin: str


class Entry(NamedTuple):
    """A session's last change, as the index or a message has it; revision 0: the index has no such session."""

    id: str
    revision: int
    deleted: bool
    updated_at_ms: int
    origin: bytes


def decode_message(message: bytes) -> Entry | None:
    """Return what a message tells; None if it is none of ours."""
    try:
        revision, updated_at_ms, kind, origin, id = _decode_message(message)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
    return Entry(id, revision, kind == 1, updated_at_ms, origin)


class Since(Request[tuple[int, list[Entry]]]):
    """One run of the script (scripts/changes.lua): up to which revision it goes, and the changes, in order.

    Args:
        namespace: its high-water marks are raised.
        partition: is asked.
        since: a revision; None asks for the present one alone.
        limit: so many changes at most; with `ids`, so many of the first have no entry in the index, as is known.
        ids: only their changes. Others that have no entry come with revision 0.

    """

    __slots__ = ("_ids", "_limit", "_namespace", "_partition", "_since")

    def __init__(
        self, namespace: Namespace, partition: Partition, since: int | None, limit: int, ids: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self._namespace = namespace
        self._partition = partition
        self._since = since
        self._limit = limit
        self._ids = ids

    def commands(self) -> Sequence[Command]:
        """Call the script."""
        partition = self._partition
        keys = (partition.state, partition.changes, partition.meta, partition.deleted_meta)
        since = "" if self._since is None else self._since
        return [self._script(scripts.CHANGES, keys, (self._namespace.incarnation, since, self._limit, *self._ids))]

    def decode(self, replies: Sequence[Reply]) -> tuple[int, list[Entry]]:
        """Return them.

        Raises:
            StoreResetError: the data was wiped or went back, or a deletion may be unknown.

        """
        self._check(replies)
        answer, revision, *flat = replies[0]
        match answer:
            case b"RESET" if revision < 0:
                raise StoreResetError("the namespace was wiped")
            case b"RESET":
                raise StoreResetError(f"the data went back in time: to revision {revision} from {self._since}")
            case b"COMPACTED":
                raise StoreResetError(
                    f"deletions after revision {self._since} may be missing: their tombstones were dropped: list again"
                )
        self._namespace.observe(self._partition, revision)
        entries = [
            Entry(id.decode(), int(float(changed)), bool(kind), int.from_bytes(at), origin)
            for id, changed, kind, at, origin in zip(*(flat[n::5] for n in range(5)), strict=True)
        ]
        if self._ids:
            entries.sort(key=lambda entry: entry.revision)
        return revision, entries


class _Reached(Request["tuple[int | None, int]"]):
    """A session's revision (None: absent), and its partition's."""

    __slots__ = ("_absent", "_id", "_partition")

    def __init__(self, namespace: Namespace, id: str) -> None:
        super().__init__()
        self._id = id
        self._partition = namespace.keyspace.of(id)
        self._absent = not namespace.known

    def commands(self) -> Sequence[Command]:
        # The partition first: else a session that is made in between would be taken for one that is not there.
        return [
            ("HGET", self._partition.state, "revision"),
            ("HGET", self._partition.session(self._id), ".revision"),
        ]

    def decode(self, replies: Sequence[Reply]) -> tuple[int | None, int]:
        self._check(replies)
        partition, session = replies
        if self._absent:
            return None, 0
        if partition is None:
            raise StoreResetError("the namespace was wiped")
        try:
            return None if session is None else int(session), int(partition)
        except ValueError as error:
            raise_interruption(error)
            raise LayoutError(f"{self._partition.state} is not of this store's layout") from None


class Changes:
    """What there is to ask about changes, as plans."""

    def __init__(self, namespace: Namespace, heartbeat: float) -> None:
        self.namespace = self._namespace = namespace
        self.heartbeat = heartbeat  # seconds after which the partitions are looked at though no message came

    @property
    def _absence(self) -> bytes:
        """What a cursor has in place of the incarnation that the namespace did not have yet."""
        return b"\0" + self._namespace.name.encode()

    @property
    def origin(self) -> str:
        """What the changes that this store makes have as their origin."""
        return self._namespace.origin.hex()

    def cursor(self) -> Plan[str]:
        """Return the cursor of now."""
        namespace = self._namespace
        if not namespace.known:
            return _encode_cursor(self._absence, 0, _WIDTHS[0])
        answers = yield Together(Since(namespace, partition, None, 0) for partition in namespace.keyspace.partitions)
        return self.encode([revision for revision, _ in answers])

    def start(self, since: str | None) -> Plan[str]:
        """Return the cursor that a watch begins with, checked; of None, that of now."""
        if since is None:
            return (yield from self.cursor())
        self.decode(since)
        return since

    def changes(self, since: str | None, limit: int) -> Plan[list[Change]]:
        """Return changes after a cursor; after None, every session there is."""
        if not isinstance(limit, int) or limit < 1:
            raise ValueError("limit is 1 or more")
        limit = min(limit, 2**53)
        positions = self.decode(since)
        if not self._namespace.known:
            return []
        partitions = self._namespace.keyspace.partitions
        found: dict[str, Change] = {}  # by id: one that has changed between two rounds is there once
        asked = list(range(len(partitions)))
        while asked and (left := limit - len(found)) > 0:
            share = min(_MAX_READ, -(-left // len(asked)))
            answers = yield Together(Since(self._namespace, partitions[n], positions[n], share) for n in asked)
            more = []
            for n, (_, entries) in zip(asked, answers, strict=True):
                taken = entries[: limit - len(found)]
                for entry in taken:
                    positions[n] = entry.revision
                    found.pop(entry.id, None)
                    found[entry.id] = self.change(entry, positions)
                if len(taken) < len(entries) or len(entries) == share:
                    more.append(n)
            asked = more
        return list(found.values())

    def wait_for(self, id: str, revision: int, seconds: float, wake: Any) -> Plan[int]:
        """Return the session's revision once it is at least `revision`; `wake` is set when it may be."""
        expires = time.monotonic() + seconds
        while True:
            wake.clear()
            reached, partition = yield _Reached(self._namespace, id)
            if reached is not None and reached >= revision:
                return int(reached)
            if reached is None and partition >= revision:
                raise NotFoundError(id)
            left = expires - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"session {id} has not reached revision {revision} in time")
            yield Pause(min(left, self.heartbeat), wake)

    def channel(self, id: str) -> str:
        """Return the channel on which a session's changes are published."""
        return self._namespace.channel(self._namespace.keyspace.of(check_id(id)).changes, id)

    def change(self, entry: Entry, positions: Sequence[int]) -> Change:
        """Return an entry as the caller sees it."""
        return Change(
            "deleted" if entry.deleted else "saved",
            entry.id,
            entry.revision,
            _UNIX_EPOCH + timedelta(milliseconds=entry.updated_at_ms),
            self.encode(positions),
            entry.origin.hex(),
        )

    def encode(self, positions: Sequence[int]) -> str:
        """Return a cursor: it belongs to this namespace, and has a revision for each partition.

        They differ by little, so that the least and what each has beyond it take a byte or two for each.
        """
        least = min(positions)
        beyond = [position - least for position in positions]
        code = _WIDTHS[(max(beyond).bit_length() - 1) // 8 if any(beyond) else 0]
        return _encode_cursor(self._namespace.incarnation, least, array(code.typecode, beyond))

    def decode(self, cursor: str | None) -> list[int]:
        """Return a cursor's revisions; of None, those before the first write.

        Raises:
            ValueError: it is no cursor.
            StoreResetError: it is of another namespace, or of this one before it was wiped.

        """
        count = len(self._namespace.keyspace.partitions)
        if cursor is None:
            return [0] * count
        try:
            incarnation, least, width, data = _decode_cursor(base64.urlsafe_b64decode(cursor))
            beyond = array({code.itemsize: code.typecode for code in _WIDTHS}[width], data)
        except (KeyError, TypeError, ValueError, msgspec.MsgspecError) as error:
            raise_interruption(error)
            raise ValueError("that is not a cursor of changes") from None
        if incarnation == self._absence:
            return [0] * count
        if incarnation != self._namespace.incarnation:
            raise StoreResetError("the cursor is of another namespace, or of this one before it was wiped: list again")
        if len(beyond) != count:
            raise ValueError("that is not a cursor of changes")
        return [least + offset for offset in _big_endian(beyond)]


_WIDTHS = [array(code) for code in "BHIIQQQQ"]  # by the number of bytes needed


def _encode_cursor(incarnation: bytes, least: int, beyond: array[int]) -> str:
    cursor = incarnation, least, beyond.itemsize, _big_endian(beyond).tobytes()
    return base64.urlsafe_b64encode(msgspec.msgpack.encode(cursor)).decode()


def _big_endian(numbers: array[int]) -> array[int]:
    if sys.byteorder == "little":
        numbers.byteswap()
    return numbers

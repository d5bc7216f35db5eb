"""What is asked of the shared store, as plans: its index, single sessions, writes bound to a revision."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, Generic, NamedTuple, Self, TypeVar, cast

from ...errors import ConflictError, CorruptSessionError, NotFoundError, VersionIncompatibleError
from ...model.asset import SessionAsset
from ...protocol.baseline import Baseline, baseline_of, set_baseline
from ...protocol.changes import Since
from ...protocol.index import AllMeta, Row, origin_of, revision_of
from ...protocol.keys import Partition
from ...protocol.reads import Mark, ReadMark
from ...protocol.request import Plan, Together
from ...protocol.watching import Watcher
from ..core import Core
from .planner import Unreadable

__all__ = ["Index", "Listed", "Shared", "Version"]

A = TypeVar("A", bound=SessionAsset)
_REMEMBERED = 64  # sessions of which only what changes is sent and read
_REMEMBERED_BYTES = 64 * 2**20


class Listed(NamedTuple):
    """What the index says of a session."""

    revision: int  # 0: it is there, but its revision can't be read
    origin: bytes
    meta: bytes  # as the index has it; b"": it was not read


class Index(NamedTuple):
    """Sessions by id, and the revisions that partitions had, by their numbers, before that was read."""

    revisions: dict[int, int]
    sessions: dict[str, Listed]

    @classmethod
    def of(cls, revisions: dict[int, int], runs: Iterable[Iterable[Row]]) -> Self:
        """Make it of the partitions' rows. An id that is none shows itself when it is asked for."""
        sessions = {
            id.decode(errors="replace"): Listed(revision_of(meta), origin_of(meta), meta)
            for rows in runs
            for _, id, meta in rows
        }
        return cls(revisions, sessions)


class Version(NamedTuple, Generic[A]):
    """A session as it is stored: readable or not, at a revision that an operation made."""

    found: A | Unreadable
    revision: int
    operation: bytes


class Shared(Generic[A]):
    """What a hybrid store asks of the Redis store."""

    def __init__(self, core: Core[A]) -> None:
        self._core = core
        self._namespace = core.changes.namespace
        self._baselines: OrderedDict[str, Baseline] = OrderedDict()
        self._bytes = 0  # of these

    @property
    def incarnation(self) -> bytes:
        """The namespace's; b"": it is absent."""
        return self._namespace.incarnation

    @property
    def name(self) -> str:
        """The namespace's name."""
        return self._namespace.name

    def cursor(self) -> Plan[str]:
        """Return the cursor of now, for a watcher."""
        return (yield from self._core.changes.cursor())

    def watcher(self, wake: Any) -> Watcher:
        """Return what follows the changes; `wake` is set when there may be some."""
        return Watcher(self._core.changes, None, wake)

    def index(self) -> Plan[tuple[dict[int, int], list[list[Row]]]]:
        """Return what there is. The revisions are read first: what is written meanwhile is above them."""
        if not self._namespace.known:
            return {}, []
        partitions = self._namespace.keyspace.partitions
        revisions = yield from self._revisions(partitions)
        return revisions, (yield Together(map(AllMeta, partitions)))

    def glance(self, ids: Sequence[str]) -> Plan[Index]:
        """Return what there is of some sessions, by their own keys."""
        if not self._namespace.known:
            return Index({}, {})
        partitions = dict.fromkeys(map(self._namespace.keyspace.of, ids))
        revisions = yield from self._revisions(partitions)
        marks = yield Together(ReadMark(self._namespace, id) for id in ids)
        found = {id: mark for id, mark in zip(ids, marks, strict=True) if mark is not None}
        return Index(revisions, {id: Listed(mark.revision, mark.operation_id[:8], b"") for id, mark in found.items()})

    def _revisions(self, partitions: Iterable[Partition]) -> Plan[dict[int, int]]:
        asked = [*partitions]
        answers = yield Together(Since(self._namespace, partition, None, 0) for partition in asked)
        return {partition.number: revision for partition, (revision, _) in zip(asked, answers, strict=True)}

    def partition_of(self, id: str) -> int:
        """Return the number of a session's partition."""
        return self._namespace.keyspace.of(id).number

    def mark(self, id: str) -> Plan[Mark | None]:
        """Return a session's revision and operation, from its own key; None: it is absent."""
        if not self._namespace.known:
            return None
        mark: Mark | None = yield ReadMark(self._namespace, id)
        return mark

    def read(self, id: str) -> Plan[Version[A] | None]:
        """Return a session; None: it is absent. Of one that was read or written lately only what is new is read."""
        try:
            asset, known = yield from self._core.saving.read(id, self._baselines.get(id))
        except NotFoundError:
            return None
        except (CorruptSessionError, VersionIncompatibleError) as error:
            mark = yield from self.mark(id)
            return None if mark is None else Version(Unreadable(error), mark.revision, mark.operation_id)
        self._remember(known)
        return Version(asset, known.revision, known.operation_id)

    def put(self, asset: A, revision: int) -> Plan[Mark]:
        """Store an asset over a revision; 0: only if the session is absent.

        Raises:
            ConflictError: it is at another.

        """
        known = self._baselines.get(asset.id)
        if known is not None and known.revision == revision:
            set_baseline(asset, known)
        try:
            yield from self._core.saving.save(asset, revision)
        except ConflictError:
            self._forget(asset.id)
            raise
        written = cast(Baseline, baseline_of(asset, self._namespace.incarnation))
        self._remember(written)
        return Mark(written.revision, written.operation_id)

    def clear(self, id: str, revision: int) -> Plan[None]:
        """Delete a session that can't be read, at a revision; 0: that can't be read either.

        Raises:
            ConflictError: it is at another.

        """
        self._forget(id)
        with contextlib.suppress(NotFoundError):
            yield self._core.sessions.delete(id, revision or None, None)

    def remove(self, id: str, revision: int) -> Plan[None]:
        """Delete a session at a revision.

        Raises:
            ConflictError: it is at another.
            NotFoundError: it is gone.

        """
        yield self._core.sessions.delete(id, revision, None)

    def _remember(self, known: Baseline) -> None:
        self._forget(known.id)
        self._baselines[known.id] = known
        self._bytes += _size(known)
        while len(self._baselines) > _REMEMBERED or self._bytes > _REMEMBERED_BYTES:
            self._forget(next(iter(self._baselines)))

    def _forget(self, id: str) -> None:
        if (known := self._baselines.pop(id, None)) is not None:
            self._bytes -= _size(known)


def _size(known: Baseline) -> int:
    return sum(map(len, known.turns)) + sum(map(len, known.fields.values()))

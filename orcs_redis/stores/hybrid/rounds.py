"""A round of synchronisation: compare both sides, say what follows, install it in batches. The only writer of bases.

A version is installed in this order: what is intended is noted; it is written there, bound to the revision that was
seen, then here, bound to the bytes that were seen; it is noted as common. Wherever that is cut off, the next round
tells its own half-done step from another's edit.
"""

from __future__ import annotations

import contextlib
import logging
import random
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Literal, NamedTuple, TypeVar, cast

import msgspec

from ...errors import (
    ConflictError,
    CorruptSessionError,
    NotFoundError,
    OutcomeUnknownError,
    PermissionDeniedError,
    StorageError,
    StoreResetError,
    SyncStoppedError,
    UnavailableError,
    VersionIncompatibleError,
)
from ...interrupts import raise_interruption
from ...model.asset import SessionAsset
from ...model.ids import check_id
from ...model.meta import SyncMode, SyncState
from ...protocol.reads import Mark
from .files import Files, Moved, Replacement, RoundLock, Signature, file_digest
from .journal import Record, Remote, Row
from .local import Local, arrived
from .planner import (
    SAME,
    Act,
    Base,
    Pending,
    Side,
    Step,
    Unreadable,
    caught_up,
    forced,
    lacking_turns,
    plan,
    sent_turns,
    sides_of,
)
from .planner import Here as HereSide
from .planner import There as ThereSide
from .results import Conflict, SyncReport
from .shared import Index, Listed, Shared, Version
from .steps import Connect, Each, Here, Pause, Plan, RedisPlan, There

__all__ = ["Progress", "Rounds", "Rules", "SyncOptions"]

A = TypeVar("A", bound=SessionAsset)
Progress = Callable[[int, int], object]

_log = logging.getLogger("orcs_redis")
_BATCH = 32  # sessions
_BATCH_BYTES = 8 * 2**20
_ATTEMPTS = 10  # at a session that others write all the time
_BRAKE = 10  # so many deletions no round stops at
_LOCK_SECONDS = 0.02


@dataclass(frozen=True)
class Rules:
    """What follows where both sides have changed, and how long what loses is kept."""

    merging: bool = True
    prefer: Literal["local", "remote"] | None = None
    keep_days: float = 30.0


@dataclass(frozen=True)
class SyncOptions:
    """What a round is to do beyond the usual."""

    dry_run: bool = False
    adopt: bool = False
    deletions: bool = False
    verify: bool = False
    progress: Progress | None = None


class _Item(NamedTuple, Generic[A]):
    """A session as it was read on both sides, and what follows."""

    id: str
    record: Record  # with the base that what was sent has become
    here: HereSide[A]
    data: bytes | None  # of the file
    there: ThereSide[A]
    mark: Mark | None  # of the version there
    removed: Collection[str]
    step: Step[A]

    @property
    def version(self) -> Side[A]:
        """What is installed."""
        return cast(Side[A], self.step.version)

    @property
    def expected(self) -> bytes | None:
        return None if self.data is None else file_digest(self.data)


@dataclass
class _Round(Generic[A]):
    """What a round works with, and what it has come to."""

    shared: Shared[A]
    options: SyncOptions
    remote: Remote
    index: Index
    report: SyncReport = field(default_factory=SyncReport)
    stopped: int = 0  # deletions that the brake has prevented
    total: int = 0
    done: int = 0
    fatal: StorageError | None = None

    def advance(self, count: int) -> None:
        self.done += count
        if self.options.progress is not None:
            self.options.progress(self.done, self.total)

    def note_reached(self, items: Sequence[_Item[A]]) -> Remote | None:
        """Take over which revisions the store has reached by what was written; return what is to be noted."""
        revisions: dict[int, int] = {}
        for item in items:
            if item.mark is not None:
                number = self.shared.partition_of(item.id)
                revisions[number] = max(item.mark.revision, revisions.get(number, 0))
        self.remote = _reached(self.remote, revisions)._replace(incarnation=self.shared.incarnation)
        return self.remote if self.remote.incarnation else None

    def fail(self, id: str, error: StorageError) -> None:
        self.report.failed.append((id, error))
        if isinstance(error, (UnavailableError, StoreResetError)):
            self.fatal = error


class Rounds(Generic[A]):
    """What brings a folder and the shared store together, as plans."""

    def __init__(self, local: Local[A], rules: Rules) -> None:
        self._local = local
        self._files: Files = local.files
        self._journal = local.journal
        self._rules = rules
        self._denied = False
        self._busy = False  # whether a round has something to do
        self._mode = SyncMode.OFFLINE
        remote = local.journal.read_remote()
        self.last_sync = None if remote is None else remote.last_sync  # seconds since 1970

    def sync(self, ids: Collection[str] | None, options: SyncOptions) -> Plan[SyncReport]:
        """Bring all sessions together, or those of these ids.

        Raises:
            UnavailableError: the shared store can't be reached.
            StoreResetError: the bases are of another namespace, or it went back in time.
            SyncStoppedError: all is done but for suspiciously many deletions.

        """
        wanted = None if ids is None else [*dict.fromkeys(map(check_id, ids))]
        with self._noting_mode():
            shared: Shared[A] = yield Connect()
            lock = yield from self._locked()
            try:
                round = yield from self._begin(shared, wanted, options)
                candidates = yield Here(self._candidates, (round, wanted))
                self._busy = bool(candidates)
                round.total = len(candidates)
                round.advance(0)
                for batch in self._batches(candidates):
                    yield from self._bring_together(round, batch)
                    round.advance(len(batch))
                yield Here(self._end, (round, wanted is None))
            finally:
                self._busy = False
                lock.release()
            if round.stopped:
                raise SyncStoppedError(round.stopped)
        return _sorted(round.report)

    @property
    def mode(self) -> SyncMode:
        """How the folder stands with the shared store, by the last round."""
        return SyncMode.SYNCING if self._busy else self._mode

    def note_failure(self, error: StorageError) -> None:
        """Note why the shared store was not reached, or can't be used."""
        offline = isinstance(error, (UnavailableError, OutcomeUnknownError))
        self._mode = SyncMode.OFFLINE if offline else SyncMode.ERROR

    @contextlib.contextmanager
    def _noting_mode(self) -> Iterator[None]:
        try:
            yield
        except StorageError as error:
            raise_interruption(error)
            self.note_failure(error)
            raise
        self._mode = SyncMode.ONLINE

    def _locked(self) -> Plan[RoundLock]:
        while True:
            lock: RoundLock | None = yield Here(self._files.try_lock_round)
            if lock is not None:
                return lock
            yield Pause(random.uniform(_LOCK_SECONDS / 2, _LOCK_SECONDS))

    def _begin(self, shared: Shared[A], wanted: list[str] | None, options: SyncOptions) -> Plan[_Round[A]]:
        """Find out what is in the shared store, and that it is the one that the bases are of."""
        yield Here(self._local.settle, (wanted,))
        remote: Remote | None = yield Here(self._journal.read_remote)
        try:
            index = yield from self._index(shared, wanted)
        except StoreResetError:
            if not options.adopt:
                raise
            shared = yield Connect(anew=True)
            index = yield from self._index(shared, wanted)
        if remote is not None and (reset := _reset(remote, shared, index)):
            if not options.adopt:
                raise StoreResetError(reset)
            if wanted is not None:
                raise ValueError("adopt takes all sessions: sync without ids")
            yield Here(self._adopt, (shared, remote, index))
            remote = None
        if remote is None:
            remote = Remote(shared.incarnation, shared.name, {}, None)
            if shared.incarnation:
                yield Here(self._journal.note, ({}, {}, remote))
        return _Round(shared, options, _reached(remote, index.revisions), index)

    def _index(self, shared: Shared[A], wanted: list[str] | None) -> Plan[Index]:
        index: Index
        if wanted is not None:
            index = yield There(shared.glance, (wanted,))
            return index
        index = yield There(shared.index)
        # An index can be evicted while its sessions are there: each one's own key says whether it is gone.
        missing = [id for id, row in self._journal.rows.items() if row.base_digest and id not in index.sessions]
        for at in range(0, len(missing), 1000):
            found = yield There(shared.glance, (missing[at : at + 1000],))
            index.sessions.update(found.sessions)
        return index

    def _adopt(self, shared: Shared[A], remote: Remote, index: Index) -> None:
        """Forget what was common with a store that was wiped, or went back in time: but for what it still has."""
        same = remote.incarnation == shared.incarnation
        kept = {
            id
            for id, row in self._journal.rows.items()
            if same and (found := index.sessions.get(id)) and row.has_revision(found.revision, found.origin)
        }
        self._journal.forget_bases(kept)

    def _candidates(self, round: _Round[A], wanted: list[str] | None) -> list[str]:
        """Return the sessions of which something has changed, without those that the brake holds."""
        if wanted is None:
            signatures = self._files.scan()
        else:
            signatures = {id: found for id in wanted if (found := self._files.signature(id))}
        rows, sessions = self._journal.rows, round.index.sessions
        candidates, gone_here, gone_there = [], [], []
        for id in signatures.keys() | rows.keys() | sessions.keys() if wanted is None else wanted:
            row, listed, signature = rows.get(id, _UNKNOWN), sessions.get(id), signatures.get(id)
            same_there = listed is not None and row.has_revision(listed.revision, listed.origin)
            if same_there and row.is_same_there and not (row.has_pending or row.reason or round.options.verify):
                seen = self._journal.seen.get(id)
                if signature and self._local.is_fresh(id, signature) and seen and seen.digest == row.base_digest:
                    continue
            candidates.append(id)
            if same_there and signature is None and not self._is_deleted(id):
                gone_here.append(id)
            elif row.base_digest and signature is not None and listed is None:
                gone_there.append(id)
        if wanted is None and not round.options.deletions and not round.options.dry_run:
            held = self._held(gone_here, len(sessions)) | self._held(self._untouched(gone_there), len(signatures))
            round.stopped = len(held)
            candidates = [id for id in candidates if id not in held]
        return sorted(candidates)

    def _is_deleted(self, id: str) -> bool:
        """Whether a session was deleted through the API."""
        removal = self._journal.removals.get(id)
        return removal is not None and removal.deleted

    def _untouched(self, ids: Sequence[str]) -> list[str]:
        """Return the sessions whose files are as they were common."""
        self._local.look(ids)
        seen, rows = self._journal.seen, self._journal.rows
        return [id for id in ids if id in seen and seen[id].digest == rows[id].base_digest]

    @staticmethod
    def _held(gone: Sequence[str], number: int) -> set[str]:
        """Return what the brake holds: a round doesn't delete most of what there is without being asked to."""
        return {*gone} if len(gone) > _BRAKE and 2 * len(gone) > number else set()

    def _batches(self, ids: Sequence[str]) -> Iterator[list[str]]:
        batch: list[str] = []
        size = 0
        for id in ids:
            seen = self._journal.seen.get(id)
            size += 0 if seen is None else seen.signature.size
            if batch and (len(batch) == _BATCH or size > _BATCH_BYTES):
                yield batch
                batch, size = [], 0
            batch.append(id)
        if batch:
            yield batch

    def _bring_together(self, round: _Round[A], ids: Sequence[str]) -> Plan[None]:
        """Read sessions on both sides, do what follows, and again those that were changed meanwhile."""
        sessions = round.index.sessions
        for attempt in range(_ATTEMPTS):
            if attempt:
                yield Pause(random.uniform(0, 0.005 * 2**attempt))
                sessions = (yield There(round.shared.glance, (ids,))).sessions
            items = yield from self._read(round, ids, sessions)
            ids = yield from self._apply(round, items)
            if round.fatal is not None:
                raise round.fatal
            if not ids:
                return
        for id in ids:
            round.fail(id, ConflictError(id, 0, 0, reason="it is written all the time"))

    def _read(
        self, round: _Round[A], ids: Sequence[str], sessions: Mapping[str, Listed], *, whole: bool = False
    ) -> Plan[list[_Item[A]]]:
        """Read sessions on both sides, there only where it is needed or with `whole`, and plan what follows."""
        found = yield Here(self._read_here, (ids,))
        wanted = []
        for id, (record, here, _, removed) in found.items():
            listed = sessions.get(id)
            if listed is None:
                continue
            base = record.base
            same = base is not None and record.row.has_revision(listed.revision, listed.origin)
            if whole or not same or (isinstance(here, Side) and base and lacking_turns(base.parts, here, removed)):
                wanted.append(id)
        versions = yield Each(round.shared.read, wanted)
        contents: dict[str, Version[A] | None] = {}
        for id, version in zip(wanted, versions, strict=True):
            if isinstance(version, StorageError):
                round.fail(id, version)
                if round.fatal is not None:
                    raise round.fatal
                del found[id]
            else:
                contents[id] = version
        items: list[_Item[A]] = yield Here(self._plan, (found, contents, sessions))
        return items

    def _read_here(self, ids: Sequence[str]) -> dict[str, tuple[Record, HereSide[A], bytes | None, Collection[str]]]:
        """Read files, and then what is known: what was removed is noted before the file shows it."""
        versions = self._local.look(ids)
        self._journal.refresh()
        records = self._journal.records(ids)
        found: dict[str, tuple[Record, HereSide[A], bytes | None, Collection[str]]] = {}
        for id, version in versions.items():
            record = records.get(id, Record(Row(), None, None))
            if isinstance(version.side, Side) and (base := arrived(record, version.side)) is not None:
                record = Record.of(base, None, record.row)
            removal = self._journal.removals.get(id)
            found[id] = record, version.side, version.data, frozenset() if removal is None else removal.turns
        return found

    def _plan(
        self,
        found: Mapping[str, tuple[Record, HereSide[A], bytes | None, Collection[str]]],
        contents: Mapping[str, Version[A] | None],
        sessions: Mapping[str, Listed],
    ) -> list[_Item[A]]:
        items = []
        for id, (record, here, data, removed) in found.items():
            there: ThereSide[A] = None
            mark = None
            base = record.base
            if id in contents:
                if (version := contents[id]) is not None:
                    there, mark = version.side, Mark(version.revision, version.operation)
                base = caught_up(base, record.pending, there)
            elif id in sessions and base is not None:
                there, mark = SAME, Mark(base.revision, base.operation)
            step = plan(base, here, there, removed=removed, merging=self._rules.merging, prefer=self._rules.prefer)
            record = Record.of(base, record.pending, _heard(record.row, mark, sessions.get(id), here, step))
            items.append(_Item(id, record, here, data, there, mark, removed, step))
        return items

    # Doing it

    def _apply(self, round: _Round[A], items: Sequence[_Item[A]]) -> Plan[list[str]]:
        """Do what follows for sessions; return those that have to be planned anew, since they have changed."""
        if round.options.dry_run:
            heard = {item.id: item.record.row for item in items if item.step.act is not Act.FORGET}
            yield Here(self._journal.note, ({}, heard))
            for item in items:
                _report(round.report, item)
            return []
        items = yield Here(self._prepare, (round, items))
        there = [item for item in items if item.step.write_there or item.step.act is Act.DELETE_THERE]
        answers = yield Each(lambda item: self._write_there(round.shared, item), there)
        again, done = [], []
        marks = {}
        for item, answer in zip(there, answers, strict=True):
            if isinstance(answer, (ConflictError, NotFoundError)):
                again.append(item.id)
            elif isinstance(answer, StorageError):
                self._fail_write(round, item.id, answer)
            else:
                marks[item.id] = answer
        for item in items:
            if item not in there:
                done.append(item)
            elif item.id in marks:
                done.append(item._replace(mark=marks[item.id]))
        again += yield Here(self._finish, (round, done))
        return again

    def _fail_write(self, round: _Round[A], id: str, error: StorageError) -> None:
        round.fail(id, error)
        if isinstance(error, PermissionDeniedError) and not self._denied:
            self._denied = True
            _log.warning("sessions can't be sent to the shared store: %s", error)

    def _prepare(self, round: _Round[A], items: Sequence[_Item[A]]) -> list[_Item[A]]:
        """Note what is intended, and keep what will be lost; return what can be done."""
        ready, notes = [], {}
        for item in items:
            record = item.record
            if item.step.act is Act.INSTALL:
                record = Record.of(record.base, _intention(item), record.row)
            if item.step.state is not None:
                notes[item.id] = record
            ready.append(item._replace(record=record))
        self._journal.note(notes)
        kept = []
        for item in ready:
            try:
                if item.step.act is not Act.DELETE_HERE:
                    round.report.kept.extend(self._keep(item))
            except StorageError as error:
                round.fail(item.id, error)
            else:
                kept.append(item)
        return kept

    def _keep(self, item: _Item[A]) -> Iterator[Path]:
        why = item.step.reason or _why(item.step)
        for side in item.step.keep:
            if side == "here" and item.data is not None:
                yield self._files.keep(item.id, side, item.data, why)
            elif side == "there" and isinstance(item.there, Side):
                yield self._files.keep(item.id, side, item.there.asset.to_json().encode(), why)

    @staticmethod
    def _write_there(shared: Shared[A], item: _Item[A]) -> RedisPlan[Mark | None]:
        revision = 0 if item.mark is None else item.mark.revision
        if item.step.act is Act.DELETE_THERE:
            yield from shared.remove(item.id, revision)
            return None
        return (yield from shared.put(item.version.asset, revision))

    def _finish(self, round: _Round[A], items: Sequence[_Item[A]]) -> list[str]:
        """Write what is to be written here, and note what is common; return what has changed meanwhile."""
        sent = {
            item.id: Record.of(item.record.base, _arrived_there(item), item.record.row)
            for item in items
            if item.step.write_here and item.step.write_there
        }
        self._journal.note(sent)
        again: list[str] = []
        replaced = self._write_here([item for item in items if item.step.write_here])
        notes: dict[str, Record | None] = {}
        for item in items:
            result = replaced.get(item.id)
            try:
                if isinstance(result, Exception):
                    raise result
                if item.step.act is Act.DELETE_HERE:
                    round.report.kept.extend(self._delete_here(item))
            except (Moved, NotFoundError):
                again.append(item.id)
            except StorageError as error:
                round.fail(item.id, error)
            else:
                if item.step.act is not Act.NOTHING:
                    notes[item.id] = _common(item)
                _report(round.report, item)
        self._journal.note(notes, {}, round.note_reached(items))
        return again

    def _write_here(self, items: Sequence[_Item[A]]) -> dict[str, Signature | Moved | StorageError]:
        versions = {item.id: item.step.version for item in items if item.step.version is not None}
        expected = {item.id: item.expected for item in items}
        replacements = [
            Replacement(id, version.asset.to_json().encode(), expected[id]) for id, version in versions.items()
        ]
        results = dict(zip(versions, self._files.replace(replacements), strict=True))
        self._local.note_written(
            {id: (result, versions[id]) for id, result in results.items() if isinstance(result, Signature)}
        )
        return results

    def _delete_here(self, item: _Item[A]) -> list[Path]:
        path = self._files.remove(item.id, item.expected or b"", keep=item.step.reason or _why(item.step))
        self._journal.note_seen({item.id: None})
        return [path] if path else []

    def _end(self, round: _Round[A], whole: bool) -> None:
        if round.report.kept:
            self._files.prune_kept(self._rules.keep_days)
        if not round.report.failed:
            self.last_sync = time.time()
        if whole and round.shared.incarnation and not round.options.dry_run:
            self._journal.note({}, {}, round.remote._replace(last_sync=self.last_sync))

    # Conflicts

    def conflict(self, id: str) -> Plan[Conflict | None]:
        """Return what a session's conflict is about; None: it has none.

        Raises:
            NotFoundError: there is no such session.

        """
        shared: Shared[A] = yield Connect()
        lock = yield from self._locked()
        try:
            round = yield from self._begin(shared, [check_id(id)], SyncOptions(dry_run=True))
            items = yield from self._read(round, [id], round.index.sessions, whole=True)
            _raise_failure(round)
        finally:
            lock.release()
        item = items[0]
        if item.here is None and item.there is None:
            raise NotFoundError(id)
        if item.step.state is not SyncState.CONFLICT:
            return None
        local = item.here.asset if isinstance(item.here, Side) else None
        remote = item.there.asset if isinstance(item.there, Side) else None
        return Conflict(id, [*item.step.parts], item.step.reason, local, remote)

    def resolve(self, id: str, keep: Literal["local", "remote"] | A) -> Plan[None]:
        """Decide what a session is to be, on both sides.

        Raises:
            NotFoundError: there is no such session.
            CorruptSessionError: the side to be kept can't be read.
            VersionIncompatibleError: a side is of another version: it is not overwritten.
            ConflictError: others write the session all the time.

        """
        shared: Shared[A] = yield Connect()
        lock = yield from self._locked()
        try:
            for attempt in range(_ATTEMPTS):
                if attempt:
                    yield Pause(random.uniform(0, 0.005 * 2**attempt))
                round = yield from self._begin(shared, [check_id(id)], SyncOptions())
                items = yield from self._read(round, [id], round.index.sessions, whole=True)
                _raise_failure(round)
                item = _resolved(items[0], keep)
                if isinstance(item.there, Unreadable) and item.step.write_there:
                    item = yield from self._clear_there(round, item)
                again = yield from self._apply(round, [item])
                _raise_failure(round)
                if not again:
                    yield Here(self._end, (round, False))
                    return
            raise ConflictError(id, 0, 0, reason="it is written all the time")
        finally:
            lock.release()

    def _clear_there(self, round: _Round[A], item: _Item[A]) -> Plan[_Item[A]]:
        """Delete what can't be read in the shared store."""
        yield There(round.shared.clear, (item.id,))
        return item._replace(there=None, mark=None)


_UNKNOWN = Row()


def _reset(remote: Remote, shared: Shared[A], index: Index) -> str:
    """Say in which way this is not the store that the bases are of; "": it is."""
    if remote.incarnation != shared.incarnation:
        if not shared.incarnation:
            return f"there is nothing in namespace {shared.name!r} any more: adopt it to send all that is here"
        return "the shared store was wiped, or is another one: adopt it to bring together what is on both sides"
    for number, revision in index.revisions.items():
        if revision < remote.revisions.get(number, 0):
            return f"the shared store went back in time, to revision {revision} of partition {number}: adopt it"
    return ""


def _reached(remote: Remote, revisions: Mapping[int, int]) -> Remote:
    reached = {number: max(revision, remote.revisions.get(number, 0)) for number, revision in revisions.items()}
    return remote._replace(revisions={**remote.revisions, **reached})


def _heard(row: Row, mark: Mark | None, listed: Listed | None, here: HereSide[A], step: Step[A]) -> Row:
    """Return what is known of a session, with what was heard of the shared store."""
    meta = listed.meta if listed is not None and here is None else b""
    row = row._replace(there_revision=0, there_origin=b"", there_meta=meta, reason=step.reason, parts=step.parts)
    return row if mark is None else row._replace(there_revision=mark.revision or -1, there_origin=mark.operation_id[:8])


def _why(step: Step[A]) -> str:
    """Return why the loser of a step is kept."""
    if step.act is Act.DELETE_HERE:
        return "deleted in the shared store"
    if step.write_here and step.write_there:
        return "lost in a merge"
    return "replaced by the shared store's version" if step.write_here else "replaced by the version here"


def _intention(item: _Item[A]) -> Pending | None:
    """Return what is to be noted before a version is installed."""
    step, mark = item.step, item.mark
    if not step.write_there:
        return None if mark is None else Pending(item.version.digest, mark.revision, mark.operation_id)
    if not isinstance(item.here, Side):
        return None  # what arrives there is pulled
    there = item.there.parts if isinstance(item.there, Side) else None
    base = None if item.record.base is None else item.record.base.parts
    return Pending(item.version.digest, mine=item.here.parts, sent=sent_turns(item.version.parts, base, there))


def _arrived_there(item: _Item[A]) -> Pending | None:
    """Return what is noted once a version is there, and not here yet."""
    pending = item.record.pending or Pending(item.version.digest)
    mark = cast(Mark, item.mark)
    return msgspec.structs.replace(pending, revision=mark.revision, operation=mark.operation_id)


def _common(item: _Item[A]) -> Record | None:
    """Return what is known of a session once it is the same on both sides; None: it is gone."""
    step, mark = item.step, item.mark
    if step.act not in (Act.ADOPT, Act.INSTALL):
        return None
    side = step.version if step.write_there else item.there
    if mark is None or not isinstance(side, Side):
        raise ValueError("what is common was not read")
    base = Base(side.parts, side.digest, mark.revision, mark.operation_id)
    row = item.record.row._replace(
        there_revision=mark.revision, there_origin=mark.operation_id[:8], there_meta=b"", reason="", parts=()
    )
    return Record.of(base, None, row)


def _resolved(item: _Item[A], keep: Literal["local", "remote"] | A) -> _Item[A]:
    """Return a session with the step that resolves it."""
    for side in (item.here, item.there):
        if isinstance(side, Unreadable) and isinstance(side.error, VersionIncompatibleError):
            raise side.error
    if item.here is None and item.there is None:
        raise NotFoundError(item.id)
    if isinstance(keep, SessionAsset):
        return item._replace(step=_whole(item, Side.of(keep)))
    wanted, other = (item.here, item.there) if keep == "local" else (item.there, item.here)
    if isinstance(wanted, Unreadable):
        raise wanted.error
    if isinstance(other, Unreadable):
        if wanted is None:
            raise CorruptSessionError(item.id)
        return item._replace(step=_whole(item, cast(Side[A], wanted)))
    here, there = cast(Side[A] | None, item.here), cast(Side[A] | None, item.there)
    return item._replace(step=forced(item.record.base, here, there, keep, item.removed))


def _whole(item: _Item[A], version: Side[A]) -> Step[A]:
    """Return the step that makes a session this version on both sides."""
    write_here = not isinstance(item.here, Side) or item.here.digest != version.digest
    write_there = not isinstance(item.there, Side) or item.there.digest != version.digest
    sides = sides_of(item.here, item.there)
    return Step(SyncState.LOCAL_AHEAD, Act.INSTALL, version, write_here, write_there, sides, reason="resolved")


def _raise_failure(round: _Round[A]) -> None:
    for _, error in round.report.failed:
        raise error


def _report(report: SyncReport, item: _Item[A]) -> None:
    step = item.step
    if step.state is SyncState.CONFLICT:
        report.conflicts.append(item.id)
    elif step.act in (Act.DELETE_HERE, Act.DELETE_THERE):
        report.deleted.append(item.id)
    elif step.act is Act.INSTALL and step.revives:
        report.revived.append(item.id)
    elif step.write_here and step.write_there:
        report.merged.append(item.id)
    elif step.write_there:
        report.uploaded.append(item.id)
    elif step.write_here:
        report.downloaded.append(item.id)


def _sorted(report: SyncReport) -> SyncReport:
    for ids in (report.uploaded, report.downloaded, report.merged, report.deleted, report.revived, report.conflicts):
        ids.sort()
    report.failed.sort(key=lambda failure: failure[0])
    return report

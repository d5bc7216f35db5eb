"""Rounds of synchronisation: what has changed on both sides, conflicts that are decided. One at a time in a folder."""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Generic, Literal, TypeVar, cast

from ...errors import (
    ConflictError,
    CorruptSessionError,
    NotFoundError,
    OutcomeUnknownError,
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
from .installing import ATTEMPTS, Installer, Item, Round, Rules, SyncOptions, reached
from .journal import Notes, Record, Remote, Row
from .local import Local
from .locks import RoundLock
from .planner import Act, Side, Step, Unreadable, forced, sides_of
from .results import Conflict, SyncReport
from .shared import Index, Shared
from .steps import Connect, Here, Pause, Plan, There

__all__ = ["Rounds"]

A = TypeVar("A", bound=SessionAsset)

_BATCH = 32  # sessions
_BATCH_BYTES = 8 * 2**20
_BRAKE = 10  # so many deletions no round stops at
_LOCK_SECONDS, _LONGEST_LOCK_SECONDS = 0.02, 0.1  # between two looks at the lock
_PRUNE_SECONDS = 86400.0


class Rounds(Generic[A]):
    """What brings a folder and the shared store together, as plans."""

    def __init__(self, local: Local[A], rules: Rules) -> None:
        self._local = local
        self._files = local.files
        self._journal = local.journal
        self._rules = rules
        self._installer = Installer(local, rules)
        self._waiting: set[RoundLock] = set()  # what rounds of this store want
        self._busy = False  # whether a round has something to do
        self._mode = SyncMode.OFFLINE
        self._prune_due = 0.0
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
            with self._files.round_lock() as lock, self._working():
                yield from self._take(lock, options.patience)
                round = yield from self._begin(shared, wanted, options)
                candidates = yield Here(self._candidates, (round, wanted))
                self._busy = bool(candidates)
                round.total = len(candidates)
                round.advance(0)
                for batch in self._batches(candidates):
                    yield from self._installer.bring_together(round, batch)
                    round.advance(len(batch))
                yield Here(self._end, (round, wanted is None))
            report = _sorted(round.report)
            if round.stopped:
                stopped = SyncStoppedError(round.stopped)
                stopped.report = report
                raise stopped
        return report

    @property
    def mode(self) -> SyncMode:
        """How the folder stands with the shared store, by the last round."""
        return SyncMode.SYNCING if self._busy else self._mode

    def note_failure(self, error: Exception) -> None:
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

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._busy = False

    def _take(self, lock: RoundLock, patience: float = math.inf) -> Plan[None]:
        """Take the lock on rounds. The caller holds the object, so as to release it wherever this is cut off.

        Raises:
            UnavailableError: others have had it for so many seconds.

        """
        delay = _LOCK_SECONDS
        expires = time.monotonic() + patience
        self._waiting.add(lock)
        try:
            while not (yield Here(lock.take)):
                if time.monotonic() >= expires:
                    raise UnavailableError("another round in the folder goes on")
                yield Pause(random.uniform(delay / 2, delay))
                delay = min(1.5 * delay, _LONGEST_LOCK_SECONDS)
        finally:
            self._waiting.discard(lock)

    @property
    def gap(self) -> float:
        """For so many seconds whoever makes round after round leaves the lock to others."""
        return 2 * _LONGEST_LOCK_SECONDS if self._waiting else _LOCK_SECONDS

    def _begin(self, shared: Shared[A], wanted: list[str] | None, options: SyncOptions) -> Plan[Round[A]]:
        """Find out what is in the shared store, and that it is the one that the bases are of."""
        yield Here(self._local.settle, (wanted,))
        remote: Remote | None = yield Here(self._journal.read_remote)
        try:
            index = yield from self._index(shared, wanted)
        except StoreResetError:
            has_adopted = remote is not None and remote.incarnation != shared.incarnation  # another process
            if not options.adopt and not has_adopted:
                raise
            shared = yield Connect(anew=True)
            index = yield from self._index(shared, wanted)
        forgotten: Collection[str] = ()
        if remote is not None and (reset := _reset(remote, shared, index)):
            if not options.adopt:
                raise StoreResetError(reset)
            if wanted is not None:
                raise ValueError("adopt takes all sessions: sync without ids")
            shared = yield Connect(anew=True)  # that went back in time is known to the Redis store, too
            index = yield from self._index(shared, wanted)
            forgotten = self._not_common(shared, remote, index)
            if options.dry_run:
                return Round(shared, options, remote, index, forgotten)
            yield Here(self._journal.forget_bases, (self._journal.rows.keys() - forgotten,))
            remote = None
        if remote is None:
            remote = Remote(shared.incarnation, shared.name, {}, None)
            if shared.incarnation:
                yield Here(self._journal.note, (Notes(remote=remote),))
        if self._mode is SyncMode.OFFLINE:
            self._mode = SyncMode.ONLINE  # it is reached, whatever comes of it
        return Round(shared, options, reached(remote, index.revisions), index)

    def _index(self, shared: Shared[A], wanted: list[str] | None) -> Plan[Index]:
        index: Index
        if wanted is not None:
            index = yield There(shared.glance, (wanted,))
            return index
        read = yield There(shared.index)
        index = yield Here(Index.of, read)
        # An index can be evicted while its sessions are there: each one's own key says whether it is gone.
        missing = yield Here(self._missing, (index,))
        for at in range(0, len(missing), 1000):
            found = yield There(shared.glance, (missing[at : at + 1000],))
            index.sessions.update(found.sessions)
        return index

    def _missing(self, index: Index) -> list[str]:
        return [id for id, row in self._journal.rows.items() if row.base_digest and id not in index.sessions]

    def _not_common(self, shared: Shared[A], remote: Remote, index: Index) -> set[str]:
        """Return the sessions of which a store that was wiped, or went back in time, has not what was common."""
        rows = self._journal.rows
        if remote.incarnation != shared.incarnation:
            return {*rows, *self._journal.seen, *index.sessions}
        sessions = index.sessions
        return {id for id, row in rows.items() if id not in sessions or not row.has_revision(*sessions[id][:2])}

    def _candidates(self, round: Round[A], wanted: list[str] | None) -> list[str]:
        """Return the sessions of which something has changed, without those that the brake holds."""
        signatures = self._local.scan(wanted)
        rows, sessions = self._journal.rows, round.index.sessions
        candidates, gone_here, gone_there = [], [], []
        known = signatures.keys() | rows.keys() | sessions.keys() | self._journal.removals.keys()
        for id in known if wanted is None else wanted:
            row = _UNKNOWN if id in round.forgotten else rows.get(id, _UNKNOWN)
            listed, signature = sessions.get(id), signatures.get(id)
            same_there = listed is not None and row.has_revision(listed.revision, listed.origin)
            if same_there and row.is_same_there and not (row.has_pending or row.reason or round.options.verify):
                seen = self._journal.seen.get(id)
                if signature and self._local.is_fresh(id, signature) and seen and seen.digest == row.base_digest:
                    continue
            candidates.append(id)
            if same_there and signature is None and not self._local.is_deleted(id):
                gone_here.append(id)
            elif row.base_digest and signature is not None and listed is None:
                gone_there.append(id)
        if gone_here and (misplaced := {*gone_here} & self._local.misplaced()):  # a renamed file is no deletion
            gone_here = [id for id in gone_here if id not in misplaced]
            candidates = [id for id in candidates if id not in misplaced]
        if not round.options.deletions and not round.options.dry_run:
            there, here = (sessions, signatures) if wanted is None else (rows, self._journal.seen)
            held_here = self._held(gone_here, len(there))
            held_there = self._held(self._untouched(gone_there), len(here))
            self._local.look(held_here)
            self._journal.note(Notes(rows={id: rows[id]._replace(there_revision=0) for id in held_there}))
            round.stopped = len(held_here) + len(held_there)
            candidates = [id for id in candidates if id not in held_here and id not in held_there]
        return sorted(candidates)

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

    def _end(self, round: Round[A], whole: bool) -> None:
        if round.report.kept or (whole and time.monotonic() > self._prune_due):
            self._files.copies.prune(self._rules.keep_days)
            self._prune_due = time.monotonic() + _PRUNE_SECONDS
        if not round.report.failed and not round.options.dry_run and not round.stopped:
            self.last_sync = time.time()
        if whole and round.shared.incarnation and not round.options.dry_run:
            self._journal.note(Notes(remote=round.remote._replace(last_sync=self.last_sync)))

    # Conflicts

    def conflict(self, id: str) -> Plan[Conflict[A] | None]:
        """Return what a session's conflict is about; None: it has none.

        Raises:
            NotFoundError: there is no such session.

        """
        check_id(id)
        shared: Shared[A] = yield Connect()
        with self._files.round_lock() as lock:
            yield from self._take(lock)
            round = yield from self._begin(shared, [id], SyncOptions(dry_run=True))
            items = yield from self._installer.read(round, [id], round.index.sessions, whole=True)
            _raise_failure(round)
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
        check_id(id)
        shared: Shared[A] = yield Connect()
        with self._files.round_lock() as lock:
            yield from self._take(lock)
            for attempt in range(ATTEMPTS):
                if attempt:
                    yield Pause(random.uniform(0, 0.005 * 2**attempt))
                round = yield from self._begin(shared, [id], SyncOptions())
                items = yield from self._installer.read(round, [id], round.index.sessions, whole=True)
                _raise_failure(round)
                item = self._resolved(items[0], keep)
                if isinstance(item.there, Unreadable) and item.step.write_there:
                    try:
                        item = yield from self._clear_there(round, item)
                    except ConflictError:  # it has changed meanwhile, and can be read perhaps
                        continue
                again = yield from self._installer.apply(round, [item])
                _raise_failure(round)
                if not again:
                    yield Here(self._end, (round, False))
                    return
            raise ConflictError(id, 0, 0, reason="it is written all the time")

    def _clear_there(self, round: Round[A], item: Item[A]) -> Plan[Item[A]]:
        """Delete what can't be read in the shared store.

        Nothing is common any more from here on: else the session, if this is cut off, were taken for deleted there.
        """
        record = Record.of(None, None, item.record.row)
        yield Here(self._journal.note, (Notes({item.id: record}),))
        yield There(round.shared.clear, (item.id, 0 if item.mark is None else item.mark.revision))
        return item._replace(record=record, there=None, mark=None)

    def _resolved(self, item: Item[A], keep: Literal["local", "remote"] | A) -> Item[A]:
        """Return a session with the step that resolves it."""
        for side in (item.here, item.there):
            if isinstance(side, Unreadable) and _is_foreign(side.error):
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
        if item.step.state is not SyncState.CONFLICT and _is_cut_off(item):
            return item  # it was resolved so, and what came of it is yet to be brought here
        step = forced(item.record.base, here, there, keep, removed=item.removed, merging=self._rules.merging)
        return item._replace(step=step)


_UNKNOWN = Row()


def _reset(remote: Remote, shared: Shared[A], index: Index) -> str:
    """Say in which way this is not the store that the bases are of; "": it is."""
    if remote.namespace != shared.name:
        return (
            f"the folder was in step with namespace {remote.namespace!r}, and this is {shared.name!r}: "
            "name the other one, or adopt this one"
        )
    if not shared.incarnation:
        return (
            f"there is no namespace {shared.name!r}: it is another server than before, or it was wiped; then adopt it"
        )
    if remote.incarnation != shared.incarnation:
        return (
            f"namespace {shared.name!r} was wiped, or this is another server than before: name that one, or adopt this"
        )
    for number, revision in index.revisions.items():
        if revision < remote.revisions.get(number, 0):
            return f"the shared store went back in time, to revision {revision} of partition {number}: adopt it"
    return ""


def _is_foreign(error: StorageError) -> bool:
    """Whether what can't be read is of another version of the schema, or another session: it is never overwritten."""
    return isinstance(error, VersionIncompatibleError) or (
        isinstance(error, CorruptSessionError) and error.field == "id"
    )


def _is_cut_off(item: Item[A]) -> bool:
    """Whether what is common is known from what was sent alone: the reply was not waited for."""
    base = item.record.base
    return base is not None and not base.revision


def _whole(item: Item[A], version: Side[A]) -> Step[A]:
    """Return the step that makes a session this version on both sides."""
    write_here = not isinstance(item.here, Side) or item.here.digest != version.digest
    write_there = not isinstance(item.there, Side) or item.there.digest != version.digest
    sides = sides_of(item.here, item.there)
    return Step(SyncState.LOCAL_AHEAD, Act.INSTALL, version, write_here, write_there, sides, reason="resolved")


def _raise_failure(round: Round[A]) -> None:
    for _, error in round.report.failed:
        raise error


def _sorted(report: SyncReport) -> SyncReport:
    for ids in (report.uploaded, report.downloaded, report.merged, report.deleted, report.revived, report.conflicts):
        ids.sort()
    report.failed.sort(key=lambda failure: failure[0])
    return report

"""How what follows is done to sessions, in batches, so that it can be cut off anywhere.

A version is installed in this order: what is intended is noted; it is written there, bound to the revision that was
seen, then here, bound to the bytes that were seen; it is noted as common. Wherever that is cut off, the next round
distinguishes its own half-done step from another's edit.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Generic, Literal, NamedTuple, TypeVar, cast

import msgspec

from ...errors import (
    ConflictError,
    NotFoundError,
    OutcomeUnknownError,
    PermissionDeniedError,
    StorageError,
    StoreResetError,
    UnavailableError,
)
from ...model.asset import SessionAsset
from ...model.meta import SyncState
from ...protocol.index import encode_meta
from ...protocol.reads import Mark
from .files import Files, Moved, Replacement
from .journal import Notes, Record, Remote, Row
from .local import Local, arrived
from .planner import (
    SAME,
    Act,
    Base,
    Pending,
    Side,
    Step,
    Unreadable,
    VersionHere,
    VersionThere,
    caught_up,
    lacking_turns,
    plan,
    sent_turns,
)
from .reading import Signature, file_digest
from .results import SyncReport
from .shared import Index, Listed, Shared, Version
from .steps import Each, Here, Pause, Plan, RedisPlan, There

__all__ = ["ATTEMPTS", "Installer", "Item", "Progress", "Round", "Rules", "SyncOptions", "reached"]

A = TypeVar("A", bound=SessionAsset)
Progress = Callable[[int, int], object]

_log = logging.getLogger("orcs_redis")
ATTEMPTS = 10
"""So often a session is planned anew that others write all the time."""


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
    patience: float = math.inf  # seconds to wait for another process' round


_NOTHING_KNOWN: Final = Record(Row(), None, None)


class Item(NamedTuple, Generic[A]):
    """A session as it was read on both sides, and what follows."""

    id: str
    record: Record  # with the base that what was sent has become
    here: VersionHere[A]
    data: bytes | None  # of the file
    there: VersionThere[A]
    mark: Mark | None  # of the version there
    removed: Collection[str]
    step: Step[A]

    @property
    def version(self) -> Side[A]:
        """What is installed."""
        return cast(Side[A], self.step.version)

    @property
    def expected(self) -> bytes | None:
        """The digest of the file that is to be replaced."""
        return None if self.data is None else file_digest(self.data)


@dataclass
class Round(Generic[A]):
    """What a round works with, and what it has come to."""

    shared: Shared[A]
    options: SyncOptions
    remote: Remote
    index: Index
    forgotten: Collection[str] = ()  # sessions whose bases a dry run takes for forgotten, as adopting would
    report: SyncReport = field(default_factory=SyncReport)
    stopped: int = 0  # deletions that the brake has prevented
    total: int = 0
    done: int = 0
    fatal: StorageError | None = None

    def advance(self, count: int) -> None:
        """Report that so many more sessions are done."""
        self.done += count
        if self.options.progress is not None:
            self.options.progress(self.done, self.total)

    def note_revisions(self, items: Sequence[Item[A]]) -> Remote | None:
        """Take over which revisions the store has reached by what was written; return what is to be noted."""
        revisions: dict[int, int] = {}
        for item in items:
            if item.mark is not None:
                number = self.shared.partition_of(item.id)
                revisions[number] = max(item.mark.revision, revisions.get(number, 0))
        self.remote = reached(self.remote, revisions)._replace(incarnation=self.shared.incarnation)
        return self.remote if self.remote.incarnation else None

    def fail(self, id: str, error: StorageError) -> None:
        """Note that a session failed."""
        self.report.failed.append((id, error))

    def fail_there(self, id: str, error: StorageError) -> None:
        """Note that a session failed in the shared store, and with it perhaps the round."""
        self.fail(id, error)
        if isinstance(error, (UnavailableError, StoreResetError)):
            self.fatal = error


class Installer(Generic[A]):
    """Reads sessions on both sides, and does what follows. The only writer of bases."""

    def __init__(self, local: Local[A], rules: Rules) -> None:
        self._local = local
        self._files: Files = local.files
        self._journal = local.journal
        self._rules = rules
        self._denied = False

    def bring_together(self, round: Round[A], ids: Sequence[str]) -> Plan[None]:
        """Read sessions on both sides, do what follows, and again those that were changed meanwhile."""
        sessions = round.index.sessions
        for attempt in range(ATTEMPTS):
            if attempt:
                yield Pause(random.uniform(0, 0.005 * 2**attempt))
                sessions = (yield There(round.shared.glance, (ids,))).sessions
            items = yield from self.read(round, ids, sessions)
            ids = yield from self.apply(round, items)
            if round.fatal is not None:
                raise round.fatal
            if not ids:
                return
        for id in ids:
            round.fail(id, ConflictError(id, 0, 0, reason="it is written all the time"))

    def read(
        self, round: Round[A], ids: Sequence[str], sessions: Mapping[str, Listed], *, whole: bool = False
    ) -> Plan[list[Item[A]]]:
        """Read sessions on both sides, there only where it is needed or with `whole`, and plan what follows."""
        found = yield Here(self._read_here, (ids, round.forgotten))
        wanted = []
        for id, (record, here, _, removed) in found.items():
            listed = sessions.get(id)
            if listed is None:
                continue
            base = record.base
            same = base is not None and record.row.has_revision(listed.revision, listed.origin)
            is_stale = isinstance(here, Side) and base and lacking_turns(base.parts, here, removed)
            vanished = here is None and not self._local.is_deleted(id)  # what is there is kept before it is deleted
            if whole or not same or is_stale or vanished:
                wanted.append(id)
        versions = yield Each(round.shared.read, wanted)
        contents: dict[str, Version[A] | None] = {}
        for id, version in zip(wanted, versions, strict=True):
            if isinstance(version, StorageError):
                round.fail_there(id, version)
                if round.fatal is not None:
                    raise round.fatal
                del found[id]
            else:
                contents[id] = version
        items: list[Item[A]] = yield Here(self._plan, (found, contents, sessions))
        return items

    def _read_here(
        self, ids: Sequence[str], forgotten: Collection[str]
    ) -> dict[str, tuple[Record, VersionHere[A], bytes | None, Collection[str]]]:
        """Read files, and then what is known: what was removed is noted before the file shows it."""
        versions = self._local.look(ids)
        self._journal.refresh()
        records = self._journal.records(ids)
        found: dict[str, tuple[Record, VersionHere[A], bytes | None, Collection[str]]] = {}
        for id, version in versions.items():
            record = records.get(id, _NOTHING_KNOWN)
            if id in forgotten:
                found[id] = _NOTHING_KNOWN, version.side, version.data, frozenset()
                continue
            if isinstance(version.side, Side) and (base := arrived(record, version.side)) is not None:
                record = Record.of(base, None, record.row)
            removal = self._journal.removals.get(id)
            found[id] = record, version.side, version.data, frozenset() if removal is None else removal.turns
        return found

    def _plan(
        self,
        found: Mapping[str, tuple[Record, VersionHere[A], bytes | None, Collection[str]]],
        contents: Mapping[str, Version[A] | None],
        sessions: Mapping[str, Listed],
    ) -> list[Item[A]]:
        items = []
        for id, (record, here, data, removed) in found.items():
            there: VersionThere[A] = None
            mark = None
            base = record.base
            if id in contents:
                if (version := contents[id]) is not None:
                    there = version.found if isinstance(version.found, Unreadable) else Side.of(version.found)
                    mark = Mark(version.revision, version.operation)
                base = caught_up(base, record.pending, there, revision=0 if mark is None else mark.revision)
            elif id in sessions and base is not None:
                there, mark = SAME, Mark(base.revision, base.operation)
            step = plan(base, here, there, removed=removed, merging=self._rules.merging, prefer=self._rules.prefer)
            record = Record.of(base, record.pending, _observed(record.row, mark, sessions.get(id), here, there, step))
            items.append(Item(id, record, here, data, there, mark, removed, step))
        return items

    # Doing it

    def apply(self, round: Round[A], items: Sequence[Item[A]]) -> Plan[list[str]]:
        """Do what follows for sessions; return those that have to be planned anew, since they have changed."""
        if round.options.dry_run:
            known = [item for item in items if item.id not in round.forgotten]
            same = {item.id: _common(item) for item in known if item.step.act in (Act.ADOPT, Act.FORGET)}
            yield Here(self._journal.note, (Notes(same, {i.id: i.record.row for i in known if i.id not in same}),))
            for item in items:
                _report(round.report, item)
            return []
        items = yield Here(self._prepare, (round, items))
        there = [item for item in items if item.step.write_there or item.step.act is Act.DELETE_THERE]
        answers = yield Each(lambda item: self._write_there(round.shared, item), there)
        again, done = [], []
        marks = {}
        refused = {}  # it has certainly not arrived, whatever others have brought
        for item, answer in zip(there, answers, strict=True):
            if isinstance(answer, StorageError) and not isinstance(answer, OutcomeUnknownError):
                refused[item.id] = Record.of(item.record.base, None, item.record.row)
            if isinstance(answer, (ConflictError, NotFoundError)):
                again.append(item.id)
            elif isinstance(answer, StorageError):
                self._fail_write(round, item.id, answer)
            else:
                marks[item.id] = answer
        if refused:
            yield Here(self._journal.note, (Notes(refused),))
        for item in items:
            if item not in there:
                done.append(item)
            elif item.id in marks:
                done.append(item._replace(mark=marks[item.id]))
        again += yield Here(self._finish, (round, done))
        return again

    def _fail_write(self, round: Round[A], id: str, error: StorageError) -> None:
        round.fail_there(id, error)
        if isinstance(error, PermissionDeniedError) and not self._denied:
            self._denied = True
            _log.warning("sessions can't be sent to the shared store: %s", error)

    def _prepare(self, round: Round[A], items: Sequence[Item[A]]) -> list[Item[A]]:
        """Note what is intended, and keep what will be lost; return what can be done."""
        ready, notes = [], {}
        for item in items:
            record = item.record
            if item.step.act is Act.INSTALL:
                record = Record.of(record.base, _intention(item), record.row)
            if item.step.state is not None:
                notes[item.id] = record
            ready.append(item._replace(record=record))
        self._journal.note(Notes(notes))
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

    def _keep(self, item: Item[A]) -> Iterator[Path]:
        why = item.step.reason or _why(item.step)
        for side in item.step.keep:
            if side == "here" and item.data is not None:
                yield self._files.copies.keep(item.id, side, item.data, why)
            elif side == "there" and isinstance(item.there, Side):
                yield self._files.copies.keep(item.id, side, item.there.asset.to_json().encode(), why)

    @staticmethod
    def _write_there(shared: Shared[A], item: Item[A]) -> RedisPlan[Mark | None]:
        revision = 0 if item.mark is None else item.mark.revision
        if item.step.act is Act.DELETE_THERE:
            yield from shared.remove(item.id, revision)
            return None
        return (yield from shared.put(item.version.asset, revision))

    def _finish(self, round: Round[A], items: Sequence[Item[A]]) -> list[str]:
        """Write what is to be written here, and note what is common; return what has changed meanwhile."""
        sent = {
            item.id: Record.of(item.record.base, _arrived_there(item), item.record.row)
            for item in items
            if item.step.write_here and item.step.write_there
        }
        self._journal.note(Notes(sent))
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
        back = {item.id: _lacking(item) for item in items}
        self._journal.note(Notes(notes, remote=round.note_revisions(items), back=back))
        return again

    def _write_here(self, items: Sequence[Item[A]]) -> dict[str, Signature | Moved | StorageError]:
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

    def _delete_here(self, item: Item[A]) -> list[Path]:
        path = self._files.remove(item.id, item.expected or b"", keep=item.step.reason or _why(item.step))
        self._journal.note_seen({item.id: None})
        return [path] if path else []


def reached(remote: Remote, revisions: Mapping[int, int]) -> Remote:
    """Return what is known of a shared store that has reached these revisions."""
    reached = {number: max(revision, remote.revisions.get(number, 0)) for number, revision in revisions.items()}
    return remote._replace(revisions={**remote.revisions, **reached})


def _observed(
    row: Row, mark: Mark | None, listed: Listed | None, here: VersionHere[A], there: VersionThere[A], step: Step[A]
) -> Row:
    """Return what is known of a session, with what was observed of the shared store."""
    meta = b""
    if here is None and mark is not None and listed is not None:  # the list shows what is there
        meta = listed.meta
        if not meta:
            meta = encode_meta(there.asset, mark.revision) if isinstance(there, Side) else row.there_meta
    row = row._replace(there_revision=0, there_origin=b"", there_meta=meta, reason=step.reason, parts=step.parts)
    return row if mark is None else row._replace(there_revision=mark.revision or -1, there_origin=mark.operation_id[:8])


def _why(step: Step[A]) -> str:
    """Return why the loser of a step is kept."""
    if step.act is Act.DELETE_HERE:
        return "deleted in the shared store"
    if step.write_here and step.write_there:
        return "lost in a merge"
    return "replaced by the shared store's version" if step.write_here else "replaced by the version here"


def _lacking(item: Item[A]) -> set[str]:
    """Return the turns that were removed here, and that the file showed no longer."""
    turns = item.here.asset.history.turns if isinstance(item.here, Side) else ()
    return set(item.removed).difference(turn.id for turn in turns)


def _intention(item: Item[A]) -> Pending | None:
    """Return what is to be noted before a version is installed."""
    step, mark = item.step, item.mark
    if not step.write_there:
        return None if mark is None else Pending(item.version.digest, mark.revision, mark.operation_id)
    if not isinstance(item.here, Side):
        return None  # what arrives there is pulled
    there, over = (item.there.parts, item.there.digest) if isinstance(item.there, Side) else (None, b"")
    base = None if item.record.base is None else item.record.base.parts
    sent = sent_turns(item.version.parts, base, there)
    return Pending(item.version.digest, mine=item.here.parts, sent=sent, over=over)


def _arrived_there(item: Item[A]) -> Pending | None:
    """Return what is noted once a version is there, and not here yet."""
    pending = item.record.pending or Pending(item.version.digest)
    mark = cast(Mark, item.mark)
    return msgspec.structs.replace(pending, revision=mark.revision, operation=mark.operation_id)


def _common(item: Item[A]) -> Record | None:
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


def _report(report: SyncReport, item: Item[A]) -> None:
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

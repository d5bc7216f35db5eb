"""What a user does in the folder: read, save, delete, list. Blocking, and never over the network."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec

from ...errors import (
    ConflictError,
    CorruptSessionError,
    NotFoundError,
    OutcomeUnknownError,
    StorageError,
    UnavailableError,
)
from ...interrupts import raise_interruption
from ...model.asset import SessionAsset, to_datetime
from ...model.filters import Filters
from ...model.ids import check_id
from ...model.labels import labels_of
from ...model.merge import merge
from ...model.meta import SessionMeta, SyncState
from ...model.parts import Digests, digests
from ...model.sections import ConversationTurn
from ...protocol.index import decode_rows
from ..disk import decode_session
from .files import Files, Moved, Replacement
from .journal import FileMeta, Journal, Notes, Record, Row, Seen
from .planner import Base, Side, Standing, Unreadable, standing
from .reading import Found, Signature, file_digest

__all__ = ["Ancestor", "FileVersion", "Local", "Saved", "ancestor_of", "set_ancestor"]

A = TypeVar("A", bound=SessionAsset)
_RACY_NS = 2 * 10**9  # a file written so shortly before it was read may have been written again in the same tick
_ATTEMPTS = 100  # at a file that other programs write all the time


class Ancestor(NamedTuple):
    """What an asset was when it was loaded from its file or last saved to it."""

    revision: int  # the file's modification time in ns
    turns: tuple[str, ...]  # ids
    digest: bytes  # of the file; b"": the content is known
    data: bytes | None  # the file's content; None: only digests are known, since the asset was pickled
    parts: Digests | None = None
    kind: type[SessionAsset] = SessionAsset  # as which the content is decoded

    def __deepcopy__(self, memo: dict[int, Any]) -> Ancestor:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if self.data is None:
            return Ancestor, (*self,)
        parts = digests(self.kind.from_json(self.data))
        return Ancestor, (self.revision, self.turns, file_digest(self.data), None, parts, self.kind)

    def is_in(self, data: bytes) -> bool:
        """Whether this is a file's content."""
        return file_digest(data) == self.digest if self.data is None else data == self.data


def ancestor_of(asset: SessionAsset, folder: Path) -> Ancestor | None:
    """Return what an asset was when it was loaded from a folder or last saved to it, if it was."""
    found: Ancestor | None = vars(asset).get("_ancestors", {}).get((str(folder), asset.id))
    return found


def set_ancestor(asset: SessionAsset, folder: Path, ancestor: Ancestor) -> None:
    """Keep with an asset what its file has."""
    vars(asset)["_ancestors"] = {**vars(asset).get("_ancestors", {}), (str(folder), asset.id): ancestor}


class FileVersion(NamedTuple, Generic[A]):
    """A session's file as it was read: `side` None: there is none."""

    side: Side[A] | Unreadable | None
    data: bytes | None
    signature: Signature | None


class Saved(NamedTuple, Generic[A]):
    """What a save came to."""

    revision: int
    data: bytes  # the file's content
    merged: A | None  # what was stored, if that is not just what was saved


class Local(Generic[A]):
    """A folder of sessions with its journal."""

    def __init__(self, files: Files, journal: Journal, asset_type: type[A]) -> None:
        self.files = files
        self.journal = journal
        self._type = asset_type
        self._written: dict[str, Signature | None] = {}  # since its file was last looked at; None: it was deleted
        self._standings: tuple[tuple[int, int], dict[str, Standing]] = (-1, -1), {}
        self._listed: tuple[tuple[int, int, dict[str, Signature]], list[SessionMeta]] = (-1, -1, {}), []
        self._writes = 0

    # Files

    def decode(self, id: str, data: bytes) -> A:
        """Decode a session's file.

        Raises:
            CorruptSessionError: it can't be decoded, or another session is in it.
            VersionIncompatibleError: it is of another version of the schema.

        """
        return decode_session(self._type, id, data)

    def load(self, id: str) -> tuple[A, Ancestor]:
        """Read a session.

        Raises:
            NotFoundError: there is no such session.
            UnavailableError: it is in the shared store only.

        """
        found = self.files.read(check_id(id))
        if found is None:
            raise self._absence(id)
        asset = self.decode(id, found.data)
        return asset, self.ancestor(found.signature.modified_ns, [turn.id for turn in asset.history.turns], found.data)

    def ancestor(self, revision: int, turns: Iterable[str], data: bytes) -> Ancestor:
        """Return what an asset is, of which this is the file."""
        return Ancestor(revision, tuple(turns), b"", data, None, self._type)

    def exists(self, id: str) -> bool:
        """Return whether there is such a session, here or in the shared store as far as it is known."""
        return self.files.signature(check_id(id)) is not None or self.is_known_there(id)

    def is_known_there(self, id: str) -> bool:
        """Return whether a session was in the shared store when last observed, and was not deleted here."""
        self.journal.refresh()
        row = self.journal.rows.get(id)
        if row is None or not row.there_revision:
            return False
        return not (row.base_digest is not None and row.is_same_there)

    def save(self, id: str, data: bytes, turns: Sequence[str], known: Ancestor | None, *, overwrite: bool) -> Saved[A]:
        """Store a session's JSON; the changes since `known`, if its file has moved on.

        Args:
            id: the session's.
            data: its JSON.
            turns: the ids of its turns.
            known: what it was made from; None: it is new, and overwrites whatever is there.
            overwrite: overwrite whatever is there.

        Raises:
            ConflictError: the file was deleted, or has changed in a part that was changed in the asset, too.
            CorruptSessionError, VersionIncompatibleError: what is there can't be read.

        """
        with self.files.lock(id):
            for _ in range(_ATTEMPTS):
                found = self.files.read(id)
                try:
                    return self._save(id, data, turns, known, found, overwrite)
                except Moved:  # another program has written it in this moment
                    continue
        raise self._contended(id)

    def _save(
        self, id: str, data: bytes, turns: Sequence[str], known: Ancestor | None, found: Found | None, overwrite: bool
    ) -> Saved[A]:
        if found is None:
            if known is not None and not overwrite:
                raise ConflictError(id, known.revision, 0)
            revision = self._replace(id, data, None)
            if (removal := self.journal.removals.get(id)) is not None and removal.deleted:
                self.journal.note_removal(id, ())
            return Saved(revision, data, None)
        merged = None
        if known is not None and known.is_in(found.data):
            removed = set(known.turns).difference(turns)
        elif known is None or overwrite:
            removed = self._give_way(id, found.data, data, turns, overwrite)
        else:
            merged = self._merge(id, data, known, found)
            removed = set(known.turns).difference(turns)
            data = merged.to_json().encode()
        if data == found.data:
            return Saved(found.signature.modified_ns, data, merged)
        with self._removing(id, removed):
            return Saved(self._replace(id, data, found), data, merged)

    @contextmanager
    def _removing(self, id: str, turns: Collection[str], *, deleted: bool = False) -> Iterator[None]:
        """Note what is about to be removed; what could not be is no removal."""
        if turns or deleted:
            self.journal.refresh()
        before = self.journal.removals.get(id)
        if turns or deleted:
            self.journal.note_removal(id, turns, deleted=deleted)
        try:
            yield
        except OutcomeUnknownError:
            raise
        except (Moved, StorageError):
            if turns or deleted:
                self.journal.set_removal(id, before)
            raise

    def _merge(self, id: str, data: bytes, known: Ancestor, found: Found) -> A:
        parts = known.parts if known.data is None else digests(self.decode(id, known.data))
        parts = parts or Digests()
        mine, theirs = self.decode(id, data), self.decode(id, found.data)
        result = merge(parts, mine, theirs)
        if result.conflicts:
            raise ConflictError(id, known.revision, found.signature.modified_ns, result.conflicts)
        return result.asset

    def _give_way(self, id: str, old: bytes, new: bytes, turns: Sequence[str], overwrite: bool) -> set[str]:
        """Keep a file that is about to be overwritten, if anything of it is lost; return the turns that are."""
        try:
            current = self.decode(id, old)
        except StorageError as error:
            raise_interruption(error)
            if not overwrite or (isinstance(error, CorruptSessionError) and error.field == "id"):
                raise
            self.files.copies.keep(id, "here", old, "it could not be read, and was overwritten")
            return set()
        if Side.of(current).digest != Side.of(self.decode(id, new)).digest:
            self.files.copies.keep(id, "here", old, "overwritten by a save")
        return {turn.id for turn in current.history.turns}.difference(turns)

    def _replace(self, id: str, data: bytes, expected: Found | None) -> int:
        signature = self.files.replace_locked(Replacement(id, data, expected))
        self._written[id] = signature
        self._writes += 1
        return signature.modified_ns

    def save_exactly(self, id: str, data: bytes, turns: Sequence[str], known: Ancestor) -> int | None:
        """Store a session's JSON over the file that it was made from; None: that has moved on."""
        with self.files.lock(id):
            found = self.files.read(id)
            if found is None or not known.is_in(found.data):
                return None
            if data == found.data:
                return known.revision
            try:
                with self._removing(id, set(known.turns).difference(turns)):
                    return self._replace(id, data, found)
            except Moved:
                return None

    def append(self, id: str, turns: Sequence[ConversationTurn]) -> int:
        """Add turns at the end of a history."""
        if not turns:
            raise ValueError("append needs a turn")
        with self.files.lock(check_id(id)):
            for attempt in range(_ATTEMPTS):
                found = self.files.read(id)
                if found is None:
                    raise self._absence(id)
                asset = self.decode(id, found.data)
                # A program that wrote the file in that moment may have read what was there for an instant.
                known = {turn.id for turn in asset.history.turns} if attempt else set()
                for turn in turns:
                    if not turn.id or turn.id not in known:
                        asset.add_turn(turn)
                try:
                    return self._replace(id, asset.to_json().encode(), found)
                except Moved:  # another program has written it in this moment
                    continue
        raise self._contended(id)

    @staticmethod
    def _contended(id: str) -> StorageError:
        return UnavailableError(f"the file of session {id} is written by another program all the time")

    def delete(self, id: str) -> None:
        """Delete a session, here and with the next sync there.

        Raises:
            NotFoundError: there is no such session.

        """
        for _ in range(_ATTEMPTS):
            found = self.files.read(check_id(id))
            if found is None:
                raise self._absence(id)
            try:
                turns = {turn.id for turn in self.decode(id, found.data).history.turns}
            except StorageError as error:
                raise_interruption(error)
                turns = set()
            try:
                with self._removing(id, turns, deleted=True):  # a round may be sending it for the first time
                    self.files.remove(id, file_digest(found.data), keep=None)
            except Moved:  # another program has written it in this moment
                continue
            self._written[id] = None
            self._writes += 1
            return
        raise self._contended(id)

    def _absence(self, id: str) -> StorageError:
        if self.is_known_there(id):
            return UnavailableError(f"session {id} is in the shared store only: it comes with the next sync")
        return NotFoundError(id)

    # What is known

    def changed(self) -> list[str]:
        """Return the sessions whose files have changed since they were last looked at, or are gone."""
        return self._changed(self.scan())

    def scan(self, ids: Collection[str] | None = None) -> dict[str, Signature]:
        """Return the signatures of all files, or of some sessions', and take over what others have found in them."""
        written = dict(self._written)
        if ids is None:
            signatures = self.files.scan()
        else:
            signatures = {id: found for id in ids if (found := self.files.signature(id))}
        self.journal.refresh()
        for id in written if ids is None else written.keys() & ids:
            signature = signatures.get(id)
            if id not in self.journal.seen if signature is None else self.is_fresh(id, signature):
                self._forget_written(id, written[id])
        return signatures

    def misplaced(self) -> set[str]:
        """Return the ids of sessions that are in files of other names, since these were renamed."""
        signatures = self.scan()
        self.look(self._changed(signatures))
        seen = self.journal.seen
        unreadable = [id for id in signatures if id in seen and not seen[id].digest]
        return {inside for id in unreadable if (inside := self.files.id_inside(id)) is not None}

    def _forget_written(self, id: str, noted: Signature | None) -> None:
        """Forget that a file was written, since it was looked at after that; it may have been written once more."""
        if id in self._written and self._written.get(id) is noted:
            self._written.pop(id, None)
            self._writes += 1

    def _changed(self, signatures: Mapping[str, Signature]) -> list[str]:
        gone = [id for id in [*self.journal.seen] if id not in signatures]
        return gone + [id for id, signature in signatures.items() if not self.is_fresh(id, signature)]

    def _metas(self, signatures: Mapping[str, Signature]) -> list[SessionMeta]:
        standings = self.standings(signatures)
        metas = []
        for id, signature in signatures.items():
            seen = self.journal.seen.get(id)
            state = standings[id].state
            if seen is not None and seen.meta is not None and state is not None:
                metas.append(_listed(id, seen.meta, signature.modified_ns, state))
        for id, row in [*self.journal.rows.items()]:  # others may be adding some
            if id in signatures or not row.there_meta or (found := standings.get(id)) is None:
                continue
            if found.state is not None:
                for meta in decode_rows([(0, id.encode(), row.there_meta)]):
                    metas.append(msgspec.structs.replace(meta, sync_state=found.state))
        metas.sort(key=lambda meta: (meta.updated_at, meta.id), reverse=True)
        return metas

    def list(self, filters: Filters) -> list[SessionMeta]:
        """List the sessions here and those known in the shared store, the last updated first."""
        signatures = self.scan()
        version = self.journal.generation, self._writes, signatures
        if self._listed[0] == version:
            metas = self._listed[1]
        else:
            changed = self._changed(signatures)
            self.look(changed)
            metas = self._metas(signatures)
            if not changed:  # else it may have been read too early
                self._listed = version, metas
        return [*filter(filters.match, metas)]

    def is_fresh(self, id: str, signature: Signature) -> bool:
        """Return whether a file is certainly as it was when it was last read."""
        seen = self.journal.seen.get(id)
        return seen is not None and seen.signature == signature and seen.looked_ns >= signature.modified_ns + _RACY_NS

    def look(self, ids: Iterable[str]) -> dict[str, FileVersion[A]]:
        """Read files, and note what is found."""
        versions: dict[str, FileVersion[A]] = {}
        found: dict[str, Seen | None] = {}
        written = dict(self._written)
        for id in ids:
            looked_ns = time.time_ns()
            versions[id] = version = self._read(id)
            if id in written:
                self._forget_written(id, written[id])
            if version.signature is None:
                if id in self.journal.seen:
                    found[id] = None
            else:
                found[id] = self._seen(id, version.side, version.signature, looked_ns)
        self.journal.note_seen({id: seen for id, seen in found.items() if seen != self.journal.seen.get(id)})
        return versions

    def note_written(self, versions: Mapping[str, tuple[Signature, Side[A]]]) -> None:
        """Note what a round has written; a file of which the content is known is certainly not read too early."""
        for id, (signature, _) in versions.items():
            if id in self._written and self.files.signature(id) == signature:  # else it was written since
                self._written.pop(id)
        self.journal.note_seen(
            {
                id: Seen(signature, signature.modified_ns + _RACY_NS, side.digest, _file_meta(side.asset))
                for id, (signature, side) in versions.items()
            }
        )

    def _read(self, id: str) -> FileVersion[A]:
        found: Found | None = None
        try:
            found = self.files.read(id)
            if found is None:
                return FileVersion(None, None, None)
            return FileVersion(Side.of(self.decode(id, found.data)), found.data, found.signature)
        except StorageError as error:
            raise_interruption(error)
            if found is not None:
                return FileVersion(Unreadable(error, f"{id}.json"), found.data, found.signature)
            return FileVersion(Unreadable(error, f"{id}.json"), None, self.files.signature(id))

    def _seen(self, id: str, side: Side[A] | Unreadable | None, signature: Signature, looked_ns: int) -> Seen:
        if isinstance(side, Side):
            return Seen(signature, looked_ns, side.digest, _file_meta(side.asset))
        before = self.journal.seen.get(id)
        reason = side.reason if side is not None else ""
        return Seen(signature, looked_ns, b"", None if before is None else before.meta, reason)

    def open(self) -> None:
        """Note what a process that was killed had brought to both sides, unless another process is at it."""
        with self.files.round_lock() as lock:
            if lock.take():
                self.settle()

    def is_deleted(self, id: str) -> bool:
        """Return whether a session was deleted through the API, and is there still."""
        removal = self.journal.removals.get(id)
        return removal is not None and removal.deleted

    def conflict_reason(self, id: str) -> str:
        """Say why a session is in conflict, by what is known; "": it is not."""
        row, seen = self.journal.rows.get(id), self.journal.seen.get(id)
        found = "" if row is None else ", ".join(row.parts) or row.reason
        return found or ("" if seen is None else seen.reason)

    def settle(self, ids: Collection[str] | None = None) -> None:
        """Note as common what was being installed and is on both sides. The caller has the lock on rounds."""
        self.journal.refresh()
        rows = self.journal.rows
        pending = [id for id in ([*rows] if ids is None else ids) if id in rows and rows[id].has_pending]
        records = self.journal.records(pending)
        settled: dict[str, Record | None] = {}
        for id, version in self.look(pending).items():
            if (record := records.get(id)) is not None and isinstance(version.side, Side):
                base = arrived(record, version.side)
                if base is not None:
                    settled[id] = Record.of(base, None, record.row._replace(reason="", parts=()))
        self.journal.note(Notes(settled))

    def standings(self, signatures: Collection[str] | None = None) -> dict[str, Standing]:
        """Say how all sessions stand, by what is known: no file is read.

        Args:
            signatures: the files there are; None: those that there were when last looked.

        """
        journal = self.journal
        version = journal.generation, self._writes
        if signatures is None and self._standings[0] == version:
            return self._standings[1]
        present = {*(journal.seen if signatures is None else signatures)}
        if signatures is None:
            for id, signature in [*self._written.items()]:
                (present.discard if signature is None else present.add)(id)
        found = {id: self._standing(id, id in present) for id in present | journal.rows.keys()}
        if signatures is None:
            self._standings = version, found
        return found

    def _standing(self, id: str, present: bool) -> Standing:
        row, seen = self.journal.rows.get(id, _UNKNOWN), self.journal.seen.get(id)
        if present and id not in self._written and seen is not None and not seen.digest:
            return Standing(SyncState.CONFLICT)
        if row.reason and (present or not row.parts):  # what was deleted here collides with nothing
            return Standing(SyncState.CONFLICT)
        same = id not in self._written and seen is not None and seen.digest == row.base_digest
        return standing(
            based=row.base_digest is not None,
            here="" if not present else "same" if same else "changed",
            there="" if not row.there_revision else "same" if row.is_same_there else "changed",
        )


_UNKNOWN = Row()


def arrived(record: Record, here: Side[Any]) -> Base | None:
    """Return the new base, if the version that was being installed is on both sides."""
    pending = record.pending
    if pending is None or not pending.revision or here.digest != pending.digest:
        return None
    return Base(here.parts, here.digest, pending.revision, pending.operation)


def _file_meta(asset: SessionAsset) -> FileMeta:
    context = asset.project_context
    return FileMeta(
        context.name,
        context.root_path,
        asset.created_at_ms,
        asset.updated_at_ms,
        len(asset.history.turns),
        labels_of(asset),
    )


def _listed(id: str, meta: FileMeta, modified_ns: int, state: SyncState) -> SessionMeta:
    return SessionMeta(
        id=id,
        name=meta.name,
        created_at=to_datetime(meta.created_at_ms),
        updated_at=to_datetime(meta.updated_at_ms),
        project_path=meta.project_path,
        turn_count=meta.turn_count,
        written_at=datetime.fromtimestamp(modified_ns / 1e9, UTC),
        sync_state=state,
        revision=modified_ns,
        labels=meta.labels,
    )

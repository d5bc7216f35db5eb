"""Saving: a loaded asset's changes are applied to what is stored now; what others changed meanwhile is taken over."""

from __future__ import annotations

import contextlib
import inspect
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from ..errors import ConflictError, NotFoundError, OutcomeUnknownError, StorageError
from ..interrupts import raise_interruption
from ..model.asset import SessionAsset
from ..model.ids import check_id
from ..model.meta import Versioned
from .baseline import Baseline, baseline_of, loaded_turns, resolved, set_baseline, turn_id
from .codec import Codec, Encoded
from .groups import STAGED_TURNS, base_groups, patch_groups, place, whole_groups
from .merging import bring_up, merged
from .patches import Patch, TurnsPatch, compare
from .reads import News, ReadNews, ReadStored, Stored
from .request import Pause, Plan
from .turns import id_of
from .writer import Namespace
from .writes import Group, LeaseToken, Outdated, Write, Written, check_lease, expectation

__all__ = ["Saving", "call_change"]

A = TypeVar("A", bound=SessionAsset)
_CUT = "its turns were cut below those of the partial asset: load it again"
_MAX_SENT = 8  # saves of unknown outcome, one after the other, that an asset remembers


class Saving(Generic[A]):
    """What is done with whole assets, as plans. Bad input is refused here, before anything is sent."""

    def __init__(self, namespace: Namespace, codec: Codec[A]) -> None:
        self._namespace = namespace
        self._codec = codec

    def save(
        self, asset: A, if_revision: int | None = None, lease: LeaseToken | None = None, *, overwrite: bool = False
    ) -> Plan[int]:
        """Store an asset: its changes if it was loaded or saved before, else the whole of it."""
        if isinstance(asset, SessionAsset):  # anything else is refused by the codec
            check_id(asset.id)
            check_lease(asset.id, lease)
        expected = expectation(if_revision)
        if overwrite and expected is not None:
            raise ValueError("overwrite takes whatever is there: give it without if_revision")
        known = self._known(asset)
        if known is None or overwrite or expected not in (None, known.revision):
            return (yield from self._save_whole(asset, expected, known, lease))
        if expected is not None and not known.conflicting:
            return (yield from self._save_exactly(asset, known, lease))
        return (yield from self._save_changes(asset, known, expected, lease))

    def _known(self, asset: A) -> Baseline | None:
        """Return what is known to be stored of an asset under its id."""
        stored = baseline_of(asset, self._namespace.incarnation) if isinstance(asset, SessionAsset) else None
        return None if stored is None or stored.id != asset.id else stored

    def _save_whole(
        self, asset: A, expected: int | None, known: Baseline | None, lease: LeaseToken | None
    ) -> Plan[int]:
        new = self._codec.encode(asset, known)
        _check_whole(asset)
        objects = tuple(asset.history.turns)
        groups = [] if expected is None else [Group(b"r", (expected,))]
        if known is not None:  # of a known session updated_at_ms is not lowered; a new asset brings its own time
            groups.append(Group(b"k"))
        groups += whole_groups(asset, new)
        staged: Sequence[bytes] = ()
        if len(new.turns) < STAGED_TURNS:
            groups.append(Group(b"h", new.turns))
        else:
            staged = new.turns
        written = yield Write(self._namespace, asset.id, groups, lease=lease, staged=staged)
        self._remember(asset, new, objects, written, 0)
        return int(written.revision)

    def _save_exactly(self, asset: A, known: Baseline, lease: LeaseToken | None) -> Plan[int]:
        """Save over the revision that the asset was made from."""
        new = self._codec.encode(asset, known)
        known = resolved(known, new.fields, new.turns)
        objects = tuple(asset.history.turns)
        patch = compare(known, new)
        written = yield from self._write_patch(asset, known, new, patch, lease, exactly=True)
        self._remember(asset, new, objects, written, known.skipped)
        return int(written.revision)

    def _remember(self, asset: A, new: Encoded, objects: Sequence[Any], written: Written, skipped: int) -> None:
        before = self._known(asset)
        if before is None or before.revision < written.revision:
            set_baseline(asset, self._baseline(asset.id, new, written, skipped), objects)

    @contextlib.contextmanager
    def _noting(self, asset: A, new: Encoded) -> Iterator[None]:
        """Note with an asset what it is when it is sent, until it has another baseline, or the write was refused."""
        known, objects = self._known(asset), loaded_turns(asset, self._namespace.incarnation)
        noted = None
        if known is not None:
            sent = [*known.sent, (new.fields, new.turns)][-_MAX_SENT:]
            noted = known._replace(conflicting=True, sent=tuple(sent))
            set_baseline(asset, noted, objects)
        try:
            yield
        except OutcomeUnknownError:
            raise
        except StorageError as error:
            raise_interruption(error)
            if known is not None and self._known(asset) is noted:
                set_baseline(asset, known, objects)
            raise

    def _baseline(self, id: str, new: Encoded, written: Written, skipped: int) -> Baseline:
        incarnation = self._namespace.incarnation
        return Baseline(incarnation, id, written.revision, written.operation_id, new.fields, new.turns, skipped)

    def _save_changes(self, asset: A, known: Baseline, expected: int | None, lease: LeaseToken | None) -> Plan[int]:
        """Apply an asset's changes to what is stored now, if that is of the revision that is expected."""
        new = first = self._codec.encode(asset, known)
        known = resolved(known, new.fields, new.turns)
        work, base = asset, known
        objects = tuple(asset.history.turns)
        if known.conflicting:
            work, base = yield from self._merge(asset, known)
            if expected not in (None, base.revision):
                raise ConflictError(asset.id, known.revision, base.revision)
            new = self._codec.encode(work, base)
        while True:
            patch = compare(base, new)
            if patch.is_empty:
                return (yield from self._refresh_saved(asset, known))
            try:
                with self._noting(asset, first):
                    written = yield from self._write_patch(work, base, new, patch, lease, exactly=expected is not None)
                break
            except Outdated:
                work, base = yield from self._merge(asset, known)
                new = self._codec.encode(work, base)
            except NotFoundError:
                raise ConflictError(asset.id, known.revision, 0) from None
            except ConflictError as error:  # gone, or made anew
                raise ConflictError(asset.id, known.revision, error.actual) from None
        if work is asset and written.before == known.revision:
            self._remember(asset, new, objects, written, base.skipped)
        else:
            mine = self._baseline(asset.id, first, written, base.skipped)
            kept = 0 if patch.turns is None else len(new.turns) - len(patch.turns.pushed)
            yield from self._follow_up(asset, mine, base, objects, new, kept)
        return int(written.revision)

    def _write_patch(
        self,
        asset: A,
        base: Baseline,
        new: Encoded,
        patch: Patch,
        lease: LeaseToken | None,
        *,
        exactly: bool = False,  # only over what it was made from
    ) -> Plan[Written]:
        turns = patch.turns
        staged: Sequence[bytes] = ()
        whole: Sequence[Group] = ()
        if turns is None:
            _check_whole(asset)
            turns = TurnsPatch((0, -1), [], [])
            if len(new.turns) < STAGED_TURNS:
                whole = (Group(b"h", new.turns),)
            else:
                staged = new.turns
        conditions = [Group(b"r", (place(base),))] if exactly else base_groups(base, patch)
        groups = [*conditions, *patch_groups(asset, base, new, patch, turns), *whole]
        written: Written = yield Write(self._namespace, asset.id, groups, lease=lease, staged=staged)
        return written

    def _refresh_saved(self, asset: A, known: Baseline) -> Plan[int]:
        try:
            return (yield from self.refresh(asset))
        except NotFoundError:
            raise ConflictError(asset.id, known.revision, 0) from None

    def _merge(self, asset: A, known: Baseline) -> Plan[tuple[A, Baseline]]:
        """Return the asset with what others changed, and what is stored; ConflictError if both changed a part."""
        try:
            theirs = yield from self._latest(known, None)
        except NotFoundError:
            raise ConflictError(asset.id, known.revision, 0) from None
        result, conflicts = merged(self._codec, asset, known, theirs)
        if conflicts:
            raise ConflictError(asset.id, known.revision, theirs.revision, conflicts)
        return result, theirs

    def refresh(self, asset: A) -> Plan[int]:
        """Bring an asset up to what is stored, in place."""
        if not isinstance(asset, SessionAsset):
            raise TypeError(f"expected a SessionAsset, got {type(asset).__name__}")
        known = self._known(asset)
        if known is None:
            raise ValueError("the asset was neither loaded from this namespace nor saved to it")
        news = yield ReadNews(self._namespace, known)
        if news.revision == known.revision and not (news.reshaped or known.conflicting):
            return known.revision
        theirs = yield from self._latest(known, news)
        if self._known(asset) is not known:  # another task was quicker
            return (yield from self.refresh(asset))
        if known.digested:
            mine = self._codec.encode(asset, known)
            known = resolved(known, mine.fields, mine.turns)
        bring_up(self._codec, asset, known, theirs)
        return theirs.revision

    def _latest(self, known: Baseline, news: News | None) -> Plan[Baseline]:
        """Return what is stored now, having read only what is new.

        Raises:
            NotFoundError: the session is gone.
            ConflictError: it was deleted and made anew, or cut below what was loaded.

        """
        if news is None:
            news = yield ReadNews(self._namespace, known)
        if news.born > known.revision:
            raise ConflictError(known.id, known.revision, news.revision)
        if known.conflicting or known.digested or news.reshaped:
            return (yield from self._read_again(known))
        fields = {**known.fields, "updated_at_ms": news.updated_at}
        turns = [*known.turns, *news.pushed]
        if not news.parts_changed:
            return known._replace(revision=news.revision, operation_id=news.operation_id, fields=fields, turns=turns)
        stored = yield ReadStored(self._namespace, self._codec, known.id, known.turn_count)
        if stored.reshaped > known.revision or stored.revision < news.revision:
            return (yield from self._read_again(known))
        return _as_baseline(known, stored, [*known.turns, *stored.turns], known.skipped)

    def _read_again(self, known: Baseline) -> Plan[Baseline]:
        stored, skipped = yield from self._read_from_place(known)
        if stored.born > known.revision:
            raise ConflictError(known.id, known.revision, stored.revision)
        if skipped is None:
            raise ConflictError(known.id, known.revision, stored.revision, reason=_CUT)
        return _as_baseline(known, stored, stored.turns[skipped - stored.start :], skipped)

    def _read_from_place(self, known: Baseline) -> Plan[tuple[Stored, int | None]]:
        """Read a session, at least from where the known turns begin, and where that is; None if they are gone.

        Nearly always nothing before them was removed; then no turn before them is read.
        """
        stored = yield ReadStored(self._namespace, self._codec, known.id, known.skipped)
        reshaped = stored.reshaped > known.revision or stored.revision <= known.revision
        if not (known.skipped and known.turns and reshaped) or _begins_alike(known, stored):
            return stored, stored.start
        stored = yield ReadStored(self._namespace, self._codec, known.id, 0)
        return stored, _find(known, stored)

    def _follow_up(
        self, asset: A, mine: Baseline, base: Baseline, objects: Sequence[Any], new: Encoded, kept: int
    ) -> Plan[None]:
        """After a save that met others' changes: bring the asset up to what is stored.

        Args:
            asset: was saved.
            mine: what it had when it was.
            base: what was stored before.
            objects: its turns.
            new: what was stored by that, but for what others pushed.
            kept: how many of these turns are where they were.

        """
        skipped: int | None = base.skipped
        turns = new.turns[:kept]
        try:
            stored = yield ReadStored(self._namespace, self._codec, asset.id, base.skipped + kept)
            if stored.reshaped > base.revision and stored.reshaped != mine.revision:  # by others
                stored, skipped = yield from self._read_from_place(mine._replace(turns=new.turns))
                turns = []
        except StorageError:  # it was saved all the same
            skipped = None
        if skipped is None or stored.born > mine.revision:  # the next save or refresh reads all, and says what is gone
            set_baseline(asset, mine._replace(conflicting=True), objects)
            return
        turns += stored.turns[max(skipped - stored.start, 0) :]
        bring_up(self._codec, asset, mine, _as_baseline(mine, stored, turns, skipped), objects)

    def update(self, id: str, change: Callable[[A], object], lease: LeaseToken | None) -> Plan[Versioned[A]]:
        """Load, change and save, again and again until no other write came between to what was changed."""
        check_lease(check_id(id), lease)
        delay = 0.001
        asset, known = yield from self._load(id)
        while True:
            call_change(change, asset)
            new = self._codec.encode(asset, known)
            turns = tuple(asset.history.turns)
            patch = compare(known, new)
            if patch.is_empty:
                return Versioned(asset, known.revision)
            try:
                written = yield from self._write_patch(asset, known, new, patch, lease)
                break
            except Outdated:
                asset, known = yield from self._load_again(known)
            except ConflictError:
                asset, known = yield from self._load(id)
            yield Pause(random.uniform(0, delay))
            delay = min(2 * delay, 0.1)
        mine = self._baseline(id, new, written, 0)
        if written.before == known.revision:
            set_baseline(asset, mine, turns)
            return Versioned(asset, written.revision)
        kept = 0 if patch.turns is None else len(new.turns) - len(patch.turns.pushed)
        yield from self._follow_up(asset, mine, known, turns, new, kept)
        now = baseline_of(asset, self._namespace.incarnation) or mine
        return Versioned(asset, max(now.revision, written.revision))

    def read(self, id: str, known: Baseline | None) -> Plan[tuple[A, Baseline]]:
        """Load a session, which may be known as it was some time ago: then only what is new is read."""
        return (yield from self._load(check_id(id)) if known is None else self._load_again(known))

    def _load(self, id: str) -> Plan[tuple[A, Baseline]]:
        stored = yield ReadStored(self._namespace, self._codec, id)
        known = Baseline(
            self._namespace.incarnation, id, stored.revision, stored.operation_id, stored.fields, stored.turns
        )
        return self._decoded(known), known

    def _load_again(self, known: Baseline) -> Plan[tuple[A, Baseline]]:
        """Load a session once more, but read only what is new."""
        try:
            theirs = yield from self._latest(known, None)
        except ConflictError:  # it was made anew
            return (yield from self._load(known.id))
        return self._decoded(theirs), theirs

    def _decoded(self, known: Baseline) -> A:
        asset = self._codec.decode(known.id, known.fields, known.turns)
        set_baseline(asset, known, tuple(asset.history.turns))
        return asset


def call_change(change: Callable[[A], object], asset: A) -> None:
    """Have an asset changed by a function of the caller's. TypeError if it waits, ValueError if it changes the id."""
    id = asset.id
    if inspect.isawaitable(answer := change(asset)):
        if inspect.iscoroutine(answer):
            answer.close()
        raise TypeError("update takes a plain function: what it does must not wait")
    if asset.id != id:
        raise ValueError("change must leave the id as it is")


def _as_baseline(known: Baseline, stored: Stored, turns: Sequence[bytes], skipped: int) -> Baseline:
    return Baseline(known.incarnation, known.id, stored.revision, stored.operation_id, stored.fields, turns, skipped)


def _begins_alike(known: Baseline, stored: Stored) -> bool:
    """Whether what was read begins with the first of the known turns."""
    first, ids = turn_id(known.turns[0]), [id_of(turn) for turn in stored.turns]
    return ids[:1] == [first] and ids.count(first) == 1


def _find(known: Baseline, stored: Stored) -> int | None:
    """Return where the turns of a partial asset begin in what is stored; None if they are not there any more."""
    if not known.turns:
        return len(stored.turns)
    places: dict[bytes, list[int]] = {}
    for n, turn in enumerate(stored.turns):
        places.setdefault(id_of(turn), []).append(n)
    for n, turn in enumerate(known.turns):
        at = places.get(turn_id(turn), [])
        if len(at) == 1:
            return at[0] - n if at[0] >= n else None
    return None


def _check_whole(asset: SessionAsset) -> None:
    if asset.history.skipped:
        raise ValueError("the asset is partial: its turns can't be removed, nor can it be saved elsewhere")

"""Assets that workers hold and change; what their saves and refreshes are to do, and to make of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from orcs_redis import SessionAsset
from orcs_redis.errors import ConflictError, NotFoundError, StorageError
from orcs_redis.model.meta import Versioned
from orcs_redis.protocol.baseline import baseline_of
from orcs_redis.protocol.writes import DELETE

from .intents import Intent, State, state_of
from .reference import Stored
from .rules import Violation
from .views import ABSENT, Changes, Turn, View, changes, rebase, view_of

if TYPE_CHECKING:
    from .driver import Writer
    from .model import Entry
    from .world import World

__all__ = ["Held", "Load", "Refresh", "Save", "Update"]


class Held:
    """An asset of a worker. `base` is what it was made from, part by part; `mine` what its worker made of it."""

    def __init__(self, world: World, asset: SessionAsset) -> None:
        self.world, self.asset = world, asset
        self.epoch = world.model.epoch
        self.base: View | None = None
        self.revision = self.skipped = 0
        self.busy = 0  # saves and refreshes under way
        self.muddled = False  # whether there was more than one of them: then what they do to the asset depends on them
        self.mine = view_of(asset)

    def changed(self) -> None:
        """Note that its worker has changed it."""
        self.mine = view_of(self.asset)

    def loaded(self) -> None:
        """Note that it was loaded: it is what is stored."""
        stored = self._note_baseline()
        self.base = view_of(stored).last(self.skipped)

    def synced(self, base: View, what: Intent, *, whole: bool = False) -> None:
        """Judge what a save or refresh made of it: what is stored, and its worker's changes since `base`.

        whole: it may have become another session.
        """
        if self.muddled:
            return
        before = self.revision
        stored = self._note_baseline()
        if stored.born > before and not whole:
            raise Violation("resurrected", f"{what} of {before}: made anew as {stored.born}")
        theirs = view_of(stored).last(self.skipped)
        wanted, found = rebase(base, self.mine, theirs), view_of(self.asset)
        in_order = wanted.ordered and not wanted.conflicts
        same_turns = found.turns == wanted.view.turns if in_order else sorted(found.turns) == sorted(wanted.view.turns)
        if found.parts != wanted.view.parts or not same_turns:
            raise Violation("merged", f"{what} leaves {found}, not {wanted.view} (of {base}, {self.mine}, {theirs})")
        self.mine = found
        kept = {name: value for name, value in base.parts.items() if name in wanted.conflicts}
        parts = {name: value for name, value in theirs.parts.items() if name not in wanted.conflicts} | kept
        in_turns = any(name.startswith("turn/") for name in wanted.conflicts)
        self.base = View(parts, base.turns if in_turns else theirs.turns)

    def is_behind(self, entry: Entry, written: View) -> bool:
        """Whether what came of its own write could not be read, or is gone: then it is as it was written."""
        known = baseline_of(self.asset, self.world.incarnation)
        if known is None or not known.conflicting or known.revision != entry.revision:
            return False
        if view_of(self.asset) != self.mine:
            return False
        self.base, self.revision, self.skipped = written, known.revision, known.skipped
        return True

    def _note_baseline(self) -> Stored:
        known = baseline_of(self.asset, self.world.incarnation)
        assert known is not None
        for stored in self.world.model.contents.get((self.asset.id, known.revision), ()):
            if stored.op == known.operation_id:
                self.revision, self.skipped = known.revision, known.skipped
                return stored
        raise Violation("merged", f"{self.asset.id} is at {known.revision}, which nobody wrote")


class _OfHeld(Intent):
    """Something that is done with a worker's asset, one thing at a time."""

    def __init__(self, world: World, held: Held) -> None:
        super().__init__(world, held.asset.id)
        self.held = held
        self.begun_with = held.mine
        self.epoch = min(self.epoch, held.epoch)
        held.busy += 1

    def end(self, outcome: Any) -> None:
        self.held.busy -= 1
        super().end(outcome)

    def refused(self, error: StorageError) -> None:
        if isinstance(error, ConflictError):
            self._check_conflict(error)

    def _was_deleted(self) -> bool:
        return any(
            entry.record.id == self.id and entry.record.change.kind == DELETE and entry.revision > self.held.revision
            for entry in self.world.model.logs[self.world.keyspace.of(self.id).number]
        )

    def _check_conflict(self, error: ConflictError) -> None:
        """Judge a conflict: only where two have changed one part."""
        held = self.held
        if held.muddled:
            return
        if error.expected != held.revision:
            raise Violation("conflict", f"{self} ended in {error!r}: the asset is of {held.revision}")
        if error.actual == 0:
            if error.parts or not self._was_deleted():
                raise Violation("conflict", f"{self} ended in {error!r}, and the session was not deleted")
            return
        theirs = self.world.model.at(self.id, error.actual)
        if theirs is None or held.base is None:
            raise Violation("conflict", f"{self} ended in {error!r}: nobody wrote that")
        if theirs.born > held.revision:
            if error.parts:
                raise Violation("conflict", f"{self} ended in {error!r}: it was made anew")
            return
        if not error.parts and held.skipped and theirs.reshaped > held.revision:
            return  # turns that were not loaded are gone: where its own begin is not known
        conflicts = rebase(held.base, held.mine, view_of(theirs).last(held.skipped)).conflicts
        if {*error.parts} != conflicts or not conflicts:
            raise Violation("conflict", f"{self} ended in {error!r}, and what collides is {sorted(conflicts)}")


class Save(_OfHeld):
    """Of an asset: whole, or what was changed in it."""

    def __init__(self, world: World, held: Held, expected: int | None, overwrite: bool) -> None:
        super().__init__(world, held)
        self._expected, self._overwrite = expected, overwrite
        self.merges = held.base is not None and expected is None and not overwrite

    def goal(self) -> Any:
        return self.held.base, self.held.mine

    def effect(self, before: State | None, entry: Entry) -> State | None:
        base, mine = entry.record.goal
        if self.held.muddled:
            return state_of(entry.made.session)
        if not self.merges:
            revision = 0 if entry.before is None else entry.before.revision
            if self._expected not in (None, revision):
                raise Violation("condition", f"{self} of {self._expected} was applied to {revision}")
            return self._whole(mine, before, revision)
        old = self._existing(before)
        assert entry.before is not None
        if entry.before.born > self.held.revision:
            raise Violation("resurrected", f"{self} of {self.held.revision}: made anew as {entry.before.born}")
        own = changes(base, mine)
        settled = self._settled(own, old.view, view_of(entry.made.session)) if entry.made.session else frozenset()
        if conflicts := rebase(base, mine, old.view.last(self.held.skipped)).conflicts - settled:
            raise Violation("part", f"{self} takes away what others made of {sorted(conflicts)}")
        return State(own.without(settled).made_to(old.view), old.records)

    def _settled(self, own: Changes, before: View, after: View) -> frozenset[str]:
        """Return what of its changes was there when it read, by an earlier attempt, and others have changed since."""
        held = self.held
        states = [
            view_of(state)
            for state in self.world.model.history[self.id]
            if state is not None and state.born <= held.revision < state.revision
        ]
        parts = {
            name
            for name, value in own.parts.items()
            if before.parts.get(name, ABSENT) == after.parts.get(name, ABSENT) != value
            and any(state.parts.get(name, ABSENT) == value for state in states)
        }
        turns = {
            f"turn/{id}"
            for id, content in (*own.added, *own.edited.items())
            if dict(before.turns).get(id) == dict(after.turns).get(id) != content
            and any((id, content) in state.turns for state in states)
        }
        return frozenset(parts | turns)

    def same_turns(self, found: View, wanted: View, entry: Entry) -> bool:
        base, mine = entry.record.goal
        return found.turns == wanted.turns or (self.merges and changes(base, mine).are_made(found, wanted))

    def _whole(self, mine: View, before: State | None, revision: int) -> State:
        records = {} if before is None else before.records
        if self.held.skipped and before is not None and self._expected == self.held.revision == revision:
            mine = mine._replace(turns=(*before.view.turns[: self.held.skipped], *mine.turns))
        return State(mine, records)

    def returned(self, result: Any) -> None:
        if self.entry is not None:
            self._check_revision(result)
            if self.held.is_behind(self.entry, self.begun_with):
                return
        self.held.synced(self.begun_with, self, whole=not self.merges)
        if self.entry is None and result != self.held.revision and not self.held.muddled:
            raise Violation("lost", f"{self} returns {result}, it is at {self.held.revision}")

    def refused(self, error: StorageError) -> None:
        if isinstance(error, NotFoundError):
            raise Violation("answer", f"{self} ended in {error!r}")
        if self.merges:
            super().refused(error)


class Refresh(_OfHeld):
    """Of a worker's asset."""

    def returned(self, result: Any) -> None:
        assert self.held.base is not None
        self.held.synced(self.held.base, self)
        if result != self.held.revision and not self.held.muddled:
            raise Violation("merged", f"{self} returns {result}, the asset is at {self.held.revision}")

    def refused(self, error: StorageError) -> None:
        if isinstance(error, NotFoundError) and not self._was_deleted():
            raise Violation("conflict", f"{self} ended in {error!r}, and the session was not deleted")
        if isinstance(error, ConflictError) and error.parts:
            raise Violation("conflict", f"{self} ended in {error!r}: it hides no conflict, and has none")
        super().refused(error)


class Load(Intent):
    """Of a session, or of its last turns."""

    def __init__(self, world: World, writer: Writer, id: str, last: int | None) -> None:
        super().__init__(world, id)
        self._writer, self._last = writer, last

    def returned(self, result: Any) -> None:
        assert isinstance(result, Versioned)
        self.world.model.loaded(self.id, result.revision, view_of(result.asset))
        length = len(result.asset.history.turns)
        if length > self._last if self._last is not None else result.asset.history.skipped:
            raise Violation("loaded", f"{self}, the last {self._last}, has {length} turns")
        _take(self.world, self._writer, result.asset).loaded()


class Update(Intent):
    """A count goes up by one, and the turn of that is added."""

    def __init__(self, world: World, writer: Writer, id: str, turn: Callable[[], Any], title: Any) -> None:
        super().__init__(world, id)
        self._writer, self._turn, self._title = writer, turn, title
        self._added: Turn = "", ""

    def change(self, asset: SessionAsset) -> None:
        """Change it, as `update` asks for."""
        asset.metadata["count"] = asset.metadata.get("count", 0) + 1
        if self._title is not None:
            asset.metadata["title"] = self._title
        turn = self._turn()
        asset.history.turns.append(turn)
        self._added = turn.id, turn.content

    def goal(self) -> Any:
        return self._added

    def effect(self, before: State | None, entry: Entry) -> State | None:
        old = self._existing(before)
        parts = old.view.parts | {"metadata.count": old.view.parts.get("metadata.count", 0) + 1}
        if self._title is not None:
            parts["metadata.title"] = self._title
        return State(View(parts, (*old.view.turns, entry.record.goal)), old.records)

    def returned(self, result: Any) -> None:
        assert isinstance(result, Versioned)
        if self.entry is None:
            raise Violation("lost", f"{self} returns {result.revision}, and nothing was written")
        held = _take(self.world, self._writer, result.asset)
        if held.is_behind(self.entry, held.mine):
            return
        held.loaded()
        self.world.model.loaded(self.id, result.revision, view_of(result.asset))

    def refused(self, error: StorageError) -> None:
        if isinstance(error, ConflictError):
            raise Violation("conflict", f"{self} ended in {error!r}")


def _take(world: World, writer: Writer, asset: SessionAsset) -> Held:
    held = Held(world, asset)
    writer.assets[asset.id] = held
    return held

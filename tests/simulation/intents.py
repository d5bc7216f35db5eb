"""What callers want, and what they are told: judged apart from what the requests say.

An intent belongs to one call of a store's method. When a write of it is applied, the session afterwards must be what
the caller wants to be made of the session before; when the call ends, its result must be what happened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from orcs_redis import ConversationTurn
from orcs_redis.errors import OutcomeUnknownError, StorageError
from orcs_redis.model.meta import Committed
from orcs_redis.protocol.commits import CommitArguments

from .driver import CANCELLED
from .reference import Stored
from .rules import Violation
from .views import ABSENT, EMPTY, Turn, View, labels_of, view_of

if TYPE_CHECKING:
    from .model import Entry
    from .world import World

__all__ = ["Append", "Commit", "Delete", "Fork", "Intent", "Pop", "Replace", "State", "Touch", "Truncate", "state_of"]

_PENDING = "pending"


class State(NamedTuple):
    """A session as far as callers see it."""

    view: View
    records: Mapping[bytes, bytes]

    def with_turns(self, turns: Sequence[Turn]) -> State:
        return self._replace(view=self.view._replace(turns=tuple(turns)))


NEW = State(EMPTY, {})


def state_of(stored: Stored | None) -> State | None:
    return None if stored is None else State(view_of(stored), stored.records)


class Intent:
    """Something that a caller wants. By itself: to read."""

    def __init__(self, world: World, id: str = "") -> None:
        self.world, self.id = world, id
        self.epoch = world.model.epoch
        self.entry: Entry | None = None  # the write that was applied for it
        self.outcome: Any = _PENDING

    def __str__(self) -> str:
        return f"{type(self).__name__.lower()} of {self.id}"

    @property
    def current(self) -> bool:
        """Whether the data has not gone back since it began."""
        return self.epoch == self.world.model.epoch

    def goal(self) -> Any:
        """Return what is wanted as of now, for a write that is made now."""

    def effect(self, before: State | None, entry: Entry) -> State | None:
        """Return what the session is to become; Violation if the write must not have been applied."""
        raise Violation("condition", f"{self} writes")

    def same_turns(self, found: View, wanted: View, entry: Entry) -> bool:
        """Whether the turns are what is wanted."""
        return found.turns == wanted.turns

    def returned(self, result: Any) -> None:
        """Judge the result of a call that succeeded."""

    def refused(self, error: StorageError) -> None:
        """Judge an error that says that nothing was written."""

    # What the model and the flows tell it

    def applied(self, entry: Entry) -> None:
        """Judge a write that was applied for it just now."""
        if not self.current:
            return
        if self.entry is not None:
            raise Violation("doubled", f"{self}: {entry.record} was applied after {self.entry.record}")
        self.entry = entry
        if self._ended():
            raise Violation("refused", f"{self} ended in {self.outcome!r:.200}, and {entry.record} was applied")
        wanted, found = self.effect(state_of(entry.before), entry), state_of(entry.made.session)
        if wanted is None or found is None:
            if wanted is not found:
                raise Violation("part", f"{self} made {found} of the session, not {wanted}")
            return
        if len({*found.view.turns}) < len(found.view.turns):
            raise Violation("turns", f"{self} doubles a turn: {found.view.turns}")
        if not self.same_turns(found.view, wanted.view, entry):
            raise Violation("turns", f"{self} made {found.view.turns} of the turns, not {wanted.view.turns}")
        for what, got, right in (
            ("parts", found.view.parts, wanted.view.parts), ("records", found.records, wanted.records)
        ):  # fmt: skip
            if got != right:
                raise Violation("part", f"{self} made {got} of the {what}, not {right}")
        stored = entry.made.session
        assert stored is not None
        parts = found.view.parts
        labels, names = (
            labels_of(parts.get("metadata.labels")),
            tuple(parts[f"project_context.{name}"] for name in ("name", "root_path")),
        )
        if (stored.labels, stored.names) != (labels, names):
            raise Violation("index", f"{self} leaves {stored.labels} and {stored.names} in the index of {parts}")

    def end(self, outcome: Any) -> None:
        """Judge how the call ended."""
        self.outcome = outcome
        if not self.current or outcome is CANCELLED or isinstance(outcome, OutcomeUnknownError):
            return
        if isinstance(outcome, StorageError):
            if self.entry is not None:
                raise Violation("refused", f"{self} ended in {outcome!r:.200}, and {self.entry.record} was applied")
            self.refused(outcome)
        elif not isinstance(outcome, TimeoutError):
            self.returned(outcome)

    def _ended(self) -> bool:
        """Whether nothing may be written any more."""
        return not (self.outcome in (_PENDING, CANCELLED) or isinstance(self.outcome, OutcomeUnknownError))

    def _check_revision(self, revision: int) -> None:
        if self.entry is None or self.entry.revision != revision:
            raise Violation("lost", f"{self} returns {revision}, it was {self.entry}")

    def _existing(self, before: State | None) -> State:
        if before is None:
            raise Violation("resurrected", f"{self} makes a session that was deleted or never made")
        return before


class Delete(Intent):
    def effect(self, before: State | None, entry: Entry) -> State | None:
        self._existing(before)
        return None


class Touch(Intent):
    def effect(self, before: State | None, entry: Entry) -> State | None:
        return self._existing(before)


class Append(Intent):
    """Of turns; `once`: of those that are not there."""

    def __init__(self, world: World, id: str, turns: Sequence[ConversationTurn], create: bool, once: bool) -> None:
        super().__init__(world, id)
        self.turns = [(turn.id, turn.content) for turn in turns]
        self._create, self._once = create, once

    def effect(self, before: State | None, entry: Entry) -> State | None:
        old = (before or NEW) if self._create else self._existing(before)
        there = {id for id, _ in old.view.turns} if self._once else ()
        return old.with_turns([*old.view.turns, *(turn for turn in self.turns if turn[0] not in there)])

    def returned(self, result: Any) -> None:
        revision = getattr(result, "revision", result)
        if self.entry is not None or not self._once:
            self._check_revision(revision)
            return
        stored = self.world.model.at(self.id, revision)
        ids = set() if stored is None else {id for id, _ in view_of(stored).turns}
        if not ids.issuperset(id for id, _ in self.turns):
            raise Violation("lost", f"{self} finds {self.turns} among {ids} at {revision}")


class Pop(Intent):
    def __init__(self, world: World, id: str, count: int) -> None:
        super().__init__(world, id)
        self._count = count
        self._popped: list[Turn] = []

    def effect(self, before: State | None, entry: Entry) -> State | None:
        turns = self._existing(before).view.turns
        kept = max(len(turns) - self._count, 0)
        self._popped = [*turns[kept:]]
        return self._existing(before).with_turns(turns[:kept])

    def returned(self, result: Any) -> None:
        found = [(turn.id, turn.content) for turn in result]
        if found != self._popped or (self.entry is None and found):
            raise Violation("popped", f"{self} returns {found}, and removed {self._popped}")


class Truncate(Intent):
    def __init__(self, world: World, id: str, length: int) -> None:
        super().__init__(world, id)
        self._length = length

    def effect(self, before: State | None, entry: Entry) -> State | None:
        old = self._existing(before)
        return old.with_turns(old.view.turns[: self._length])

    def returned(self, result: Any) -> None:
        if self.entry is not None:
            self._check_revision(result.revision)
            return
        stored = self.world.model.at(self.id, result.revision)
        if stored is None or len(stored.turns) > self._length:
            raise Violation("lost", f"{self} to {self._length} turns returns {result.revision}: {stored}")


class Replace(Intent):
    def __init__(self, world: World, id: str, turn: ConversationTurn) -> None:
        super().__init__(world, id)
        self._turn = turn.id, turn.content

    def effect(self, before: State | None, entry: Entry) -> State | None:
        old = self._existing(before)
        turns = list(old.view.turns)
        places = [n for n, (id, _) in enumerate(turns) if id == self._turn[0]]
        if not places:
            raise Violation("condition", f"{self}: there is no {self._turn[0]} in {turns}")
        turns[places[-1]] = self._turn
        return old.with_turns(turns)

    def returned(self, result: Any) -> None:
        self._check_revision(result)


class Fork(Intent):
    def __init__(self, world: World, source: str, id: str, length: int | None, records: bool) -> None:
        super().__init__(world, id)
        self._source, self._length, self._records = source, length, records

    def effect(self, before: State | None, entry: Entry) -> State | None:
        if before is not None:
            raise Violation("condition", f"{self} from {self._source} is over a session")
        made = entry.made.session
        assert made is not None
        origin = view_of(made).parts.get("metadata.forked_from", {})
        source = state_of(self.world.model.at(self._source, origin.get("revision", 0)))
        if source is None:
            raise Violation("part", f"{self} is from {origin}, which {self._source} never was")
        turns = source.view.turns[: self._length]
        about = {"id": self._source, "revision": origin["revision"], "length": len(turns)}
        parts = source.view.parts | {"metadata.forked_from": about}
        return State(View(parts, turns), source.records if self._records else {})

    def returned(self, result: Any) -> None:
        self._check_revision(result)


class Commit(Intent):
    def __init__(
        self, world: World, id: str, arguments: CommitArguments, create: bool, if_revision: int | None,
        if_last: str | None,
    ) -> None:  # fmt: skip
        super().__init__(world, id)
        self._arguments, self._create, self._if_revision, self._if_last = arguments, create, if_revision, if_last
        self._result: Any = None

    def effect(self, before: State | None, entry: Entry) -> State | None:
        old = (before or NEW) if self._create else self._existing(before)
        revision = 0 if entry.before is None else entry.before.revision
        if self._if_revision not in (None, revision):
            raise Violation("condition", f"{self} of {self._if_revision} was applied to {revision}")
        if self._if_last is not None and self._if_last not in [id for id, _ in old.view.turns[-1:]]:
            raise Violation("condition", f"{self} after {self._if_last} was applied to {old.view.turns}")
        records, placed = self._records(old.records)
        self._result = before is None, placed
        return State(View(self._parts(old.view.parts), self._turns(old.view.turns)), records)

    def returned(self, result: Any) -> None:
        assert isinstance(result, Committed)
        if self.entry is None:  # there was nothing to do
            only_cuts = not any(
                value for name, value in self._arguments._asdict().items() if name not in ("pop", "truncate")
            )
            stored = self.world.model.at(self.id, result.revision)
            if not only_cuts or stored is None or self._turns(view_of(stored).turns) != view_of(stored).turns:
                raise Violation("lost", f"{self} returns {result}, and nothing was written")
            return
        self._check_revision(result.revision)
        if (result.created, result.placed) != self._result:
            raise Violation("placed", f"{self} returns {result}, and it was {self._result}")

    def _turns(self, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
        arguments = self._arguments
        if arguments.pop:
            turns = turns[: max(len(turns) - arguments.pop, 0)]
        if arguments.truncate is not None:
            turns = turns[: arguments.truncate]
        return (*turns, *((turn.id, turn.content) for turn in arguments.append))

    def _parts(self, old: Mapping[str, Any]) -> dict[str, Any]:
        arguments = self._arguments
        parts = dict(old)
        for name, value in (arguments.set or {}).items():
            plain = msgspec.msgpack.decode(msgspec.msgpack.encode(value))
            if name == "project_context":
                parts |= {f"{name}.{field}": plain[field] for field in ("name", "root_path")}
            elif "." in name:  # times are none of the view
                parts[name] = plain
        for name in arguments.unset:
            parts.pop(name, None)
        if arguments.labels:
            before = labels_of(parts.get("metadata.labels"))
            labels = {name: value for name, value in {**before, **arguments.labels}.items() if value is not None}
            if labels or before:  # else what is there, if anything, is no labels
                parts["metadata.labels"] = labels or ABSENT
        return {name: value for name, value in parts.items() if value is not ABSENT}

    def _records(self, old: Mapping[bytes, bytes]) -> tuple[dict[bytes, bytes], dict[str, bool]]:
        arguments = self._arguments
        records = dict(old)
        records |= {key.encode(): data for key, data in (arguments.put or {}).items()}
        placed = {key: key.encode() not in old for key in arguments.put_new or {}}
        for key, data in (arguments.put_new or {}).items():
            records.setdefault(key.encode(), data)
        kept = {*(arguments.put or ()), *(arguments.put_new or ())}
        for key in arguments.drop:
            for name in [name.decode() for name in records]:
                if name == key or (key.endswith("*") and name.startswith(key[:-1]) and name not in kept):
                    del records[name.encode()]
        return records, placed

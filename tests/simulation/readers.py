"""Who reads records, lists and counts: what they get must have been there while they read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from orcs_redis.model.meta import SessionMeta

from .intents import Intent
from .reference import Stored
from .rules import Violation

if TYPE_CHECKING:
    from .world import World

__all__ = ["Count", "Listing", "Range", "Values"]


class _Reader(Intent):
    """Something that is read; sessions may have had several states meanwhile."""

    def __init__(self, world: World, id: str = "") -> None:
        super().__init__(world, id)
        self._since = {other: len(world.model.history[other]) for other in world.ids}

    def states(self, id: str) -> list[Stored | None]:
        """Return all states that a session had since it began to read."""
        return self.world.model.history[id][self._since[id] - 1 :]


class Values(_Reader):
    """Records by their keys: one command."""

    def __init__(self, world: World, id: str, keys: Iterable[str]) -> None:
        super().__init__(world, id)
        self._keys = [key.encode() for key in keys]

    def returned(self, result: Any) -> None:
        found = {key.encode(): data for key, data in result.items()}
        wanted = [
            {key: data for key, data in _records(state).items() if key in self._keys} for state in self.states(self.id)
        ]
        if found not in wanted:
            raise Violation("records", f"{self}: {self._keys} are {found}, not one of {wanted}")


class Range(_Reader):
    """Records in the order of their keys: what was there all the time is in it, and nothing that never was."""

    def __init__(self, world: World, id: str, prefix: str, limit: int | None, reverse: bool) -> None:
        super().__init__(world, id)
        self._prefix, self._limit, self._reverse = prefix.encode(), limit, reverse

    def returned(self, result: Any) -> None:
        found = [(key.encode(), data) for key, data in result]
        states = [_records(state) for state in self.states(self.id)]
        keys = [key for key, _ in found]
        if keys != sorted({*keys}, reverse=self._reverse) or (self._limit is not None and len(keys) > self._limit):
            raise Violation("records", f"{self} in order: {keys}")
        for key, data in found:
            if not key.startswith(self._prefix) or all(state.get(key) != data for state in states):
                raise Violation("records", f"{self}: {key!r} was never {data!r}: {states}")
        always = {key for key in states[0] if key.startswith(self._prefix) and all(key in state for state in states)}
        if len(found) == self._limit:
            last = keys[-1] if keys else b""
            always = {key for key in always if (key > last if self._reverse else key < last) and self._limit}
        if not always.issubset(keys):
            raise Violation("records", f"{self}: {sorted(always)} were there, and {keys} are found")


class _OfSessions(_Reader):
    """Sessions with some labels, or of a project."""

    def __init__(self, world: World, labels: Mapping[str, str], path: str | None) -> None:
        super().__init__(world, f"{dict(labels)} and {path}")
        self._labels, self._path = labels, path

    def match(self, state: Stored | None) -> bool:
        """Whether a session is one of them."""
        return (
            state is not None and self._labels.items() <= state.labels.items() and self._path in (None, state.names[1])
        )

    def bounds(self) -> tuple[set[str], set[str]]:
        """Return the ids of those that were one all the time, and of those that were at some time."""
        states = {id: self.states(id) for id in self.world.ids}
        always = {id for id, some in states.items() if all(map(self.match, some))}
        return always, {id for id, some in states.items() if any(map(self.match, some))}


class Listing(_OfSessions):
    """A list: each session as it was."""

    def returned(self, result: list[SessionMeta]) -> None:
        always, ever = self.bounds()
        ids = [meta.id for meta in result]
        if not always <= {*ids} <= ever or len({*ids}) < len(ids):
            raise Violation("listed", f"{self}: {ids}, of {sorted(always)} to {sorted(ever)}")
        for meta in result:
            if not any(self.match(state) and _is_of(meta, state) for state in self.states(meta.id)):
                raise Violation("listed", f"{self}: {meta!r} with {meta.labels} never was so")


class Count(_OfSessions):
    """How many there are."""

    def returned(self, result: int) -> None:
        always, ever = self.bounds()
        if not len(always) <= result <= len(ever):
            raise Violation("listed", f"{self}: {result} sessions, of {sorted(always)} to {sorted(ever)}")


def _records(state: Stored | None) -> dict[bytes, bytes]:
    return {} if state is None else state.records


def _is_of(meta: SessionMeta, state: Stored | None) -> bool:
    return state is not None and (meta.revision, meta.turn_count, meta.labels, (meta.name, meta.project_path)) == (
        state.revision, len(state.turns), state.labels, state.names,
    )  # fmt: skip

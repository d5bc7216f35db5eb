"""A model of one session: what each write makes of it, written without the store's own code.

A write's arguments, as workers log them:

    commit   turns, pop, truncate, set, unset, put, put_new, drop, labels, create, once, if_last
    replace  replace: a turn
    create, put   whole: a snapshot, which replaces all but the records
    amend    an update: turns, set; and metadata.counter is one more
    merge    the save of an asset that was loaded: mine, its snapshot; the base is known to the caller
    delete
    fork     source, length, records

A turn is [id, uid of the write that its content is of]. A snapshot has turns, and parts by name; of a partial asset it
has the last turns, and says how many were skipped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

__all__ = [
    "COUNTER",
    "LABELS",
    "Merged",
    "Refused",
    "State",
    "apply",
    "fork",
    "merged",
    "merged_parts",
    "rebased",
    "same_asset",
    "same_snapshot",
]

COUNTER, LABELS, FORKED = "metadata.counter", "metadata.labels", "metadata.forked_from"
Turn: TypeAlias = tuple[str, str]


@dataclass(frozen=True)
class State:
    """What a session holds; `born` is the uid of the write that made it."""

    born: str
    turns: tuple[Turn, ...] = ()
    parts: Mapping[str, Any] = field(default_factory=dict)
    records: Mapping[str, str] = field(default_factory=dict)
    skipped: int = 0  # turns before these

    @classmethod
    def of(cls, snapshot: Mapping[str, Any], born: str = "", records: Mapping[str, str] | None = None) -> State:
        turns = tuple((id, text) for id, text in snapshot["turns"])
        return cls(born, turns, snapshot["parts"], records or {}, snapshot.get("skipped", 0))

    def view(self, skipped: int) -> State:
        """Return it without its first turns."""
        return replace(self, turns=self.turns[skipped:], skipped=skipped)

    @property
    def key(self) -> str:
        """What distinguishes it from others."""
        records = sorted(self.records.items())
        return repr((self.born, self.turns, sorted(self.parts.items(), key=lambda part: part[0]), records))


class Refused(Exception):
    """The write can't be applied to that state."""


def same_snapshot(state: State, snapshot: Mapping[str, Any]) -> bool:
    """Whether a state has these turns and parts."""
    skipped, turns = snapshot.get("skipped", 0), tuple(map(tuple, snapshot["turns"]))
    if skipped != state.skipped:
        state = state.view(skipped)
        if not state.turns:
            return False
    return state.turns == turns and dict(state.parts) == snapshot["parts"]


def apply(kind: str, uid: str, args: Mapping[str, Any], state: State | None) -> tuple[State | None, dict[str, Any]]:
    """Return what a write makes of a state, and what it answers. `merge` and `fork` are apart.

    Raises:
        Refused: the session is absent, or not as the write wants it.

    """
    if kind in ("create", "put"):
        if kind == "create" and state is not None:
            raise Refused("it exists")
        whole = State.of(args["whole"], state.born if state else uid, state.records if state else {})
        return whole, {}
    if kind == "commit":
        return _committed(uid, args, state)
    if state is None:
        raise Refused("it is absent")
    if kind == "delete":
        return None, {}
    if kind == "replace":
        return _replaced(args["replace"], state), {}
    if kind == "amend":
        counter = state.parts.get(COUNTER, 0) + 1
        parts = {**state.parts, **args["set"], COUNTER: counter}
        return replace(state, parts=parts, turns=state.turns + _turns(args)), {"counter": counter}
    raise ValueError(kind)


def _turns(args: Mapping[str, Any]) -> tuple[Turn, ...]:
    return tuple((id, text) for id, text in args.get("turns", ()))


def _committed(uid: str, args: Mapping[str, Any], state: State | None) -> tuple[State, dict[str, Any]]:
    created = state is None
    if state is None:
        if not args.get("create"):
            raise Refused("it is absent")
        state = State(uid)
    turns = state.turns
    if args.get("if_last") is not None and (not turns or turns[-1][0] != args["if_last"]):
        raise Refused(f"{args['if_last']} is not the last turn")
    answer: dict[str, Any] = {"created": created}
    if args.get("truncate") is not None:
        turns = turns[: args["truncate"]]
    if args.get("pop"):
        answer["popped"] = [id for id, _ in turns[-args["pop"] :]]
        turns = turns[: -args["pop"]]
    new = _turns(args)
    if args.get("once"):
        known = {id for id, _ in turns}
        new = tuple(turn for turn in new if turn[0] not in known)
    parts = {**state.parts, **args.get("set", {})}
    for name in args.get("unset", ()):
        parts.pop(name, None)
    if args.get("labels"):
        labels = {**parts.get(LABELS, {}), **args["labels"]}
        labels = {name: value for name, value in labels.items() if value is not None}
        parts[LABELS] = labels
        if not labels:
            del parts[LABELS]
    records, answer["placed"] = _with_records(args, state.records)
    return State(state.born, turns + new, parts, records), answer


def _with_records(args: Mapping[str, Any], records: Mapping[str, str]) -> tuple[dict[str, str], dict[str, bool]]:
    put, put_new, drop = args.get("put", {}), args.get("put_new", {}), args.get("drop", ())
    placed = {key: key not in records for key in put_new}
    result = {**put_new, **records, **put}
    for name in drop:
        if name.endswith("*"):
            gone = [key for key in result if key.startswith(name[:-1]) and key not in put and key not in put_new]
        else:
            gone = [name]
        for key in gone:
            result.pop(key, None)
    return result, placed


def _replaced(turn: Sequence[str], state: State) -> State:
    id, text = turn
    places = [n for n, (other, _) in enumerate(state.turns) if other == id]
    if not places:
        raise Refused(f"there is no turn {id}")
    turns = list(state.turns)
    turns[places[-1]] = id, text
    return replace(state, turns=tuple(turns))


def fork(uid: str, source: State, revision: int, args: Mapping[str, Any], records: Mapping[str, str]) -> State:
    """Return what a fork makes of a source at a revision."""
    turns = source.turns if args["length"] is None else source.turns[: args["length"]]
    origin = {"id": args["source"], "revision": revision, "length": len(turns)}
    return State(uid, turns, {**source.parts, FORKED: origin}, records if args["records"] else {})


def aligned(base: State, theirs: State) -> State | None:
    """Return as much of theirs as a partial asset has loaded; None if that is not there any more."""
    if not base.skipped:
        return theirs
    ids = [id for id, _ in theirs.turns]
    for n, (id, _) in enumerate(base.turns):
        if ids.count(id) == 1:
            return theirs.view(ids.index(id) - n) if ids.index(id) >= n else None
    return None


class Merged(NamedTuple):
    """What mine and theirs come to, mine where they collide; and what collides."""

    state: State
    conflicts: tuple[str, ...]


def merge(base: State, mine: State, theirs: State) -> Merged:
    """Merge three ways, part by part: who changed a part has it; if both did, it collides."""
    conflicts: set[str] = set()

    def choose(name: str, old: Any, here: Any, there: Any) -> Any:
        if here in (old, there):
            return there
        if there != old:
            conflicts.add(name)
        return here

    parts = {}
    for name in {*base.parts, *mine.parts, *theirs.parts}:
        value = choose(name, base.parts.get(name), mine.parts.get(name), theirs.parts.get(name))
        if value is not None:
            parts[name] = value
    old, here, there = dict(base.turns), dict(mine.turns), dict(theirs.turns)
    turns = []
    for id, text in theirs.turns:
        if id not in old and id in here and here[id] != text:
            turns.append((id, text))  # both have added it: both stay
        elif (text := choose(f"turn/{id}", old.get(id), here.get(id), text)) is not None:
            turns.append((id, text))
    for id, text in mine.turns:
        if id in old and id not in there:
            if choose(f"turn/{id}", old[id], text, None) is not None:
                turns.append((id, text))
        elif id not in old and there.get(id) != text:
            turns.append((id, text))
    merged = State(theirs.born, tuple(turns), parts, theirs.records, theirs.skipped)
    return Merged(merged, tuple(sorted(conflicts)))


def rebased(base: State, theirs: State, conflicts: Sequence[str]) -> State:
    """Return what an asset is based on once theirs was merged into it: theirs, but for what collides."""
    parts = {**theirs.parts}
    old, turns = dict(base.turns), list(theirs.turns)
    for name in conflicts:
        if name.startswith("turn/"):
            id = name.removeprefix("turn/")
            turns = [turn for turn in turns if turn[0] != id] + ([(id, old[id])] if id in old else [])
        else:
            parts.pop(name, None)
            if name in base.parts:
                parts[name] = base.parts[name]
    return State(theirs.born, tuple(turns), parts, theirs.records, theirs.skipped)


def merged(base: State, mine: Mapping[str, Any], theirs: State) -> Merged | None:
    """Merge an asset with what is stored; None if that is not there any more of which the asset is a part."""
    there = aligned(base, theirs)
    return None if there is None else merge(base, State.of(mine), there)


def merged_parts(base: State, mine: Mapping[str, Any], theirs: State) -> Merged | None:
    """Merge an asset of which no turn has changed."""
    here = State.of(mine)
    if here.turns != base.turns:
        return None
    result = merge(replace(base, turns=()), replace(here, turns=()), replace(theirs, turns=()))
    return result._replace(state=replace(result.state, turns=theirs.turns, skipped=0))


def same_asset(state: State, snapshot: Mapping[str, Any], conflicts: Sequence[str]) -> bool:
    """Whether a snapshot is a state; where turns collide, their order is not looked at."""
    if not any(part.startswith("turn/") for part in conflicts):
        return same_snapshot(state, snapshot)
    if state.skipped != snapshot.get("skipped", 0):
        return False
    return sorted(map(list, state.turns)) == sorted(snapshot["turns"]) and dict(state.parts) == snapshot["parts"]

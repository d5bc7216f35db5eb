"""Three-way merge of assets, by parts: what both had, mine, theirs.

A part that one side changed is as that side has it, and so is one that both changed equally. What both changed
differently collides, but for these: of `updated_at_ms` the later time holds, of `created_at_ms` the earlier one; of a
fact that both learned, theirs, as `ProjectContext.learn` has it; turns that both added under one id both stay.
Lists of strings and grants are sets.

Lists are in their order, and what is new in mine comes after it. Theirs is what is stored.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Collection
from typing import Any, Final, Generic, NamedTuple, TypeVar

import msgspec
from msgspec import Struct

from .asset import SessionAsset
from .parts import TIMES, Digests, Entry, digests, drop_part, get_part, list_part, parts_of, set_part

__all__ = ["Merged", "merge", "rebased", "settled"]

A = TypeVar("A", bound=SessionAsset)
T = TypeVar("T")

_COMPACTED: Final = "history.compacted"
_TURNS: Final = "history.turns"
_FACTS: Final = "project_context.learned_facts"


class Merged(NamedTuple, Generic[A]):
    """An asset without a baseline, which shares its values with both sides, and the names of what collides, sorted.

    Where parts collide it has mine, or theirs if that was conceded.
    """

    asset: A
    conflicts: tuple[str, ...]


def merge(
    base: A | Digests | None, mine: A, theirs: A, *, now: int | None = None, concede: Collection[str] = ()
) -> Merged[A]:
    """Merge two versions of one session, of one type.

    Args:
        base: the last version that both had, or its digests; None: they had none.
        mine: an asset. Of what is equal on both sides, the result has its values.
        theirs: what is stored.
        now: the latest time that `updated_at_ms` becomes if both changed it, in milliseconds since 1970.
        concede: names of parts of which theirs holds if they collide.

    """
    old = base if isinstance(base, Digests) else Digests() if base is None else digests(base)
    here, there = digests(mine), digests(theirs)
    chooser = _Chooser(set(), concede)
    merged = _copied(mine)
    for name in here.values | there.values:
        digest = _Versions(old.values.get(name), here.values.get(name), there.values.get(name))
        if name in TIMES and len({*digest}) == 3:
            set_part(merged, name, _time(name, get_part(mine, name), get_part(theirs, name), now))
        elif not chooser.mine_holds(name, digest):
            if name in there.values:
                set_part(merged, name, get_part(theirs, name))
            else:
                drop_part(merged, name)
    values, others = parts_of(mine).lists, parts_of(theirs).lists
    for path in values:
        versions = _Versions(old.lists.get(path, []), here.lists[path], there.lists[path])
        items = _merged_list(path, versions, values[path], others[path], chooser)
        if path == _TURNS:
            merged.history.turns = items
        else:
            set_part(merged, path, items)
    return Merged(merged, tuple(sorted(chooser.conflicts)))


def rebased(base: Digests, theirs: Digests, conflicts: Collection[str]) -> Digests:
    """Return what an asset is based on once theirs was merged into it: theirs, but for what collides."""
    values = {name: data for name, data in theirs.values.items() if name not in conflicts}
    lists = {}
    for path, entries in theirs.lists.items():
        kept = [entry for entry in base.lists.get(path, []) if list_part(path, entry[0]) in conflicts]
        lists[path] = [entry for entry in entries if list_part(path, entry[0]) not in conflicts] + kept
    return Digests(values | {name: base.values[name] for name in conflicts if name in base.values}, lists)


def settled(base: Digests, sent: Digests, theirs: Digests) -> Digests:
    """Return what both had, where mine was sent once, and may have been stored or not.

    What is stored as it was sent, both had: it is no change of others.
    """
    values = {name: data for name, data in base.values.items() if sent.values.get(name) != theirs.values.get(name)}
    values |= {name: data for name, data in sent.values.items() if data == theirs.values.get(name)}
    lists = {path: _settled_list(base.lists.get(path, []), sent.lists[path], theirs.lists[path]) for path in sent.lists}
    return Digests(values, lists)


def _settled_list(base: list[Entry], sent: list[Entry], theirs: list[Entry]) -> list[Entry]:
    if sent == theirs:
        return sent
    unchanged, mine, others = {*sent}, dict(sent), dict(theirs)
    result: list[Entry] = []
    for key, data in base:
        if (key, data) in unchanged or mine.get(key) != others.get(key):
            result.append((key, data))
        elif key in mine:
            result.append((key, mine[key]))
    known = {key for key, _ in base}
    return result + [(key, data) for key, data in sent if key not in known and others.get(key) == data]


class _Versions(NamedTuple, Generic[T]):
    """Something in three versions."""

    base: T
    mine: T
    theirs: T


class _Chooser(NamedTuple):
    conflicts: set[str]
    concede: Collection[str]

    def mine_holds(self, name: str, of: _Versions[Any]) -> bool:
        """Say which version of a part holds, None being its absence; note a conflict."""
        if of.theirs in (of.base, of.mine):
            return True
        if of.mine == of.base:
            return False
        self.conflicts.add(name)
        return name not in self.concede

    def undone(self, of: _Versions[Entry | None]) -> bool:
        """Whether a turn stays because it was removed along with a compaction that does not hold."""
        if _COMPACTED not in self.conflicts:
            return False
        removed, kept = (of.mine, of.theirs) if _COMPACTED in self.concede else (of.theirs, of.mine)
        return removed is None and kept == of.base


def _merged_list(
    path: str, of: _Versions[list[Entry]], values: list[Any], others: list[Any], chooser: _Chooser
) -> list[Any]:
    undoing = path == _TURNS and _COMPACTED in chooser.conflicts
    if of.theirs == of.mine or (of.theirs == of.base and not undoing):
        return list(values)
    same = next((n for n, entries in enumerate(zip(*of, strict=False)) if len({*entries}) > 1), min(map(len, of)))
    of = _Versions(*(entries[same:] for entries in of))
    result, values, others = values[:same], values[same:], others[same:]
    for row in _rows(of, pairing=path != _TURNS):
        entries = _Versions(*(None if n is None else entries[n] for n, entries in zip(row, of, strict=True)))
        key = next(entry[0] for entry in entries if entry is not None)
        if (path == _TURNS and chooser.undone(entries)) or (path == _FACTS and row.base is None):
            mine_holds = entries.theirs in (None, entries.mine)  # what is there stays, theirs before mine
        else:
            mine_holds = chooser.mine_holds(list_part(path, key), entries)
        if mine_holds and row.mine is not None:
            result.append(values[row.mine])
        elif not mine_holds and row.theirs is not None:
            result.append(others[row.theirs])
    return result


def _rows(of: _Versions[list[Entry]], pairing: bool) -> list[_Versions[int | None]]:
    """Say which elements are one, by their places in the lists, in the order of the result.

    Args:
        of: the lists.
        pairing: elements of one key that were added on both sides are one, whatever is in them.

    """
    base, mine, theirs = (list(enumerate(entries)) for entries in of)
    of_mine, of_theirs = _aligned(base, mine), _aligned(base, theirs)
    in_mine, in_theirs = ({old: new for new, old in found.items()} for found in (of_mine, of_theirs))
    added = [(n, entry) for n, entry in mine if n not in of_mine]
    twins = _aligned(added, [(n, entry) for n, entry in theirs if n not in of_theirs], pairing)
    paired = {*twins.values()}
    following: dict[int | None, list[_Versions[int | None]]] = defaultdict(list)  # by what they stand behind in mine
    last = None
    for n, _ in mine:
        if (old := of_mine.get(n)) is None:
            continue
        if old in in_theirs:
            last = in_theirs[old]
        else:
            following[last].append(_Versions(old, n, None))
    rows = following[None]
    for n, _ in theirs:
        old = of_theirs.get(n)
        rows.append(_Versions(old, twins.get(n) if old is None else in_mine.get(old), n))
        rows += following[n]
    return rows + [_Versions(None, n, None) for n, _ in added if n not in paired]


def _aligned(old: list[tuple[int, Entry]], new: list[tuple[int, Entry]], by_key: bool = True) -> dict[int, int]:
    """Find for elements of the new list those of the old that they are or were: the same, else of the same key."""
    found: dict[int, int] = {}
    for size in (2, 1) if by_key else (2,):
        taken = {*found.values()}
        waiting: dict[Any, deque[int]] = defaultdict(deque)
        for n, entry in old:
            if n not in taken:
                waiting[entry[:size]].append(n)
        for n, entry in new:
            if n not in found and waiting[entry[:size]]:
                found[n] = waiting[entry[:size]].popleft()
    return found


def _time(name: str, mine: int, theirs: int, now: int | None) -> int:
    if name == "created_at_ms":
        return min(mine, theirs)
    later = max(mine, theirs)
    return later if now is None else min(later, now)


def _copied(asset: A) -> A:
    """Copy an asset with its sections and maps, not what is in them."""

    def copied(value: Any) -> Any:
        if isinstance(value, Struct):
            fields = {name: copied(getattr(value, name)) for name in value.__struct_fields__}
            return msgspec.structs.replace(value, **fields)
        return dict(value) if type(value) is dict else value

    result: A = copied(asset)
    return result

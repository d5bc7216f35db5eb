"""Sessions as their users see them, and how they are merged: the rules of `save` and `refresh`, told once more."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import msgspec

from orcs_redis import SessionAsset

from .reference import Stored

__all__ = ["ABSENT", "EMPTY", "Changes", "Rebased", "Turn", "View", "changes", "labels_of", "rebase", "view_of"]

Turn = tuple[str, str]  # id and content
ABSENT: Any = "absent"  # in place of a part's value
_MAPS = ("metadata", "skill_configs")
_NAMES = ("name", "root_path")  # of the project: two parts in one field
_decode = msgspec.msgpack.decode


class View(NamedTuple):
    """Parts by name, but for times and what the workers leave alone; and turns."""

    parts: dict[str, Any]
    turns: tuple[Turn, ...]

    def is_end_of(self, whole: View) -> bool:
        """Whether it is the same, or the same without the first turns."""
        return self.parts == whole.parts and whole.turns[len(whole.turns) - len(self.turns) :] == self.turns

    def last(self, skipped: int) -> View:
        """Return it without its first turns."""
        return self._replace(turns=self.turns[skipped:])


EMPTY = View({"project_context.name": None, "project_context.root_path": None}, ())


def view_of(session: Stored | SessionAsset) -> View:
    """Return what a user sees of a session that is stored, or of an asset."""
    if isinstance(session, SessionAsset):
        fields = {
            f"{section}.{key}": msgspec.msgpack.encode(value)
            for section in _MAPS
            for key, value in getattr(session, section).items()
        }
        fields["project_context"] = msgspec.msgpack.encode(session.project_context)
        turns = tuple((turn.id, turn.content) for turn in session.history.turns)
    else:
        fields = session.fields
        turns = tuple((turn[0], turn[3]) for turn in map(_decode, session.turns))
    parts = {name: _decode(data) for name, data in fields.items() if name.partition(".")[0] in _MAPS}
    project = _decode(fields["project_context"])
    return View(parts | {f"project_context.{name}": project.get(name) for name in _NAMES}, turns)


def labels_of(value: Any) -> dict[str, str]:
    """Return what of `metadata["labels"]` is indexed."""
    if isinstance(value, dict) and len(value) <= 8 and all(_is_label(text) for item in value.items() for text in item):
        return value
    return {}


def _is_label(text: Any) -> bool:
    return isinstance(text, str) and 1 <= len(text.encode()) <= 200


class Changes(NamedTuple):
    """What a user has changed in an asset."""

    parts: dict[str, Any]
    removed: frozenset[str]
    edited: dict[str, str]
    added: tuple[Turn, ...]

    def made_to(self, view: View) -> View:
        """Return what they make of a session that others may have changed, where these did not."""
        there = {id for id, _ in view.turns}
        turns = [(id, self.edited.get(id, content)) for id, content in view.turns if id not in self.removed]
        turns += [turn for turn in self.added if turn[0] not in there or turn not in view.turns]
        parts = {name: value for name, value in (view.parts | self.parts).items() if value is not ABSENT}
        return View(parts, tuple(turns))

    def without(self, names: Iterable[str]) -> Changes:
        """Return them without those of these parts and turns."""
        gone = frozenset(names)
        return Changes(
            {name: value for name, value in self.parts.items() if name not in gone},
            self.removed,
            {id: content for id, content in self.edited.items() if f"turn/{id}" not in gone},
            tuple(turn for turn in self.added if f"turn/{turn[0]}" not in gone),
        )

    def are_made(self, found: View, wanted: View) -> bool:
        """Whether the turns are right. One that comes in the place of one that was removed may keep that place."""
        if not (self.removed and self.added):
            return found.turns == wanted.turns
        groups = [[turn for turn in view.turns if turn not in self.added] for view in (found, wanted)]
        own = [[turn for turn in view.turns if turn in self.added] for view in (found, wanted)]
        return groups[0] == groups[1] and own[0] == own[1]


def changes(base: View, mine: View) -> Changes:
    """Return what makes one view of the other."""
    parts = {name: new for name in _names(base, mine) if (new := _part(mine, name)) != _part(base, name)}
    old, new = dict(base.turns), dict(mine.turns)
    edited = {id: content for id, content in new.items() if id in old and old[id] != content}
    return Changes(parts, frozenset(old.keys() - new.keys()), edited, tuple(t for t in mine.turns if t[0] not in old))


class Rebased(NamedTuple):
    """A merge: of what others have changed and what is changed here."""

    view: View
    conflicts: frozenset[str]
    ordered: bool  # whether the order of the turns is certain


def rebase(base: View, mine: View, theirs: View) -> Rebased:
    """Merge: what one side changed is as that side has it; what both did differently collides, and mine stays."""
    parts, conflicts = {}, set()
    for name in _names(base, mine, theirs):
        old, here, there = _part(base, name), _part(mine, name), _part(theirs, name)
        if there not in (old, here) and here != old:
            conflicts.add(name)
        value = there if here == old else here
        if value is not ABSENT:
            parts[name] = value
    old_turns, here_turns, there_turns = dict(base.turns), dict(mine.turns), dict(theirs.turns)
    turns: list[Turn] = []
    for id, content in theirs.turns:
        before, own = old_turns.get(id), here_turns.get(id)
        if before is None:  # it was added
            turns.append((id, content))
        elif own is None:
            if content != before:
                conflicts.add(f"turn/{id}")
        else:
            if own not in (before, content) and content != before:
                conflicts.add(f"turn/{id}")
            turns.append((id, content if own == before else own))
    ordered = not (old_turns.keys() - here_turns.keys() and here_turns.keys() - old_turns.keys())
    for id, own in mine.turns:
        if id in there_turns:
            if id not in old_turns and own != there_turns[id]:
                turns.append((id, own))  # both stay
        elif id not in old_turns:
            turns.append((id, own))
        elif own != old_turns[id]:  # they removed it
            conflicts.add(f"turn/{id}")
            turns.append((id, own))
            ordered = False
    return Rebased(View(parts, tuple(turns)), frozenset(conflicts), ordered)


def _names(*views: View) -> Iterable[str]:
    return sorted({name for view in views for name in view.parts})


def _part(view: View, name: str) -> Any:
    return view.parts.get(name, ABSENT)

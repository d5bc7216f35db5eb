"""What a write says, as groups of the writing script's arguments."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from ..model.asset import SessionAsset
from .baseline import Baseline, digest, turn_id
from .codec import Encoded
from .commands import Argument
from .patches import Patch, TurnsPatch
from .reads import Tail
from .turns import id_of
from .writes import Group

__all__ = ["STAGED_TURNS", "base_group", "base_groups", "pairs", "patch_groups", "place", "whole_groups"]

STAGED_TURNS = 16
"""From so many turns on, a history is staged by plain commands, not passed through Lua."""


def whole_groups(asset: SessionAsset, new: Encoded) -> list[Group]:
    """Return what makes a session exactly this, but for its turns."""
    return [
        Group(b"W"),
        Group(b"t", (asset.updated_at_ms,)),
        Group(b"s", pairs(new.fields)),
        Group(b"m", (new.about.created_at, new.about.names)),
        Group(b"L", (new.about.labels,)),
    ]


def place(known: Baseline | Tail) -> bytes:
    """Return a revision and the operation that made it."""
    return b"%d:%b" % (known.revision, known.operation_id)


def base_group(known: Baseline | Tail) -> Group:
    """Return what a write is made from."""
    return Group(b"g", (place(known), known.turn_count))


def base_groups(known: Baseline, patch: Patch) -> list[Group]:
    """Return what the write is made from, and of what it changes what it was."""
    names = [*patch.set, *patch.removed]
    digests = [digest(data).hex() if (data := known.fields.get(name)) else "" for name in names]
    return [base_group(known), *([Group(b"e", digests)] if digests else [])]


def patch_groups(asset: SessionAsset, known: Baseline, new: Encoded, patch: Patch, turns: TurnsPatch) -> list[Group]:
    """Return what applies a patch to the session.

    Raises:
        ValueError: turns of a partial asset were removed.

    """
    groups = []
    if "updated_at_ms" in patch.set or patch.turns is None or not patch.turns.is_empty:
        groups.append(Group(b"t", (asset.updated_at_ms,)))
    if patch.set:
        groups.append(Group(b"s", pairs(patch.set)))
    if patch.removed:
        groups.append(Group(b"u", patch.removed))
    # Of what is not changed here, others may have another value by now.
    created_at = new.about.created_at if "created_at_ms" in patch.set else b""
    names = new.about.names if "project_context" in patch.set else b""
    if created_at or names:
        groups.append(Group(b"m", (created_at, names)))
    if "metadata.labels" in patch.set or "metadata.labels" in patch.removed:
        groups.append(Group(b"L", new.about[2:]))
    if known.skipped and turns.edits and _lost(known, new):
        raise ValueError("the asset is partial: no turn of it can be removed")
    first, last = turns.keep
    if turns.moves and last < 0:
        last = known.turn_count - 1
    if (first, last) != (0, -1) or known.skipped:  # nothing is cut, but it must be there
        groups.append(Group(b"x", (first, last)))
    if turns.edits:
        edits: list[Argument] = []
        for index, data in turns.edits:
            edits += (known.skipped + index, data)
        groups.append(Group(b"y", edits))
    if turns.pushed:
        groups.append(Group(b"p", turns.pushed))
    return groups


def _lost(known: Baseline, new: Encoded) -> bool:
    """Whether a turn is not there any more, whatever is in it."""
    return bool(Counter(map(turn_id, known.turns)) - Counter(map(id_of, new.turns)))


def pairs(fields: Mapping[str, bytes]) -> list[Argument]:
    """Return names and values in turn."""
    found: list[Argument] = []
    for pair in fields.items():
        found += pair
    return found

"""How an asset is brought up to what is stored, in place: what others wrote is taken over, what is changed here stays.

The usual case costs what is new: turns were inserted, and parts changed that are as they were here. All else is a
three-way merge of whole assets (`model.merge`).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, TypeVar

from ..model.asset import SessionAsset
from ..model.merge import merge
from ..model.sections import ConversationTurn, now_ms
from .baseline import Baseline, Digest, loaded_turns, resolved, set_baseline
from .codec import Codec
from .turns import decode_turns

__all__ = ["bring_up", "merged"]

A = TypeVar("A", bound=SessionAsset)


def bring_up(codec: Codec[A], asset: A, base: Baseline, theirs: Baseline, objects: Sequence[Any] | None = None) -> None:
    """Take over into an asset what others have changed, and remember what is stored.

    Of what both have changed, the asset's own stays, and collides again when it is saved.

    Args:
        codec: of the store.
        asset: is changed in place.
        base: what both had.
        theirs: what is stored.
        objects: the asset's turns as they were in `base`; without it, as they were when it was loaded.

    """
    objects = loaded_turns(asset, base.incarnation) if objects is None else objects
    if not (base.conflicting or base.digested) and _fast_forward(codec, asset, base, theirs, objects):
        return
    result, conflicts = merged(codec, asset, base, theirs)
    codec.assign(asset, result)
    if conflicts:
        set_baseline(asset, _retained(base, theirs, conflicts), None)
    else:
        set_baseline(asset, theirs, _stored_turns(asset, theirs))


def merged(codec: Codec[A], asset: A, base: Baseline, theirs: Baseline) -> tuple[A, tuple[str, ...]]:
    """Merge an asset with what is stored: a new asset, and the names of the parts that collide."""
    known, lost = _without_digests(codec, asset, resolved(base, theirs.fields, theirs.turns), theirs)
    old = codec.decode(base.id, known.fields, known.turns)
    new = codec.decode(theirs.id, theirs.fields, theirs.turns)
    result = merge(old, asset, new, now=now_ms())
    return result.asset, tuple(sorted({*result.conflicts, *lost}))


def _without_digests(codec: Codec[A], asset: A, base: Baseline, theirs: Baseline) -> tuple[Baseline, list[str]]:
    """Return a baseline without digests, and the parts that both have changed, from what is not known any more."""
    fields = {name: data for name, data in base.fields.items() if type(data) is not Digest}
    lost = []
    for name in base.fields.keys() - fields.keys():
        if (data := theirs.fields.get(name)) is not None:
            fields[name] = data
        if codec.encode_field(asset, name) != data:
            lost.append(name)
    return base._replace(fields=fields, turns=[turn for turn in base.turns if type(turn) is not Digest]), lost


def _retained(base: Baseline, theirs: Baseline, conflicts: Sequence[str]) -> Baseline:
    """Return what is stored, but for the parts that collide: of those, what they were before."""
    fields = dict(theirs.fields)
    for part in conflicts:
        name = _field_of(part, theirs.fields.keys() | base.fields.keys())
        if name in base.fields:
            fields[name] = base.fields[name]
        else:
            fields.pop(name, None)
    turns = base.turns if any(part.startswith("turn/") for part in conflicts) else theirs.turns
    return theirs._replace(fields=fields, turns=turns, conflicting=True)


def _field_of(part: str, fields: Any) -> str:
    """Return the field of the hash that a part lies in."""
    if part in fields:
        return part
    section, _, key = part.partition(".")
    if section == "extra":
        return f"..{key}" if "." in key else key
    return section


def _fast_forward(
    codec: Codec[A], asset: A, base: Baseline, theirs: Baseline, objects: Sequence[ConversationTurn] | None
) -> bool:
    """Take over what needs no merge; if anything does, change nothing and return False."""
    at = _insertion(base.turns, theirs.turns)
    turns = asset.history.turns
    if at is None or objects is None or len(turns) < len(objects) or not all(map(operator.is_, turns, objects)):
        return False
    inserted = decode_turns(theirs.id, theirs.turns[at : at + len(theirs.turns) - len(base.turns)])
    if inserted and len(turns) > len(base.turns):
        ids = {turn.id for turn in turns[len(base.turns) :]}
        if any(turn.id in ids for turn in inserted):
            return False
    names = [
        name for name in base.fields.keys() | theirs.fields.keys() if base.fields.get(name) != theirs.fields.get(name)
    ]
    if any(codec.encode_field(asset, name) != base.fields.get(name) for name in names):
        return False
    values = {name: codec.decode_part(theirs.id, name, data) for name in names if (data := theirs.fields.get(name))}
    for name in names:
        if name in values:
            codec.set_field(asset, name, values[name])
        else:
            codec.drop_field(asset, name)
    turns[at:at] = inserted
    set_baseline(asset, theirs, (*objects[:at], *inserted, *objects[at:]))
    return True


def _insertion(old: Sequence[bytes], new: Sequence[bytes]) -> int | None:
    """Return where turns were inserted, if nothing else happened to them; at the end, if none were."""
    if new[: len(old)] == old:
        return len(old)
    at = next((n for n, pair in enumerate(zip(old, new, strict=False)) if pair[0] != pair[1]), 0)
    tail = len(old) - at
    return at if len(new) > len(old) and list(new[-tail:]) == list(old[at:]) else None


def _stored_turns(asset: SessionAsset, theirs: Baseline) -> tuple[ConversationTurn, ...] | None:
    """Return the asset's turns as they are in what is stored; None if they are others."""
    turns = asset.history.turns[: len(theirs.turns)]
    return tuple(turns) if len(turns) == len(theirs.turns) else None

"""How an asset is brought up to what is stored, in place: what others wrote is taken over, what is changed here stays.

The usual case costs what is new: turns were inserted, and parts changed that are as they were here. All else is a
three-way merge of whole assets (`model.merge`).
"""

from __future__ import annotations

import contextlib
import operator
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Final, TypeVar

from ..errors import SerializationError
from ..model.asset import SessionAsset
from ..model.encoding import attempt
from ..model.merge import Merged, merge, settled
from ..model.parts import Digests, Entry, digests, drop_part, get_part, set_part
from ..model.sections import ConversationTurn, now_ms
from .baseline import Baseline, Digest, loaded_turns, resolved, set_baseline, turn_id
from .codec import Codec
from .turns import are_encoded, decode_id, decode_turns, encode_known_turn

__all__ = ["bring_up", "merged"]

A = TypeVar("A", bound=SessionAsset)

_SECTIONS: Final = ("history", "preferences", "project_context")  # of which there are smaller parts
_TURNS: Final = "history.turns"
_UNKNOWN: Final = b""  # as a digest: of nothing that there is


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
    codec = codec.of(asset)
    objects = loaded_turns(asset, base.incarnation) if objects is None else objects
    if not (base.conflicting or base.digested) and _fast_forward(codec, asset, base, theirs, objects):
        return
    result, conflicts = merged(codec, asset, base, theirs)
    codec.assign(asset, result)
    known = _retained(codec, base, theirs, conflicts) if conflicts else theirs
    set_baseline(asset, known, _stored_turns(asset, known))


def merged(codec: Codec[A], asset: A, base: Baseline, theirs: Baseline) -> tuple[A, tuple[str, ...]]:
    """Merge an asset with what is stored: a new asset, and the names of the parts that collide.

    Raises:
        SerializationError: the asset has a value that would not come back.

    """
    codec = codec.of(asset)
    new = codec.decode(theirs.id, theirs.fields, theirs.turns)
    base = resolved(base, theirs.fields, theirs.turns)

    def merge_with(base: Baseline) -> Merged[A]:
        old = _digests(codec, base, theirs, asset, new)
        for fields, turns in base.sent:
            old = settled(old, digests(codec.decode(base.id, fields, turns)), digests(new))
        return merge(old, asset, new, now=now_ms())

    result, refusal = attempt(merge_with, base)
    if refusal is not None:
        codec.encode(asset, theirs)  # says what it is
        raise SerializationError("asset", "it has no encoding")
    return result.asset, result.conflicts


def _digests(codec: Codec[A], base: Baseline, stored: Baseline, mine: A, theirs: A) -> Digests:
    """Return the digests of what both had. Of what is not known any more, both have something else now."""
    fields = {name: data for name, data in base.fields.items() if type(data) is not Digest}
    turns = [data for data in base.turns if type(data) is not Digest]
    unknown = base.fields.keys() - fields.keys()
    if not unknown and len(turns) == len(base.turns):
        return digests(codec.decode(base.id, fields, turns))
    here, there = digests(mine), digests(theirs)
    filled = {name: stored.fields[name] for name in unknown & stored.fields.keys()} | fields
    found = digests(codec.decode(base.id, filled, turns))
    for part in map(codec.part_of, unknown):
        for name in here.values.keys() | there.values.keys() | {part}:
            if name == part or (part in _SECTIONS and name.startswith(f"{part}.")):
                found.values[name] = _UNKNOWN
        for path in found.lists:
            if path != _TURNS and path.partition(".")[0] == part:
                found.lists[path] = _either(here.lists[path], there.lists[path])
    known = iter(found.lists[_TURNS])
    found.lists[_TURNS] = [_turn_entry(data, known) for data in base.turns]
    return found


def _turn_entry(data: bytes, known: Iterator[Entry]) -> Entry:
    return (decode_id(turn_id(data)), _UNKNOWN) if type(data) is Digest else next(known)


def _either(mine: Sequence[Entry], theirs: Sequence[Entry]) -> list[Entry]:
    """Return what a list may have had: what both have; and of what one of them has, something else."""
    common = Counter(mine) & Counter(theirs)
    differing = dict.fromkeys(key for key, _ in [*(Counter(mine) - common), *(Counter(theirs) - common)])
    return [*common.elements(), *((key, _UNKNOWN) for key in differing)]


def _retained(codec: Codec[A], base: Baseline, theirs: Baseline, conflicts: Sequence[str]) -> Baseline:
    """Return what is stored, but for the parts that collide: of those, what they were before."""
    fields = dict(theirs.fields)
    smaller = []
    for part in conflicts:
        name = codec.field_of_part(part)
        data = base.fields.get(name) if name is not None else None
        if name in _SECTIONS and type(data) is bytes:
            smaller.append(part)
        elif name is not None and data is not None:
            fields[name] = data
        elif name is not None:
            fields.pop(name, None)
    if smaller:
        fields |= _with_parts(codec, base, theirs, smaller)
    ids = {part.removeprefix("turn/") for part in conflicts if part.startswith("turn/")}
    # Turns that a compaction has dropped, which collides, keep their place.
    turns = base.turns if "history.compacted" in conflicts else _with_turns(base.turns, theirs.turns, ids)
    return theirs._replace(fields=fields, turns=turns, conflicting=True, digested=base.digested)


def _with_parts(codec: Codec[A], base: Baseline, theirs: Baseline, parts: Sequence[str]) -> dict[str, bytes]:
    """Return the sections of these parts: theirs, in which these parts are as they were before."""
    sections = {part.partition(".")[0] for part in parts}
    old = codec.decode(base.id, {**theirs.fields, **{name: base.fields[name] for name in sections}}, ())
    mixed = codec.decode(theirs.id, theirs.fields, ())
    for part in parts:
        try:
            set_part(mixed, part, get_part(old, part))
        except KeyError:  # there was none
            with contextlib.suppress(KeyError):
                drop_part(mixed, part)
    return {name: data for name in sections if (data := codec.encode_field(mixed, name)) is not None}


def _with_turns(old: Sequence[bytes], new: Sequence[bytes], ids: Collection[str]) -> Sequence[bytes]:
    """Return the new turns, in which those of these ids are as they were before."""
    if not ids:
        return new
    before = {id: data for data in old if (id := decode_id(turn_id(data))) in ids}
    turns = [before.pop(id, None) if (id := decode_id(turn_id(data))) in ids else data for data in new]
    return [*(data for data in turns if data is not None), *before.values()]


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
    if any(codec.is_required(name) for name in names if name not in theirs.fields):
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


def _stored_turns(asset: SessionAsset, known: Baseline) -> tuple[ConversationTurn, ...]:
    """Return the turns of a baseline: the asset's own, where it has them."""
    turns = asset.history.turns[: len(known.turns)]
    if are_encoded(turns, known.turns):
        return tuple(turns)
    own = {encode_known_turn(turn): turn for turn in asset.history.turns}
    return tuple([own.get(data) or _turn_of(known.id, data) for data in known.turns])


def _turn_of(id: str, data: bytes) -> ConversationTurn:
    if type(data) is Digest:  # all that is known of it
        return ConversationTurn(id=decode_id(data.id), role="", content="")
    return decode_turns(id, [data])[0]

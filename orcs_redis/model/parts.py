"""An asset as parts: what two writers can both have changed. Their names, their values, digests of them.

| part | named |
|---|---|
| a key of a map | `metadata.title`, `skill_configs.x`, `component_snapshots.x`, `preferences.custom.x`, `extra.x` |
| a turn, a fact, a context, by its key | `turn/<id>`, `project_context.learned_facts.x`, ...`.persistent_contexts.x` |
| a field of these sections | `project_context.name`, `preferences.coding_style.indent`, `history.max_turns` |
| any other top-level field | `created_at_ms`, `granted_commands`, a subclass' own |

A key is the rest of the name, whatever is in it. Turns that share an id share a name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import cache
from hashlib import blake2b
from typing import Any, Final, NamedTuple, TypeAlias, get_args, get_origin

import msgspec
from msgspec import Struct
from msgspec.structs import FieldInfo

from .asset import SessionAsset, json_fields
from .encoding import attempt, f32_text, named, parse_json
from .raw import content_of

__all__ = [
    "MAPS",
    "TIMES",
    "Digests",
    "Entry",
    "Parts",
    "Place",
    "changed",
    "digest",
    "digests",
    "drop_part",
    "get_part",
    "list_part",
    "parts_of",
    "place_of",
    "set_part",
    "settable",
]

TIMES: Final = frozenset({"created_at_ms", "updated_at_ms"})
"""The parts that never collide."""

MAPS: Final = ("metadata", "skill_configs", "component_snapshots")
"""The top-level maps of which each value is a part that is stored by itself."""

_TURN: Final = "turn/"
_TURNS: Final = "history.turns"
_FACTS: Final = "project_context.learned_facts"
_KEYS: Final = {_TURNS: "id", _FACTS: "key", "project_context.persistent_contexts": "id"}
_WHOLE: Final = "history.compacted"  # the one list that is not merged
_FIXED: Final = {"id", "version"}
_DIGEST_SIZE: Final = 16

Entry: TypeAlias = tuple[str, bytes]
"""Of an element of a list: its key (its digest where it has none) and its digest."""

_encode: Final = msgspec.json.Encoder(order="sorted").encode


class Parts(NamedTuple):
    """What an asset consists of: lists by the path of their field, and all other parts by name."""

    values: dict[str, Any]
    lists: dict[str, list[Any]]


class Digests(Struct, frozen=True):
    """The same as digests: all that a merge has to know of what both sides had."""

    values: dict[str, bytes] = {}
    lists: dict[str, list[Entry]] = {}


class Place(NamedTuple):
    """Where a part is: the fields that lead to it, its key if it is in a map or a list, its type."""

    fields: tuple[str, ...]
    key: str | None
    hint: Any


def parts_of(asset: SessionAsset) -> Parts:
    """Return all parts of an asset, by reference."""
    parts = Parts({}, {})
    for name in asset.__struct_fields__:
        value = getattr(asset, name)
        if name not in SessionAsset.__struct_fields__:
            parts.values[name] = value
        elif name not in _FIXED:
            _collect(value, name, parts)
    return parts


def _collect(value: Any, path: str, parts: Parts) -> None:
    if isinstance(value, Struct):
        for name in value.__struct_fields__:
            _collect(getattr(value, name), f"{path}.{name}", parts)
    elif isinstance(value, dict):
        parts.values.update({f"{path}.{key}": item for key, item in value.items()})
    elif isinstance(value, list) and path != _WHOLE:
        parts.lists[path] = value
    else:
        parts.values[path] = value


def digest(value: Any) -> bytes:
    """Return the digest of a value: of its JSON, keys sorted."""
    return blake2b(_encode(value), digest_size=_DIGEST_SIZE).digest()


def digests(asset: SessionAsset) -> Digests:
    """Return the digests of an asset that can be stored; the same once it went through orcs' JSON."""
    parts = parts_of(asset)
    values = {name: digest(value) for name, value in parts.values.items()}
    for name, field in json_fields(type(asset)).items():
        if name not in SessionAsset.__struct_fields__:
            # JSON may give another value of that type: an integer comes back as the float that the field wants.
            values[name] = digest(parse_json(_encode(parts.values[name]), field.hint))
    return Digests(values, {path: [_entry(path, item) for item in items] for path, items in parts.lists.items()})


def _entry(path: str, item: Any) -> Entry:
    known = item
    if path == _FACTS:
        # orcs keeps the confidence with the precision of 32 bits.
        known = msgspec.structs.replace(item, confidence=f32_text(item.confidence))
    elif path == _TURNS and item.raw is not None and item.content == content_of(item.raw, item.role):
        # Derived: given or not, it is the same, and so it is to another version of the projection.
        known = msgspec.structs.replace(item, content="")
    data = digest(known)
    return (getattr(item, _KEYS[path]) if path in _KEYS else data.hex()), data


def changed(old: Digests, new: Digests) -> set[str]:
    """Return the names of the parts that differ; of a list that has the same in another order, its field's."""
    names = {name for name in old.values.keys() | new.values.keys() if old.values.get(name) != new.values.get(name)}
    for path in old.lists.keys() | new.lists.keys():
        before, after = old.lists.get(path, []), new.lists.get(path, [])
        if before != after:
            counts, others = Counter(before), Counter(after)
            differing = (counts - others) | (others - counts)
            names |= {list_part(path, key) for key, _ in differing} or {path}
    return names


def list_part(path: str, key: str) -> str:
    """Return the name of the part that an element of the list at ``path`` belongs to."""
    if path == _TURNS:
        return _TURN + key
    return f"{path}.{key}" if path in _KEYS else path


def place_of(name: str, asset_type: type[SessionAsset] = SessionAsset) -> Place:
    """Find a part, or a section that has parts.

    Raises:
        ValueError: there is none of this name, or it is a map.

    """
    if not isinstance(name, str) or attempt(str.encode, name)[1] is not None:
        raise ValueError("a part's name is text")
    is_turn = name.startswith(_TURN)
    rest = f"{_TURNS}.{name[len(_TURN) :]}" if is_turn else name
    fields: tuple[str, ...] = ()
    hint: Any = asset_type
    while True:
        head, dot, rest = rest.partition(".")
        field = _fields(hint).get(head)
        fields += (head,)
        path = ".".join(fields)
        own = fields[0] not in SessionAsset.__struct_fields__
        if field is None or (path == _TURNS and not is_turn):
            break
        hint = field.type
        if get_origin(hint) is dict and not own:
            if not dot:
                raise ValueError(f"{path} is a map: a part of it is named {path}.<key>")
            return Place(fields, rest, get_args(hint)[1])
        if not dot:
            return Place(fields, None, hint)
        if path in _KEYS:
            return Place(fields, rest, get_args(hint)[0])
        if own or not isinstance(hint, msgspec.StructMeta):
            break
    raise ValueError(f"no such part: {named(name)}")


@cache
def _fields(kind: type[Struct]) -> dict[str, FieldInfo]:
    return {field.name: field for field in msgspec.structs.fields(kind)}


def settable(name: str, asset_type: type[SessionAsset] = SessionAsset, *, unset: bool = False) -> Place:
    """Find what a commit can set, or unset: a key of a top-level map, or a section.

    Raises:
        ValueError: it can't, and why.

    """
    place = place_of(name, asset_type)
    section = place.fields[0]
    if section == "history":
        raise ValueError(f"{named(name)}: turns are changed by append, pop, truncate and replace_turn")
    if section in _FIXED:
        raise ValueError(f"{section} can't be changed")
    if len(place.fields) > 1:
        raise ValueError(f"{named(name)} is not stored by itself: set {section}, or save an asset")
    fields = json_fields(asset_type)
    if section == "extra" and place.key in {field.key for field in fields.values()}:
        raise ValueError(f"{named(name)}: a field of this name exists")
    if unset and place.key is None and fields[section].required:
        raise ValueError(f"{section} can't be unset: every session has it")
    return place


def get_part(asset: SessionAsset, name: str) -> Any:
    """Return a part's value; of turns with one id, the last. KeyError if there is none."""
    place = place_of(name, type(asset))
    owner = _owner(asset, place)
    if isinstance(owner, list):
        return owner[next(_positions(owner, place))]
    return getattr(owner, place.fields[-1]) if place.key is None else owner[place.key]


def set_part(asset: SessionAsset, name: str, value: Any) -> None:
    """Set a part to a value of its type; an element of a list that is not there goes to its end."""
    place = place_of(name, type(asset))
    owner = _owner(asset, place)
    if place.key is None:
        setattr(owner, place.fields[-1], value)
    elif isinstance(owner, dict):
        owner[place.key] = value
    else:
        try:
            owner[next(_positions(owner, place))] = value
        except KeyError:
            owner.append(value)


def drop_part(asset: SessionAsset, name: str) -> None:
    """Remove a part, or set a field to its default. KeyError if there is none, ValueError if it has no default."""
    place = place_of(name, type(asset))
    owner = _owner(asset, place)
    if place.key is not None:
        del owner[next(_positions(owner, place)) if isinstance(owner, list) else place.key]
        return
    field = _fields(owner.__class__)[place.fields[-1]]
    if field.required:
        raise ValueError(f"{named(name)} can't be dropped: every session has it")
    made = field.default_factory is not msgspec.NODEFAULT
    setattr(owner, field.name, field.default_factory() if made else field.default)


def _owner(asset: SessionAsset, place: Place) -> Any:
    owner: Any = asset
    for name in place.fields if place.key is not None else place.fields[:-1]:
        owner = getattr(owner, name)
    return owner


def _positions(items: list[Any], place: Place) -> Iterator[int]:
    """Yield where a key is in a list, from its end; KeyError in place of the end."""
    key = _KEYS[".".join(place.fields)]
    yield from (n for n in reversed(range(len(items))) if getattr(items[n], key) == place.key)
    raise KeyError(place.key)

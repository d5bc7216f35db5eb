"""What a commit says, checked, as groups of the writing script's arguments; and what its answer means."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import SerializationError
from ..model.asset import check_time
from ..model.encoding import encode, named
from ..model.labels import check_labels, valid_labels
from ..model.meta import Committed
from ..model.parts import TIMES, settable
from ..model.sections import ConversationTurn, ProjectContext
from .codec import Codec
from .commands import Argument
from .records import check_record_key
from .writes import Group, Written

__all__ = ["CommitArguments", "commit_groups", "committed"]

_NO_LABELS = encode({})


class CommitArguments(NamedTuple):
    """What a commit changes; its conditions are given apart."""

    append: Sequence[ConversationTurn] = ()
    pop: int = 0
    truncate: int | None = None
    set: Mapping[str, object] | None = None
    unset: Collection[str] = ()
    put: Mapping[str, bytes] | None = None
    put_new: Mapping[str, bytes] | None = None
    drop: Collection[str] = ()
    labels: Mapping[str, str | None] | None = None


def commit_groups(codec: Codec[Any], changes: CommitArguments) -> list[Group]:
    """Return the groups of what a commit changes.

    Raises:
        ValueError: it changes nothing, or one thing twice; a part, key or label can't be.
        SerializationError: a value that would not come back, or too large.

    """
    for name in ("unset", "drop"):
        if isinstance(getattr(changes, name), str):
            raise ValueError(f"{name} is a collection of names")
    for name in ("set", "put", "put_new", "labels"):
        if not isinstance(getattr(changes, name) or {}, Mapping):
            raise TypeError(f"{name} is a map")
    groups = [*_part_groups(codec, changes), *_turn_groups(codec, changes), *_record_groups(codec, changes)]
    if not groups:
        raise ValueError("a commit changes something")
    return groups


def committed(changes: CommitArguments, written: Written) -> Committed:
    """Return what a commit came to."""
    bits = "".join(f"{byte:08b}" for byte in written.bits) + "0"
    new = changes.put_new or {}
    return Committed(written.revision, bits[0] == "1", {key: bits[n] == "1" for n, key in enumerate(new, 1)})


def _turn_groups(codec: Codec[Any], changes: CommitArguments) -> list[Group]:
    groups = []
    if changes.pop and changes.truncate is not None:
        raise ValueError("a commit pops or truncates, not both")
    if type(changes.pop) is not int or changes.pop < 0:
        raise ValueError("pop is a number of turns")
    if changes.pop:
        groups.append(Group(b"z", (min(changes.pop, 2**31),)))
    if changes.truncate is not None:
        if type(changes.truncate) is not int or changes.truncate < 0:
            raise ValueError("truncate is a number of turns")
        groups.append(Group(b"q", (min(changes.truncate, 2**31),)))
    if isinstance(changes.append, ConversationTurn):
        raise TypeError("append is a sequence of turns")
    if changes.append:
        groups.append(Group(b"p", codec.turns(changes.append)))
    return groups


def _part_groups(codec: Codec[Any], changes: CommitArguments) -> list[Group]:
    values: list[Argument] = []
    fields: set[str] = set()
    groups = []
    labels: bytes | None = None
    for name, value in (changes.set or {}).items():
        place = settable(name, codec.asset_type)
        field, data = codec.encode_part(place, value)
        if field in TIMES:
            check_time(field, value)
        values += (field, data)
        fields.add(field)
        if field == "updated_at_ms":
            groups.append(Group(b"t", (int(value),)))  # type: ignore[call-overload]  # encoded as one above
        if field == "metadata.labels":
            labels = encode(dict(sorted(value.items()))) if valid_labels(value) else _NO_LABELS
    removed = [codec.field_of(settable(name, codec.asset_type, unset=True)) for name in changes.unset]
    if len({*removed}) < len(removed) or not fields.isdisjoint(removed):
        raise ValueError("a part is set and unset, or unset twice")
    if values:
        groups.append(Group(b"s", values))
    if removed:
        groups.append(Group(b"u", removed))
        labels = _NO_LABELS if "metadata.labels" in removed else labels
    if (about := _index_group(changes.set or {})) is not None:
        groups.append(about)
    return groups + _label_groups(changes.labels, labels)


def _index_group(parts: Mapping[str, Any]) -> Group | None:
    """Return what the index metadata takes over from parts that are set."""
    created, context = parts.get("created_at_ms"), parts.get("project_context")
    if created is None and context is None:
        return None
    names = b"" if not isinstance(context, ProjectContext) else encode(context.name) + encode(context.root_path)
    return Group(b"m", (b"" if created is None else created.to_bytes(8), names))


def _label_groups(labels: Mapping[str, str | None] | None, whole: bytes | None) -> list[Group]:
    if labels is None or not labels:
        return [] if whole is None else [Group(b"L", (whole,))]
    if whole is not None:
        raise ValueError("labels are given as a whole and one by one")
    check_labels({name: value for name, value in labels.items() if value is not None})
    for name, value in labels.items():
        if value is None:
            check_labels({name: "x"})
    changes: list[Argument] = []
    for name, value in labels.items():
        changes += (name, value or "")
    return [Group(b"j", changes)]


def _record_groups(codec: Codec[Any], changes: CommitArguments) -> list[Group]:
    put, new = changes.put or {}, changes.put_new or {}
    prefixes = [key[:-1] for key in changes.drop if isinstance(key, str) and key.endswith("*")]
    keys = [key for key in changes.drop if not (isinstance(key, str) and key.endswith("*"))]
    for key in (*put, *new, *keys):
        _check_key(key)
    for prefix in prefixes:
        if "*" in prefix:
            raise ValueError("drop: a prefix has one star, at its end")
        if prefix:
            check_record_key(prefix)
    named_keys = [*put, *new, *keys]
    if len({*named_keys}) < len(named_keys) or len({*prefixes}) < len(prefixes):
        raise ValueError("a record is put or dropped twice")
    groups = []
    for letter, records in ((b"P", put), (b"N", new)):
        if records:
            groups.append(Group(letter, _records(codec, records)))
    if keys:
        groups.append(Group(b"D", keys))
    if prefixes:
        groups.append(Group(b"R", prefixes))
    return groups


def _records(codec: Codec[Any], records: Mapping[str, bytes]) -> list[Argument]:
    values: list[Argument] = []
    for key, data in records.items():
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise TypeError(f"a record is bytes, not {type(data).__name__}")
        if not data:
            raise SerializationError(f"records.{named(key)}", "no bytes at all")
        data = bytes(data)
        if len(data) > codec.max_turn_bytes:
            raise SerializationError(f"records.{named(key)}", f"{len(data)} bytes, of {codec.max_turn_bytes} allowed")
        values += (key, data)
    return values


def _check_key(key: str) -> None:
    if check_record_key(key).endswith(b"*"):
        raise ValueError("the key of a record does not end in a star")

"""What the server keeps, key by key, against what the log makes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from orcs_redis.protocol.keys import Partition

from .reference import Stored
from .rules import Violation
from .views import labels_of, view_of

if TYPE_CHECKING:
    from .world import World

__all__ = ["check_state"]


def check_state(world: World) -> None:
    """Judge every key of every partition."""
    for partition in world.partitions:
        _check_indices(world, partition)
    for id in world.ids:
        _check_session(world, id)


def _check_session(world: World, id: str) -> None:
    partition, stored = world.keyspace.of(id), world.model.stored(id)
    fields, turns, records, names = world.server.check(
        ("HGETALL", partition.session(id)), ("LRANGE", partition.turns(id), 0, -1),
        ("HGETALL", partition.records(id)), ("ZRANGE", partition.names(id), 0, -1, "WITHSCORES"),
    )  # fmt: skip
    if stored is None:
        if fields or turns or records or names:
            raise Violation("state", f"{id} is there, and was deleted or never made")
        return
    _equal(f"the fields of {id}", _decoded(fields), _decoded(fields_of(stored)))
    _equal(f"the turns of {id}", tuple(turns), stored.turns)
    _equal(f"the records of {id}", records, stored.records)
    if [name for name, score in names] != sorted(stored.records) or any(score for _, score in names):
        raise Violation("records", f"{id} has the names {names}, and the records {sorted(stored.records)}")


def fields_of(stored: Stored) -> dict[bytes, bytes]:
    """Return all fields of a session's hash."""
    marks = {
        ".revision": stored.revision, ".turns": len(stored.turns), ".born": stored.born,
        ".reshaped": stored.reshaped, ".parts": stored.parts,
    }  # fmt: skip
    own = {name.encode(): str(value).encode() for name, value in marks.items()}
    return own | {b".op": stored.op} | {name.encode(): data for name, data in stored.fields.items()}


def _decoded(fields: dict[bytes, bytes]) -> dict[bytes, Any]:
    """Make them readable, and one map of labels equal to another."""
    return {name: data if name.startswith(b".") else msgspec.msgpack.decode(data) for name, data in fields.items()}


def _check_indices(world: World, partition: Partition) -> None:
    deleted = world.model.graves[partition.number]
    there = {
        id: session.stored
        for id, session in world.model.sessions.items()
        if session.stored is not None and world.keyspace.of(id) is partition
    }
    changes, listed, graves, meta_of_graves, metas, labels = world.server.check(
        ("ZRANGE", partition.changes, 0, -1, "WITHSCORES"), ("ZRANGE", partition.updated, 0, -1, "WITHSCORES"),
        ("ZRANGE", partition.deleted, 0, -1, "WITHSCORES"), ("HKEYS", partition.deleted_meta),
        ("HGETALL", partition.meta), ("ZRANGE", partition.labels, 0, -1, "WITHSCORES"),
    )  # fmt: skip
    revisions = {id: stored.revision for id, stored in there.items()}
    _equal("the index of changes", _scores(changes), revisions | deleted)
    _equal("the index of times", _scores(listed), {id: stored.updated_at for id, stored in there.items()})
    _equal("the tombstones", _scores(graves), deleted)
    _equal("their metadata", sorted(map(bytes.decode, meta_of_graves)), sorted(deleted))
    _equal("the sessions with metadata", sorted(map(bytes.decode, metas)), sorted(there))
    for id, stored in there.items():
        meta = metas[id.encode()]
        wanted = [
            stored.revision, stored.updated_at, len(stored.turns), stored.op[:8], stored.written_at, stored.created_at,
            stored.labels, *stored.names,
        ]  # fmt: skip
        _equal(f"the metadata of {id}", msgspec.msgpack.decode(meta), wanted)
        if meta[43:52] != b"\xcf" + stored.created_at.to_bytes(8):
            raise Violation("state", f"the metadata of {id} has no fixed widths: {meta!r}")
    members = [member for id, stored in there.items() for member in _members(id, stored)]
    if [member for member, _ in labels] != sorted(members) or any(score for _, score in labels):
        raise Violation("index", f"the index of labels has {labels}, not {sorted(members)}")


def _members(id: str, stored: Stored) -> list[bytes]:
    parts = view_of(stored).parts
    pairs = {**labels_of(parts.get("metadata.labels")), "": parts["project_context.root_path"]}
    return [
        len(name.encode()).to_bytes() + name.encode() + len(value.encode()).to_bytes(4) + value.encode() + id.encode()
        for name, value in pairs.items()
        if value is not None
    ]


def _scores(members: list[tuple[bytes, float]]) -> dict[str, int]:
    return {id.decode(): int(score) for id, score in members}


def _equal(what: str, found: Any, wanted: Any) -> None:
    if found != wanted:
        raise Violation("state", f"{what}: {found}, not {wanted}")

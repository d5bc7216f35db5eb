"""What a server holds, read without any of the store's own code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import redis

__all__ = ["NAMESPACE", "PARTITIONS", "take_dump"]

NAMESPACE = "chaos"
PARTITIONS = 2


def take_dump(client: redis.Redis) -> list[dict[str, Any]]:
    """Return what the server holds, read without any of the store's own code: one mapping for each partition."""
    keys = {key.decode() for key in client.scan_iter(match="*", count=10_000)}
    keys.discard(f"{NAMESPACE}:layout")
    dump = []
    for number in range(PARTITIONS):
        prefix = f"{{{NAMESPACE}/{number}}}:"
        read: Any = client

        def scores(name: str, prefix: str = prefix, read: Any = read) -> dict[str, int]:
            return {id.decode(): int(score) for id, score in read.zrange(prefix + name, 0, -1, withscores=True)}

        own = {key for key in keys if key.startswith(prefix)}
        sessions = {}
        for key in sorted(own):
            if key.startswith(f"{prefix}session:"):
                id = key.removeprefix(f"{prefix}session:")
                fields = read.hgetall(key)
                turns = [msgspec.msgpack.decode(turn) for turn in read.lrange(f"{prefix}turns:{id}", 0, -1)]
                sessions[id] = {
                    "revision": int(fields[b".revision"]),
                    "turns": int(fields[b".turns"]),
                    "ids": [turn[0] for turn in turns],
                    "metadata": {
                        name.decode().removeprefix("metadata."): msgspec.msgpack.decode(data)
                        for name, data in fields.items()
                        if name.startswith(b"metadata.")
                    },
                    "updated_at_ms": msgspec.msgpack.decode(fields[b"updated_at_ms"]),
                }
                records = read.hgetall(f"{prefix}records:{id}")
                sessions[id]["snapshot"] = {
                    "turns": [[turn[0], turn[3].removeprefix("of ")] for turn in turns],
                    "parts": _parts(fields),
                    "records": {name.decode(): data.decode() for name, data in records.items()},
                }
                sessions[id]["names"] = [name.decode() for name in read.zrange(f"{prefix}names:{id}", 0, -1)]
                own -= {key, *(f"{prefix}{kind}:{id}" for kind in ("turns", "records", "names"))}
        # Staged turns of a save that never came run out by themselves, and so do leases.
        passing = (f"{prefix}staging:", f"{prefix}lease:")
        strays = {key for key in own if not key.startswith(passing) or read.pttl(key) == -1}
        strays -= {
            prefix + name
            for name in ("state", "updated", "meta", "changes", "deleted", "deleted:meta", "labels", "fence", "leases")
        }
        state = read.hgetall(f"{prefix}state")
        dump.append(
            {
                "revision": int(state[b"revision"]),
                "sessions": sessions,
                "meta": {
                    id.decode(): msgspec.msgpack.decode(data)[:3] for id, data in read.hgetall(f"{prefix}meta").items()
                },
                "index": _labels(read.zrange(f"{prefix}labels", 0, -1)),
                "tails": {
                    id.decode(): msgspec.msgpack.decode(data)[6:] for id, data in read.hgetall(f"{prefix}meta").items()
                },
                "updated": scores("updated"),
                "changes": scores("changes"),
                "deleted": scores("deleted"),
                "deleted_meta": sorted(id.decode() for id in read.hkeys(f"{prefix}deleted:meta")),
                "windows": [_revisions(data) for name, data in state.items() if name.startswith(b"w")],
                "strays": sorted(strays),
            }
        )
    return dump


def _revisions(window: bytes) -> list[int]:
    answer_bits = 0x40  # in the place of a revision's first byte
    places = [at for at in range(16, len(window), 16) if window[at + 8] != answer_bits]
    return [int.from_bytes(window[at + 9 : at + 16]) for at in places]


def _parts(fields: Mapping[bytes, bytes]) -> dict[str, Any]:
    """Return the parts that workers change, by name."""
    names = [name for name in fields if name.startswith(b"metadata.")]
    parts = {name.decode(): msgspec.msgpack.decode(fields[name]) for name in names}
    project = msgspec.msgpack.decode(fields[b"project_context"])
    if project.get("name") is not None:
        parts["project_context.name"] = project["name"]
    return parts


def _labels(members: Sequence[bytes]) -> list[list[str]]:
    """Return id, name and value of each member of the index."""
    found = []
    for member in members:
        name_end = 1 + member[0]
        value_at = name_end + 4
        value_end = value_at + int.from_bytes(member[name_end:value_at])
        found.append([member[value_end:].decode(), member[1:name_end].decode(), member[value_at:value_end].decode()])
    return sorted(found)

"""Index entries and records as the writing script leaves them, written with a plain client."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import msgspec

from orcs_redis.protocol.index import label_key
from orcs_redis.protocol.keys import Keyspace

__all__ = ["ByHand"]


class ByHand:
    """A namespace's index and records; `client` may be a pipeline."""

    def __init__(self, client: Any, namespace: str, partitions: int = 1) -> None:
        self.client = client
        self.keyspace = Keyspace(namespace, partitions)

    def session(
        self, id: str, updated_at_ms: int, project: str | None = None, labels: Mapping[str, str] | None = None
    ) -> None:
        """Put a session that was not there into the index."""
        keys, labels = self.keyspace.of(id), labels or {}
        meta = b"\x99\xcf%b\xcf%b\xce%b\xc4\x08originof\xcf%b\xcf%b" % (
            struct.pack(">Q", 7), struct.pack(">Q", updated_at_ms), struct.pack(">I", 3), struct.pack(">Q", 2_000_000),
            struct.pack(">Q", 1_000),
        )  # fmt: skip
        tail = [dict(sorted(labels.items())), "name", project]
        self.client.hset(keys.meta, id, meta + b"".join(map(msgspec.msgpack.encode, tail)))
        self.client.zadd(keys.updated, {id: updated_at_ms})
        found = [*labels.items(), *([] if project is None else [("", project)])]
        if found:
            self.client.zadd(keys.labels, {label_key(*label) + id.encode(): 0 for label in found})

    def drop(self, id: str) -> None:
        """Take a session out of the index."""
        keys = self.keyspace.of(id)
        for member in self.client.zrange(keys.labels, 0, -1):
            if member.endswith(id.encode()):
                self.client.zrem(keys.labels, member)
        self.client.hdel(keys.meta, id)
        self.client.zrem(keys.updated, id)

    def record(self, id: str, key: str, value: bytes) -> None:
        """Put a record into a session."""
        keys = self.keyspace.of(id)
        self.client.hset(keys.records(id), key, value)
        self.client.zadd(keys.names(id), {key: 0})

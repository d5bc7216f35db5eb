"""The names of keys: a namespace, its partitions, and what lies in each (docs/protocol.md)."""

from __future__ import annotations

import unicodedata
from zlib import crc32

__all__ = ["LAYOUT_VERSION", "MAX_PARTITIONS", "Keyspace", "Partition", "check_namespace"]

LAYOUT_VERSION = 2
MAX_PARTITIONS = 1024  # a list asks all of them at the same time


def check_namespace(namespace: str) -> str:
    """Return the namespace, or raise ValueError: 1 to 100 bytes, no braces, no control characters."""
    try:
        size = len(namespace.encode())
    except (UnicodeEncodeError, AttributeError) as exc:
        raise ValueError("namespace is not text") from exc
    if not 1 <= size <= 100:
        raise ValueError(f"namespace has {size} bytes, not 1 to 100")
    if any(char in "{}" or unicodedata.category(char) == "Cc" for char in namespace):
        raise ValueError("namespace has braces or control characters")
    return namespace


class Partition:
    """One partition's keys; they share a hash tag, so that one script may use them together."""

    __slots__ = (
        "changes", "deleted", "deleted_meta", "fence", "labels", "leases", "meta", "number", "prefix", "state",
        "updated",
    )  # fmt: skip

    def __init__(self, namespace: str, number: int) -> None:
        self.number = number
        self.prefix = prefix = f"{{{namespace}/{number}}}:"
        self.state = prefix + "state"
        self.updated = prefix + "updated"
        self.meta = prefix + "meta"
        self.changes = prefix + "changes"
        self.deleted = prefix + "deleted"
        self.deleted_meta = prefix + "deleted:meta"
        self.fence = prefix + "fence"
        self.leases = prefix + "leases"
        self.labels = prefix + "labels"

    def session(self, id: str) -> str:
        """HASH: a session's sections."""
        return f"{self.prefix}session:{id}"

    def turns(self, id: str) -> str:
        """LIST: a session's turns."""
        return f"{self.prefix}turns:{id}"

    def records(self, id: str) -> str:
        """HASH: a session's records by their keys."""
        return f"{self.prefix}records:{id}"

    def names(self, id: str) -> str:
        """ZSET, all scores 0: the keys of a session's records, in order."""
        return f"{self.prefix}names:{id}"

    def lease(self, id: str) -> str:
        """HASH: who has the right to a session."""
        return f"{self.prefix}lease:{id}"

    def staging(self, name: str) -> str:
        """LIST: turns on their way into a session."""
        return f"{self.prefix}staging:{name}"


class Keyspace:
    """A namespace's keys; a session's partition is CRC-32 (as in zlib) of its id's UTF-8, modulo their number."""

    def __init__(self, namespace: str, partitions: int) -> None:
        self.namespace = namespace
        self.partitions = [Partition(namespace, number) for number in range(partitions)]

    @staticmethod
    def layout(namespace: str) -> str:
        """HASH: the namespace's descriptor."""
        return f"{namespace}:layout"

    def of(self, id: str) -> Partition:
        """Return the partition a session belongs to."""
        partitions = self.partitions
        return partitions[0] if len(partitions) == 1 else partitions[crc32(id.encode()) % len(partitions)]

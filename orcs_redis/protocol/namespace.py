"""How a namespace is opened: its descriptor is read or created, and the rights are probed.

What a store then knows of it, `Namespace`, is in writer.py.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence

from .. import scripts
from ..errors import LayoutError, PermissionDeniedError, StorageError, UnsupportedServerError
from ..interrupts import raise_interruption
from .attempts import ScriptNotLoaded, check_server, not_callable_error, translate
from .commands import Command, Reply, as_error, as_map
from .keys import LAYOUT_VERSION, MAX_PARTITIONS, Keyspace
from .request import Plan, Request
from .writer import Namespace

__all__ = ["Create", "Probe", "ReadLayout", "open_namespace"]

_log = logging.getLogger("orcs_redis")
_POLICY = re.compile(rb"maxmemory_policy:(?!noeviction)([a-z-]+)")

# What the scripts call besides TIME and PUBLISH, and what goes ahead of them; tests/test_rights.py reads the scripts.
_WRITE_COMMANDS = (
    "EVALSHA", "EXEC", "EXISTS", "HDEL", "HGET", "HINCRBY", "HLEN", "HMGET", "HRANDFIELD", "HSET", "LLEN", "LSET",
    "LTRIM", "MULTI", "PERSIST", "PEXPIRE", "PUBLISH", "RENAME", "RPUSH", "TIME", "UNLINK", "ZADD", "ZCARD", "ZRANGE",
    "ZREM", "ZSCORE",
)  # fmt: skip
_OTHER_COMMANDS = (
    "EVAL",
    "GET",
    "HGETALL",
    "LRANGE",
    "PTTL",
    "SET",
    "SUBSCRIBE",
    "UNSUBSCRIBE",
    "ZCOUNT",
    "ZMSCORE",
    "ZREMRANGEBYSCORE",
)


class ReadLayout(Request["dict[bytes, bytes]"]):
    """The namespace's descriptor; empty if there is none."""

    __slots__ = ("_key",)

    def __init__(self, name: str) -> None:
        super().__init__()
        self._key = Keyspace.layout(name)

    def commands(self) -> Sequence[Command]:
        """HELLO returns the server's version, also over a client that was injected; INFO may be denied."""
        return [("HELLO",), ("HGETALL", self._key), ("INFO", "memory")]

    def decode(self, replies: Sequence[Reply]) -> dict[bytes, bytes]:
        """Return the descriptor's fields."""
        text = as_error(replies[0])
        if text is None:
            check_server(replies[0])
        elif not isinstance(translate(text), PermissionDeniedError):
            check_server({b"version": b"0"})
        if (as_error(replies[1]) or "").startswith("WRONGTYPE"):
            raise LayoutError(f"{self._key} is not a descriptor of this store's layout")
        self._check(replies[1:2])
        if as_error(replies[2]) is None and (policy := _POLICY.search(bytes(replies[2]))):
            name = policy[1].decode(errors="replace")
            _log.warning("the server's maxmemory-policy is %s: it may evict sessions; noeviction is needed", name)
        return dict(as_map(replies[1]))


class Create(Request[str]):
    """The creation of a namespace (scripts/create.lua)."""

    __slots__ = ("_arguments", "_keys")

    def __init__(self, name: str, partitions: int) -> None:
        super().__init__()
        keyspace = Keyspace(name, partitions)
        self._keys = [Keyspace.layout(name), *(partition.state for partition in keyspace.partitions)]
        self._arguments = (LAYOUT_VERSION, os.urandom(8).hex())

    def commands(self) -> Sequence[Command]:
        """Call the script, which does nothing if it was called before."""
        return [self._script(scripts.CREATE, self._keys, self._arguments)]

    def decode(self, replies: Sequence[Reply]) -> str:
        """Return its answer.

        Raises:
            PermissionDeniedError, UnsupportedServerError: a command can't be called.

        """
        self._check(replies)
        answer, command = replies[0]
        if answer in (b"DENIED", b"MISSING"):
            raise not_callable_error(answer, command.decode())
        return bytes(answer).decode()


class Probe(Request["StorageError | None"]):
    """Whether the user may do what the writing script does: the error if not (scripts/probe.lua)."""

    __slots__ = ("_namespace",)

    def __init__(self, namespace: Namespace) -> None:
        super().__init__()
        self._namespace = namespace

    def commands(self) -> Sequence[Command]:
        """Call the script, and ask for the partitions' revisions: the first write will name one."""
        partitions = self._namespace.keyspace.partitions
        keys = (partitions[0].state, partitions[0].changes)
        channel = self._namespace.channel(partitions[0].changes)
        probe = self._script(scripts.PROBE, keys, (channel, *_WRITE_COMMANDS, *_OTHER_COMMANDS))
        return [probe, *(("HGET", partition.state, "revision") for partition in partitions)]

    def decode(self, replies: Sequence[Reply]) -> StorageError | None:
        """Return what is denied. Another obstacle (a full disk, say) may pass, and is no reason not to read.

        Raises:
            UnsupportedServerError: a command is missing or was renamed.

        """
        for partition, revision in zip(self._namespace.keyspace.partitions, replies[1:], strict=True):
            if type(revision) is bytes and revision.isdigit():
                self._namespace.observe(partition, int(revision))
        text = as_error(replies[0])
        if text is not None:
            problem = translate(text)
            if isinstance(problem, (ScriptNotLoaded, UnsupportedServerError)):
                self._check(replies)
            denies = isinstance(problem, PermissionDeniedError)
            return PermissionDeniedError(f"the user may not write: {problem}") if denies else None
        found = list(zip(replies[0][::2], map(bytes.decode, replies[0][1::2]), strict=True))
        if missing := [command for answer, command in found if answer == b"MISSING"]:
            raise not_callable_error(b"MISSING", ", ".join(missing))
        denied = [command for answer, command in found if answer == b"DENIED" and command in _WRITE_COMMANDS]
        if denied:
            return not_callable_error(b"DENIED", ", ".join(denied))
        return None


def open_namespace(name: str, partitions: int | None) -> Plan[Namespace]:
    """Read the namespace's descriptor, or create it.

    Raises:
        LayoutError: another version, another number of partitions, or something else's keys.

    """
    fields = yield ReadLayout(name)
    if not fields:
        answer = yield Create(name, partitions or 1)
        if answer == "STRAY":
            raise LayoutError(f"namespace {name!r} has data but no descriptor: it was lost or is foreign")
        fields = yield ReadLayout(name)
    try:
        version, count = int(fields[b"version"]), int(fields[b"partitions"])
        incarnation = fields[b"incarnation"]
    except (KeyError, ValueError) as error:
        raise_interruption(error)
        raise LayoutError(f"{Keyspace.layout(name)} is not a descriptor of this store's layout") from None
    if version != LAYOUT_VERSION:
        raise LayoutError(f"namespace {name!r} has layout {version}, this store is of layout {LAYOUT_VERSION}")
    if not 1 <= count <= MAX_PARTITIONS:
        raise LayoutError(f"namespace {name!r} says it has {count} partitions")
    if partitions is not None and partitions != count:
        raise LayoutError(f"namespace {name!r} has {count} partitions, not {partitions}")
    return Namespace(name, count, incarnation)

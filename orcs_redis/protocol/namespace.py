"""How a namespace is found, and created with the first write; the rights are probed when a store is opened.

What a store then knows of it, `Namespace`, is in writer.py.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

from .. import scripts
from ..errors import (
    ConflictError,
    LayoutError,
    NotFoundError,
    OutcomeUnknownError,
    PermissionDeniedError,
    StorageError,
    StoreResetError,
    UnavailableError,
    UnsupportedServerError,
)
from ..interrupts import raise_interruption
from .attempts import ScriptNotLoaded, TornRead, check_server, not_callable_error, translate
from .commands import Command, Reply, as_error, as_map
from .keys import LAYOUT_VERSION, MAX_PARTITIONS, Keyspace
from .request import Pause, Plan, Request, Together
from .writer import Namespace

__all__ = ["Create", "Probe", "ReadLayout", "appearance", "create", "on_namespace", "open_namespace"]

T = TypeVar("T")
_RETRY_DELAY = 0.01  # seconds

_log = logging.getLogger("orcs_redis")
_POLICY = re.compile(rb"maxmemory_policy:(?!noeviction)([a-z-]+)")

# What the scripts call besides TIME and PUBLISH, and what goes ahead of them; tests/test_rights.py reads the scripts.
_WRITE_COMMANDS = (
    "COPY", "EVALSHA", "EXEC", "EXISTS", "HDEL", "HEXISTS", "HGET", "HINCRBY", "HKEYS", "HLEN", "HMGET", "HRANDFIELD",
    "HSET", "LINDEX", "LLEN", "LMOVE", "LRANGE", "LSET", "LTRIM", "MULTI", "PERSIST", "PEXPIRE", "PUBLISH", "RENAME",
    "RPUSH", "TIME", "UNLINK", "ZADD", "ZCARD", "ZRANGE", "ZREM", "ZSCORE",
)  # fmt: skip
_OTHER_COMMANDS = (
    "EVAL",
    "GET",
    "HGETALL",
    "PTTL",
    "SET",
    "SUBSCRIBE",
    "UNSUBSCRIBE",
    "ZCOUNT",
    "ZMSCORE",
    "ZREMRANGEBYSCORE",
)


class Greet(Request[None]):
    """The first exchange: which server it is, and how it is configured."""

    __slots__ = ()

    def commands(self) -> Sequence[Command]:
        """HELLO returns the server's version, also over a client that was injected; INFO may be denied."""
        return [("HELLO",), ("INFO", "memory")]

    def decode(self, replies: Sequence[Reply]) -> None:
        """Check the version, and warn of a policy that evicts sessions."""
        text = as_error(replies[0])
        if text is None:
            check_server(replies[0])
        elif not isinstance(translate(text), PermissionDeniedError):
            check_server({b"version": b"0"})
        if as_error(replies[1]) is None and (policy := _POLICY.search(bytes(replies[1]))):
            name = policy[1].decode(errors="replace")
            _log.warning("the server's maxmemory-policy is %s: it may evict sessions; noeviction is needed", name)


class ReadLayout(Request["dict[bytes, bytes]"]):
    """The namespace's descriptor; empty if there is none."""

    __slots__ = ("_key", "_name", "_state", "_stray")

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name
        self._key = Keyspace.layout(name)
        self._state = Keyspace(name, 1).partitions[0].state
        self._stray = False

    def commands(self) -> Sequence[Command]:
        """A state without a descriptor is looked for; first, so that one that is made in between has both."""
        return [("EXISTS", self._state), ("HGETALL", self._key)]

    def decode(self, replies: Sequence[Reply]) -> dict[bytes, bytes]:
        """Return the descriptor's fields.

        Raises:
            LayoutError: something else's key; or there is data, and no descriptor.

        """
        state, layout = replies
        if (as_error(layout) or "").startswith("WRONGTYPE"):
            raise LayoutError(f"{self._key} is not a descriptor of this store's layout")
        self._check([layout])
        fields = dict(as_map(layout))
        if not fields and state == 1:
            if self._stray:
                raise _stray_error(self._name)
            self._stray = True
            raise TornRead("it was wiped in between, or its descriptor is gone")
        return fields


class Create(Request["tuple[bool, dict[bytes, bytes]]"]):
    """The creation of a namespace (scripts/create.lua): whether it was made now, and its descriptor."""

    __slots__ = ("_keys", "_name")
    writes = True

    def __init__(self, name: str, partitions: int) -> None:
        super().__init__()
        self._name = name
        keyspace = Keyspace(name, partitions)
        self._keys = [Keyspace.layout(name), *(partition.state for partition in keyspace.partitions)]

    def commands(self) -> Sequence[Command]:
        """Call the script, which does nothing if it was called before, and read what there is.

        What an earlier attempt has made may be wiped by now: each has an incarnation of its own.
        """
        call = self._script(scripts.CREATE, self._keys, (LAYOUT_VERSION, os.urandom(8).hex()))
        return [call, ("HGETALL", self._keys[0])]

    def decode(self, replies: Sequence[Reply]) -> tuple[bool, dict[bytes, bytes]]:
        """Return what there is.

        Raises:
            LayoutError: there is data, and no descriptor.
            PermissionDeniedError, UnsupportedServerError: a command can't be called.

        """
        self._check(replies)
        answer, command = replies[0]
        if answer in (b"DENIED", b"MISSING"):
            raise not_callable_error(answer, command.decode())
        if answer == b"STRAY":
            raise _stray_error(self._name)
        if not (fields := dict(as_map(replies[1]))):
            raise TornRead("it was wiped in between")
        return answer == b"OK", fields


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


def open_namespace(name: str, partitions: int | None) -> Plan[tuple[Namespace, StorageError | None]]:
    """Look for the namespace, and find out what the user may not do there. Nothing is created.

    Raises:
        LayoutError: another version, another number of partitions, or something else's keys.

    """
    namespace = Namespace(name, partitions or 1, asked=partitions)
    _, fields = yield Together([Greet(), ReadLayout(name)])
    if fields:
        _adopt(namespace, fields)
    return namespace, (yield Probe(namespace))


def _look(namespace: Namespace) -> Plan[None]:
    """Find out whether an absent namespace is there now. Raises LayoutError, as `open_namespace`."""
    fields = yield ReadLayout(namespace.name)
    if fields and not namespace.known:
        _adopt(namespace, fields)
        yield Probe(namespace)  # for the revisions


def create(namespace: Namespace) -> Plan[None]:
    """Create an absent namespace, or take it as another has created it.

    Raises:
        LayoutError: as `open_namespace`.
        UnavailableError: it could not be done in time, though it may be yet.

    """
    if namespace.known:  # another thread was first; should it be wiped by now, it is not created again
        return
    try:
        created, fields = yield Create(namespace.name, namespace.asked or 1)
    except OutcomeUnknownError as error:
        raise_interruption(error)
        raise UnavailableError(f"nothing was written, though the namespace may have been created: {error}") from error
    if not namespace.known:
        _adopt(namespace, fields)
        if not created:
            yield Probe(namespace)


def on_namespace(namespace: Namespace, make: Callable[[], Plan[T]]) -> Plan[T]:
    """Run a plan, `make()`, where the namespace may be absent: it is created when the plan comes to its first write.

    What a plan has found counts only if the namespace is absent afterwards, too: else another process has created it
    meanwhile, perhaps with more partitions, and the plan is made and run again.
    """
    while not namespace.known:
        plan = make()
        with contextlib.closing(plan):
            value, refusal, write = yield from _until_write(plan)
        if write is not None:
            refusal = write.in_absence()
            if refusal is None:
                yield from create(namespace)
                break
        yield from _look(namespace)
        if not namespace.known:
            if refusal is None:
                return cast(T, value)
            try:
                raise refusal
            finally:
                del refusal  # else it and this frame are a cycle
    return (yield from make())


def _until_write(plan: Plan[T]) -> Plan[tuple[T | None, StorageError | None, Request[Any] | None]]:
    """Run a plan up to its end or its first write; return its value, why it failed, or the write."""
    try:
        step = next(plan)
        while not (isinstance(step, Request) and step.writes):
            try:
                result = yield step
            except StorageError as error:
                raise_interruption(error)
                step = plan.throw(error)
            else:
                step = plan.send(result)
    except StopIteration as stop:
        raise_interruption(stop)
        return stop.value, None, None
    except (ConflictError, NotFoundError, StoreResetError) as error:  # it may be there by now
        raise_interruption(error)
        return None, error, None
    return None, None, step


def appearance(namespace: Namespace, seconds: float, wake: Any) -> Plan[None]:
    """Look for an absent namespace; if it is absent still, wait for some seconds, or until `wake` is set."""
    wake.clear()
    try:
        yield from _look(namespace)
    except UnavailableError:
        seconds = min(seconds, _RETRY_DELAY)
    if not namespace.known:
        yield Pause(seconds, wake)


def _adopt(namespace: Namespace, fields: Mapping[bytes, bytes]) -> None:
    """Take the namespace as its descriptor says, or raise LayoutError."""
    name = namespace.name
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
    if not incarnation:
        raise LayoutError(f"namespace {name!r} has no incarnation")
    if namespace.asked not in (None, count):
        raise LayoutError(f"namespace {name!r} has {count} partitions, not {namespace.asked}")
    namespace.adopt(count, incarnation)


def _stray_error(name: str) -> LayoutError:
    return LayoutError(f"namespace {name!r} has data but no descriptor: it was lost or is foreign")

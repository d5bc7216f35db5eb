"""Leases: one worker at a time has the right to a session. Claim, renewal and release.

A fencing token, by which late writes are recognised, goes with each; stores/leasing.py has what the holder sees.
"""

from __future__ import annotations

import itertools
import os
import socket
import time
import weakref
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from .. import scripts
from ..errors import (
    LayoutError,
    LeaseHeldError,
    LeaseLostError,
    OutcomeUnknownError,
    StorageError,
    StoreResetError,
)
from ..interrupts import raise_interruption
from ..model.ids import check_id
from .commands import Argument, Command, Reply
from .keys import Partition
from .request import Pause, Plan, Request, Together
from .writer import Namespace
from .writes import Identified, check_not_stopped, script_error

__all__ = ["LeaseInfo", "Leases", "check_terms"]

_UNIX_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MAX_TTL = 7 * 86400.0


class LeaseInfo(NamedTuple):
    """Who holds a session's lease; times are the server's."""

    id: str
    token: int
    holder: str
    since: datetime
    until: datetime


class _Request(Identified[int]):
    """One run of the lease script (scripts/lease.lua). The result is the fencing token; only a claim is identified."""

    __slots__ = ("_arguments", "_id", "sent")

    def __init__(self, namespace: Namespace, id: str, kind: str, *arguments: Argument) -> None:
        super().__init__(namespace, id)
        self._id = id
        self._arguments = (namespace.incarnation, kind, id, *arguments)
        self.sent = 0.0  # `time.monotonic` at the last attempt: the server counts from then or later

    def commands(self) -> Sequence[Command]:
        """Call the script."""
        return self._call(self._arguments)

    def is_conclusive(self, error: StorageError) -> bool:
        """Whether it says who holds the lease. For another reason the script may refuse what it has granted before."""
        return isinstance(error, (LeaseHeldError, LeaseLostError, OutcomeUnknownError))

    def decode(self, replies: Sequence[Reply]) -> int:
        """Return the fencing token, or raise what the script says."""
        check_not_stopped(replies[0])
        self._check(replies)
        answer, value = (*replies[0], None)[:2]
        match answer:
            case b"OK":
                return int(value)
            case b"HELD":
                raise LeaseHeldError(self._id, max(0, value) / 1000)
            case b"LEASELOST":
                raise LeaseLostError(self._id)
        raise script_error(self._partition, answer, value)

    def _call(self, arguments: Sequence[Argument]) -> Sequence[Command]:
        partition = self._partition
        keys = (partition.state, partition.lease(self._id), partition.fence, partition.leases)
        self.sent = time.monotonic()
        return [self._script(scripts.LEASE, keys, arguments)]


class _Claim(_Request):
    """The taking of a lease: known by an operation id until it is finished, like a write."""

    __slots__ = ()

    def __init__(self, namespace: Namespace, id: str, ttl_ms: int, holder: str) -> None:
        super().__init__(namespace, id, "acquire")
        self._arguments += (ttl_ms, holder)

    def commands(self) -> Sequence[Command]:
        """Call the script, with the same operation id until there is an answer."""
        token, (incarnation, kind, id, *rest) = self._identify(), self._arguments
        return self._call(
            (incarnation, kind, id, token.operation_id, *rest, token.high_water_mark, token.low_water_mark)
        )

    def decode(self, replies: Sequence[Reply]) -> int:
        """Return the fencing token, or raise what the script says."""
        self._unanswered -= 1
        match replies[0]:
            case [b"FORGOTTEN", revision]:
                raise self._evicted(revision)
            case [b"OK" | b"HELD", *_]:  # it is noted
                self._unanswered = 0
        return super().decode(replies)


class _LeasedIds(Request[list[str]]):
    __slots__ = ("_partition",)

    def __init__(self, partition: Partition) -> None:
        super().__init__()
        self._partition = partition

    def commands(self) -> Sequence[Command]:
        return [("ZRANGE", self._partition.leases, 0, -1)]

    def decode(self, replies: Sequence[Reply]) -> list[str]:
        self._check(replies)
        return [id.decode() for id in replies[0]]


class _Holders(Request[list[LeaseInfo]]):
    __slots__ = ("_ids", "_partition")

    def __init__(self, partition: Partition, ids: Sequence[str]) -> None:
        super().__init__()
        self._partition = partition
        self._ids = ids

    def commands(self) -> Sequence[Command]:
        found: list[Command] = []
        for id in self._ids:
            found.append(("HMGET", self._partition.lease(id), "token", "holder", "since"))
            found.append(("ZSCORE", self._partition.leases, id))
        return found

    def decode(self, replies: Sequence[Reply]) -> list[LeaseInfo]:
        self._check(replies)
        leases = []
        for id, fields, until in zip(self._ids, replies[::2], replies[1::2], strict=True):
            if None in fields or until is None:
                continue  # it has run out, or was released meanwhile
            try:
                token, since, end = int(fields[0]), int(fields[2]), int(float(until))
            except ValueError as error:
                raise_interruption(error)
                raise LayoutError(f"{self._partition.lease(id)} is not of this store's layout") from None
            holder = fields[1].decode(errors="replace")
            leases.append(LeaseInfo(id, token, holder, _moment(since), _moment(end)))
        return leases


class Leases:
    """What there is to ask about leases, as requests and plans."""

    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace
        self._holder = f"{socket.gethostname()}:{os.getpid()}:{namespace.origin.hex()}"

    def channel(self, id: str) -> str:
        """Return the channel on which the releases of a session's lease are published."""
        return self._namespace.channel(self._namespace.keyspace.of(id).leases, id)

    def acquire(self, id: str, ttl: float) -> _Claim:
        """Take the lease; LeaseHeldError if another has it."""
        return _Claim(self._namespace, id, _milliseconds(ttl), self._holder)

    def acquire_when_free(self, claim: Request[int], wait: float, wake: Any) -> Plan[int]:
        """Take the lease within `wait` seconds; `wake` is an event that is set when one may be free."""
        expires = time.monotonic() + wait
        while True:
            wake.clear()
            try:
                token: int = yield claim
            except LeaseHeldError as held:
                left = expires - time.monotonic()
                if left <= 0:
                    raise
                # Released, it wakes us; a holder that died is noticed when its time is over.
                yield Pause(min(left, (held.remaining or 0) + 0.002), wake)
            else:
                return token

    def renew(self, id: str, token: int, ttl: float, since: float, leasing: weakref.ref[Any]) -> Plan[None]:
        """Renew a lease, three times in each ttl, until it is lost; `since`: when it was claimed, of `time.monotonic`.

        Also until `leasing`, the context manager, is gone: a signal handler's exception may have ended its block before
        `__exit__` could do anything.
        """
        expires = since + ttl
        while True:
            yield Pause(min(ttl / 3, max(0.0, expires - time.monotonic())))
            sent = time.monotonic()
            if sent >= expires or leasing() is None:
                return
            renewal = _Request(self._namespace, id, "renew", token, _milliseconds(ttl))
            renewal.deadline = expires - sent
            try:
                yield renewal
            except (LeaseLostError, StoreResetError):
                return
            except StorageError:  # a full server's, say: it may pass while the lease lasts
                continue
            expires = sent + ttl

    def release(self, id: str, token: int) -> Request[int]:
        """Give the lease back; LeaseLostError if it is held no more."""
        return _Request(self._namespace, id, "release", token)

    def all(self) -> Plan[list[LeaseInfo]]:
        """Return all leases that are held, in the order in which they end."""
        partitions = self._namespace.keyspace.partitions
        ids = yield Together(map(_LeasedIds, partitions))
        held = [_Holders(*pair) for pair in zip(partitions, ids, strict=True) if pair[1]]
        found = (yield Together(held)) if held else []
        return sorted(itertools.chain.from_iterable(found), key=lambda lease: lease.until)


def check_terms(id: str, ttl: float, wait: float) -> tuple[str, float, float]:
    """Return a session's id, and for how many seconds its lease is wanted and waited for; ValueError for bad ones."""
    if not 0.001 <= ttl <= _MAX_TTL:
        raise ValueError("the ttl of a lease is a millisecond to a week, in seconds")
    if not wait >= 0:
        raise ValueError("wait is 0 or more, in seconds")
    return check_id(id), float(ttl), float(wait)


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def _moment(milliseconds: int) -> datetime:
    return _UNIX_EPOCH + timedelta(milliseconds=milliseconds)

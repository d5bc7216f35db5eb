"""Leases: one worker at a time has the right to a session, and a token by which its late writes are recognised."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from . import scripts
from .errors import (
    LayoutError,
    LeaseHeldError,
    LeaseLostError,
    OutcomeUnknownError,
    StorageError,
    StoreResetError,
)
from .ids import check_id
from .interrupts import raise_interruption
from .keys import Partition
from .operations import Identified, Namespace, Operation, check_script, refusal
from .plans import Pause, Plan, Together
from .resp import Argument, Command, Reply

if TYPE_CHECKING:
    from .store import RedisSessionStore
    from .sync import RedisSessionStore as BlockingStore

__all__ = ["AsyncLeasing", "BlockingLease", "BlockingLeasing", "Lease", "LeaseInfo", "Leases"]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MAX_TTL = 7 * 86400.0


class LeaseInfo(NamedTuple):
    """Who holds a session's lease; times are the server's."""

    id: str
    token: int
    holder: str
    since: datetime
    until: datetime


class Lease:
    """The right to a session, as long as the `async with` block lasts and it is not lost.

    Attributes:
        id: the session's.
        token: grows from one lease to the next; a write with `lease=` is refused once another token was given out.

    """

    def __init__(self, id: str, token: int) -> None:
        self.id = id
        self.token = token
        self._lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def lost(self) -> asyncio.Future[None]:
        """Done when the lease is no longer held; each asking gives a future of its own, which may be cancelled."""
        return asyncio.shield(self._lost)

    def end(self) -> None:
        """Note that it is no longer held: `lost` is done."""
        if not self._lost.done():
            self._lost.set_result(None)

    def __repr__(self) -> str:
        return f"<Lease id={self.id!r} token={self.token}>"


class BlockingLease:
    """The right to a session, as long as the `with` block lasts and it is not lost: `lost` is a `threading.Event`."""

    def __init__(self, id: str, token: int) -> None:
        self.id = id
        self.token = token
        self.lost = threading.Event()

    def __repr__(self) -> str:
        return f"<Lease id={self.id!r} token={self.token}>"


class _Request(Identified[int]):
    """One run of the lease script (scripts/lease.lua); the result is the token. By itself it needs no identity."""

    __slots__ = ("_arguments", "_id", "sent")

    def __init__(self, namespace: Namespace, id: str, kind: str, *arguments: Argument) -> None:
        super().__init__(namespace, id)
        self._id = id
        self._arguments = (namespace.incarnation, kind, id, *arguments)
        self.sent = 0.0  # when it was last sent, of `time.monotonic`: the server counts from then or later

    def commands(self) -> Sequence[Command]:
        """Call the script."""
        return self._call(self._arguments)

    def settles(self, error: StorageError) -> bool:
        """Whether it says who holds the lease. For another reason the script may refuse what it has given before."""
        return isinstance(error, (LeaseHeldError, LeaseLostError, OutcomeUnknownError))

    def decode(self, replies: Sequence[Reply]) -> int:
        """Return the token, or raise what the script says."""
        check_script(replies[0])
        self._check(replies)
        answer, value = (*replies[0], None)[:2]
        match answer:
            case b"OK":
                return int(value)
            case b"HELD":
                raise LeaseHeldError(self._id, max(0, value) / 1000)
            case b"LEASELOST":
                raise LeaseLostError(self._id)
        raise refusal(self._partition, answer, value)

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
        ticket, (incarnation, kind, id, *rest) = self._identify(), self._arguments
        return self._call((incarnation, kind, id, ticket.operation_id, *rest, ticket.seen, ticket.floor))

    def decode(self, replies: Sequence[Reply]) -> int:
        """Return the token, or raise what the script says."""
        self._unanswered -= 1
        match replies[0]:
            case [b"FORGOTTEN", revision]:
                raise self._forgotten(revision)
            case [b"OK" | b"HELD", *_]:  # it is noted
                self._unanswered = 0
        return super().decode(replies)


class _LeasedIds(Operation[list[str]]):
    __slots__ = ("_partition",)

    def __init__(self, partition: Partition) -> None:
        super().__init__()
        self._partition = partition

    def commands(self) -> Sequence[Command]:
        return [("ZRANGE", self._partition.leases, 0, -1)]

    def decode(self, replies: Sequence[Reply]) -> list[str]:
        self._check(replies)
        return [id.decode() for id in replies[0]]


class _Holders(Operation[list[LeaseInfo]]):
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
    """What there is to ask about leases, as operations and plans."""

    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace
        self._holder = f"{socket.gethostname()}:{os.getpid()}:{namespace.origin.hex()}"

    def channel(self, id: str) -> str:
        """Return the channel on which releases are published."""
        return self._namespace.channel(self._namespace.keyspace.of(id).leases)

    def acquire(self, id: str, ttl: float) -> _Claim:
        """Take the lease; LeaseHeldError if another has it."""
        return _Claim(self._namespace, id, _milliseconds(ttl), self._holder)

    def acquire_when_free(self, claim: Operation[int], wait: float, wake: Any) -> Plan[int]:
        """Take the lease within `wait` seconds; `wake` is an event that is set when one may be free."""
        until = time.monotonic() + wait
        while True:
            wake.clear()
            try:
                token: int = yield claim
            except LeaseHeldError as held:
                left = until - time.monotonic()
                if left <= 0:
                    raise
                # Released, it wakes us; a holder that died is noticed when its time is over.
                yield Pause(min(left, (held.remaining or 0) + 0.002), wake)
            else:
                return token

    def keep(self, id: str, token: int, ttl: float, since: float, leasing: weakref.ref[Any]) -> Plan[None]:
        """Renew a lease, granted or renewed last at `since` (`time.monotonic`) or later, until it is lost.

        Also until `leasing`, the context manager, is gone: a signal handler's exception may have ended its block before
        `__exit__` could do anything.
        """
        until = since + ttl
        while True:
            yield Pause(min(ttl / 3, max(0.0, until - time.monotonic())))
            sent = time.monotonic()
            if sent >= until or leasing() is None:
                return
            renew = _Request(self._namespace, id, "renew", token, _milliseconds(ttl))
            renew.deadline = until - sent
            try:
                yield renew
            except (LeaseLostError, StoreResetError):
                return
            except StorageError:  # a full server's, say: it may pass while the lease lasts
                continue
            until = sent + ttl

    def release(self, id: str, token: int) -> Operation[int]:
        """Give the lease back; LeaseLostError if it is held no more."""
        return _Request(self._namespace, id, "release", token)

    def all(self) -> Plan[list[LeaseInfo]]:
        """Return all leases that are held, in the order in which they end."""
        partitions = self._namespace.keyspace.partitions
        ids = yield Together(map(_LeasedIds, partitions))
        held = [_Holders(*pair) for pair in zip(partitions, ids, strict=True) if pair[1]]
        found = (yield Together(held)) if held else []
        return sorted(itertools.chain.from_iterable(found), key=lambda lease: lease.until)


class AsyncLeasing:
    """The context manager that `lease` returns, for asyncio."""

    def __init__(self, store: RedisSessionStore[Any], id: str, ttl: float, wait: float) -> None:
        self._store = store
        self._id, self._ttl, self._wait = _checked(id, ttl, wait)

    async def __aenter__(self) -> Lease:
        store, leases, id = self._store, self._store._core.leases, self._id
        claim = leases.acquire(id, self._ttl)
        try:
            token = await store._perform(claim)
        except LeaseHeldError:
            if self._wait <= 0:
                raise
            wake = asyncio.Event()
            listener = _waking(wake, id)
            store._subscription.listen(leases.channel(id), listener)
            try:
                token = await store._follow(leases.acquire_when_free(claim, self._wait, wake))
            finally:
                store._subscription.leave(leases.channel(id), listener)
        self._lease = Lease(id, token)
        keep = leases.keep(id, token, self._ttl, claim.sent, weakref.ref(self))
        self._keeper = asyncio.get_running_loop().create_task(_keep(store, keep, self._lease))
        return self._lease

    async def __aexit__(self, *_: object) -> None:
        self._keeper.cancel()
        self._lease.end()
        with contextlib.suppress(StorageError):  # then it runs out by itself, or did
            await self._store._perform(self._store._core.leases.release(self._id, self._lease.token))


async def _keep(store: RedisSessionStore[Any], keep: Plan[None], lease: Lease) -> None:
    try:
        await store._follow(keep)
    finally:
        lease.end()


class BlockingLeasing:
    """The context manager that `lease` returns, for blocking code."""

    def __init__(self, store: BlockingStore[Any], id: str, ttl: float, wait: float) -> None:
        self._store = store
        self._id, self._ttl, self._wait = _checked(id, ttl, wait)

    def __enter__(self) -> BlockingLease:
        store, leases, id = self._store, self._store._core.leases, self._id
        claim = leases.acquire(id, self._ttl)
        try:
            token = store._perform(claim)
        except LeaseHeldError:
            if self._wait <= 0:
                raise
            wake = threading.Event()
            leave = store._listen(leases.channel(id), _waking(wake, id))
            try:
                token = store._follow(leases.acquire_when_free(claim, self._wait, wake))
            finally:
                leave()
        self._lease = BlockingLease(id, token)
        self._ended = threading.Event()
        keep = leases.keep(id, token, self._ttl, claim.sent, weakref.ref(self))
        arguments = store, keep, self._lease, self._ended
        threading.Thread(target=_keep_blocking, args=arguments, name="orcs-redis-lease", daemon=True).start()
        return self._lease

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        with contextlib.suppress(StorageError):  # then it runs out by itself, or did
            self._store._perform(self._store._core.leases.release(self._id, self._lease.token))
        self._lease.lost.set()


def _keep_blocking(store: BlockingStore[Any], keep: Plan[None], lease: BlockingLease, ended: threading.Event) -> None:
    with contextlib.closing(keep), contextlib.suppress(StopIteration):
        step = next(keep)
        while not (isinstance(step, Pause) and ended.wait(step.seconds)):
            step = keep.send(None) if isinstance(step, Pause) else store._step(keep, step)
    lease.lost.set()


def _waking(wake: Any, id: str) -> Callable[[bytes | None], None]:
    wanted = id.encode()

    def listen(message: bytes | None) -> None:
        if message is None or message == wanted:
            wake.set()

    return listen


def _checked(id: str, ttl: float, wait: float) -> tuple[str, float, float]:
    if not 0.001 <= ttl <= _MAX_TTL:
        raise ValueError("the ttl of a lease is a millisecond to a week, in seconds")
    if not wait >= 0:
        raise ValueError("wait is 0 or more, in seconds")
    return check_id(id), float(ttl), float(wait)


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def _moment(milliseconds: int) -> datetime:
    return _EPOCH + timedelta(milliseconds=milliseconds)

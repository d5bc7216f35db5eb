"""What a store knows of its namespace, and of its own writes: operation ids, dedup windows.

A store that is opened, also after a restart, has a new origin. Its writes to a partition are counted in an epoch, whose
dedup window the server keeps. A write is unfinished until its store has an answer or gives it up. One that was
given up without an answer may arrive late, so later writes name it to be barred, until one of them is applied: that
acknowledges it. A new epoch retires the window before it; once nothing of that is unfinished, it is named as closed,
which bars all of it.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

from .. import scripts
from ..interrupts import raise_interruption
from .codec import VERSION
from .commands import CallPrefix
from .keys import Keyspace, Partition

__all__ = ["Namespace", "OperationToken"]

_MAX_SPREAD = 1024  # between counters in flight in one epoch: a write that hangs keeps the window from being trimmed
_CLOSED = 2**32 - 1  # in place of a counter: nothing more is to come of an epoch
_MAX_BARRED = 100  # at most this many are named by one write


def _call_prefixes(partition: Partition, incarnation: bytes) -> tuple[CallPrefix, CallPrefix]:
    """Return what all calls of the writing script for a partition have in common: by digest, by text."""
    keys = (
        partition.state, partition.updated, partition.meta, partition.changes, partition.deleted,
        partition.deleted_meta, partition.labels,
    )  # fmt: skip
    script, arguments = scripts.WRITE, (incarnation, VERSION)
    return CallPrefix("EVALSHA", script.sha, keys, arguments), CallPrefix("EVAL", script.source, keys, arguments)


class OperationToken:
    """What a write is known by, the same in each attempt."""

    __slots__ = ("__weakref__", "barred", "counter", "high_water_mark", "low_water_mark", "nonce", "window")

    def __init__(self, window: DedupWindow, counter: int, high_water_mark: int) -> None:
        self.window = window
        self.counter = counter
        self.nonce = time.time_ns() & 0xFFFFFFFF  # two clones of a process count alike, but not at the same moment
        self.high_water_mark = high_water_mark  # known before the first attempt: the write's revision will be above it
        self.low_water_mark = counter  # the lowest counter of the window's writes that were not finished when it began
        self.barred: Sequence[_Barred] = ()  # what the server must refuse, should it arrive late

    def fields(self) -> tuple[bytes, int, int, int, int]:
        """Return what the scripts need to recognise it: writer, counter, nonce, high-water mark, low-water mark."""
        return self.window.writer, self.counter, self.nonce, self.high_water_mark, self.low_water_mark

    @property
    def operation_id(self) -> bytes:
        """A unique id of this write."""
        return self.window.writer + self.counter.to_bytes(4) + self.nonce.to_bytes(4)


class DedupWindow:
    """The writes of one epoch to a partition, as scripts/write.lua remembers them; `writer` is origin and epoch."""

    __slots__ = ("counters", "epoch_number", "given_up", "unfinished", "writer")

    def __init__(self, origin: bytes, epoch_number: int) -> None:
        self.writer = origin + os.urandom(4)
        self.epoch_number = epoch_number  # in this store; the epoch itself is random
        self.counters = itertools.count(1)
        # By counter, lowest first, with their nonces. A token may be gone: a signal handler's exception has lost it.
        self.unfinished: dict[int, tuple[weakref.ref[OperationToken], int]] = {}
        self.given_up: dict[int, int] = {}  # counter and nonce of what ended unanswered, until the server bars it

    def low_water_mark(self, counter: int) -> int:
        """Return the lowest counter that is not finished, or `counter`. Writes whose token is gone are given up."""
        while True:
            try:
                lowest = next(iter(self.unfinished), counter)
            except RuntimeError as error:  # another thread, which takes no lock for it, has ended one meanwhile
                raise_interruption(error)
                continue
            token, nonce = self.unfinished.get(lowest, (None, 0))
            if token is None or token() is not None:
                return lowest
            self.given_up[lowest] = nonce
            self.unfinished.pop(lowest, None)

    def given_up_from(self, low_water_mark: int) -> Iterator[_Barred]:
        """Yield the writes that were given up, from this counter on: those below are refused by the mark."""
        for counter, nonce in tuple(self.given_up.items()):
            if counter >= low_water_mark:
                yield self, counter, nonce

    def acknowledge(self, low_water_mark: int) -> None:
        """Note that the server bars what is below the low-water mark."""
        for counter in tuple(self.given_up):
            if counter < low_water_mark:
                self.given_up.pop(counter, None)


_Barred: TypeAlias = tuple[DedupWindow, int, int]
"""A write to be refused: its window, counter and nonce. With the counter _CLOSED: all of the window."""


class Namespace:
    """What a store knows of its namespace once it is open: keys, the windows of its writes, revisions.

    It may be absent: then it has no incarnation, the partitions that it would get here, and no write is sent to it.
    Once it is known it remains the same: another incarnation is another Namespace.
    """

    def __init__(self, name: str, partitions: int, incarnation: bytes = b"", asked: int | None = None) -> None:
        """`asked`: the only number of partitions that it may be found with."""
        self.name = name
        self.asked = asked
        self.origin = os.urandom(8)
        self.known = False
        self._epoch_number = 0  # for the next write to each partition
        self._lock = threading.RLock()  # a signal handler or finalizer may write while its thread is in `begin`
        self._set(partitions, incarnation)

    def _set(self, partitions: int, incarnation: bytes) -> None:
        self.keyspace = Keyspace(self.name, partitions)
        self.high_water_marks = [0] * partitions  # the highest revision that this store has observed
        self.prefixes = [_call_prefixes(partition, incarnation) for partition in self.keyspace.partitions]
        self._windows = [DedupWindow(self.origin, self._epoch_number) for _ in range(partitions)]
        self._retired: list[list[DedupWindow]] = [[] for _ in range(partitions)]
        self.incarnation = incarnation
        self.known = incarnation != b""  # whether it is there; set last: other threads ask for it without the lock

    def adopt(self, partitions: int, incarnation: bytes) -> None:
        """Take it as it was found, if it was absent until now."""
        with self._lock:
            if not self.known:
                self._set(partitions, incarnation)

    def begin(self, partition: Partition) -> OperationToken:
        """Return a new write's token."""
        number = partition.number
        with self._lock:
            window = self._windows[number]
            if window.epoch_number != self._epoch_number:
                window = self._retire(number, window)
            token = OperationToken(window, next(window.counters), self.high_water_marks[number])
            token.low_water_mark = window.low_water_mark(token.counter)
            if token.counter - token.low_water_mark >= _MAX_SPREAD or token.counter > 0xFFFFFFF0:
                window = self._retire(number, window)
                token = OperationToken(window, next(window.counters), self.high_water_marks[number])
            window.unfinished[token.counter] = weakref.ref(token), token.nonce
            if self._retired[number] or window.given_up:
                retired = map(_barred_of_retired, self._retired[number])
                barred = itertools.chain(window.given_up_from(token.low_water_mark), *retired)
                token.barred = list(itertools.islice(barred, _MAX_BARRED))
            return token

    def end(self, token: OperationToken, *, answered: bool = True) -> None:
        """Note that a write is finished, and will not be sent again; unanswered, an attempt may be on its way still."""
        token.window.unfinished.pop(token.counter, None)
        if not answered:
            token.window.given_up[token.counter] = token.nonce

    def acknowledge(self, partition: Partition, token: OperationToken) -> None:
        """Note that a write was applied: the server has barred what was named to it."""
        with self._lock:
            token.window.acknowledge(token.low_water_mark)
            for window, counter, _ in token.barred:
                if counter != _CLOSED:
                    window.given_up.pop(counter, None)
                elif window in self._retired[partition.number]:
                    self._retired[partition.number].remove(window)

    def begin_epoch(self) -> None:
        """Begin a new epoch with the next write: a process that was cloned must not go on as its twin does."""
        self._epoch_number += 1

    def note_eviction(self, partition: Partition, revision: int) -> None:
        """Note that the server has evicted windows of up to this revision: all goes on in a new epoch."""
        self.observe(partition, revision)
        self.begin_epoch()

    def observe(self, partition: Partition, revision: int) -> None:
        """Remember that the partition has reached a revision."""
        if revision > self.high_water_marks[partition.number]:
            self.high_water_marks[partition.number] = revision

    def channel(self, key: str, id: str | None = None) -> str:
        """Return the channel that goes with a key, of one session with `id`.

        Pub/sub knows no databases, and no other namespace has this name.
        """
        channel = f"{key}:{self.incarnation.decode()}"
        return channel if id is None else f"{channel}:{id}"

    @property
    def creation_channel(self) -> str:
        """The channel on which its creation is published: named like the first state."""
        return self.keyspace.partitions[0].state

    def _retire(self, number: int, window: DedupWindow) -> DedupWindow:
        new = DedupWindow(self.origin, self._epoch_number)
        if next(window.counters) > 1:
            self._retired[number].append(window)
        self._windows[number] = new
        return new


def _barred_of_retired(window: DedupWindow) -> Iterable[_Barred]:
    """Return what is to be barred of a retired window: all, once nothing of it is unfinished."""
    if window.unfinished and window.low_water_mark(_CLOSED) < _CLOSED:
        return window.given_up_from(0)
    return [(window, _CLOSED, 0)]

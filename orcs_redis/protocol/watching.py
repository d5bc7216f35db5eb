"""Watching: every session's latest state reaches every watcher, whatever happened to the connection.

Pub/sub makes it fast: a message that carries the partition's next revision is delivered as it is. The `changes` index
makes it true: whenever a revision is missing, or may be, what changed since is read from there. A watch of few sessions
listens to their own channels: what is missing may have been of others, so it looks at its own sessions alone.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, defaultdict, deque
from collections.abc import Collection
from typing import Any

from ..errors import OutcomeUnknownError, StoreResetError, UnavailableError
from ..model.ids import check_id
from .changes import Change, Changes, Entry, Since, decode_message
from .keys import Partition
from .request import Listener, Pause, Plan, Together

__all__ = ["Watcher", "waking"]

_MAX_CHANNELS = 1000  # of single sessions; the script takes no more ids
_MAX_READ = 1000  # changes read at once
_MAX_PENDING = 10_000  # changes kept for a slow consumer; beyond that they are read again when it comes
_RETRY_DELAY = 0.01  # seconds


class _Track:
    """What a watcher knows of one partition."""

    def __init__(self, partition: Partition, position: int, ids: list[str] | None) -> None:
        self.partition = partition
        self.ids = ids  # the sessions whose own channels are listened to; None: the partition's is
        self.gone: dict[str, None] = {}  # of them, those that had no entry in the index, or a deletion
        self.head = position  # up to here each change is pending or was delivered
        self.last_notified = 0  # the last message's revision
        self.went_back = False  # whether a message came that was not later than the last one: the data went back
        self.needs_resync = True  # whether there may be more than pending
        self.resync_requests = 0  # how often messages may have been missed
        self.pending: OrderedDict[str, Entry] = OrderedDict()  # in order of revisions

    def request_resync(self) -> None:
        """Note that messages may have been missed; also if an answer of before is on its way."""
        self.resync_requests += 1
        self.needs_resync = True


class Watcher:
    """One watch: fed by messages, asked by a consumer; they may be in different threads."""

    def __init__(self, changes: Changes, ids: Collection[str] | None, wake: Any) -> None:
        if isinstance(ids, str):
            raise ValueError("ids is a collection of ids")
        self._changes = changes
        self._namespace = changes.namespace
        self._ids = None if ids is None else frozenset(map(check_id, ids))
        self._wake = wake
        self._lock = threading.Lock()
        self._tracks: deque[_Track] = deque()
        self._positions: list[int] = []
        self._due = 0.0  # when all partitions are looked at, whatever was received

    def start(self, since: str | None) -> Plan[None]:
        """Find out where to begin."""
        cursor = since if since is not None else (yield from self._changes.cursor())
        self._positions = self._changes.decode(cursor)
        keyspace = self._namespace.keyspace
        wanted: dict[Partition, list[str] | None] = dict.fromkeys(keyspace.partitions)
        if self._ids is not None:
            found = defaultdict(list)
            for id in sorted(self._ids):
                found[keyspace.of(id)].append(id)
            few = len(self._ids) <= _MAX_CHANNELS
            wanted = {partition: ids if few else None for partition, ids in found.items()}
        self._tracks.extend(
            _Track(partition, self._positions[partition.number], ids) for partition, ids in wanted.items()
        )
        self._due = time.monotonic() + self._changes.heartbeat

    def listeners(self) -> dict[str, Listener]:
        """Return the channels to listen to, and with what."""
        channel = self._namespace.channel
        return {
            channel(track.partition.changes, id): listener
            for track in self._tracks
            for listener in [self._listener(track)]
            for id in ([None] if track.ids is None else track.ids)
        }

    def pop(self) -> Change | None:
        """Return the next change that is pending; None if there is none, or something has to be read first."""
        with self._lock:
            if time.monotonic() >= self._due:  # a message may have been lost, or its sender may not publish
                self._due = time.monotonic() + self._changes.heartbeat
                for track in self._tracks:
                    track.needs_resync = True
            if any(track.needs_resync and not track.pending for track in self._tracks):
                return None
            for _ in range(len(self._tracks)):  # in turn, so that a busy partition does not hide the others
                track = self._tracks[0]
                self._tracks.rotate(-1)
                if track.pending:
                    _, entry = track.pending.popitem(last=False)
                    self._positions[track.partition.number] = entry.revision
                    return self._changes.change(entry, self._positions)
        return None

    def wait(self) -> Plan[None]:
        """Return when there may be changes pending: received, or read where some may have been missed.

        Raises:
            StoreResetError: the data was wiped or went back, or a deletion may be unknown.

        """
        self._wake.clear()
        try:
            yield from self.catch_up()
        except (UnavailableError, OutcomeUnknownError):
            yield Pause(_RETRY_DELAY)
            return
        if not self.has_pending:
            yield Pause(self.seconds_left, self._wake)

    def catch_up(self) -> Plan[None]:
        """Read what has changed where messages may have been missed. Raises what `wait` raises."""
        behind = [track for track in tuple(self._tracks) if track.needs_resync and not track.pending]
        if behind:
            yield from self._resync(behind)

    @property
    def has_pending(self) -> bool:
        """Whether there is something for `pop`, or something to be read first."""
        return any(track.pending or track.needs_resync for track in tuple(self._tracks))

    @property
    def seconds_left(self) -> float:
        """After so many seconds all partitions are looked at, whatever was received."""
        return max(0.0, self._due - time.monotonic())

    def _resync(self, behind: list[_Track]) -> Plan[None]:
        """Read what has changed in partitions of which nothing is pending."""
        limit = min(_MAX_READ, 1 + 10 * _MAX_READ // len(behind))
        before = [(track.resync_requests, track.last_notified) for track in behind]
        answers = yield Together(self._since(track, limit) for track in behind)
        for track, (resync_requests, last_notified), (revision, entries) in zip(behind, before, answers, strict=True):
            whole = track.ids is not None or len(entries) < limit
            if track.went_back or (whole and last_notified > revision):
                raise StoreResetError(
                    f"the data went back in time: to revision {revision} or less from {last_notified}"
                )
            with self._lock:
                for entry in entries:
                    self._add(track, entry)
                track.head = max(track.head, revision)
                track.needs_resync = (
                    not whole
                    or track.last_notified > track.head
                    or track.resync_requests != resync_requests
                    or track.went_back
                )

    def _since(self, track: _Track, limit: int) -> Since:
        if track.ids is None:
            return Since(self._namespace, track.partition, track.head, limit)
        ids = [*track.gone, *(id for id in track.ids if id not in track.gone)]
        return Since(self._namespace, track.partition, track.head, len(track.gone), ids)

    def _listener(self, track: _Track) -> Listener:
        def listen(message: bytes | None) -> None:
            with self._lock:
                if message is None:
                    track.request_resync()
                elif message:  # an empty one is a probe
                    self._receive(track, message)
            self._wake.set()

        return listen

    def _receive(self, track: _Track, message: bytes) -> None:
        entry = decode_message(message)
        if entry is None:
            track.request_resync()
            return
        track.went_back |= entry.revision <= track.last_notified
        track.last_notified = entry.revision
        if entry.revision == track.head + 1 and not track.needs_resync:
            self._add(track, entry)
            track.head = entry.revision
            if len(track.pending) > _MAX_PENDING:
                track.head = next(iter(track.pending.values())).revision - 1
                track.pending.clear()
                track.needs_resync = True
        elif entry.revision > track.head or track.went_back:
            track.needs_resync = True  # what came between is read, if only to know that it was of other sessions

    def _add(self, track: _Track, entry: Entry) -> None:
        if track.ids is not None and entry.deleted:
            track.gone[entry.id] = None
        else:
            track.gone.pop(entry.id, None)
        if entry.revision > 0 and (self._ids is None or entry.id in self._ids):
            track.pending.pop(entry.id, None)
            track.pending[entry.id] = entry


def waking(wake: Any, revision: int) -> Listener:
    """Return a listener to a session's channel that sets an event when it may have reached a revision."""

    def listen(message: bytes | None) -> None:
        entry = decode_message(message) if message else None
        if entry is None or entry.revision >= revision:
            wake.set()

    return listen

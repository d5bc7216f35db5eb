"""Consumers of watches over a simulated subscription, and what they must have received."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from orcs_redis.errors import StorageError, StoreResetError
from orcs_redis.protocol.changes import Change, decode_message
from orcs_redis.protocol.commands import Reply, as_error
from orcs_redis.protocol.watching import Watcher
from orcs_redis.protocol.writes import DELETE

from .driver import CANCELLED, Flow, Wake, Writer
from .rules import Violation

if TYPE_CHECKING:
    from .world import World

__all__ = ["Consumer", "check_messages", "check_since"]


class Consumer:
    """Somebody who reads a watch: messages arrive in order over each connection, and those on a broken one are lost."""

    def __init__(self, world: World, writer: Writer, ids: Sequence[str] | None, since: str | None) -> None:
        self.world, self.writer, self.ids = world, writer, ids
        self.wake = Wake()
        self.watcher = Watcher(writer.changes, ids, self.wake)
        self.queue: collections.deque[tuple[str, bytes | None]] = collections.deque()
        self.received: list[Change] = []
        self.connected = self.started = self.lossy = self.went_back = False
        self._last: dict[str, int] = {}  # revision of each channel's last message over this connection
        self.ended: Any = None  # an error, or CANCELLED
        self.epoch = world.model.epoch
        self.start: list[int] = []
        self._listeners: dict[str, Any] = {}
        self._flow: Flow | None = None
        Flow(world, writer, self.watcher.start(since), self._begun)

    def _begun(self, outcome: Any) -> None:
        if outcome is not None:
            self.ended = outcome
            return
        self.start = list(self.watcher._positions)
        self._listeners = self.watcher.listeners()
        self.started = True

    @property
    def active(self) -> bool:
        """Whether it goes on."""
        return self.started and self.ended is None

    def publish(self, channel: str, message: bytes) -> None:
        """Send it a message, which is received later."""
        if self.connected and channel in self._listeners:
            self.queue.append((channel, message))

    def disconnect(self) -> None:
        """Break its connection."""
        self.connected = False
        self.queue.clear()
        self._last.clear()

    def lose(self) -> None:
        """Lose the messages that are on their way, and nobody notices."""
        kept = [(channel, message) for channel, message in self.queue if message is None]
        self.lossy |= len(kept) < len(self.queue)
        self.queue = collections.deque(kept)

    def step(self, receive: bool) -> bool:
        """Do one thing; False if there is nothing to do."""
        if not self.active:
            return False
        if not self.connected:
            self.connected = True
            self.queue.extend((channel, None) for channel in self._listeners)
            return True
        if self.queue and receive:
            channel, message = self.queue.popleft()
            if message is not None:
                entry = decode_message(message)
                assert entry is not None
                revision = entry.revision
                self.went_back |= revision <= self._last.get(channel, 0)
                self._last[channel] = revision
            self._listeners[channel](message)
            return True
        if self._flow is None:
            change = self.watcher.pop()
            if change is not None:
                self.received.append(change)
                if self.world.tracing:
                    self.world.say(
                        f"watch of writer {self.writer.number}: {change.id} {change.kind} at {change.revision}"
                    )
                return True
            self.world.count("looks")
            self._flow = Flow(self.world, self.writer, self.watcher.wait(), self._waited)
            if self._flow.done:
                self._flow = None
            return True
        if self._flow.ready():
            self._flow.resume()
            return True
        return False

    def _waited(self, outcome: Any) -> None:
        self._flow = None
        if outcome is CANCELLED or isinstance(outcome, StorageError):
            self.ended = outcome

    # What it must have received

    def check(self) -> None:
        """Judge it when all is over."""
        if not self.started:
            if isinstance(self.ended, StoreResetError):
                self._check_reset(self.ended)
            return  # else there was no answer in time
        restored = self.world.model.epoch > self.epoch
        heads = list(self.start)
        for change in self.received:
            number = self.world.keyspace.of(change.id).number
            if change.revision <= heads[number]:
                raise Violation("watch", f"{change.id} at {change.revision} came after {heads[number]}")
            heads[number] = change.revision
            if not restored:
                self._check_change(change, number)
        if isinstance(self.ended, StorageError):
            self._check_reset(self.ended)
        elif self.ended is None:
            self._check_last(restored)

    def _check_change(self, change: Change, number: int) -> None:
        log = self.world.model.logs[number]
        entry = log[change.revision - 1] if change.revision <= len(log) else None
        if (
            entry is None
            or entry.record.id != change.id
            or (entry.record.change.kind == DELETE) != (change.kind == "deleted")
            or entry.op[:8].hex() != change.origin
        ):
            raise Violation("watch", f"{change} came, the log has {entry}")

    def _check_reset(self, error: StorageError) -> None:
        if not isinstance(error, StoreResetError):
            raise Violation("watch", f"it ended in {error!r}")
        if self.world.model.epoch == self.epoch and not any(self.world.model.compacted):
            raise Violation("reset", f"it ended in {error!r}, and nothing went back or was compacted")
        self.world.count("watches reset")

    def _check_last(self, restored: bool) -> None:
        if self.went_back:
            raise Violation("reset", "it goes on though a message was below the last one")
        if restored:
            for track in self.watcher._tracks:
                revision = len(self.world.model.logs[track.partition.number])
                if track.head > revision:
                    raise Violation(
                        "reset", f"it is at {track.head} and does not notice that the data is at {revision}"
                    )
            return
        last = {change.id: change for change in self.received}
        for id, session in self.world.model.sessions.items():
            number = self.world.keyspace.of(id).number
            if (self.ids is not None and id not in self.ids) or session.revision <= self.start[number]:
                continue
            change = last.get(id)
            if change is None and session.stored is None and self.start[number] == 0:
                continue  # who begins with nothing needs to know of no deletion
            if self._came_and_went(id, change):
                continue
            if change is None or change.revision != session.revision:
                raise Violation("watch", f"the last state of {id}, {session.revision}, did not come, but {change}")

    def _came_and_went(self, id: str, change: Change | None) -> bool:
        """Whether a watch of some sessions knew that this one was gone, and it is gone again, without a tombstone."""
        model, number = self.world.model, self.world.keyspace.of(id).number
        if self.ids is None or not _is_forgotten(model, id, model.graves[number]):
            return False
        known = change.revision if change else self.start[number]
        kinds = [entry.record.change.kind for entry in model.logs[number][:known] if entry.record.id == id]
        return not kinds or kinds[-1] == DELETE


def check_messages(world: World, messages: Sequence[tuple[str, bytes]], before: Sequence[int]) -> None:
    """Judge what was published by calls before which the logs had these lengths."""
    heads = list(before)
    own = [published for published in messages if published[0] not in world.change_channels]
    for channel, message in messages:
        number = world.change_channels.get(channel)
        if number is None:
            continue
        found = decode_message(message)
        heads[number] += 1
        entry = world.model.logs[number][heads[number] - 1] if heads[number] <= len(world.model.logs[number]) else None
        wanted = entry and (entry.revision, entry.record.change.kind == DELETE, entry.op[:8], entry.record.id)
        if found is None or (found.revision, found.deleted, found.origin, found.id) != wanted:
            raise Violation("message", f"{found} was published, the log has {entry}")
        if own.count((f"{channel}:{found.id}", message)) != 1:
            raise Violation("message", f"{found} was not published once on the session's own channel")
    if heads != [len(log) for log in world.model.logs]:
        raise Violation("message", f"messages were published up to {heads} only")


def check_since(world: World, number: int, since: Any, limit: int, ids: Sequence[str], reply: Reply) -> None:
    """Judge the answer of changes.lua; with ids, `limit` says of how many of them it is known that they are gone."""
    if as_error(reply) is not None:
        return world.model.refused(reply)
    answer, revision, *flat = reply
    model, partition = world.model, world.partitions[number]
    log = model.logs[number]
    if answer == b"OK":
        found = list(zip(map(bytes.decode, flat[::5]), map(int, flat[1::5]), map(bool, flat[2::5]), strict=True))
        graves, compacted = model.graves[number], model.compacted[number]
        unknown = [id for id in ids[limit:] if id not in model.sessions or _is_forgotten(model, id, graves)]
        if since != "" and 0 < int(since) < compacted and (unknown or not ids):
            raise Violation("reset", f"deletions after {since} are unknown up to {compacted}, and it says nothing")
        wanted = sorted(
            (session.revision, id, session.stored is None)
            for id, session in model.sessions.items()
            if world.keyspace.of(id) is partition and not _is_forgotten(model, id, graves) and (not ids or id in ids)
            and since != "" and session.revision > int(since)
        )  # fmt: skip
        whole = bool(ids) or len(wanted) < limit
        if ids:
            found.sort(key=lambda entry: (entry[1], entry[0]))
            wanted = sorted([(0, id, True) for id in unknown]) + wanted
        else:
            wanted = wanted[:limit]
        if [(changed, id, deleted) for id, changed, deleted in found] != wanted:
            raise Violation("watch", f"after {since} there are {found}, not {wanted}")
        if revision != (len(log) if whole or not wanted or wanted[-1][0] == len(log) else wanted[-1][0]):
            raise Violation("watch", f"the changes after {since} reach to {revision}: {found} of {len(log)}")
    elif answer == b"RESET" and not (since != "" and int(since) > len(log) == revision):
        raise Violation("reset", f"RESET {revision} for {since}, though there are {len(log)}")
    elif answer == b"COMPACTED" and not 0 < int(since) < revision == model.compacted[number]:
        raise Violation("reset", f"COMPACTED {revision} for {since}")
    return None


def _is_forgotten(model: Any, id: str, graves: Any) -> bool:
    """Whether a session was deleted, and its tombstone dropped."""
    return model.sessions[id].stored is None and id not in graves

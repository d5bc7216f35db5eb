"""Planted faults: one for each rule of the protocol. A simulation that does not catch one checks nothing.

Each names the profile and the number of schedules within which it is surely caught.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from orcs_redis.errors import StoreResetError
from orcs_redis.protocol import changes, leases, writer
from orcs_redis.protocol.attempts import ConnectionLost, Retry
from orcs_redis.protocol.namespace import Probe
from orcs_redis.protocol.watching import Watcher
from orcs_redis.protocol.writer import Namespace
from orcs_redis.protocol.writes import Write

from .clock import Clock
from .planting import Plant, after, before, changes_script, lease_script, replaced, write
from .plants_parts import PLANTS_OF_PARTS

__all__ = ["PLANTS"]


def _unsent(retry: Retry, problem: Any, *_: Any) -> None:
    if isinstance(problem, ConnectionLost):
        problem.sent = False


def _resets_conclude(original: Any) -> Any:
    return lambda self, error: isinstance(error, StoreResetError) or original(self, error)


def _mark_now(self: Write, token: writer.OperationToken, *_: Any) -> None:
    token.high_water_mark = self._namespace.high_water_marks[self._partition.number]


def _close_all(token: writer.OperationToken, self: Namespace, partition: Any) -> None:
    token.barred = [(window, writer._CLOSED, 0) for window in self._retired[partition.number]]


def _close_once(token: writer.OperationToken, self: Namespace, partition: Any) -> None:
    closed = [window for window, counter, _ in token.barred if counter == writer._CLOSED]
    self._retired[partition.number] = [window for window in self._retired[partition.number] if window not in closed]


def _name_once(token: writer.OperationToken, *_: Any) -> None:
    for window, counter, _nonce in token.barred:
        window.given_up.pop(counter, None)


def _trust_low_water_mark(token: writer.OperationToken, *_: Any) -> None:
    token.window.acknowledge(token.low_water_mark)


def _answered(original: Any) -> Any:
    return lambda self, token, *, answered=True: original(self, token)


def _raise_low_water_mark(token: writer.OperationToken, *_: Any) -> None:
    token.low_water_mark = token.counter


def _sent_now(_: Any, self: Any, *__: Any) -> None:
    self.sent = vars(leases)["time"].monotonic()


def _first_sent(call: Any) -> Any:
    def method(self: Any, arguments: Any) -> Any:
        first = self.sent
        commands = call(self, arguments)
        self.sent = first or self.sent
        return commands

    return method


def _nothing_lies_between(self: Watcher, track: Any, message: bytes) -> None:
    entry = changes.decode_message(message)
    if entry is not None and not track.needs_resync and entry.revision > track.head + 1:
        track.head = entry.revision - 1


def _forget_that_it_went_back(_: Any, self: Watcher, track: Any, message: bytes) -> None:
    track.went_back = False


def _deaf_to_reconnects(original: Any) -> Any:
    def method(self: Watcher, track: Any) -> Any:
        listen = original(self, track)
        return lambda message: None if message is None else listen(message)

    return method


def _one_of_each(original: Any) -> Any:
    def method(self: Namespace, number: int, window: Any) -> Any:
        return window if window.epoch_number == self._epoch_number else original(self, number, window)

    return method


@contextlib.contextmanager
def _clones_alike() -> Iterator[None]:
    with mock.patch.object(Namespace, "begin_epoch"), mock.patch.object(Clock, "time_ns", return_value=0):
        yield


_ALL = (
    # Dedup windows
    write(
        "unknown-in-window", "an operation in its window gets its first answer", "faults", 60,
        "if operation.counter <= window.highest then", "if false then",
    ),
    write(
        "highest-is-last", "a window knows the highest counter, in whatever order they came", "faults", 1000,
        "if operation.counter > window.highest then window.highest", "if true then window.highest",
    ),
    write(
        "one-entry-a-call", "each operation of a merged call is remembered", "faults", 100,
        "window.exists, added[#added + 1] =", "window.exists, added[1] =",
    ),
    write(
        "trims-unfinished", "only what is below the low-water mark is trimmed from a window", "faults", 300,
        "struct_unpack('>I4', entries, first) < window", "struct_unpack('>I4', entries, first) <= window",
    ),
    write(
        "no-low-water-mark", "what is below the low-water mark is refused", "faults", 300,
        "if operation.counter < window.low_water_mark then", "if false then",
    ),
    write(
        "no-birth", "what is older than its window is FORGOTTEN", "forgetting", 4000,
        "forgotten = window.forgotten_at_birth or forgotten", "return nil",
    ),
    write(
        "no-forgotten", "without a window, what is older than an evicted one is FORGOTTEN", "windows", 200,
        "forgotten = operation.window, partition.forgotten", "forgotten = operation.window, 0",
    ),
    write(
        "eviction-unnoted", "a window that is evicted leaves its last revision", "windows", 200,
        "forgotten, bytes = math.max(partition.forgotten, last_revision)", "forgotten, bytes = partition.forgotten",
    ),
    write(
        "never-closed", "an epoch that is named as finished is closed", "abandoned", 1000,
        "if counter == CLOSED then\n", "if counter == CLOSED then return elseif false then\n",
    ),
    write(
        "never-barred", "an operation that is named as given up is barred", "abandoned", 1000,
        "if counter >= window.low_water_mark and window", "if counter == CLOSED and window",
    ),
    write(
        "windows-unbounded", "windows are bounded in number", "windows", 60,
        "local too_many = not error_refusal(count) and count > 5 + MAX_WINDOWS", "local too_many = false",
    ),
    write(
        "bytes-unbounded", "windows are bounded in bytes", "forgetting", 1500,
        "pcall('HLEN', state_key), bytes > MAX_DEDUP_BYTES", "pcall('HLEN', state_key), false",
    ),
    write(
        "bytes-miscounted", "the bytes of windows are counted", "windows", 60,
        "last_revision), bytes - size", "last_revision), bytes",
    ),
    write(
        "growth-uncounted", "the bytes that windows grow by are counted", "calm", 20,
        "if growth ~= 0 or new > 0 then", "if false then",
    ),
    # Writes
    write(
        "no-conflict", "a write meets the revision that it names", "calm", 60,
        "if tonumber(expected) ~= (revision or 0) or expected_op ~=", "if expected_op ~=",
    ),
    write(
        "no-maker", "a save of changes meets the operation that made the revision", "restores", 2500,
        "(revision or 0) or expected_op ~= '' and op ~= expected_op then", "(revision or 0) then",
    ),
    write(
        "no-lease", "a write meets its lease", "leases", 60,
        "held ~= ARGV[first.l] and {'LEASELOST'}", "nil",
    ),
    write(
        "no-reset", "data that went back below the high-water mark is RESET", "restores", 400,
        "partition.revision < operation.high_water_mark and {'RESET', partition.revision}\n    or earlier_answer(",
        "earlier_answer(",
    ),
    write(
        "refusal-spoils", "one operation's refusal leaves the others of a call as they are", "faults", 200,
        "(revision and -1 or 0), metas[i])\n",
        "(revision and -1 or 0), metas[i])\n  if items[i][1] == 'CONFLICT' then return items end\n",
    ),
    write(
        "unprotected-read", "a foreign key of one operation leaves the others of a call as they are", "leases", 1000,
        "redis.pcall('HGET', operation.lease_key", "redis.call('HGET', operation.lease_key",
    ),
    write(
        "one-message-a-call", "each write is published", "calm", 60,
        "for i = 1, #messages, 2 do", "for i = 1, 1 do",
    ),
    write(
        "own-channel-forgotten", "each write is published on the session's own channel", "calm", 60,
        "redis.pcall('PUBLISH', channel .. ':' .. messages[i + 1], messages[i])", "",
    ),
    write(
        "unindexed", "each write of a call comes into the index of changes", "calm", 60,
        "redis.call('ZADD', changes_key, unpack(changes))", "",
    ),
    write(
        "compaction-unnoted", "a tombstone that is dropped leaves its revision", "calm", 100,
        "redis.call('HSET', state_key, 'compacted', oldest[2])", "",
    ),
    # Leases
    lease_script(
        "token-of-time", "tokens only grow", "leases", 60,
        "math.max(last_token + 1, now)", "1 + now % 7",
    ),
    lease_script(
        "two-holders", "a lease has one holder", "leases", 60,
        "if held[1] then\n", "if held[1] and now % 2 == 0 then\n",
    ),
    lease_script(
        "claim-unnoted", "a claim that was granted is noted, so that it is refused after its release", "leases", 400,
        "redis.call('PEXPIRE', lease_key, ttl)\n  add_entry(identity)", "redis.call('PEXPIRE', lease_key, ttl)",
    ),
    lease_script(
        "late-claim", "a claim that its store has finished with is refused", "leases", 400,
        "if answered_before(identity, high_water_mark) then return {'FORGOTTEN', partition.revision} end", "",
    ),
    lease_script(
        "claim-over-reset", "a claim is refused if the data went back", "restores", 1000,
        "if partition.revision < high_water_mark then return {'RESET', partition.revision} end", "",
    ),
    lease_script(
        "no-ttl", "a lease has a time to live from its first moment", "leases", 20,
        "redis.call('PEXPIRE', lease_key, ttl)\n  add_entry(identity)", "add_entry(identity)",
    ),
    lease_script(
        "renewal-of-nothing", "a renewal prolongs the lease", "leases", 100,
        "redis.call('PEXPIRE', lease_key, ttl)\n  return", "return",
    ),
    # Changes
    changes_script(
        "compacted-ignored", "deletions that may be unknown are COMPACTED", "calm", 100,
        "local compacted = since > 0 and", "local compacted = false and",
    ),
    changes_script(
        "compacted-ignored-of-some", "so they are in a look at some sessions", "calm", 1000,
        "if compacted then return compacted end\n    add", "add",
    ),
    changes_script(
        "gone-again-and-again", "a session that is known to be gone is not told of as news", "calm", 1000,
        "elseif changed == 0 and i > limit then", "elseif changed == 0 then",
    ),
    changes_script(
        "batch-to-the-end", "a batch that is full tells how far it reaches", "calm", 100,
        "if #found == 2 * limit then", "if false then",
    ),
    changes_script(
        "back-ignored", "a position that the data has not reached is RESET", "restores", 600,
        "if since > revision then return {'RESET', revision} end", "if since > revision then return reply end",
    ),
    # Writers
    Plant(
        "always-conclusive", "only some refusals are conclusive", "faults", 2000,
        patch=lambda: mock.patch.object(Write, "is_conclusive", return_value=True),
    ),
    Plant(
        "reset-conclusive", "a counter that went back is not conclusive", "restores", 2000,
        patch=replaced(Write, "is_conclusive", _resets_conclude),
    ),
    Plant(
        "attempts-unnoted", "what was sent may have been applied", "faults", 100,
        patch=before(Retry, "after", _unsent),
    ),
    Plant(
        "id-of-each-attempt", "an operation keeps its id until it is answered", "faults", 100,
        patch=before(Write, "commands", Write.end),
    ),
    Plant(
        "mark-of-each-attempt", "the high-water mark is of before the first attempt", "windows", 600,
        patch=before(Write, "_call", _mark_now),
    ),
    Plant(
        "closes-unfinished", "only epochs whose operations are finished are closed", "faults", 200,
        patch=after(Namespace, "begin", _close_all),
    ),
    Plant(
        "closes-once", "an epoch is named until its closing is acknowledged", "abandoned", 1000,
        patch=after(Namespace, "begin", _close_once),
    ),
    Plant(
        "given-up-unnamed", "what was given up is named", "abandoned", 1000,
        patch=replaced(Namespace, "end", _answered),
    ),
    Plant(
        "given-up-once", "what was given up is named until that is acknowledged", "abandoned", 1000,
        patch=after(Namespace, "begin", _name_once),
    ),
    Plant(
        "low-water-trusted", "a low-water mark bars what was given up once it is acknowledged", "abandoned", 2000,
        patch=after(Namespace, "begin", _trust_low_water_mark),
    ),
    Plant(
        "low-water-too-high", "the low-water mark is the lowest unfinished counter", "faults", 200,
        patch=after(Namespace, "begin", _raise_low_water_mark),
    ),
    Plant(
        "window-without-end", "an epoch ends when one operation keeps too much of it", "faults", 1500,
        patch=replaced(Namespace, "_retire", _one_of_each),
    ),
    Plant(
        "clones-alike", "a clone begins an epoch of its own", "clones", 200,
        patch=_clones_alike,
    ),
    Plant(
        "revisions-unread", "a store knows the partitions' revisions before its first write", "windows", 100,
        patch=lambda: mock.patch.object(Probe, "decode", return_value=None),
    ),
    # Holders
    Plant(
        "held-since-the-reply", "a holder's time counts from the attempt", "leases", 200,
        patch=after(leases._Claim, "decode", _sent_now),
    ),
    Plant(
        "held-since-the-first-attempt", "a holder's time counts from the last attempt", "leases", 1000,
        patch=replaced(leases._Request, "_call", _first_sent),
    ),
    # Watchers
    Plant(
        "gap-unseen", "a revision that is missing is looked for", "watches", 1000,
        patch=before(Watcher, "_receive", _nothing_lies_between),
    ),
    Plant(
        "back-unseen", "a message below the last one is a reset", "restores", 2500,
        patch=after(Watcher, "_receive", _forget_that_it_went_back),
    ),
    Plant(
        "reconnects-unseen", "after a reconnection the partitions are looked at", "watches", 1000,
        patch=replaced(Watcher, "_listener", _deaf_to_reconnects),
    ),
    Plant(
        "no-heartbeat", "at each heartbeat the partitions are looked at", "watches", 5000,
        patch=after(changes.Changes, "__init__", lambda _, self, *__: setattr(self, "heartbeat", 1e9)),
    ),
    Plant(
        "restless", "a watch rests when nothing happens", "watches", 300,
        patch=after(changes.Changes, "__init__", lambda _, self, *__: setattr(self, "heartbeat", 0.001)),
    ),
)  # fmt: skip
PLANTS = {plant.name: plant for plant in (*_ALL, *PLANTS_OF_PARTS)}
